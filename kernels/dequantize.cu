// dequantize: rows of one tensor of the file, as stored there, to fp16 rows of a weight
//
// computes:  out[first_out + place(first_row + r)][k] = fp16(value), the fp32 value computed in the
//            order of operations of gguf.quants, without contraction, then rounded to nearest even.
//            place is the identity, or puts a head's rows (2 i, 2 i + 1) at (i, i + D / 2).
// layout:    raw: num_rows rows of K values in GGML blocks, back to back; K a multiple of 8;
//            out: (., K) fp16 dense; out_of_range: of the values that are no number or beyond fp16's
//            65,504, the first one's bits under ~(its place in the tensor); 0: there is none
// mapping:   thread = 8 neighbouring values of one row (16 bytes of output), grid-stride
// macros:    TYPE_<GGML type>
// bound by:  bytes; in practice by the copy over PCIe that feeds it
// order:     out_of_range is a maximum; nothing else is reduced
// source:    block layouts: ggml's block_q*; arithmetic: gguf.quants
// architectures: sm_80 sm_90 sm_120
// compile:   TYPE_F32=1 | TYPE_F16=1 | TYPE_BF16=1 | TYPE_Q8_0=1 | TYPE_Q4_0=1 | TYPE_Q4_1=1 | TYPE_Q5_0=1 | TYPE_Q5_1=1 | TYPE_Q4_K=1 | TYPE_Q5_K=1 | TYPE_Q6_K=1
// spills:    none

constexpr int THREADS = 256;
constexpr int GROUP = 8;

__device__ __forceinline__ float half_at(const u8* p) { return to_f32((f16)(p[0] | p[1] << 8)); }
__device__ __forceinline__ u32 word_at(const u8* p) {
    return p[0] | p[1] << 8 | p[2] << 16 | (u32)p[3] << 24;
}

// Every decode(block, j, v) below writes the GROUP values from j on of one block into v; a block of a
// plain type is taken to be one group.
#if defined(TYPE_F32)
constexpr int VALUES = GROUP, BYTES = 4 * GROUP;
__device__ __forceinline__ void decode(const u8* block, int, float (&v)[GROUP]) {
    for (int i = 0; i < GROUP; ++i) v[i] = ((const float*)block)[i];
}
#elif defined(TYPE_F16)
constexpr int VALUES = GROUP, BYTES = 2 * GROUP;
__device__ __forceinline__ void decode(const u8* block, int, float (&v)[GROUP]) {
    for (int i = 0; i < GROUP; ++i) v[i] = to_f32(((const f16*)block)[i]);
}
#elif defined(TYPE_BF16)
constexpr int VALUES = GROUP, BYTES = 2 * GROUP;
__device__ __forceinline__ void decode(const u8* block, int, float (&v)[GROUP]) {
    for (int i = 0; i < GROUP; ++i) v[i] = as_float((u32)((const u16*)block)[i] << 16);
}
#elif defined(TYPE_Q8_0)
constexpr int VALUES = 32, BYTES = 34;
__device__ __forceinline__ void decode(const u8* block, int j, float (&v)[GROUP]) {
    const float d = half_at(block);
    for (int i = 0; i < GROUP; ++i) v[i] = __fmul_rn((float)(i8)block[2 + j + i], d);
}
#elif defined(TYPE_Q4_0)
constexpr int VALUES = 32, BYTES = 18;
__device__ __forceinline__ void decode(const u8* block, int j, float (&v)[GROUP]) {
    const float d = half_at(block);
    for (int i = 0; i < GROUP; ++i) {
        const int q = block[2 + (j + i) % 16] >> j / 16 * 4 & 15;
        v[i] = __fmul_rn(d, (float)(q - 8));
    }
}
#elif defined(TYPE_Q4_1)
constexpr int VALUES = 32, BYTES = 20;
__device__ __forceinline__ void decode(const u8* block, int j, float (&v)[GROUP]) {
    const float d = half_at(block), m = half_at(block + 2);
    for (int i = 0; i < GROUP; ++i) {
        const int q = block[4 + (j + i) % 16] >> j / 16 * 4 & 15;
        v[i] = __fadd_rn(__fmul_rn(d, (float)q), m);
    }
}
#elif defined(TYPE_Q5_0)
constexpr int VALUES = 32, BYTES = 22;
__device__ __forceinline__ void decode(const u8* block, int j, float (&v)[GROUP]) {
    const float d = half_at(block);
    const u32 high = word_at(block + 2);
    for (int i = 0; i < GROUP; ++i) {
        const int low = block[6 + (j + i) % 16] >> j / 16 * 4 & 15;
        const int q = low | (high >> (j + i) & 1) << 4;
        v[i] = __fmul_rn(d, (float)(q - 16));
    }
}
#elif defined(TYPE_Q5_1)
constexpr int VALUES = 32, BYTES = 24;
__device__ __forceinline__ void decode(const u8* block, int j, float (&v)[GROUP]) {
    const float d = half_at(block), m = half_at(block + 2);
    const u32 high = word_at(block + 4);
    for (int i = 0; i < GROUP; ++i) {
        const int low = block[8 + (j + i) % 16] >> j / 16 * 4 & 15;
        const int q = low | (high >> (j + i) & 1) << 4;
        v[i] = __fadd_rn(__fmul_rn(d, (float)q), m);
    }
}
#elif defined(TYPE_Q4_K) || defined(TYPE_Q5_K)
// d, dmin (fp16), 12 bytes of packed 6-bit scales and minima of the 8 sub-blocks of 32, then for
// Q5_K 32 bytes of fifth bits, then 4 x 32 bytes: the low nibbles of sub-block 2 i, the high
// nibbles of sub-block 2 i + 1.
constexpr bool FIFTH_BIT =
#if defined(TYPE_Q5_K)
    true;
#else
    false;
#endif
constexpr int VALUES = 256, BYTES = 144 + (FIFTH_BIT ? 32 : 0);
__device__ __forceinline__ void decode(const u8* block, int j, float (&v)[GROUP]) {
    const u8* packed = block + 4;
    const int s = j / 32;
    int scale, minimum;
    if (s < 4) {
        scale = packed[s] & 63;
        minimum = packed[4 + s] & 63;
    } else {
        scale = (packed[4 + s] & 15) | (packed[s - 4] >> 2 & 48);
        minimum = packed[4 + s] >> 4 | (packed[s] >> 2 & 48);
    }
    const float d = __fmul_rn(half_at(block), (float)scale);
    const float m = __fmul_rn(half_at(block + 2), (float)minimum);
    const u8* fifth = block + 16;
    const u8* nibbles = fifth + (FIFTH_BIT ? 32 : 0) + s / 2 * 32;
    for (int i = 0; i < GROUP; ++i) {
        int q = nibbles[j % 32 + i] >> s % 2 * 4 & 15;
        if (FIFTH_BIT) q |= (fifth[j % 32 + i] >> s & 1) << 4;
        v[i] = __fsub_rn(__fmul_rn(d, (float)q), m);
    }
}
#elif defined(TYPE_Q6_K)
// 128 bytes of low nibbles, 64 of high bit pairs, 16 int8 scales, d. Each half of 128 values: the
// low nibbles of its 64 bytes, then their high nibbles; bit pair (value / 32) of byte value % 32.
constexpr int VALUES = 256, BYTES = 210;
__device__ __forceinline__ void decode(const u8* block, int j, float (&v)[GROUP]) {
    const float d = __fmul_rn(half_at(block + 208), (float)(i8)block[192 + j / 16]);
    const u8* low = block + j / 128 * 64;
    const u8* high = block + 128 + j / 128 * 32;
    for (int i = 0; i < GROUP; ++i) {
        const int value = j % 128 + i;
        const int q = (low[value % 64] >> value / 64 * 4 & 15) |
                      (high[value % 32] >> value / 32 * 2 & 3) << 4;
        v[i] = __fmul_rn(d, (float)(q - 32));
    }
}
#endif

__device__ __forceinline__ int place(int row, int rope_head_dim) {
    if (rope_head_dim == 0) return row;
    const int head = row / rope_head_dim, r = row % rope_head_dim;
    return head * rope_head_dim + r % 2 * (rope_head_dim / 2) + r / 2;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    dequantize(const u8* __restrict__ raw, f16* __restrict__ out, u64* __restrict__ out_of_range,
               int num_rows, int K, int first_row, int first_out, int rope_head_dim) {
    const int groups = K / GROUP;
    const u64 total = (u64)num_rows * groups;
    const u64 row_bytes = (u64)K / VALUES * BYTES;
    u64 outside = 0;
    for (u64 g = blockIdx.x * (u64)THREADS + threadIdx.x; g < total; g += (u64)gridDim.x * THREADS) {
        const int row = g / groups, k = g % groups * GROUP;
        const u8* source = raw + row * row_bytes;
        float v[GROUP];
        decode(source + k / VALUES * BYTES, k % VALUES, v);
        u32 packed[GROUP / 2];
        bool fits = true;
#pragma unroll
        for (int i = 0; i < GROUP / 2; ++i) {
            packed[i] = to_f16x2(v[2 * i], v[2 * i + 1]);
            fits = fits && fabsf(v[2 * i]) <= 65504.0f && fabsf(v[2 * i + 1]) <= 65504.0f;
        }
        for (int i = 0; i < GROUP && !fits; ++i) {
            if (fabsf(v[i]) <= 65504.0f) continue;
            const u32 at = (u64)(first_row + row) * K + k + i;
            const u64 found = (u64)~at << 32 | __float_as_uint(v[i]);
            outside = found > outside ? found : outside;
        }
        f16* target = out + (u64)(first_out + place(first_row + row, rope_head_dim)) * K + k;
        *(uint4*)target = make_uint4(packed[0], packed[1], packed[2], packed[3]);
    }
    if (outside) atomicMax(out_of_range, outside);
}

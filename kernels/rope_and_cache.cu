// rope_and_cache: bias, rotary embedding, and the new keys and values into the paged cache
//
// computes:  v = qkv[t] + bias (bias may be null); for each head of Q and K and i < D/2, with cos
//            and sin from rope_table[positions[t]], low = v[i] and high = v[i + D/2]:
//                low' = low cos - high sin, high' = high cos + low sin
//            Q' -> q[t]; K' and V -> the cache slot slot_mapping[t]; all rounded to fp16.
//            A negative slot writes no cache. A V that fp16 cannot hold is cached as 0 and its pair
//            in K as NaN: who sees the key gets NaN, and attention's 0 * V is 0 for who does not.
// layout:    qkv (T, (H + 2 Hkv) D) fp16: Q heads, K heads, V heads; bias ((H + 2 Hkv) D,) fp32;
//            rope_table (positions, 2, D/2) fp32; q (T, H, D) fp16;
//            keys, values (num_blocks, Hkv, 64, D) fp16; slot = block * 64 + offset; D a multiple
//            of 8
// mapping:   block (t, j) owns THREADS of token t's units: 4 pairs of one Q head, or of one K head
//            and its V
// macros:    NUM_HEADS (H), NUM_KV_HEADS (Hkv), HEAD_DIM (D), THREADS
// bound by:  bytes: T (H + 2 Hkv) D (2 + 2)
// order:     no reduction
// architectures: sm_80 sm_90 sm_120
// compile:   NUM_HEADS=32 NUM_KV_HEADS=32 HEAD_DIM=96 THREADS=256 | NUM_HEADS=14 NUM_KV_HEADS=2 HEAD_DIM=64 THREADS=256
// spills:    none

static_assert(HEAD_DIM % 8 == 0, "whole units of 4 pairs");
constexpr int HALF = HEAD_DIM / 2;
constexpr int UNITS = HEAD_DIM / 8;  // per head
constexpr int HEADS = NUM_HEADS + 2 * NUM_KV_HEADS;

// The 4 pairs (i, i + D/2) of one unit.
struct Pairs {
    float low[4], high[4];

    __device__ __forceinline__ Pairs(const float* source) {
        load(low, source);
        load(high, source + HALF);
    }
    __device__ __forceinline__ Pairs(const f16* source, const float* bias) {
        load(low, source, bias);
        load(high, source + HALF, bias ? bias + HALF : nullptr);
    }
    static __device__ __forceinline__ void load(float (&x)[4], const float* source) {
        const float4 v = *(const float4*)source;
        x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    }
    static __device__ __forceinline__ void load(float (&x)[4], const f16* source,
                                                const float* bias) {
        const uint2 v = *(const uint2*)source;
        const float4 b = bias ? *(const float4*)bias : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        x[0] = low_f32(v.x) + b.x, x[1] = high_f32(v.x) + b.y;
        x[2] = low_f32(v.y) + b.z, x[3] = high_f32(v.y) + b.w;
    }
    __device__ __forceinline__ void rotate(const float* table) {
        const Pairs turn(table);  // cosines, sines
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float l = low[i], h = high[i];
            low[i] = __fmaf_rn(l, turn.low[i], -__fmul_rn(h, turn.high[i]));
            high[i] = __fmaf_rn(h, turn.low[i], __fmul_rn(l, turn.high[i]));
        }
    }
    static __device__ __forceinline__ uint2 pack(const float (&x)[4]) {
        return make_uint2(to_f16x2(x[0], x[1]), to_f16x2(x[2], x[3]));
    }
    __device__ __forceinline__ void store(f16* target) const {
        *(uint2*)target = pack(low);
        *(uint2*)(target + HALF) = pack(high);
    }
};

// Moves what fp16 cannot hold from value to key, where it is NaN.
__device__ __forceinline__ void move_overflow(float& value, float& key) {
    if (!(fabsf(value) < 65520.0f)) value = 0.0f, key = as_float(0x7fffffffu);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rope_and_cache(const f16* __restrict__ qkv, const float* __restrict__ bias,
                   const float* __restrict__ rope_table, const i32* __restrict__ positions,
                   const i32* __restrict__ slot_mapping, f16* __restrict__ q,
                   f16* __restrict__ keys, f16* __restrict__ values) {
    let_next_start();
    wait_for_previous();
    const size_t t = blockIdx.x;
    const int unit = blockIdx.y * THREADS + threadIdx.x;
    if (unit >= (NUM_HEADS + NUM_KV_HEADS) * UNITS) return;
    const int head = unit / UNITS;
    const int i = unit % UNITS * 4;
    const int column = head * HEAD_DIM + i;
    const f16* row = qkv + t * HEADS * HEAD_DIM;

    Pairs rotated(row + column, bias ? bias + column : nullptr);
    rotated.rotate(rope_table + (size_t)positions[t] * HEAD_DIM + i);
    if (head < NUM_HEADS) {
        rotated.store(q + (t * NUM_HEADS + head) * HEAD_DIM + i);
        return;
    }
    const i32 slot = slot_mapping[t];
    if (slot < 0) return;
    const int value_column = column + NUM_KV_HEADS * HEAD_DIM;
    Pairs value(row + value_column, bias ? bias + value_column : nullptr);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        move_overflow(value.low[j], rotated.low[j]);
        move_overflow(value.high[j], rotated.high[j]);
    }
    const size_t tile = (size_t)(slot / BLOCK_SIZE) * NUM_KV_HEADS + head - NUM_HEADS;
    const size_t place = (tile * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM + i;
    rotated.store(keys + place);
    value.store(values + place);
}

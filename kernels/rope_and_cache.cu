// rope_and_cache: bias, rotary embedding, and the new keys and values into the paged cache
//
// computes:  v = qkv[t] + bias (bias may be null); for each head of Q and K and i < D/2, with cos and
//            sin from rope_table[positions[t]]:
//                low' = low cos - high sin, high' = high cos + low sin   (low = v[i], high = v[i+D/2])
//            Q' -> q[t]; K' and V -> the cache slot slot_mapping[t]; all rounded to fp16.
//            A negative slot writes no cache.
// layout:    qkv (T, (H + 2 Hkv) D) fp32: Q heads, K heads, V heads; bias ((H + 2 Hkv) D,) fp32;
//            rope_table (positions, 2, D/2) fp32; q (T, H, D) fp16;
//            keys, values (num_blocks, Hkv, 64, D) fp16; slot = block * 64 + offset; D a multiple of 8
// mapping:   block (t, j) owns THREADS of token t's units; a unit is 4 pairs of one head
// macros:    NUM_HEADS (H), NUM_KV_HEADS (Hkv), HEAD_DIM (D), THREADS
// bound by:  bytes: T (H + 2 Hkv) D (4 + 2)
// order:     no reduction
// architectures: sm_80 sm_90 sm_120
// compile:   NUM_HEADS=32 NUM_KV_HEADS=32 HEAD_DIM=96 THREADS=256 | NUM_HEADS=14 NUM_KV_HEADS=2 HEAD_DIM=64 THREADS=256
// spills:    none

static_assert(HEAD_DIM % 8 == 0, "whole units of 4 pairs");
constexpr int HALF = HEAD_DIM / 2;
constexpr int UNITS = HEAD_DIM / 8;  // per head
constexpr int HEADS = NUM_HEADS + 2 * NUM_KV_HEADS;

__device__ __forceinline__ float4 add(float4 a, float4 b) {
    return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w);
}

__device__ __forceinline__ uint2 pack(float4 v) {
    return make_uint2(to_f16x2(v.x, v.y), to_f16x2(v.z, v.w));
}

__device__ __forceinline__ void rotate(float& low, float& high, float cosine, float sine) {
    const float l = low, h = high;
    low = __fmaf_rn(l, cosine, -__fmul_rn(h, sine));
    high = __fmaf_rn(h, cosine, __fmul_rn(l, sine));
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rope_and_cache(const float* __restrict__ qkv, const float* __restrict__ bias,
                   const float* __restrict__ rope_table, const i32* __restrict__ positions,
                   const i32* __restrict__ slot_mapping, f16* __restrict__ q,
                   f16* __restrict__ keys, f16* __restrict__ values) {
    const size_t t = blockIdx.x;
    const int unit = blockIdx.y * THREADS + threadIdx.x;
    if (unit >= HEADS * UNITS) return;
    const int head = unit / UNITS;
    const int i = unit % UNITS * 4;

    const float* source = qkv + (t * HEADS + head) * HEAD_DIM + i;
    float4 low = *(const float4*)source;
    float4 high = *(const float4*)(source + HALF);
    if (bias) {
        low = add(low, *(const float4*)(bias + head * HEAD_DIM + i));
        high = add(high, *(const float4*)(bias + head * HEAD_DIM + i + HALF));
    }
    if (head < NUM_HEADS + NUM_KV_HEADS) {
        const float* row = rope_table + (size_t)positions[t] * HEAD_DIM + i;
        const float4 cosine = *(const float4*)row;
        const float4 sine = *(const float4*)(row + HALF);
        rotate(low.x, high.x, cosine.x, sine.x);
        rotate(low.y, high.y, cosine.y, sine.y);
        rotate(low.z, high.z, cosine.z, sine.z);
        rotate(low.w, high.w, cosine.w, sine.w);
    }

    f16* target;
    if (head < NUM_HEADS) {
        target = q + (t * NUM_HEADS + head) * HEAD_DIM;
    } else {
        const i32 slot = slot_mapping[t];
        if (slot < 0) return;
        const bool is_key = head < NUM_HEADS + NUM_KV_HEADS;
        const int kv_head = (head - NUM_HEADS) % NUM_KV_HEADS;
        const size_t row = ((size_t)(slot / BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * BLOCK_SIZE;
        target = (is_key ? keys : values) + (row + slot % BLOCK_SIZE) * HEAD_DIM;
    }
    *(uint2*)(target + i) = pack(low);
    *(uint2*)(target + i + HALF) = pack(high);
}

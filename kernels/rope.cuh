// rope.cuh: the rotary embedding of one head, 4 pairs a thread, and values that fp16 cannot hold
//
// macros:    NUM_HEADS (H), NUM_KV_HEADS (Hkv), HEAD_DIM (D)
// order:     no reduction

static_assert(HEAD_DIM % 8 == 0, "whole units of 4 pairs");
constexpr int HALF = HEAD_DIM / 2;
constexpr int HEAD_UNITS = HEAD_DIM / 8;  // of 4 pairs, per head
constexpr int HEADS = NUM_HEADS + 2 * NUM_KV_HEADS;

// The 4 pairs (i, i + D/2) of one unit.
struct Pairs {
    float low[4], high[4];

    Pairs() = default;
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
        const float4 b = bias ? *(const float4*)bias : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        load(x, *(const uint2*)source, b);
    }
    static __device__ __forceinline__ void load(float (&x)[4], uint2 v, float4 b) {
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

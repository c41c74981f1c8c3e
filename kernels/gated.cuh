// gated.cuh: the gated activation, of gate and up values in fp16
//
// y = fp16(g / (1 + exp(-g)) * u): an infinite g or u gives a y that is not finite.

constexpr float MINUS_LOG2_E = -1.4426950408889634f;

__device__ __forceinline__ float one_plus_exp(float gate) {
    return __fadd_rn(1.0f, exp2_hardware(__fmul_rn(gate, MINUS_LOG2_E)));
}

__device__ __forceinline__ u32 gated_two(u32 gate, u32 up) {
    const float low = low_f32(gate), high = high_f32(gate);
    return to_f16x2(__fmul_rn(__fdiv_rn(low, one_plus_exp(low)), low_f32(up)),
                    __fmul_rn(__fdiv_rn(high, one_plus_exp(high)), high_f32(up)));
}

// The bits of gated_two for |gate| < 80, without its division's branches: the same reciprocal, once
// refined, and quotient, once corrected, of which only a zero's sign is lost. Of all such gates none
// differed on an H200.
__device__ __forceinline__ float gated_near(float gate, float up) {
    const float divisor = one_plus_exp(gate);
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(divisor));
    inverse = __fmaf_rn(inverse, __fmaf_rn(-divisor, inverse, 1.0f), inverse);
    float quotient = __fmul_rn(gate, inverse);
    quotient = __fmaf_rn(__fmaf_rn(-divisor, quotient, gate), inverse, quotient);
    return __fmul_rn(as_float(as_bits(quotient) & 0x7fffffffu | as_bits(gate) & 0x80000000u), up);
}

// Two values in each word.
template <int WORDS>
__device__ __forceinline__ void gate_words(const u32 (&gate)[WORDS], const u32 (&up)[WORDS],
                                           u32 (&y)[WORDS]) {
    constexpr u32 TO_80 = 0x8000 - 0x5500;  // from the bits of 80 to the sign's
    u32 far = 0;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) far |= (gate[i] & 0x7fff7fffu) + (TO_80 << 16 | TO_80);
    if (far & 0x80008000u) {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) y[i] = gated_two(gate[i], up[i]);
    } else {
#pragma unroll
        for (int i = 0; i < WORDS; ++i)
            y[i] = to_f16x2(gated_near(low_f32(gate[i]), low_f32(up[i])),
                            gated_near(high_f32(gate[i]), high_f32(up[i])));
    }
}

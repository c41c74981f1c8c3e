// gated.cuh: SwiGLU of one gate and one up

constexpr float MINUS_LOG2_E = -1.4426950408889634f;

__device__ __forceinline__ float gated(float gate, float up) {
    const float e = exp2_hardware(__fmul_rn(gate, MINUS_LOG2_E));
    return __fmul_rn(__fdiv_rn(gate, __fadd_rn(1.0f, e)), up);
}

__device__ __forceinline__ u32 gated_two(u32 gate, u32 up) {
    return to_f16x2(gated(low_f32(gate), low_f32(up)), gated(high_f32(gate), high_f32(up)));
}

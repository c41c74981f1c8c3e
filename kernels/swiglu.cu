// swiglu: the gated activation between the two feed-forward products
//
// computes:  y[t][f] = fp16(g / (1 + exp(-g)) * u), g = gate_up[t][f], u = gate_up[t][F + f]; an
//            infinite g or u (beyond fp16 in the product before) gives a y that is not finite
// layout:    gate_up (T, 2F) fp16, gate first; y (T, F) fp16; F a multiple of 8
// mapping:   thread i of the grid owns the i-th 8 columns of y
// macros:    INTERMEDIATE (F), THREADS
// bound by:  bytes: T F (4 + 2)
// order:     no reduction
// architectures: sm_80 sm_90 sm_120
// compile:   INTERMEDIATE=8192 THREADS=256
// spills:    none

static_assert(INTERMEDIATE % 8 == 0, "whole vectors of eight columns");
constexpr int UNITS = INTERMEDIATE / 8;
constexpr float MINUS_LOG2_E = -1.4426950408889634f;

__device__ __forceinline__ float gated(float gate, float up) {
    const float e = exp2_hardware(__fmul_rn(gate, MINUS_LOG2_E));
    return __fmul_rn(__fdiv_rn(gate, __fadd_rn(1.0f, e)), up);
}

__device__ __forceinline__ u32 gated_two(u32 gate, u32 up) {
    return to_f16x2(gated(low_f32(gate), low_f32(up)), gated(high_f32(gate), high_f32(up)));
}

extern "C" __global__ void __launch_bounds__(THREADS)
    swiglu(const f16* __restrict__ gate_up, f16* __restrict__ y, int num_tokens) {
    let_next_start();
    wait_for_previous();
    const size_t unit = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (unit >= (size_t)num_tokens * UNITS) return;
    const uint4* row = (const uint4*)gate_up + unit / UNITS * 2 * UNITS;
    const uint4 gate = row[unit % UNITS];
    const uint4 up = row[UNITS + unit % UNITS];
    ((uint4*)y)[unit] = make_uint4(gated_two(gate.x, up.x), gated_two(gate.y, up.y),
                                   gated_two(gate.z, up.z), gated_two(gate.w, up.w));
}

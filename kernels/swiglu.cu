// swiglu: the gated activation between the two feed-forward products
//
// computes:  y[t][f] = fp16(g / (1 + exp(-g)) * u), g = gate_up[t][f], u = gate_up[t][F + f]
// layout:    gate_up (T, 2F) fp32, gate first; y (T, F) fp16; F a multiple of 8
// mapping:   thread i of the grid owns the i-th 8 columns of y
// macros:    INTERMEDIATE (F), THREADS
// bound by:  bytes: T F (8 + 2)
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

__device__ __forceinline__ uint2 gated_four(float4 gate, float4 up) {
    return make_uint2(to_f16x2(gated(gate.x, up.x), gated(gate.y, up.y)),
                      to_f16x2(gated(gate.z, up.z), gated(gate.w, up.w)));
}

extern "C" __global__ void __launch_bounds__(THREADS)
    swiglu(const float* __restrict__ gate_up, f16* __restrict__ y, int num_tokens) {
    let_next_start();
    wait_for_previous();
    const size_t unit = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (unit >= (size_t)num_tokens * UNITS) return;
    const float* row = gate_up + unit / UNITS * 2 * INTERMEDIATE;
    const float4* gate = (const float4*)row + unit % UNITS * 2;
    const float4* up = gate + INTERMEDIATE / 4;
    const uint2 first = gated_four(gate[0], up[0]);
    const uint2 second = gated_four(gate[1], up[1]);
    ((uint4*)y)[unit] = make_uint4(first.x, first.y, second.x, second.y);
}

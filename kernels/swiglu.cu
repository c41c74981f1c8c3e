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

#include "gated.cuh"

static_assert(INTERMEDIATE % 8 == 0, "whole vectors of eight columns");
constexpr int UNITS = INTERMEDIATE / 8;

extern "C" __global__ void __launch_bounds__(THREADS)
    swiglu(const f16* __restrict__ gate_up, f16* __restrict__ y, int num_tokens) {
    let_next_start();
    wait_for_previous();
    const size_t unit = (size_t)blockIdx.x * THREADS + threadIdx.x;
    if (unit >= (size_t)num_tokens * UNITS) return;
    const uint4* row = (const uint4*)gate_up + unit / UNITS * 2 * UNITS;
    const uint4 gate = row[unit % UNITS];
    const uint4 up = row[UNITS + unit % UNITS];
    u32 out[4];
    gate_words({gate.x, gate.y, gate.z, gate.w}, {up.x, up.y, up.z, up.w}, out);
    ((uint4*)y)[unit] = make_uint4(out[0], out[1], out[2], out[3]);
}

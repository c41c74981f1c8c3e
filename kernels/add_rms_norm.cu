// add_rms_norm: adds a layer's output to the residual stream and normalizes the sum
//
// computes:  x[t][c] += delta[t][c], then y[t][c] as rms_norm
// layout:    x (T, C) fp32, updated in place; delta (T, C) fp32; weight (C,) fp32; y (T, C) fp16;
//            C a multiple of 4
// mapping:   block t owns row t and keeps it in registers between the two passes
// macros:    HIDDEN (C), THREADS
// bound by:  bytes: T C (4 + 4 + 4 + 2); at one row, latency
// order:     see NormRow in common.cuh: fixed by C alone (THREADS follows from C)
// architectures: sm_80 sm_90 sm_120
// compile:   HIDDEN=3072 THREADS=256 | HIDDEN=896 THREADS=224 | HIDDEN=576 THREADS=160
// spills:    none

extern "C" __global__ void __launch_bounds__(THREADS)
    add_rms_norm(float* __restrict__ x, const float* __restrict__ delta,
                 const float* __restrict__ weight, f16* __restrict__ y, float eps) {
    let_next_start();
    wait_for_previous();
    const size_t offset = (size_t)blockIdx.x * HIDDEN;
    NormRow<HIDDEN, THREADS> row;
    row.load(x + offset);
    row.add(x + offset, delta + offset);
    row.normalize(weight, eps, y + offset);
}

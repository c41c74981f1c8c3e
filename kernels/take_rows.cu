// take_rows: the rows whose logits are wanted, packed
//
// computes:  y[r] = x[rows[r]], bytes unchanged
// layout:    x (T, ROW_VECTORS) and y (R, ROW_VECTORS) vectors of 16 bytes; rows (R,) i32
// mapping:   block r owns row r
// macros:    ROW_VECTORS, THREADS
// bound by:  bytes: R ROW_VECTORS 32
// order:     no reduction
// architectures: sm_80 sm_90 sm_120
// compile:   ROW_VECTORS=768 THREADS=256
// spills:    none

extern "C" __global__ void __launch_bounds__(THREADS)
    take_rows(const uint4* __restrict__ x, const i32* __restrict__ rows, uint4* __restrict__ y) {
    let_next_start();
    wait_for_previous();
    const size_t r = blockIdx.x;
    const uint4* source = x + (size_t)rows[r] * ROW_VECTORS;
    for (int i = threadIdx.x; i < ROW_VECTORS; i += THREADS) y[r * ROW_VECTORS + i] = source[i];
}

// feed_back: sampled token ids put where a step names them by the row they were sampled in
//
// computes:  ids[i] = sampled[-1 - ids[i]] where ids[i] < 0; other ids stay
// layout:    ids (num_ids,) i32; sampled (R,) i32
// mapping:   a thread per id
// macros:    THREADS
// bound by:  latency
// order:     no reduction
// architectures: sm_80 sm_90 sm_120
// compile:   THREADS=256
// spills:    none

extern "C" __global__ void __launch_bounds__(THREADS)
    feed_back(i32* __restrict__ ids, const i32* __restrict__ sampled, i32 num_ids) {
    let_next_start();
    wait_for_previous();
    const i32 i = blockIdx.x * THREADS + threadIdx.x;
    if (i < num_ids && ids[i] < 0) ids[i] = sampled[-1 - ids[i]];
}

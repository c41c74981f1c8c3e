// embedding: the residual stream starts as rows of the embedding table
//
// computes:  x[t][c] = fp32(token_embd[token_ids[t]][c])
// layout:    token_ids (T,) i32; token_embd (V, C) fp16; x (T, C) fp32; C a multiple of 8
// mapping:   block t owns token t; a thread moves 8 columns at a time
// macros:    HIDDEN (C), THREADS
// bound by:  bytes: T C (2 + 4)
// order:     no reduction
// architectures: sm_80 sm_90 sm_120
// compile:   HIDDEN=3072 THREADS=256 | HIDDEN=576 THREADS=96
// spills:    none

static_assert(HIDDEN % 8 == 0, "whole vectors of eight columns");

extern "C" __global__ void __launch_bounds__(THREADS)
    embedding(const i32* __restrict__ token_ids, const f16* __restrict__ token_embd,
              float* __restrict__ x) {
    let_next_start();
    wait_for_previous();
    const size_t t = blockIdx.x;
    const uint4* source = (const uint4*)(token_embd + (size_t)token_ids[t] * HIDDEN);
    float4* target = (float4*)(x + t * HIDDEN);
    for (int i = threadIdx.x; i < HIDDEN / 8; i += THREADS) {
        const uint4 h = source[i];
        target[2 * i] = make_float4(low_f32(h.x), high_f32(h.x), low_f32(h.y), high_f32(h.y));
        target[2 * i + 1] = make_float4(low_f32(h.z), high_f32(h.z), low_f32(h.w), high_f32(h.w));
    }
}

// attention_merge: puts together the splits that attention_decode left
//
// computes:  out[query][head] from its splits' maxima, sums and unnormalized outputs
// layout:    see attention.cuh and attention_partials.cuh
// mapping:   warp = (sequence, head); those without partials leave at once
// macros:    those of attention.cuh
// bound by:  latency
// order:     splits ascending, as attention_prefill merges its own
// architectures: sm_80 sm_90 sm_120
// compile:   NUM_HEADS=32 NUM_KV_HEADS=32 HEAD_DIM=96 WARPS=4 MIN_BLOCKS=1
// spills:    none

#include "attention.cuh"
#include "attention_partials.cuh"

// --- merge: one warp, one query's head ---------------------------------------------------------

constexpr int LANE_COLUMNS = (HEAD_DIM + WARP - 1) / WARP;  // lane, lane + 32, …
constexpr int AHEAD = 8;                                    // splits under way at once

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    attention_merge(float* __restrict__ partials, const i32* __restrict__ query_start,
                    const i32* __restrict__ context_lens, f16* __restrict__ out, int num_sequences,
                    int max_blocks, int reach, float scale) {
    const int lane = threadIdx.x % WARP;
    let_next_start();
    wait_for_previous();
    const int index = blockIdx.x * WARPS + threadIdx.x / WARP;
    const int sequence = index / NUM_HEADS;
    const int head = index % NUM_HEADS;
    if (sequence >= num_sequences) return;
    const int query = query_start[sequence];
    const int split_count = num_splits(context_lens[sequence], reach);
    if (query_start[sequence + 1] - query != 1 || split_count < 2) return;  // written by its decode

    const int row = head % GROUP % 16;
    const int unit = head / GROUP * GROUP_TILES + head % GROUP / 16;
    const float* partial = partial_of(partials, sequence, 0, unit, max_blocks);
    Merged merged;
    float total[LANE_COLUMNS] = {};
    for (int start = 0; start < split_count; start += AHEAD) {
        float2 state[AHEAD];
        float o[AHEAD][LANE_COLUMNS];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (start + i >= split_count) break;
            const float* from = partial + (size_t)(start + i) * UNITS * ITEM_FLOATS;
            state[i] = ((const float2*)(from + ITEM_ROWS * HEAD_DIM))[row];
#pragma unroll
            for (int c = 0; c < LANE_COLUMNS; ++c)
                if (lane + c * WARP < HEAD_DIM) o[i][c] = from[row * HEAD_DIM + lane + c * WARP];
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (start + i >= split_count) break;
            merged.take(state[i].x, state[i].y, scale);
#pragma unroll
            for (int c = 0; c < LANE_COLUMNS; ++c) total[c] = merged.value(total[c], o[i][c]);
        }
    }
    const float inverse = __frcp_rn(merged.sum);
    f16* target = out + ((size_t)query * NUM_HEADS + head) * HEAD_DIM;
#pragma unroll
    for (int c = 0; c < LANE_COLUMNS; ++c)
        if (lane + c * WARP < HEAD_DIM)
            target[lane + c * WARP] = to_f16(normalized(total[c], inverse));
}

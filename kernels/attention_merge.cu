// attention_merge: puts together the splits that attention_decode left
//
// computes:  out[query][head] from its splits' maxima, sums and unnormalized outputs
// layout:    see attention.cuh and attention_partials.cuh
// mapping:   warp w of the grid takes (sequence, head) w, w + W, …, those without partials left out
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

// A sequence's head. place: of its query in out; num_splits: 0 where nothing is to be merged.
struct Query {
    int sequence, head, place, num_splits;
};

__device__ __forceinline__ void merge(const Query& query, float* partials, f16* out,
                                      int max_blocks, float scale) {
    const int lane = threadIdx.x % WARP;
    const int row = query.head % GROUP % 16;
    const int unit = query.head / GROUP * GROUP_TILES + query.head % GROUP / 16;
    const float* partial = partial_of(partials, query.sequence, 0, unit, max_blocks);
    Merged merged;
    float total[LANE_COLUMNS] = {};
    for (int start = 0; start < query.num_splits; start += AHEAD) {
        float2 state[AHEAD];
        float o[AHEAD][LANE_COLUMNS];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (start + i >= query.num_splits) break;
            const float* from = partial + (size_t)(start + i) * UNITS * ITEM_FLOATS;
            state[i] = ((const float2*)(from + ITEM_ROWS * HEAD_DIM))[row];
#pragma unroll
            for (int c = 0; c < LANE_COLUMNS; ++c)
                if (lane + c * WARP < HEAD_DIM) o[i][c] = from[row * HEAD_DIM + lane + c * WARP];
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (start + i >= query.num_splits) break;
            merged.take(state[i].x, state[i].y, scale);
#pragma unroll
            for (int c = 0; c < LANE_COLUMNS; ++c) total[c] = merged.value(total[c], o[i][c]);
        }
    }
    const float inverse = __frcp_rn(merged.sum);
    f16* target = out + ((size_t)query.place * NUM_HEADS + query.head) * HEAD_DIM;
#pragma unroll
    for (int c = 0; c < LANE_COLUMNS; ++c)
        if (lane + c * WARP < HEAD_DIM)
            target[lane + c * WARP] = to_f16(normalized(total[c], inverse));
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    attention_merge(float* __restrict__ partials, const i32* __restrict__ query_start,
                    const i32* __restrict__ context_lens, f16* __restrict__ out, int num_sequences,
                    int max_blocks, int reach, float scale, const i32* __restrict__ num_shared,
                    int whole_runs) {
    let_next_start();
    auto look_up = [&](int index) {
        const int sequence = min(index / NUM_HEADS, num_sequences - 1);
        const int place = query_start[sequence];
        const int context = context_lens[sequence];
        const Splits splits(context, num_shared[sequence], reach, whole_runs);
        const bool is_single = query_start[sequence + 1] - place == 1;
        const int count = splits.in_chunks + splits.outside;
        const bool is_merged = !is_single || splits.is_run || count < 2;
        return Query{sequence, index % NUM_HEADS, place, is_merged ? 0 : count};
    };
    int index = blockIdx.x * WARPS + threadIdx.x / WARP;
    Query query = look_up(index);  // what the host placed
    wait_for_previous();
    while (index < num_sequences * NUM_HEADS) {
        if (query.num_splits) merge(query, partials, out, max_blocks, scale);
        index += gridDim.x * WARPS;
        query = look_up(index);
    }
}

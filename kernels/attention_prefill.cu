// attention_prefill: attention of the sequences that have several queries in this step
//
// computes:  see attention.cuh
// layout:    see attention.cuh; query_start[0] need not be 0
// mapping:   block (i, KV head) owns WARPS * ROW_TILES * 16 rows of one sequence and walks its tiles;
//            warps share the tiles in shared memory
// macros:    those of attention.cuh, ROW_TILES (of a warp), STAGES (2)
// bound by:  flops (mma.sync) and exponentials
// order:     see attention.cuh
// architectures: sm_80 sm_90 sm_120
// compile:   NUM_HEADS=32 NUM_KV_HEADS=32 HEAD_DIM=96 WARPS=4 ROW_TILES=1 STAGES=2 MIN_BLOCKS=2
//            | NUM_HEADS=14 NUM_KV_HEADS=2 HEAD_DIM=64 WARPS=4 ROW_TILES=1 STAGES=2 MIN_BLOCKS=3
//            | NUM_HEADS=32 NUM_KV_HEADS=8 HEAD_DIM=128 WARPS=4 ROW_TILES=1 STAGES=2 MIN_BLOCKS=2
// spills:    none

#include "attention.cuh"

// --- prefill: one block, one sequence, WARPS * ROW_TILES * 16 rows -----------------------------

constexpr int BLOCK_ROWS = WARPS * ROW_TILES * 16;
constexpr int PARKED = ROW_TILES * (COLUMN_TILES + 1) * WARP;  // float4s of a warp: o, max and sum

#include "attention_rows.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    attention_prefill(const f16* __restrict__ q, const f16* __restrict__ keys,
                      const f16* __restrict__ values, const i32* __restrict__ query_start,
                      const i32* __restrict__ context_lens, const i32* __restrict__ block_tables,
                      f16* __restrict__ out, int num_sequences, int max_blocks, int reach,
                      float scale) {
    extern __shared__ __align__(128) char shared[];
    let_next_start();
    wait_for_previous();
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    const int kv_head = blockIdx.y;

    const int block = gridDim.x - 1 - blockIdx.x;  // a sequence's longest rows first
    const int sequence = find_sequence(query_start, num_sequences, block);
    const int query = query_start[sequence];
    const int num_queries = query_start[sequence + 1] - query;
    const int num_rows = num_queries * GROUP;
    const int block_row = (block - first_row_block(query_start, sequence)) * BLOCK_ROWS;
    if (num_queries < 2 || block_row >= num_rows) return;
    const int context = context_lens[sequence];
    const int position = context - num_queries;  // of the sequence's first query

    Rows<ROW_TILES> rows;
    const int warp_row = block_row + warp * ROW_TILES * 16;
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = warp_row + i * 16 + half * 8 + lane / 4;
            rows.load_q(i, half, row < num_rows ? q + row_offset(query, row, kv_head) : nullptr);
        }

    // Positions of the first and last row, of the block and of this warp.
    const int block_first = position + block_row / GROUP;
    const int block_last = position + (min(block_row + BLOCK_ROWS, num_rows) - 1) / GROUP;
    const int warp_first = position + warp_row / GROUP;
    const int warp_last = position + (min(warp_row + ROW_TILES * 16, num_rows) - 1) / GROUP;
    const int first_tile = first_visible(block_first, reach) / TILE;
    const int last_tile = block_last / TILE;
    const int warp_first_tile = first_visible(warp_first, reach) / TILE;
    const int warp_last_tile = warp_row < num_rows ? warp_last / TILE : -1;

    const TileLoader<TILE / WARPS> loader(warp * (TILE / WARPS));
    const u32 stages = shared_address(shared);
    const i32* table = block_tables + (size_t)sequence * max_blocks;
    auto load = [&](int tile) {
        const size_t offset = ((size_t)table[tile] * NUM_KV_HEADS + kv_head) * TILE * HEAD_DIM;
        const u32 stage = stages + tile % STAGES * STAGE_BYTES;
        loader.load(stage, keys + offset, context - tile * TILE);
        loader.load(stage + TILE_BYTES, values + offset, context - tile * TILE);
        copy_async_commit();
    };

    load(first_tile);
    rows.start_split();
    for (int tile = first_tile; tile <= last_tile; ++tile) {
        copy_async_wait<0>();
        __syncthreads();  // this tile has landed, and nobody reads the stage about to be refilled
        if (tile < last_tile) load(tile + 1);
        if (tile < warp_first_tile || tile > warp_last_tile) continue;

        const int base = tile * TILE;
        const bool all_visible =
            base + TILE - 1 <= warp_first && base >= first_visible(warp_last, reach);
        const u32 stage = stages + tile % STAGES * STAGE_BYTES;
        auto visible = [&](int i, int half, int key) {
            const int row = warp_row + i * 16 + half * 8 + lane / 4;
            const int back = position + row / GROUP - base - key;
            return back >= 0 && back < reach;
        };
        rows.attend(stage, stage + TILE_BYTES, all_visible, visible, scale);

        const bool is_last = tile == warp_last_tile;
        const bool is_parked = tile / SPLIT_TILES > warp_first_tile / SPLIT_TILES;
        if (tile % SPLIT_TILES != SPLIT_TILES - 1 && !is_last) continue;
        rows.finish_split();
        // This warp's totals wait here while a split is under way.
        float4* parked = (float4*)(shared + STAGES * STAGE_BYTES) + warp * PARKED + lane;
#pragma unroll
        for (int i = 0; i < ROW_TILES; ++i) {
            float4* place = parked + i * (COLUMN_TILES + 1) * WARP;
            Merged merged[2];
            if (is_parked) {
                const float4 state = place[COLUMN_TILES * WARP];
                merged[0].max = state.x, merged[0].sum = state.y;
                merged[1].max = state.z, merged[1].sum = state.w;
            }
            merged[0].take(rows.max[i][0], rows.sum[i][0], scale);
            merged[1].take(rows.max[i][1], rows.sum[i][1], scale);
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; ++n) {
                float(&o)[4] = rows.o[i][n];
                if (is_parked) {
                    const float4 total = place[n * WARP];
                    o[0] = merged[0].value(total.x, o[0]);
                    o[1] = merged[0].value(total.y, o[1]);
                    o[2] = merged[1].value(total.z, o[2]);
                    o[3] = merged[1].value(total.w, o[3]);
                }
                if (!is_last) place[n * WARP] = make_float4(o[0], o[1], o[2], o[3]);
            }
            place[COLUMN_TILES * WARP] =
                make_float4(merged[0].max, merged[0].sum, merged[1].max, merged[1].sum);
            rows.sum[i][0] = merged[0].sum, rows.sum[i][1] = merged[1].sum;
        }
        if (!is_last) rows.start_split();
    }
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = warp_row + i * 16 + half * 8 + lane / 4;
            if (row < num_rows)
                write_row(out + row_offset(query, row, kv_head), rows.o[i], half,
                          rows.sum[i][half]);
        }
}

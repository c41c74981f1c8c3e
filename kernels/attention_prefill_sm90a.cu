// attention_prefill_sm90a: attention_prefill with Hopper's warpgroup products
//
// computes:  see attention.cuh
// layout:    see attention.cuh; query_start[0] need not be 0
// mapping:   item = (WARPS * 16 rows of one sequence, KV head); a block per SM takes items until none
//            is left, longest rows first. One warp has the copy engine load tiles of keys and
//            values ahead, across items; each four of the others own 64 rows: products by wgmma
//            with q and the weights in registers, a tile's values under way while the next tile's
//            scores become weights
// macros:    those of attention.cuh (WARPS: of rows, 8 or 12), STAGES
// bound by:  latency of the exponentials between products, by stall samples of an earlier state
// order:     see attention.cuh; a chain of wgmma has the bits of one of mma.sync on an H200
// architectures: sm_90a
// generic twin: attention_prefill
// compile:   NUM_HEADS=32 NUM_KV_HEADS=32 HEAD_DIM=96 WARPS=12 STAGES=4 MIN_BLOCKS=1
//            | NUM_HEADS=14 NUM_KV_HEADS=2 HEAD_DIM=64 WARPS=12 STAGES=4 MIN_BLOCKS=1
//            | NUM_HEADS=32 NUM_KV_HEADS=8 HEAD_DIM=128 WARPS=8 STAGES=4 MIN_BLOCKS=1
// spills:    none

#include "attention.cuh"
#include "attention_warpgroup.cuh"

constexpr int BLOCK_ROWS = WARPS * 16;

#include "attention_rows.cuh"

constexpr int PARKED = (COLUMN_TILES + 1) * WARP;  // float4s of a warp: o, then maxima and sums
constexpr int SLOTS = 2 * STAGES;                  // tiles in shared memory: keys and values in turn
static_assert(WARPS == 8 || WARPS == 12, "two or three warpgroups of rows");

// The loader is a warp, but registers are moved between whole warpgroups.
constexpr int LOADER_THREADS = 4 * WARP;
constexpr int ROW_REGISTERS = WARPS == 8 ? 224 : HEAD_DIM > 80 ? 160 : 152;
constexpr int LOADER_REGISTERS = WARPS == 12 && HEAD_DIM > 80 ? 32 : 56;

// The next item after the first of every block, and the blocks that found none. Both are 0 between
// launches, which follow each other on one stream.
__device__ int items_taken = 0, blocks_done = 0;

// What a block's warps know of an item. num_rows: of its sequence; 0 when there is no item.
struct Item {
    int query, num_rows, block_row, kv_head;
    int position;  // of the sequence's first query
    int first_tile, last_tile;

    __device__ __forceinline__ int position_of(int row) const { return position + row / GROUP; }
};

// The dynamic shared memory of a block, after the slots and the parked totals.
struct Shared {
    u64 full[SLOTS], empty[SLOTS];
    u64 item_full[2], item_empty[2];
    Item items[2];
};

static_assert(sizeof(Shared) <= 512, "attention.py leaves no more room");

// --- the loading warp ------------------------------------------------------------------------------

struct Loader {
    u32 slots, full, empty;
    Ring<SLOTS> ring;

    // Rows of the whole cache, from `row` on, by the copy engine.
    __device__ __forceinline__ void load(const TensorMap& map, int row) {
        const u32 barrier = full + ring.place() * 8, slot = slots + ring.place() * TILE_BYTES;
        wait_for(empty + ring.place() * 8, ring.round() ^ 1);
        if (threadIdx.x % WARP == 0) {
            arrive_expecting(barrier, TILE_BYTES);
#pragma unroll
            for (int panel = 0; panel < CHUNKS / SPAN; ++panel)
                copy_box(slot + panel * PANEL_BYTES, map, panel * SPAN * 8, row, barrier);
        }
        __syncwarp();
        ++ring.count;
    }

    // A tile whose rows from `valid` on are to become zero.
    __device__ __forceinline__ void load_valid(const f16* tile, int valid) {
        const int lane = threadIdx.x % WARP;
        const u32 slot = slots + ring.place() * TILE_BYTES;
        wait_for(empty + ring.place() * 8, ring.round() ^ 1);
#pragma unroll 1
        for (int i = lane; i < TILE * CHUNKS; i += WARP) {
            const int row = i / CHUNKS, chunk = i % CHUNKS;
            const u32 place = row * SPAN + (chunk % SPAN ^ flip<SPAN>(row));
            copy_async_16(slot + chunk / SPAN * PANEL_BYTES + place * 16,
                          (const char*)tile + i * 16, row < valid ? 16 : 0);
        }
        copy_async_commit();
        copy_async_wait<0>();
        show_to_async_units();
        __syncwarp();
        if (lane == 0) arrive(full + ring.place() * 8);
        ++ring.count;
    }
};

// A warp's view of the tiles: the keys of the one at hand, then its values.
struct Tiles {
    u32 slots, full, empty;
    Ring<STAGES> ring;

    __device__ __forceinline__ u32 keys() const { return slots + ring.place() * 2 * TILE_BYTES; }
    __device__ __forceinline__ u32 values() const { return keys() + TILE_BYTES; }
    __device__ __forceinline__ void wait_keys() const {
        wait_for(full + ring.place() * 16, ring.round());
    }
    __device__ __forceinline__ void wait_values() const {
        wait_for(full + ring.place() * 16 + 8, ring.round());
    }
    __device__ __forceinline__ void release_keys() const {
        if (threadIdx.x % WARP == 0) arrive(empty + ring.place() * 16);
    }
    __device__ __forceinline__ void release_values() const {
        if (threadIdx.x % WARP == 0) arrive(empty + ring.place() * 16 + 8);
    }
};

// One item for one warp: 16 of its warpgroup's 64 rows.
__device__ __forceinline__ void attend(const Item& item, Tiles& tiles, float4* parked, const f16* q,
                                       f16* out, int reach, float scale) {
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    // The warpgroup's tiles; rows that do not exist see none.
    const int group_row = item.block_row + warp / 4 * 64;
    const int group_last = item.position_of(min(group_row + 64, item.num_rows) - 1);
    const int first = first_visible(item.position_of(group_row), reach) / TILE;
    const int last = group_row < item.num_rows ? group_last / TILE : -1;

    int tile = item.first_tile;
    const int last_tile = item.last_tile;
    auto skip = [&] {
        tiles.wait_keys();
        tiles.wait_values();
        __syncwarp();
        tiles.release_keys();
        tiles.release_values();
        ++tiles.ring.count;
    };
    for (; tile < first && tile <= last_tile; ++tile) skip();
    if (tile <= last) {
        WarpRows rows;
        const int warp_row = item.block_row + warp * 16;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = warp_row + half * 8 + lane / 4;
            const bool exists = row < item.num_rows;
            rows.load_q(half, exists ? q + row_offset(item.query, row, item.kv_head) : nullptr);
        }
        // The tiles that all of the warp's rows see whole.
        const int whole_from =
            (first_visible(item.position_of(warp_row + 15), reach) + TILE - 1) / TILE;
        const int whole_to = (item.position_of(warp_row) + 1) / TILE - 1;
        // Scores to weights; returns what the rows of o are to be multiplied by.
        auto soften = [&](int tile) {
            if (tile < whole_from || tile > whole_to)
                mask(rows.s, [&](int half, int key) {
                    const int row = item.block_row + warp * 16 + half * 8 + lane / 4;
                    const int back = item.position_of(row) - tile * TILE - key;
                    return back >= 0 && back < reach;
                });
            // Both rows step by step: neither waits for the other's shuffles.
            float top[2] = {tile_maximum(rows.s, 0, rows.max[0]),
                            tile_maximum(rows.s, 1, rows.max[1])};
#pragma unroll
            for (int lanes = 1; lanes < 4; lanes *= 2) {
                const float other = __shfl_xor_sync(FULL_WARP, top[0], lanes);
                top[1] = fmaxf(top[1], __shfl_xor_sync(FULL_WARP, top[1], lanes));
                top[0] = fmaxf(top[0], other);
            }
            const float keep = weigh(rows.s, 0, top[0], rows.max[0], rows.sum[0], scale);
            return make_float2(
                keep, weigh(rows.s, 1, top[1], rows.max[1], rows.sum[1], scale));
        };

        tiles.wait_keys();
        begin_products();
        rows.multiply_keys(tiles.keys());
        wait_for_products<0>();
        touch(rows.s);
        tiles.release_keys();
        rows.start_split();
        soften(tile);
        rows.pack_weights();

        bool add = false, is_parked = false;
        for (++tile; tile <= last; ++tile) {
            Tiles next = tiles;
            ++next.ring.count;
            next.wait_keys();
            tiles.wait_values();
            touch(rows.s);
            touch(rows.p);
            touch(rows.o);
            begin_products();
            rows.multiply_keys(next.keys());
            rows.multiply_values(tiles.values(), add);
            wait_for_products<1>();
            touch(rows.s);
            next.release_keys();

            const bool new_split = tile % SPLIT_TILES == 0;
            Merged merged[2];
            if (new_split) {
                rows.merge_sums(merged, parked, is_parked, scale);
                rows.start_split();
            }
            const float2 keep = soften(tile);
            finish_before_waiting(rows.sum[0], rows.sum[1]);
            wait_for_products<0>();
            touch(rows.s);
            touch(rows.p);
            touch(rows.o);
            tiles.release_values();
            rows.pack_weights();
            if (new_split) {
                if (is_parked) rows.merge_parked(merged, parked);
                rows.park(parked);
                is_parked = true;
            } else {
                rescale(rows.o, 0, keep.x);
                rescale(rows.o, 1, keep.y);
            }
            add = !new_split;
            tiles = next;
        }

        tiles.wait_values();
        touch(rows.p);
        touch(rows.o);
        begin_products();
        rows.multiply_values(tiles.values(), add);
        wait_for_products<0>();
        touch(rows.p);
        touch(rows.o);
        tiles.release_values();
        ++tiles.ring.count;
        Merged merged[2];
        rows.merge_sums(merged, parked, is_parked, scale);
        if (is_parked) rows.merge_parked(merged, parked);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = item.block_row + warp * 16 + half * 8 + lane / 4;
            if (row < item.num_rows)
                write_row(out + row_offset(item.query, row, item.kv_head), rows.o, half,
                          merged[half].sum);
        }
    }
    for (; tile <= last_tile; ++tile) skip();
}

// The warps that own rows: one item after the other.
__device__ __forceinline__ void attend_all(Shared& shared, u32 slots, float4* parked, const f16* q,
                                           f16* out, int reach, float scale) {
    Tiles tiles = {slots, shared_address(shared.full), shared_address(shared.empty), {}};
    Ring<2> turn;
    while (true) {
        wait_for(shared_address(&shared.item_full[turn.place()]), turn.round());
        const Item item = shared.items[turn.place()];
        if (item.num_rows == 0) break;
        arrive(shared_address(&shared.item_empty[turn.place()]));
        attend(item, tiles, parked, q, out, reach, scale);
        ++turn.count;
    }
}

// The loading warp: takes items, makes them known and loads their tiles.
__device__ __forceinline__ void load_all(Shared& shared, u32 slots, const TensorMap& keys_map,
                                         const TensorMap& values_map, const f16* values,
                                         const i32* query_start,
                                         const i32* context_lens, const i32* block_tables,
                                         int num_sequences, int max_blocks, int num_row_blocks,
                                         int reach) {
    const int lane = threadIdx.x % WARP;
    Loader loader = {slots, shared_address(shared.full), shared_address(shared.empty), {}};
    Ring<2> turn;
    int index = blockIdx.x;
    while (index < num_row_blocks * NUM_KV_HEADS) {
        int next = 0;
        if (lane == 0) next = gridDim.x + atomicAdd(&items_taken, 1);
        // A sequence's longest rows first, in all heads.
        const int block = num_row_blocks - 1 - index / NUM_KV_HEADS;
        const int sequence = find_sequence(query_start, num_sequences, block);
        const int query = query_start[sequence];
        const int num_queries = query_start[sequence + 1] - query;
        const int block_row = (block - first_row_block(query_start, sequence)) * BLOCK_ROWS;
        if (num_queries > 1 && block_row < num_queries * GROUP) {
            wait_for(shared_address(&shared.item_empty[turn.place()]), turn.round() ^ 1);
            Item& item = shared.items[turn.place()];
            const int context = context_lens[sequence];
            if (lane == 0) {
                item.query = query;
                item.num_rows = num_queries * GROUP;
                item.block_row = block_row;
                item.kv_head = index % NUM_KV_HEADS;
                item.position = context - num_queries;
                const int last_row = min(block_row + BLOCK_ROWS, item.num_rows) - 1;
                item.first_tile = first_visible(item.position_of(block_row), reach) / TILE;
                item.last_tile = item.position_of(last_row) / TILE;
                arrive(shared_address(&shared.item_full[turn.place()]));
            }
            __syncwarp();
            ++turn.count;
            const i32* table = block_tables + (size_t)sequence * max_blocks;
            i32 blocks = 0;  // lane i: the cache block of tile i of each 32
            const int first = item.first_tile, last = item.last_tile;
            for (int tile = first; tile <= last; ++tile) {
                const int i = (tile - first) % WARP;
                if (i == 0) blocks = table[min(tile + lane, last)];
                const int cache_block = __shfl_sync(FULL_WARP, blocks, i);
                const int row = (cache_block * NUM_KV_HEADS + index % NUM_KV_HEADS) * TILE;
                loader.load(keys_map, row);
                // What lies behind the context may be anything, and 0 x infinity is no zero. Scores
                // of such keys are masked whatever they are.
                const int valid = context - tile * TILE;
                if (valid >= TILE) loader.load(values_map, row);
                else loader.load_valid(values + (size_t)row * HEAD_DIM, valid);
            }
        }
        index = __shfl_sync(FULL_WARP, next, 0);
    }
    wait_for(shared_address(&shared.item_empty[turn.place()]), turn.round() ^ 1);
    if (lane == 0) {
        shared.items[turn.place()].num_rows = 0;
        arrive(shared_address(&shared.item_full[turn.place()]));
    }
    // The last block to end leaves the counters as they were.
    if (lane == 0 && atomicAdd(&blocks_done, 1) == gridDim.x - 1) items_taken = blocks_done = 0;
}

extern "C" __global__ void __launch_bounds__(THREADS + LOADER_THREADS, MIN_BLOCKS)
    attention_prefill_sm90a(const __grid_constant__ TensorMap keys_map,
                            const __grid_constant__ TensorMap values_map,
                            const f16* __restrict__ q, const f16* __restrict__ values,
                            const i32* __restrict__ query_start,
                            const i32* __restrict__ context_lens,
                            const i32* __restrict__ block_tables, f16* __restrict__ out,
                            int num_sequences, int max_blocks, int reach, float scale,
                            int num_row_blocks) {
    extern __shared__ __align__(1024) char dynamic[];
    let_next_start();
    const u32 slots = shared_address(dynamic);
    float4* parked = (float4*)(dynamic + SLOTS * TILE_BYTES);
    Shared& shared = *(Shared*)(parked + WARPS * PARKED);
    const int warp = threadIdx.x / WARP;
    if (threadIdx.x == 0) {
        for (int i = 0; i < SLOTS; ++i) {
            init_barrier(shared_address(&shared.full[i]), 1);
            init_barrier(shared_address(&shared.empty[i]), WARPS);
        }
        for (int i = 0; i < 2; ++i) {
            init_barrier(shared_address(&shared.item_full[i]), 1);
            init_barrier(shared_address(&shared.item_empty[i]), THREADS);  // each has its copy
        }
        show_to_async_units();
    }
    __syncthreads();
    wait_for_previous();

    if (warp < WARPS) {
        take_registers<ROW_REGISTERS>();
        parked += warp * PARKED + threadIdx.x % WARP;
        attend_all(shared, slots, parked, q, out, reach, scale);
    } else {
        give_registers<LOADER_REGISTERS>();
        if (warp == WARPS)
            load_all(shared, slots, keys_map, values_map, values, query_start, context_lens,
                     block_tables, num_sequences, max_blocks, num_row_blocks, reach);
    }
}

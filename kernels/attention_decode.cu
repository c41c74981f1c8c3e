// attention_decode: attention of the sequences that have one query in this step
//
// computes:  see attention.cuh; a query with one split is done, others leave partials
// layout:    see attention.cuh and attention_partials.cuh. Chunk c is one split, chunk_split[c], of
//            sequences members[chunk_start[c]] … members[chunk_start[c + 1] - 1], at most 32, whose
//            block tables agree there and who have all of it behind them; together the first
//            num_shared[b] splits of sequence b are in chunks
// mapping:   item = 16 rows of one KV head against one split or a run of them: the rows of a chunk, or
//            those of one sequence; each warp has one item after another, chunks first, and streams
//            their queries and tiles through its own stages without a gap
// macros:    those of attention.cuh, STAGES (of a warp)
// bound by:  bytes of keys and values; those of a chunk once, as long as its items run side by side
// order:     see attention.cuh; rows of one mma do not meet, so who shares a tile changes no bit
// architectures: sm_80 sm_90 sm_120
// compile:   NUM_HEADS=32 NUM_KV_HEADS=32 HEAD_DIM=96 WARPS=8 STAGES=1 MIN_BLOCKS=1
//            | NUM_HEADS=14 NUM_KV_HEADS=2 HEAD_DIM=64 WARPS=12 STAGES=1 MIN_BLOCKS=1
//            | NUM_HEADS=32 NUM_KV_HEADS=8 HEAD_DIM=128 WARPS=6 STAGES=1 MIN_BLOCKS=1
// spills:    none

#include "attention.cuh"
#include "attention_partials.cuh"
#include "attention_items.cuh"

constexpr u32 QUERY_BYTES = ITEM_ROWS * HEAD_DIM * 2;

// The splits before, parked in shared memory, join what `rows` found of row `half` in the split after
// them.
__device__ __forceinline__ void merge_parked(Rows<1>& rows, int half, const float* parked, int row,
                                             float scale) {
    const float2* o = (const float2*)(parked + row * HEAD_DIM) + threadIdx.x % 4;
    const float2 state = ((const float2*)(parked + ITEM_ROWS * HEAD_DIM))[row];
    Merged merged;
    merged.max = state.x, merged.sum = state.y;
    merged.take(rows.max[0][half], rows.sum[0][half], scale);
    rows.max[0][half] = merged.max;
    rows.sum[0][half] = merged.sum;
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; ++n) {
        const float2 total = o[n * 4];
        rows.o[0][n][2 * half] = merged.value(total.x, rows.o[0][n][2 * half]);
        rows.o[0][n][2 * half + 1] = merged.value(total.y, rows.o[0][n][2 * half + 1]);
    }
}

// The items that were drawn, and the blocks that are done. Both are 0 between launches, which follow
// each other on one stream.
__device__ int items_drawn = 0, blocks_done = 0;

struct Memory {
    const f16 *q, *keys, *values;
    const i32* block_tables;
    int max_blocks, reach;
};

// A warp's part of shared memory: stages; queries of STAGES items; splits of the run at hand.
struct Places {
    u32 stages;
    f16* queries;
    float* parked;

    __device__ __forceinline__ u32 stage(int tile) const {
        return stages + tile % STAGES * STAGE_BYTES;
    }
    __device__ __forceinline__ f16* queries_of(int item) const {
        return queries + item % STAGES * ITEM_ROWS * HEAD_DIM;
    }
};

// The tiles on their way, STAGES of them, keys and values apart: each is loaded again as soon as it
// has been used. With an item's first keys come its queries.
struct Stream {
    const Sequences& sequences;
    const Chunks& chunks;
    const Memory& memory;
    const Places& places;
    const TileLoader<TILE> loader;
    const u64 once, again;
    Item item;          // whose tiles are being loaded
    int first, loaded;  // its first tile; tiles loaded by now
    i32 blocks;         // lane i: the cache block of its i-th tile
    int next;           // lane 0: the item after it
    int begun, queue;   // items by now; lane i: the i-th of each 32

    __device__ __forceinline__ Stream(const Sequences& sequences, const Chunks& chunks,
                                      const Memory& memory, const Places& places, int index)
        : sequences(sequences), chunks(chunks), memory(memory), places(places), loader(0),
          once(read_once()), again(read_again()),
          item(sequences, chunks, index, memory.reach), loaded(0), blocks(0), next(0), begun(0),
          queue(0) {
        look_up_blocks();
    }

    __device__ __forceinline__ void start() {
        begin_item();
#pragma unroll
        for (int i = 0; i < STAGES; ++i) {
            load_keys();
            load_values();
        }
    }

    __device__ __forceinline__ void look_up_blocks() {
        first = item.tile;
        const int tile = first + threadIdx.x % WARP;
        if (item.valid && tile < item.end)
            blocks = memory.block_tables[(size_t)item.sequence * memory.max_blocks + tile];
    }
    __device__ __forceinline__ void begin_item() {
        const int lane = threadIdx.x % WARP;
        if (lane == begun % WARP) queue = item.index;
        ++begun;
        if (!item.valid) return;
        next = item.index + chunks.stride;
        if (chunks.is_drawn(next) && lane == 0)
            next = chunks.first_drawn + atomicAdd(&items_drawn, 1);
    }
    __device__ __forceinline__ void load_queries() const {
        const size_t query = sequences.query[item.sequence];
        const size_t head = item.kv_head * GROUP + item.first_row;
        const char* from = (const char*)(memory.q + (query * NUM_HEADS + head) * HEAD_DIM);
        const u32 target = shared_address(places.queries_of(begun - 1));
        for (int i = threadIdx.x % WARP; i < item.num_rows * CHUNKS; i += WARP)
            copy_async_16(target + i * 16, from + i * 16);
    }
    __device__ __forceinline__ const f16* place(const f16* cache) const {
        const size_t block = __shfl_sync(FULL_WARP, blocks, item.tile - first);
        return cache + (block * NUM_KV_HEADS + item.kv_head) * TILE * HEAD_DIM;
    }
    __device__ __forceinline__ void load_keys() {
        if (item.valid) {
            loader.load(places.stage(loaded), place(memory.keys), item.context - item.tile * TILE,
                        item.member < 0 ? once : again);
            if (item.member < 0 && item.tile == first) load_queries();
        }
        copy_async_commit();
    }
    __device__ __forceinline__ void load_values() {
        if (item.valid) {
            loader.load(places.stage(loaded) + TILE_BYTES, place(memory.values),
                        item.context - item.tile * TILE, item.member < 0 ? once : again);
            ++loaded;
            if (++item.tile == item.end) {
                item = Item(sequences, chunks, __shfl_sync(FULL_WARP, next, 0), memory.reach);
                look_up_blocks();
                begin_item();
            }
        }
        copy_async_commit();
    }
    // The i-th item, which was begun by now.
    __device__ __forceinline__ Item item_at(int i) const {
        return Item(sequences, chunks, __shfl_sync(FULL_WARP, queue, i % WARP), memory.reach);
    }
    // What was loaded next is there, for all lanes.
    __device__ __forceinline__ void wait() const {
        copy_async_wait<2 * STAGES - 1>();
        __syncwarp();
    }
};

struct StreamTurn {
    Stream& stream;
    __device__ __forceinline__ void after_keys() const {
        __syncwarp();
        stream.load_keys();
    }
    __device__ __forceinline__ void before_values() const { stream.wait(); }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    attention_decode(const f16* __restrict__ q, const f16* __restrict__ keys,
                     const f16* __restrict__ values, const i32* __restrict__ query_start,
                     const i32* __restrict__ context_lens, const i32* __restrict__ block_tables,
                     f16* __restrict__ out, int num_sequences, int max_blocks, int reach,
                     float scale, float* partials, const i32* __restrict__ num_shared,
                     int whole_runs, int chunks_done,
                     const i32* num_chunks,  // restrict would let its load move before the wait
                     const i32* __restrict__ members, const i32* __restrict__ chunk_start,
                     const i32* __restrict__ chunk_split) {
    extern __shared__ __align__(128) char shared[];
    let_next_start();
    const int warp = threadIdx.x / WARP;
    // In shared memory: all warps' stages, all queries, all parked splits, the lists.
    char* const queries = shared + WARPS * STAGES * STAGE_BYTES;
    float* const parked = (float*)(queries + WARPS * STAGES * QUERY_BYTES);
    const Places places = {shared_address(shared) + warp * STAGES * STAGE_BYTES,
                           (f16*)(queries + warp * STAGES * QUERY_BYTES),
                           parked + warp * ITEM_FLOATS};
    int* const lists = (int*)(parked + (whole_runs ? WARPS * ITEM_FLOATS : 0));
    const Sequences sequences = {lists, lists + num_sequences + 1, lists + 2 * num_sequences + 1,
                                 (u16*)(lists + 3 * num_sequences + 1), num_sequences};
    count_splits(sequences, query_start, context_lens, num_shared, reach, whole_runs);
    const Chunks chunks(sequences, members, chunk_start, chunk_split,
                        chunks_done ? 0 : *num_chunks);
    const Memory memory = {q, keys, values, block_tables, max_blocks, reach};
    Stream stream(sequences, chunks, memory, places, warp * gridDim.x + blockIdx.x);
    // Until here all is from the host. attention_shared lets this kernel start when all before it is
    // done, and nothing here depends on what it leaves.
    if (!chunks_done) wait_for_previous();
    stream.start();

    int used = 0, done = 0;
    for (Item item = stream.item_at(0); item.valid; item = stream.item_at(++done)) {
        const Row own[2] = {Row(sequences, chunks, item, 0, reach),
                            Row(sequences, chunks, item, 1, reach)};
        auto place = [&](const Row& row) {  // in q and out
            const size_t head = item.kv_head * GROUP + row.head;
            return ((size_t)sequences.query[row.sequence] * NUM_HEADS + head) * HEAD_DIM;
        };
        Rows<1> rows;
        rows.halves = item.num_rows > 8 ? 2 : 1;
        stream.wait();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = half * 8 + threadIdx.x % WARP / 4;
            const f16* from = places.queries_of(done) + row * HEAD_DIM;
            if (item.member >= 0) from = q + place(own[half]);
            rows.load_q(0, half, own[half].exists ? from : nullptr);
        }
        const int first = max(own[0].first, own[1].first);
        const int context = min(own[0].context, own[1].context);
        const int first_split = item.tile / SPLIT_TILES;
        rows.start_split();
        for (int tile = item.tile; tile < item.end; ++tile, ++used) {
            const int base = tile * TILE;
            const bool all_visible = base >= first && base + TILE <= context;
            auto visible = [&](int, int half, int key) {
                return base + key >= own[half].first && base + key < own[half].context;
            };
            const u32 stage = places.stage(used);
            stream.wait();
            rows.attend(stage, stage + TILE_BYTES, __all_sync(FULL_WARP, all_visible), visible,
                        scale, StreamTurn{stream});
            __syncwarp();
            stream.load_values();
            const bool is_last = tile == item.end - 1;
            if (!is_last && tile % SPLIT_TILES != SPLIT_TILES - 1) continue;

            const int split = tile / SPLIT_TILES;
            rows.finish_split();
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const Row& row = own[half];
                const int from = row.first / SPLIT;  // partials are counted from here
                if (!row.exists || split < from) continue;
                if (!item.is_run && num_splits(row.context, reach) > 1) {
                    const int unit = item.kv_head * GROUP_TILES + row.head / 16;
                    store_row(partial_of(partials, row.sequence, split - from, unit, max_blocks),
                              rows.o[0], half, row.head % 16, rows.max[0][half], rows.sum[0][half]);
                    continue;
                }
                if (split > first_split)
                    merge_parked(rows, half, places.parked, row.head % 16, scale);
                if (is_last)
                    write_row(out + place(row), rows.o[0], half, rows.sum[0][half]);
                else
                    store_row(places.parked, rows.o[0], half, row.head % 16, rows.max[0][half],
                              rows.sum[0][half]);
            }
            __syncwarp();
            rows.start_split();
        }
    }
    if (chunks_done) wait_for_previous();  // who waits for this kernel waits for that one
    if (chunks.is_drawn(chunks.num_items - 1)) {
        // The last block to end leaves the counters as they were.
        __syncthreads();
        if (threadIdx.x == 0 && atomicAdd(&blocks_done, 1) == gridDim.x - 1)
            items_drawn = blocks_done = 0;
    }
}

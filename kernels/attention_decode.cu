// attention_decode: attention of the sequences that have one query in this step
//
// computes:  see attention.cuh; a query with one split is done, others leave partials
// layout:    see attention.cuh and attention_partials.cuh. Chunk c is one split, chunk_split[c], of
//            sequences members[chunk_start[c]] … members[chunk_start[c + 1] - 1], at most 32, whose
//            block tables agree there and who have all of it behind them; together the first
//            num_shared[b] splits of sequence b are in chunks
// mapping:   item = 16 rows of one KV head against one split: the rows of a chunk, or those of one
//            sequence; warp w of the grid owns items w, w + W, …, chunks first, and streams their
//            tiles through its own stages without a gap
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

__device__ __forceinline__ void store_split(float* partial, const Rows<1>& rows, int half, int row) {
    const int t = threadIdx.x % 4;
    float2* o = (float2*)(partial + row * HEAD_DIM) + t;
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; ++n)
        o[n * 4] = make_float2(rows.o[0][n][2 * half], rows.o[0][n][2 * half + 1]);
    float2* state = (float2*)(partial + ITEM_ROWS * HEAD_DIM) + row;
    if (t == 0) *state = make_float2(rows.max[0][half], rows.sum[0][half]);
}

// The tiles on their way, STAGES of them, keys and values apart: each is loaded again as soon as it
// has been used.
struct Stream {
    const Sequences& sequences;
    const Chunks& chunks;
    const f16 *keys, *values;
    const i32* block_tables;
    int max_blocks, reach, stride;
    u32 stages;
    TileLoader<TILE> loader;
    Item item;          // whose tiles are being loaded
    i32 blocks;         // lane i: the cache block of its i-th tile
    int first, loaded;  // its first tile; tiles loaded by now

    __device__ __forceinline__ u32 stage(int tile) const {
        return stages + tile % STAGES * STAGE_BYTES;
    }
    __device__ __forceinline__ void look_up_blocks() {
        first = item.tile;
        const int tile = first + threadIdx.x % WARP;
        if (item.valid && tile < item.end)
            blocks = block_tables[(size_t)item.sequence * max_blocks + tile];
    }
    __device__ __forceinline__ const f16* place(const f16* cache) const {
        const size_t block = __shfl_sync(FULL_WARP, blocks, item.tile - first);
        return cache + (block * NUM_KV_HEADS + item.kv_head) * TILE * HEAD_DIM;
    }
    __device__ __forceinline__ void load_keys() {
        if (item.valid)
            loader.load(stage(loaded), place(keys), item.context - item.tile * TILE);
        copy_async_commit();
    }
    __device__ __forceinline__ void load_values() {
        if (item.valid) {
            const u32 target = stage(loaded) + TILE_BYTES;
            loader.load(target, place(values), item.context - item.tile * TILE);
            ++loaded;
            if (++item.tile == item.end) {
                item = Item(sequences, chunks, item.index + stride, stride, reach);
                look_up_blocks();
            }
        }
        copy_async_commit();
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
                     float scale, float* __restrict__ partials,
                     const i32* __restrict__ num_shared,
                     const i32* num_chunks,  // restrict would let its load move before the wait
                     const i32* __restrict__ members, const i32* __restrict__ chunk_start,
                     const i32* __restrict__ chunk_split) {
    extern __shared__ __align__(128) char shared[];
    let_next_start();
    wait_for_previous();
    const int warp = threadIdx.x / WARP;
    int* lists = (int*)(shared + WARPS * STAGES * STAGE_BYTES);
    const Sequences sequences = {lists, lists + num_sequences + 1, lists + 2 * num_sequences + 1,
                                 num_sequences};
    const Chunks chunks = {members, chunk_start, chunk_split,
                           *num_chunks * NUM_KV_HEADS * CHUNK_TILES};
    count_splits(sequences, query_start, context_lens, num_shared, reach);

    const int stride = gridDim.x * WARPS;
    Item item(sequences, chunks, warp * gridDim.x + blockIdx.x, stride, reach);
    Stream stream = {sequences, chunks, keys, values, block_tables, max_blocks, reach, stride,
                     shared_address(shared) + warp * STAGES * STAGE_BYTES, TileLoader<TILE>(0),
                     item, 0, 0, 0};
    stream.look_up_blocks();
#pragma unroll
    for (int i = 0; i < STAGES; ++i) {
        stream.load_keys();
        stream.load_values();
    }

    int used = 0;
    for (; item.valid; item = Item(sequences, chunks, item.index + stride, stride, reach)) {
        const Row own[2] = {Row(sequences, chunks, item, 0, reach),
                            Row(sequences, chunks, item, 1, reach)};
        size_t place[2];  // in q and out
        Rows<1> rows;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const size_t query = query_start[own[half].sequence];
            const size_t head = item.kv_head * GROUP + own[half].head;
            place[half] = (query * NUM_HEADS + head) * HEAD_DIM;
            rows.load_q(0, half, own[half].exists ? q + place[half] : nullptr);
        }
        const int first = max(own[0].first, own[1].first);
        const int context = min(own[0].context, own[1].context);
        rows.start_split();
        for (int tile = item.tile; tile < item.end; ++tile, ++used) {
            const int base = tile * TILE;
            const bool all_visible = base >= first && base + TILE <= context;
            auto visible = [&](int, int half, int key) {
                return base + key >= own[half].first && base + key < own[half].context;
            };
            const u32 stage = stream.stage(used);
            stream.wait();
            rows.attend(stage, stage + TILE_BYTES, __all_sync(FULL_WARP, all_visible), visible,
                        scale, StreamTurn{stream});
            __syncwarp();
            stream.load_values();
        }
        rows.finish_split();
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const Row& row = own[half];
            const int split = item.split - row.first / SPLIT;  // counted from the first visible
            if (!row.exists || split < 0) continue;
            if (num_splits(row.context, reach) == 1) {
                write_row(out + place[half], rows.o[0], half, rows.sum[0][half]);
                continue;
            }
            const int unit = item.kv_head * GROUP_TILES + row.head / 16;
            store_split(partial_of(partials, row.sequence, split, unit, max_blocks), rows, half,
                        row.head % 16);
        }
    }
}

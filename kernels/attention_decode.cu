// attention_decode: attention of the sequences that have one query in this step
//
// computes:  see attention.cuh; a query with one split is done, others leave partials
// layout:    see attention.cuh and attention_partials.cuh
// mapping:   item = (sequence, split, KV head, row tile); warp w of the grid owns items w, w + W, …
//            and streams their tiles through its own stages without a gap
// macros:    those of attention.cuh, STAGES (of a warp)
// bound by:  bytes of keys and values
// order:     see attention.cuh
// architectures: sm_80 sm_90 sm_120
// compile:   NUM_HEADS=32 NUM_KV_HEADS=32 HEAD_DIM=96 WARPS=4 STAGES=2 MIN_BLOCKS=1
//            | NUM_HEADS=14 NUM_KV_HEADS=2 HEAD_DIM=64 WARPS=4 STAGES=2 MIN_BLOCKS=1
//            | NUM_HEADS=32 NUM_KV_HEADS=8 HEAD_DIM=128 WARPS=3 STAGES=2 MIN_BLOCKS=1
// spills:    none

#include "attention.cuh"
#include "attention_partials.cuh"

// --- decode: one warp, one item ----------------------------------------------------------------

// What a block knows of every sequence, in shared memory.
struct Sequences {
    int* first_split;  // (B + 1,), running number of splits
    int* context;      // (B,)
    int count;
};

// Fills the table: an inclusive sum over the sequences, THREADS at a time.
__device__ __forceinline__ void count_splits(const Sequences& s, const i32* query_start,
                                             const i32* context_lens, int reach) {
    __shared__ int warp_sums[WARPS];
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    int before = 0;
    if (threadIdx.x == 0) s.first_split[0] = 0;
    for (int start = 0; start < s.count; start += THREADS) {
        const int b = start + threadIdx.x;
        int sum = 0;
        if (b < s.count) {
            const bool mine = query_start[b + 1] - query_start[b] == 1;
            s.context[b] = context_lens[b];
            sum = mine ? num_splits(s.context[b], reach) : 0;
        }
#pragma unroll
        for (int step = 1; step < WARP; step <<= 1) {
            const int other = __shfl_up_sync(FULL_WARP, sum, step);
            if (lane >= step) sum += other;
        }
        __syncthreads();
        if (lane == WARP - 1) warp_sums[warp] = sum;
        __syncthreads();
        int total = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            if (w < warp) sum += warp_sums[w];
            total += warp_sums[w];
        }
        if (b < s.count) s.first_split[b + 1] = before + sum;
        before += total;
    }
    __syncthreads();
}

// One item: the tiles [tile, end) of one split, for one row tile of one KV head.
struct Item {
    int sequence, unit, split_count, split;  // split: counted from the first visible one
    int context, first, tile, end;
    bool valid;

    __device__ __forceinline__ Item(const Sequences& s, int index, int reach) {
        const int pair = index / UNITS;
        unit = index % UNITS;
        valid = pair < s.first_split[s.count];
        if (!valid) return;
        int low = 0, high = s.count;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (s.first_split[middle] <= pair) low = middle;
            else high = middle;
        }
        sequence = low;
        split = pair - s.first_split[low];
        split_count = s.first_split[low + 1] - s.first_split[low];
        context = s.context[low];
        first = first_visible(context - 1, reach);
        const int split_tile = (first / (TILE * SPLIT_TILES) + split) * SPLIT_TILES;
        tile = max(split_tile, first / TILE);
        end = min(split_tile + SPLIT_TILES, (context - 1) / TILE + 1);
    }
};

__device__ __forceinline__ void store_split(float* partial, const Rows<1>& rows, int num_rows) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = half * 8 + lane / 4;
        if (row >= num_rows) continue;
        float2* o = (float2*)(partial + row * HEAD_DIM) + lane % 4;
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; ++n)
            o[n * 4] = make_float2(rows.o[0][n][2 * half], rows.o[0][n][2 * half + 1]);
        float2* state = (float2*)(partial + ITEM_ROWS * HEAD_DIM) + row;
        if (lane % 4 == 0) *state = make_float2(rows.max[0][half], rows.sum[0][half]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    attention_decode(const f16* __restrict__ q, const f16* __restrict__ keys,
                     const f16* __restrict__ values, const i32* __restrict__ query_start,
                     const i32* __restrict__ context_lens, const i32* __restrict__ block_tables,
                     f16* __restrict__ out, int num_sequences, int max_blocks, int reach,
                     float scale, float* __restrict__ partials) {
    extern __shared__ __align__(128) char shared[];
    let_next_start();
    wait_for_previous();
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    const u32 stages = shared_address(shared) + warp * STAGES * STAGE_BYTES;
    int* lists = (int*)(shared + WARPS * STAGES * STAGE_BYTES);
    const Sequences sequences = {lists, lists + num_sequences + 1, num_sequences};
    count_splits(sequences, query_start, context_lens, reach);

    const int num_warps = gridDim.x * WARPS;
    int index = warp * gridDim.x + blockIdx.x;
    Item work(sequences, index, reach);
    Item ahead = work;  // the item whose tiles are being loaded
    int ahead_index = index;
    i32 ahead_blocks = 0;  // lane i: the cache block of its i-th tile
    int ahead_start = 0;
    const TileLoader<TILE> loader(0);
    auto look_up_blocks = [&] {
        ahead_start = ahead.tile;
        const int tile = ahead.tile + lane;
        if (ahead.valid && tile < ahead.end)
            ahead_blocks = block_tables[(size_t)ahead.sequence * max_blocks + tile];
    };
    int loaded = 0;
    auto load_next = [&] {
        if (ahead.valid) {
            const size_t block = __shfl_sync(FULL_WARP, ahead_blocks, ahead.tile - ahead_start);
            const int kv_head = ahead.unit / GROUP_TILES;
            const size_t offset = (block * NUM_KV_HEADS + kv_head) * TILE * HEAD_DIM;
            const u32 stage = stages + loaded % STAGES * STAGE_BYTES;
            loader.load(stage, keys + offset, ahead.context - ahead.tile * TILE);
            loader.load(stage + TILE_BYTES, values + offset, ahead.context - ahead.tile * TILE);
            ++loaded;
            if (++ahead.tile == ahead.end) {
                ahead_index += num_warps;
                ahead = Item(sequences, ahead_index, reach);
                look_up_blocks();
            }
        }
        copy_async_commit();
    };
    look_up_blocks();
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) load_next();

    int used = 0;
    for (; work.valid; index += num_warps, work = Item(sequences, index, reach)) {
        const int kv_head = work.unit / GROUP_TILES;
        const int first_row = work.unit % GROUP_TILES * 16;
        const int num_rows = min(16, GROUP - first_row);
        const size_t query = query_start[work.sequence];
        const size_t head = query * NUM_HEADS + kv_head * GROUP + first_row;
        Rows<1> rows;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = half * 8 + lane / 4;
            rows.load_q(0, half, row < num_rows ? q + (head + row) * HEAD_DIM : nullptr);
        }
        rows.start_split();
        for (int tile = work.tile; tile < work.end; ++tile, ++used) {
            copy_async_wait<STAGES - 2>();
            __syncwarp();  // this tile has landed, and no lane reads the stage about to be refilled
            load_next();
            const int base = tile * TILE;
            const bool all_visible = base >= work.first && base + TILE <= work.context;
            const u32 stage = stages + used % STAGES * STAGE_BYTES;
            auto visible = [&](int, int, int key) {
                return base + key >= work.first && base + key < work.context;
            };
            rows.attend(stage, stage + TILE_BYTES, all_visible, visible, scale);
        }
        rows.finish_split();

        if (work.split_count == 1) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = half * 8 + lane / 4;
                if (row < num_rows)
                    write_row(out + (head + row) * HEAD_DIM, rows.o[0], half, rows.sum[0][half]);
            }
            continue;
        }
        float* partial = partial_of(partials, work.sequence, work.split, work.unit, max_blocks);
        store_split(partial, rows, num_rows);
    }
}

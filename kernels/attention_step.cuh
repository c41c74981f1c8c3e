// attention_step.cuh: rotary embedding, cache and attention of a step's single queries, in one go
//
// computes:  rope_and_cache and attention_decode for sequences of one token. An item rotates its own
//            queries; the item of the newest position also rotates and caches the new key and value,
//            and puts them into its tile in shared memory. So nothing waits for the cache, and tiles
//            may be on their way before the queries are known
// mapping:   item = 16 rows of one KV head against one split of one sequence; warp w of the grid's
//            attending warps owns items w, w + W, …
// order:     see attention.cuh; merge_rows merges the splits

#ifndef STEP_STAGES
#define STEP_STAGES 4
#endif
constexpr int SCRATCH_ROWS = 18;            // 16 queries, the new key, the new value
constexpr u32 SCRATCH_BYTES = SCRATCH_ROWS * HEAD_DIM * 2;
constexpr u32 ATTENTION_WARP_BYTES = SCRATCH_BYTES + STEP_STAGES * STAGE_BYTES;

// A sequence of the step.
struct StepRow {
    int context, slot;
    float turn[HEAD_DIM];  // its position's row of rope_table
};

// What all layers of a step share.
struct Step {
    const StepRow* rows;  // in shared memory
    const i32* block_tables;
    f16* attended;
    float* partials;
    int num_sequences, max_blocks, reach;
    float scale;
};

// One layer's.
struct LayerCache {
    const f16* qkv;
    const float* bias;
    f16 *keys, *values;
};

struct StepItem {
    int index, sequence, kv_head, first_row, num_rows, context, split, tile, end;
    bool valid;

    __device__ __forceinline__ StepItem(const Step& step, int index) : index(index) {
        int left = index, count = 0;
        for (sequence = 0; sequence < step.num_sequences; ++sequence) {
            context = step.rows[sequence].context;
            count = num_splits(context, step.reach) * UNITS;
            if (left < count) break;
            left -= count;
        }
        valid = sequence < step.num_sequences;
        if (!valid) return;
        const int first = first_visible(context - 1, step.reach);
        kv_head = left % UNITS / GROUP_TILES;
        first_row = left % GROUP_TILES * 16;
        num_rows = min(16, GROUP - first_row);
        split = first / SPLIT + left / UNITS;
        tile = max(split * SPLIT_TILES, first / TILE);
        end = min((split + 1) * SPLIT_TILES, (context - 1) / TILE + 1);
    }
    __device__ __forceinline__ bool is_newest() const { return end * TILE >= context; }
};

// The tiles on their way: what the cache holds of them before this step.
struct StepStream {
    const Step& step;
    const LayerCache& cache;
    int stride;
    u32 stages;
    TileLoader<TILE> loader;
    StepItem item;  // whose tiles are being loaded
    i32 blocks;     // lane i: the cache block of its i-th tile
    int first, loaded;

    __device__ __forceinline__ StepStream(const Step& step, const LayerCache& cache, int index,
                                          int stride, u32 stages)
        : step(step), cache(cache), stride(stride), stages(stages), loader(0), item(step, index),
          blocks(0), loaded(0) {
        look_up_blocks();
#pragma unroll
        for (int i = 0; i < STEP_STAGES; ++i) {
            load_keys();
            load_values();
        }
    }
    __device__ __forceinline__ u32 stage(int tile) const {
        return stages + tile % STEP_STAGES * STAGE_BYTES;
    }
    __device__ __forceinline__ void look_up_blocks() {
        first = item.tile;
        const int tile = first + threadIdx.x % WARP;
        if (item.valid && tile < item.end)
            blocks = step.block_tables[(size_t)item.sequence * step.max_blocks + tile];
    }
    __device__ __forceinline__ void load(const f16* from, u32 target) const {
        const size_t block = __shfl_sync(FULL_WARP, blocks, item.tile - first);
        loader.load(target, from + (block * NUM_KV_HEADS + item.kv_head) * TILE * HEAD_DIM,
                    item.context - 1 - item.tile * TILE);
    }
    __device__ __forceinline__ void load_keys() {
        if (item.valid) load(cache.keys, stage(loaded));
        copy_async_commit();
    }
    __device__ __forceinline__ void load_values() {
        if (item.valid) {
            load(cache.values, stage(loaded) + TILE_BYTES);
            ++loaded;
            if (++item.tile == item.end) {
                item = StepItem(step, item.index + stride);
                look_up_blocks();
            }
        }
        copy_async_commit();
    }
    // What was loaded next is there, for all lanes.
    __device__ __forceinline__ void wait() const {
        copy_async_wait<2 * STEP_STAGES - 1>();
        __syncwarp();
    }
};

// The queries of an item into scratch, rotated; and of the newest item the key and value behind them
// and into the cache. One warp.
__device__ __forceinline__ void rotate(const Step& step, const LayerCache& cache,
                                       const StepItem& item, f16* scratch) {
    const int lane = threadIdx.x % WARP;
    const f16* qkv = cache.qkv + (size_t)item.sequence * HEADS * HEAD_DIM;
    const StepRow& own = step.rows[item.sequence];
    const int new_i = min(lane, HEAD_UNITS - 1) * 4;
    const int key_column = (NUM_HEADS + item.kv_head) * HEAD_DIM + new_i;
    const int value_column = key_column + NUM_KV_HEADS * HEAD_DIM;
    Pairs key(qkv + key_column, cache.bias + key_column);
    Pairs value(qkv + value_column, cache.bias + value_column);
#pragma unroll 1
    for (int unit = lane; unit < item.num_rows * HEAD_UNITS; unit += WARP) {
        const int i = unit % HEAD_UNITS * 4;
        const int row = unit / HEAD_UNITS;
        const int column = (item.kv_head * GROUP + item.first_row + row) * HEAD_DIM + i;
        Pairs query(qkv + column, cache.bias + column);
        query.rotate(own.turn + i);
        query.store(scratch + row * HEAD_DIM + i);
    }
    if (item.is_newest() && lane < HEAD_UNITS) {
        key.rotate(own.turn + new_i);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            move_overflow(value.low[j], key.low[j]);
            move_overflow(value.high[j], key.high[j]);
        }
        key.store(scratch + 16 * HEAD_DIM + new_i);
        value.store(scratch + 17 * HEAD_DIM + new_i);
        const size_t tile = (size_t)(own.slot / BLOCK_SIZE) * NUM_KV_HEADS + item.kv_head;
        const size_t place = (tile * BLOCK_SIZE + own.slot % BLOCK_SIZE) * HEAD_DIM + new_i;
        key.store(cache.keys + place);
        value.store(cache.values + place);
    }
    __syncwarp();
}

// A row of scratch into a tile; one warp.
__device__ __forceinline__ void put_row(char* tile, int row, const f16* source) {
    const int lane = threadIdx.x % WARP;
    if (lane < CHUNKS) *(uint4*)(tile + chunk_offset(row, lane)) = ((const uint4*)source)[lane];
    __syncwarp();
}

struct StepTurn {
    StepStream& stream;
    char* values;      // of the tile, if it is the newest
    const f16* value;  // what goes there
    int row;

    __device__ __forceinline__ void after_keys() const {
        __syncwarp();
        stream.load_keys();
    }
    __device__ __forceinline__ void before_values() const {
        stream.wait();
        if (values) put_row(values, row, value);
    }
};

// All items from the stream's first on. memory: of this warp, scratch before stages.
__device__ __forceinline__ void attend_items(StepStream& stream, int index, char* memory) {
    const Step& step = stream.step;
    f16* scratch = (f16*)memory;
    char* stages = memory + SCRATCH_BYTES;
    const int group_row = threadIdx.x % WARP / 4;
    int used = 0;
    for (StepItem item(step, index); item.valid; item = StepItem(step, item.index + stream.stride)) {
        rotate(step, stream.cache, item, scratch);
        Rows<1> rows;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = half * 8 + group_row;
            rows.load_q(0, half, row < item.num_rows ? scratch + row * HEAD_DIM : nullptr);
        }
        const int context = item.context;
        const int first = first_visible(context - 1, step.reach);
        rows.start_split();
        for (int tile = item.tile; tile < item.end; ++tile, ++used) {
            const int base = tile * TILE;
            const bool all_visible = base >= first && base + TILE <= context;
            auto visible = [&](int, int, int key) {
                return base + key >= first && base + key < context;
            };
            const u32 offset = used % STEP_STAGES * STAGE_BYTES;
            const bool is_newest = base + TILE >= context;
            const int row = (context - 1) % TILE;
            stream.wait();
            if (is_newest) put_row(stages + offset, row, scratch + 16 * HEAD_DIM);
            const StepTurn turn = {stream, is_newest ? stages + offset + TILE_BYTES : nullptr,
                                   scratch + 17 * HEAD_DIM, row};
            const u32 stage = stream.stage(used);
            rows.attend(stage, stage + TILE_BYTES, all_visible, visible, step.scale, turn);
            __syncwarp();
            stream.load_values();
        }
        rows.finish_split();
        const int split = item.split - first / SPLIT;  // counted from the first visible
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = half * 8 + group_row;
            if (row >= item.num_rows) continue;
            const int head = item.kv_head * GROUP + item.first_row + row;
            if (num_splits(context, step.reach) == 1) {
                f16* out = step.attended + ((size_t)item.sequence * NUM_HEADS + head) * HEAD_DIM;
                write_row(out, rows.o[0], half, rows.sum[0][half]);
                continue;
            }
            const int unit = item.kv_head * GROUP_TILES + item.first_row / 16;
            store_split(partial_of(step.partials, item.sequence, split, unit, step.max_blocks),
                        rows, half, row);
        }
        __syncwarp();
    }
}

// --- the splits put together, by all THREADS of the block ---------------------------------------

constexpr int ATTENDED = NUM_HEADS * HEAD_DIM;
constexpr int HELD_PAIRS = (ATTENDED / 2 + THREADS - 1) / THREADS;  // columns of a thread, by two
constexpr int MERGE_AHEAD = HELD_PAIRS <= 6 ? 3 : 1;                // splits under way at once

// Two floats, loaded where it says so and not where they are first used.
__device__ __forceinline__ float2 load_now(const float* from) {
    float2 value;
    asm volatile("ld.global.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "l"(from));
    return value;
}

// Row `sequence` of what attention leaves, fp16, to `target`.
__device__ __forceinline__ void merge_row(const Step& step, int sequence, u32* target) {
    const int split_count = num_splits(step.rows[sequence].context, step.reach);
    if (split_count < 2) {
        const u32* whole = (const u32*)(step.attended + (size_t)sequence * ATTENDED);
        for (int pair = threadIdx.x; pair < ATTENDED / 2; pair += THREADS) target[pair] = whole[pair];
        return;
    }
    const float* from[HELD_PAIRS];   // this pair of columns in the first split
    const float* state[HELD_PAIRS];
    Merged merged[HELD_PAIRS];
    float2 total[HELD_PAIRS] = {};
#pragma unroll
    for (int j = 0; j < HELD_PAIRS; ++j) {
        const int column = min((int)threadIdx.x + j * THREADS, ATTENDED / 2 - 1) * 2;
        const int head = column / HEAD_DIM;
        const int row = head % GROUP % 16;
        const int unit = head / GROUP * GROUP_TILES + head % GROUP / 16;
        const float* partial = partial_of(step.partials, sequence, 0, unit, step.max_blocks);
        from[j] = partial + row * HEAD_DIM + column % HEAD_DIM;
        state[j] = partial + ITEM_ROWS * HEAD_DIM + row * 2;
    }
    for (int start = 0; start < split_count; start += MERGE_AHEAD) {
        float2 o[HELD_PAIRS][MERGE_AHEAD], of[HELD_PAIRS][MERGE_AHEAD];  // output; maximum and sum
#pragma unroll
        for (int i = 0; i < MERGE_AHEAD; ++i) {
            const size_t split = min(start + i, split_count - 1) * UNITS * ITEM_FLOATS;
#pragma unroll
            for (int j = 0; j < HELD_PAIRS; ++j) {
                o[j][i] = load_now(from[j] + split);
                of[j][i] = load_now(state[j] + split);
            }
        }
#pragma unroll
        for (int i = 0; i < MERGE_AHEAD; ++i) {
            if (start + i >= split_count) break;
#pragma unroll
            for (int j = 0; j < HELD_PAIRS; ++j) {
                merged[j].take(of[j][i].x, of[j][i].y, step.scale);
                total[j].x = merged[j].value(total[j].x, o[j][i].x);
                total[j].y = merged[j].value(total[j].y, o[j][i].y);
            }
        }
    }
#pragma unroll
    for (int j = 0; j < HELD_PAIRS; ++j) {
        const int pair = threadIdx.x + j * THREADS;
        const float inverse = __frcp_rn(merged[j].sum);
        if (pair < ATTENDED / 2)
            target[pair] = to_f16x2(normalized(total[j].x, inverse), normalized(total[j].y, inverse));
    }
}

// attention_step.cuh: rotary embedding, cache and attention of a step's single queries, in one go
//
// computes:  rope_and_cache and attention_decode for sequences of one token. A team rotates an item's
//            queries; that of the newest position also rotates and caches the new key and value, and
//            puts them into its tile in shared memory. So nothing waits for the cache, and keys may be
//            on their way before the queries are known
// mapping:   item = 16 rows of one KV head against one split of one sequence, done by a team of
//            SPLIT_TILES warps: each scores a tile, then each owns some columns of the result. Team t
//            of the grid's owns items t, t + T, …; once it has left all of them it merges the splits of
//            some heads
// order:     see attention.cuh: the split's maxima and sums run over its tiles in order, whoever scored
//            them, and each column of o is the same chain. Splits merge as in attention_merge

// This thread's index in its team, worked out anew wherever it is asked for: what depends on it would
// otherwise be kept in registers through all products.
__device__ __forceinline__ int team_thread() {
    int index;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
    return index % (SPLIT_TILES * WARP);
}

constexpr int TEAM_WARPS = SPLIT_TILES;
constexpr int TEAM_THREADS = TEAM_WARPS * WARP;
constexpr int TEAMS = THREADS / TEAM_THREADS;                // of a block, at most
constexpr int OWNED_TILES = (COLUMN_TILES + TEAM_WARPS - 1) / TEAM_WARPS;  // of a warp, of 8 columns
constexpr u32 TEAM_TILES_BYTES = SPLIT_TILES * TILE_BYTES;  // keys, then values

// What a team shares besides its tiles.
struct TeamMemory {
    uint4 weights[SPLIT_TILES][TILE / 16][WARP];  // of 16 keys, as a lane gives them to mma
    float added[SPLIT_TILES][2][WARP];            // each lane's share of a tile's sum, by `half`
    float top[SPLIT_TILES][16];                   // a tile's maximum, by row
    f16 queries[16][HEAD_DIM], key[HEAD_DIM], value[HEAD_DIM];
};

// A sequence of the step.
struct StepRow {
    alignas(16) float turn[HEAD_DIM];  // its position's row of rope_table
    int context, slot;
};

// What all layers of a step share.
struct Step {
    const StepRow* rows;  // in shared memory
    const i32* block_tables;
    u64 *attended, *partials;  // packets: of two fp16 columns; of what attention_partials.cuh lays out
    int num_sequences, max_blocks, reach;
    float scale;
};

// One layer's.
struct LayerCache {
    const u64* qkv;  // packets of two columns
    const float* bias;
    f16 *keys, *values;
    u32 tag;         // of qkv; the next one is attention's own
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

__device__ __forceinline__ const f16* tile_of(const Step& step, const StepItem& item,
                                              const f16* cache, int tile) {
    const size_t block = step.block_tables[(size_t)item.sequence * step.max_blocks + tile];
    return cache + (block * NUM_KV_HEADS + item.kv_head) * TILE * HEAD_DIM;
}

// A team's keys or values on their way: what the cache holds of them before this step. Warp w loads
// the w-th tile.
__device__ __forceinline__ void load_tiles(const Step& step, const StepItem& item, const f16* from,
                                           u32 tiles) {
    const int warp = team_thread() / WARP;
    const int tile = item.tile + warp;
    if (item.valid && tile < item.end) {
        const TileLoader<TILE> loader(team_thread() >> 30);  // 0, but not known to be
        loader.load(tiles + warp * TILE_BYTES, tile_of(step, item, from, tile),
                    item.context - 1 - tile * TILE);
    }
    copy_async_commit();
}

// Four floats, loaded where it says so and not where they are first used.
__device__ __forceinline__ float4 load_now(const float* from) {
    float4 value;
    asm volatile("ld.global.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
                 : "l"(from));
    return value;
}

__device__ __forceinline__ Pairs unpack(const TwoPackets& low, const TwoPackets& high,
                                        const float4& low_bias, const float4& high_bias) {
    Pairs pairs;
    Pairs::load(pairs.low, make_uint2(low.value(0), low.value(1)), low_bias);
    Pairs::load(pairs.high, make_uint2(high.value(0), high.value(1)), high_bias);
    return pairs;
}

// A unit of an item's queries, or of its key and its value, and where its 4 quads of columns lie.
struct Unit {
    int row, i, columns[4];
    bool is_key;

    __device__ __forceinline__ Unit(const StepItem& item, int unit)
        : row(unit / HEAD_UNITS), i(unit % HEAD_UNITS * 4), is_key(row == item.num_rows) {
        const int head = is_key ? NUM_HEADS + item.kv_head
                                : item.kv_head * GROUP + item.first_row + row;
        columns[0] = head * HEAD_DIM + i;
        columns[1] = columns[0] + HALF;
        columns[2] = columns[0] + (is_key ? NUM_KV_HEADS * HEAD_DIM : 0);
        columns[3] = columns[2] + HALF;
    }
    static __device__ __forceinline__ int count(const StepItem& item) {
        return (item.num_rows + item.is_newest()) * HEAD_UNITS;
    }
};

// Keys of an item to shared memory, its values and biases to the L2 cache.
__device__ __forceinline__ void prefetch(const Step& step, const LayerCache& cache, int index,
                                         u32 tiles) {
    const StepItem item(step, index);
    load_tiles(step, item, cache.keys, tiles);
    if (!item.valid) return;
    const int tile = item.tile + team_thread() / WARP;
    if (tile < item.end && team_thread() % WARP == 0)
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(
                         tile_of(step, item, cache.values, tile)),
                     "n"(TILE_BYTES)
                     : "memory");
    for (int i = team_thread(); i < Unit::count(item); i += TEAM_THREADS) {
        const Unit unit(item, i);
#pragma unroll
        for (int column : unit.columns)
            asm volatile("prefetch.global.L2 [%0];" ::"l"(cache.bias + column));
    }
}

// The queries of an item into the team's memory, rotated; and of the newest item the key and value,
// which go into the cache as well.
__device__ __forceinline__ void rotate(const Step& step, const LayerCache& cache,
                                       const StepItem& item, TeamMemory& memory) {
    const u64* qkv = cache.qkv + (size_t)item.sequence * (HEADS * HEAD_DIM / 2);
    const StepRow& own = step.rows[item.sequence];
#pragma unroll 1
    for (int index = team_thread(); index < Unit::count(item); index += TEAM_THREADS) {
        const Unit unit(item, index);
        const int i = unit.i;
        float4 bias[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) bias[j] = load_now(cache.bias + unit.columns[j]);
        TwoPackets two[4];
        take_packets(two, cache.tag, [&](int j) { return qkv + unit.columns[j] / 2; });
        Pairs turned = unpack(two[0], two[1], bias[0], bias[1]);
        turned.rotate(own.turn + i);
        if (!unit.is_key) {
            turned.store(memory.queries[unit.row] + i);
            continue;
        }
        Pairs value = unpack(two[2], two[3], bias[2], bias[3]);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            move_overflow(value.low[j], turned.low[j]);
            move_overflow(value.high[j], turned.high[j]);
        }
        turned.store(memory.key + i);
        value.store(memory.value + i);
        const size_t tile = (size_t)(own.slot / BLOCK_SIZE) * NUM_KV_HEADS + item.kv_head;
        const size_t target = (tile * BLOCK_SIZE + own.slot % BLOCK_SIZE) * HEAD_DIM + i;
        turned.store(cache.keys + target);
        value.store(cache.values + target);
    }
}

// The newest row of a tile; one warp.
__device__ __forceinline__ void put_row(char* tile, int row, const f16* source) {
    const int lane = team_thread() % WARP;
    if (lane < CHUNKS) *(uint4*)(tile + chunk_offset(row, lane)) = ((const uint4*)source)[lane];
    __syncwarp();
}

// Where one split of one sequence and unit lies among the partials.
__device__ __forceinline__ int split_place(const Step& step, int sequence, int split, int unit) {
    const int max_splits = (step.max_blocks + SPLIT_TILES - 1) / SPLIT_TILES;
    return ((sequence * max_splits + split) * UNITS + unit) * ITEM_FLOATS;
}

// A split's running maximum and sum, of rows g and g + 8 of a quad's lanes, tile by tile.
struct Running {
    float max[2] = {minus_infinity(), minus_infinity()}, sum[2] = {}, origin[2], keep[2];

    __device__ __forceinline__ void take(const TeamMemory& memory, int tile, float scale) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float top = fmaxf(max[half], memory.top[tile][half * 8 + team_thread() % WARP / 4]);
            origin[half] = top == minus_infinity() ? 0.0f : top;
            keep[half] = exp2_hardware(__fmul_rn(__fsub_rn(max[half], origin[half]), scale));
            max[half] = top;
        }
    }
    __device__ __forceinline__ void add(const TeamMemory& memory, int tile) {
#pragma unroll
        for (int half = 0; half < 2; ++half)
            sum[half] = __fmaf_rn(sum[half], keep[half], memory.added[tile][half][team_thread() % WARP]);
    }
    // The row's sum over the split, in every lane of its quad.
    __device__ __forceinline__ void finish() {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float x = __fadd_rn(sum[half], __shfl_xor_sync(FULL_WARP, sum[half], 1));
            sum[half] = __fadd_rn(x, __shfl_xor_sync(FULL_WARP, x, 2));
        }
    }
};

// One warp's tile: its keys' scores and their maxima.
struct TileScores {
    float s[1][TILE / 8][4];

    __device__ __forceinline__ void score(const Step& step, const StepItem& item, int tile, u32 keys,
                                          TeamMemory& memory, int index) {
        const int g = team_thread() % WARP / 4;
        Rows<1> rows;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = half * 8 + g;
            rows.load_q(0, half, row < item.num_rows ? memory.queries[row] : nullptr);
        }
        rows.score(s, keys);
        const int base = tile * TILE, first = first_visible(item.context - 1, step.reach);
        auto visible = [&](int, int key) {
            return base + key >= first && base + key < item.context;
        };
        if (base < first || base + TILE > item.context) mask(s[0], visible);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float top = minus_infinity();
#pragma unroll
            for (int n = 0; n < TILE / 8; ++n)
                top = fmaxf(top, fmaxf(s[0][n][2 * half], s[0][n][2 * half + 1]));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 1));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2));
            if (team_thread() % 4 == 0) memory.top[index][half * 8 + g] = top;
        }
    }

    // Once all maxima are there: the weights of the tile.
    __device__ __forceinline__ void weigh(const Step& step, TeamMemory& memory, int index) {
        const int lane = team_thread() % WARP;
        Running running;
        for (int i = 0; i <= index; ++i) running.take(memory, i, step.scale);
        u32 p[TILE / 8][2];
#pragma unroll
        for (int half = 0; half < 2; ++half)
            memory.added[index][half][lane] =
                Rows<1>::weigh(s[0], p, half, running.origin[half], step.scale);
#pragma unroll
        for (int k = 0; k < TILE / 16; ++k)
            memory.weights[index][k][lane] =
                make_uint4(p[2 * k][0], p[2 * k][1], p[2 * k + 1][0], p[2 * k + 1][1]);
    }
};

// One warp's columns of the result: every TEAM_WARPS-th 8.
struct OwnedColumns {
    float o[OWNED_TILES][4];
    int warp;

    // values: the team's tiles of the split.
    __device__ __forceinline__ OwnedColumns(const Step& step, const TeamMemory& memory, u32 values,
                                            int num_tiles, Running& running)
        : o(), warp(team_thread() / WARP) {
        const int lane = team_thread() % WARP;
        for (int tile = 0; tile < num_tiles; ++tile) {
            running.take(memory, tile, step.scale);
            running.add(memory, tile);
#pragma unroll
            for (int j = 0; j < OWNED_TILES; ++j)
#pragma unroll
                for (int v = 0; v < 4; ++v) o[j][v] = __fmul_rn(o[j][v], running.keep[v / 2]);
#pragma unroll
            for (int k = 0; k < TILE / 16; k += 2) {
                const uint4 even = memory.weights[tile][k][lane];
                const uint4 odd = memory.weights[tile][k + 1][lane];
                const u32 a[2][4] = {{even.x, even.y, even.z, even.w}, {odd.x, odd.y, odd.z, odd.w}};
#pragma unroll
                for (int j = 0; j < OWNED_TILES; ++j) {
                    u32 b[4];
                    const u32 from = chunk_offset(k * 16 + lane, min(column_tile(j), CHUNKS - 1));
                    load_matrix_x4_transposed(b, values + tile * TILE_BYTES + from);
                    mma_k16(o[j], a[0], b[0], b[1]);
                    mma_k16(o[j], a[1], b[2], b[3]);
                }
            }
        }
    }

    __device__ __forceinline__ int column_tile(int j) const { return warp + j * TEAM_WARPS; }

    // Row `half` as a split among others, unnormalized; row: of the item.
    __device__ __forceinline__ void leave_split(u64* split, int row, int half, const Running& running,
                                                u32 tag) const {
        const int t = team_thread() % 4;
#pragma unroll
        for (int j = 0; j < OWNED_TILES; ++j)
            if (column_tile(j) < COLUMN_TILES)
                put_two(split + row * HEAD_DIM + column_tile(j) * 8 + t * 2, o[j][2 * half],
                        o[j][2 * half + 1], tag);
        if (warp == 0 && t == 0)
            put_two(split + ITEM_ROWS * HEAD_DIM + row * 2, running.max[half], running.sum[half], tag);
    }

    // Row `half` as all there is, normalized; row: the head's attended packets.
    __device__ __forceinline__ void leave_row(u64* row, int half, const Running& running,
                                              u32 tag) const {
        const float inverse = __frcp_rn(running.sum[half]);
#pragma unroll
        for (int j = 0; j < OWNED_TILES; ++j)
            if (column_tile(j) < COLUMN_TILES)
                put_packet(row + column_tile(j) * 4 + team_thread() % 4,
                           to_f16x2(normalized(o[j][2 * half], inverse),
                                    normalized(o[j][2 * half + 1], inverse)),
                           tag);
    }
};

// All items of a team from `index` on, whose keys have been prefetched. tiles, memory: the team's.
// Team::wait(): its threads wait for each other.
template <class Team>
__device__ __forceinline__ void attend_items(const Step& step, const LayerCache& cache, int index,
                                             int stride, char* tiles, TeamMemory& memory,
                                             const Team& team) {
    const int warp = team_thread() / WARP;
    char* const own = tiles + warp * TILE_BYTES;
    const u32 tag = cache.tag + 1;
#pragma unroll 1
    for (StepItem item(step, index); item.valid; item = StepItem(step, item.index + stride)) {
        const int tile = item.tile + warp;
        const int newest_row = (tile + 1) * TILE >= item.context ? (item.context - 1) % TILE : -1;
        rotate(step, cache, item, memory);
        copy_async_wait<0>();
        team.wait();
        TileScores scores;
        if (tile < item.end) {
            if (newest_row >= 0) put_row(own, newest_row, memory.key);
            scores.score(step, item, tile, shared_address(own), memory, warp);
        }
        team.wait();
        load_tiles(step, item, cache.values, shared_address(tiles));
        if (tile < item.end) scores.weigh(step, memory, warp);
        copy_async_wait<0>();
        __syncwarp();
        if (tile < item.end && newest_row >= 0) put_row(own, newest_row, memory.value);
        team.wait();
        Running running;
        const OwnedColumns columns(step, memory, shared_address(tiles), item.end - item.tile, running);
        running.finish();
        const int split = item.split - first_visible(item.context - 1, step.reach) / SPLIT;
        const int unit = item.kv_head * GROUP_TILES + item.first_row / 16;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = half * 8 + team_thread() % WARP / 4;
            if (row >= item.num_rows) continue;
            const size_t head = item.sequence * NUM_HEADS + item.kv_head * GROUP + item.first_row + row;
            if (num_splits(item.context, step.reach) == 1)
                columns.leave_row(step.attended + head * (HEAD_DIM / 2), half, running, tag);
            else
                columns.leave_split(step.partials + split_place(step, item.sequence, split, unit), row,
                                    half, running, tag);
        }
        team.wait();
        prefetch(step, cache, item.index + stride, shared_address(tiles));
    }
}

// --- the splits put together ------------------------------------------------------------------------

constexpr int ATTENDED = NUM_HEADS * HEAD_DIM;
constexpr int MERGE_AHEAD = 4;  // splits asked for at once

// One head of one sequence, by a team, a thread having 4 of its columns.
__device__ __forceinline__ void merge_head(const Step& step, int sequence, int head, u32 tag) {
    const int split_count = num_splits(step.rows[sequence].context, step.reach);
    const int column = team_thread() * 4;
    if (split_count < 2 || column >= HEAD_DIM) return;
    const int row = head % GROUP % 16;
    const u64* split = step.partials + split_place(step, sequence, 0,
                                                   head / GROUP * GROUP_TILES + head % GROUP / 16);
    Merged merged;
    float total[4] = {};
    for (int start = 0; start < split_count; start += MERGE_AHEAD) {
        const int count = min(split_count - start, MERGE_AHEAD);
        TwoPackets two[MERGE_AHEAD * 3];  // of each split: maximum and sum, columns
        auto from = [&](int i) {
            const int place = i % 3 == 0 ? ITEM_ROWS * HEAD_DIM + row * 2
                                         : row * HEAD_DIM + column + (i % 3 - 1) * 2;
            return split + i / 3 * (UNITS * ITEM_FLOATS) + place;
        };
        take_packets(two, tag, from, count * 3);
#pragma unroll
        for (int i = 0; i < MERGE_AHEAD; ++i) {
            if (i >= count) break;
            const TwoPackets* of = two + i * 3;
            merged.take(as_float(of[0].value(0)), as_float(of[0].value(1)), step.scale);
#pragma unroll
            for (int v = 0; v < 4; ++v)
                total[v] = merged.value(total[v], as_float(of[1 + v / 2].value(v % 2)));
        }
        split += MERGE_AHEAD * UNITS * ITEM_FLOATS;
    }
    const float inverse = __frcp_rn(merged.sum);
#pragma unroll
    for (int v = 0; v < 4; ++v) total[v] = normalized(total[v], inverse);
    put_two(step.attended + ((size_t)sequence * NUM_HEADS + head) * (HEAD_DIM / 2) + column / 2,
            to_f16x2(total[0], total[1]), to_f16x2(total[2], total[3]), tag);
}

// The heads of team `index` of `count`: counted from the last team, as the first have more items.
__device__ __forceinline__ void merge_heads(const Step& step, int index, int count, u32 tag) {
    for (int i = count - 1 - index; i < step.num_sequences * NUM_HEADS; i += count)
        merge_head(step, i / NUM_HEADS, i % NUM_HEADS, tag);
}

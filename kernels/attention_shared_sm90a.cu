// attention_shared_sm90a: decode attention over the splits that sequences share, each read once
//
// computes:  see attention.cuh; leaves partials, or the output where a row sees one split only
// layout:    see attention.cuh, attention_partials.cuh and, for the chunks, attention_decode.cu
// mapping:   item = 64 rows of a chunk's KV head against its split. A block per SM has a team for every
//            four of WARPS: they own 64 rows, products by wgmma with q and the weights in registers,
//            and a scout, one warp, looks up their next item and has its queries copied. One more
//            warp has the copy engine load keys and values ahead, each team's into a ring of its own
// macros:    those of attention.cuh (WARPS: of rows, 8 or 12), STAGES (tiles of keys or values of a
//            team)
// bound by:  bytes of keys and values
// order:     see attention.cuh; a chain of wgmma has the bits of one of mma.sync on an H200
// architectures: sm_90a
// generic twin: attention_decode, which takes the chunks as items of 16 rows
// compile:   NUM_HEADS=32 NUM_KV_HEADS=32 HEAD_DIM=96 WARPS=12 STAGES=5 MIN_BLOCKS=1
//            | NUM_HEADS=14 NUM_KV_HEADS=2 HEAD_DIM=64 WARPS=12 STAGES=8 MIN_BLOCKS=1
//            | NUM_HEADS=32 NUM_KV_HEADS=8 HEAD_DIM=128 WARPS=8 STAGES=6 MIN_BLOCKS=1
// spills:    none

#include "attention.cuh"
#include "attention_partials.cuh"
#include "attention_warpgroup.cuh"

constexpr int TEAMS = WARPS / 4;
constexpr int CHUNK_ROWS = CHUNK_MEMBERS * GROUP;  // of a KV head
constexpr int BLOCK_ROWS = CHUNK_ROWS < 64 ? CHUNK_ROWS : 64;
constexpr int ROW_BLOCKS = (CHUNK_ROWS + BLOCK_ROWS - 1) / BLOCK_ROWS;
constexpr u32 ROW_BYTES = HEAD_DIM * 2;
static_assert(TEAMS == 2 || TEAMS == 3, "the scouts and the loader are one group of four warps");
static_assert(CHUNK_MEMBERS == WARP, "a lane of a scout looks up one member");

// Registers are moved between whole groups of four warps.
constexpr int OTHER_THREADS = 4 * WARP;
constexpr int ROW_REGISTERS = WARPS == 8 ? 224 : 152;
constexpr int OTHER_REGISTERS = 56;

// What is known of an item. num_rows: from first_row on; 0 when there is no item.
struct Item {
    int num_rows, first_row, kv_head, split;
    int blocks[SPLIT_TILES];
    int sequence[CHUNK_MEMBERS], query[CHUNK_MEMBERS], context[CHUNK_MEMBERS];
};

// A team's tiles, keys and values in turn; its items, in turn; the queries of one.
struct Desk {
    u64 full[STAGES], empty[STAGES];
    u64 item_full[2], item_empty[2], queries_full, queries_empty;
    Item items[2];
};

static_assert(sizeof(Desk) <= 1024, "attention.py leaves no more room");

// The place of a team's next tile. Every warp of the team waits for every one in turn, so that none
// takes a turn of the ring for the one after next.
struct Place {
    u32 slots, full, empty;
    Ring<STAGES> ring;

    __device__ __forceinline__ Place(u32 slots, const Desk& desk)
        : slots(slots), full(shared_address(desk.full)), empty(shared_address(desk.empty)) {}

    __device__ __forceinline__ u32 slot() const { return slots + ring.place() * TILE_BYTES; }
    __device__ __forceinline__ u32 full_barrier() const { return full + ring.place() * 8; }
    __device__ __forceinline__ u32 empty_barrier() const { return empty + ring.place() * 8; }
    __device__ __forceinline__ void wait() const { wait_for(full_barrier(), ring.round()); }
    __device__ __forceinline__ void release() {
        if (threadIdx.x % WARP == 0) arrive(empty_barrier());
        ++ring.count;
    }
};

// Bytes that lie side by side: a multiple of 16, and both addresses, too.
__device__ __forceinline__ void copy_bytes(u32 shared, const void* global, u32 bytes, u32 barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(shared),
        "l"(global), "r"(bytes), "r"(barrier)
        : "memory");
}

// --- scouts ----------------------------------------------------------------------------------------

struct Batch {
    const i32 *query_start, *context_lens, *block_tables;
    int max_blocks;
    const i32 *members, *chunk_start, *chunk_split;
};

// An item as a scout looks it up: each lane one member, and the cache block of one tile.
struct Lookup {
    int index, num_rows, split, sequence, query, context;
    i32 block;

    __device__ __forceinline__ Lookup(int index, int num_items, const Batch& batch)
        : index(index), num_rows(0), split(0), sequence(0), query(0), context(0), block(0) {
        if (index >= num_items) return;
        const int lane = threadIdx.x % WARP;
        const int chunk = index / (NUM_KV_HEADS * ROW_BLOCKS);
        const int start = batch.chunk_start[chunk];
        const int count = batch.chunk_start[chunk + 1] - start;
        num_rows = min(count * GROUP - index % ROW_BLOCKS * BLOCK_ROWS, BLOCK_ROWS);
        sequence = batch.members[start + min(lane, count - 1)];
        split = batch.chunk_split[chunk];
        const int tile = split * SPLIT_TILES + lane % SPLIT_TILES;
        block = batch.block_tables[(size_t)sequence * batch.max_blocks + tile];
        query = batch.query_start[sequence];
        context = batch.context_lens[sequence];
    }

    __device__ __forceinline__ int first_row() const { return index % ROW_BLOCKS * BLOCK_ROWS; }
    __device__ __forceinline__ int kv_head() const { return index / ROW_BLOCKS % NUM_KV_HEADS; }

    __device__ __forceinline__ void tell(Item& item) const {
        const int lane = threadIdx.x % WARP;
        item.sequence[lane] = sequence;
        item.query[lane] = query;
        item.context[lane] = context;
        // What the loader reads is written by the lane that arrives, and given back by every lane that
        // has read it: racecheck follows barriers lane by lane.
        int blocks[SPLIT_TILES];
#pragma unroll
        for (int i = 0; i < SPLIT_TILES; ++i) blocks[i] = __shfl_sync(FULL_WARP, block, i);
        if (lane == 0) {
#pragma unroll
            for (int i = 0; i < SPLIT_TILES; ++i) item.blocks[i] = blocks[i];
            item.num_rows = max(num_rows, 0);
            item.first_row = first_row();
            item.kv_head = kv_head();
            item.split = split;
        }
    }

    // Each lane has its member's rows copied, as far as they are among the item's.
    __device__ __forceinline__ void copy_queries(u32 queries, const f16* q, u32 barrier) const {
        const int lane = threadIdx.x % WARP;
        if (lane == 0) arrive_expecting(barrier, num_rows * ROW_BYTES);
        __syncwarp();
        const int from = max(lane * GROUP, first_row());
        const int to = min((lane + 1) * GROUP, first_row() + num_rows);
        if (from >= to) return;
        const size_t head = kv_head() * GROUP + from - lane * GROUP;
        copy_bytes(queries + (from - first_row()) * ROW_BYTES,
                   q + ((size_t)query * NUM_HEADS + head) * HEAD_DIM, (to - from) * ROW_BYTES,
                   barrier);
    }
};

// Items of no rows, in chunks of few members, are passed on like others but for their queries.
__device__ __forceinline__ void scout_all(Desk& desk, u32 queries, const f16* q, Lookup at,
                                          int num_items, const Batch& batch) {
    Ring<2> turn;
    Ring<1> read;
    while (true) {
        wait_for(shared_address(&desk.item_empty[turn.place()]), turn.round() ^ 1);
        const bool is_end = at.index >= num_items;
        at.tell(desk.items[turn.place()]);
        if (is_end && threadIdx.x % WARP == 0) desk.items[turn.place()].num_rows = -1;
        __syncwarp();
        if (threadIdx.x % WARP == 0) arrive(shared_address(&desk.item_full[turn.place()]));
        if (is_end) return;
        ++turn.count;
        if (at.num_rows > 0) {
            wait_for(shared_address(&desk.queries_empty), read.round() ^ 1);
            at.copy_queries(queries, q, shared_address(&desk.queries_full));
            ++read.count;
        }
        at = Lookup(at.index + gridDim.x * TEAMS, num_items, batch);
    }
}

// --- the loading warp --------------------------------------------------------------------------------

// A tile, the whole cache's rows from `row` on, by the copy engine.
__device__ __forceinline__ void load(const TensorMap& map, int row, const Place& place) {
    wait_for(place.empty_barrier(), place.ring.round() ^ 1);
    if (threadIdx.x % WARP == 0) {
        arrive_expecting(place.full_barrier(), TILE_BYTES);
#pragma unroll
        for (int panel = 0; panel < CHUNKS / SPAN; ++panel)
            copy_box(place.slot() + panel * PANEL_BYTES, map, panel * SPAN * 8, row,
                     place.full_barrier());
    }
    __syncwarp();
}

// In place of a tile of an item without rows.
__device__ __forceinline__ void load_nothing(const Place& place) {
    wait_for(place.empty_barrier(), place.ring.round() ^ 1);
    if (threadIdx.x % WARP == 0) arrive(place.full_barrier());
    __syncwarp();
}

// Of every team's item the first keys and values, then of every team's the second, and so on.
__device__ __forceinline__ void load_all(Desk* desks, u32 slots, const TensorMap& keys_map,
                                         const TensorMap& values_map) {
    static_assert(TEAMS * SPLIT_TILES <= WARP, "a lane looks up one tile");
    const int lane = threadIdx.x % WARP;
    Ring<2> turn;
    Ring<STAGES> ring;  // of all teams
    u32 ended = 0;
    for (;; ++turn.count) {
        int row = -1;  // lane team * SPLIT_TILES + tile: the tile's first, where it has rows
        for (int team = 0; team < TEAMS; ++team) {
            if (ended >> team & 1) continue;
            wait_for(shared_address(&desks[team].item_full[turn.place()]), turn.round());
            const Item& item = desks[team].items[turn.place()];
            if (item.num_rows < 0) ended |= 1u << team;
            if (item.num_rows > 0 && lane / SPLIT_TILES == team)
                row = (item.blocks[lane % SPLIT_TILES] * NUM_KV_HEADS + item.kv_head) * TILE;
            arrive(shared_address(&desks[team].item_empty[turn.place()]));
        }
        if (ended == (1u << TEAMS) - 1) return;
#pragma unroll 1
        for (int tile = 0; tile < SPLIT_TILES; ++tile, ring.count += 2)
#pragma unroll 1
            for (int team = 0; team < TEAMS; ++team) {
                if (ended >> team & 1) continue;
                Place place(slots + team * STAGES * TILE_BYTES, desks[team]);
                place.ring = ring;
                const int first = __shfl_sync(FULL_WARP, row, team * SPLIT_TILES + tile);
                if (first >= 0) load(keys_map, first, place);
                else load_nothing(place);
                ++place.ring.count;
                if (first >= 0) load(values_map, first, place);
                else load_nothing(place);
            }
    }
}

// --- teams -------------------------------------------------------------------------------------------

// A lane's row `half` of an item: one head of one sequence.
struct Row {
    int head, sequence, query, context, first;
    bool exists;

    __device__ __forceinline__ Row(const Item& item, int half, int reach) {
        const int own = threadIdx.x / WARP % 4 * 16 + half * 8 + threadIdx.x % WARP / 4;
        exists = own < item.num_rows;
        const int row = exists ? item.first_row + own : 0;
        head = row % GROUP;
        sequence = item.sequence[row / GROUP];
        query = item.query[row / GROUP];
        context = item.context[row / GROUP];
        first = first_visible(context - 1, reach);
    }
};

__device__ __forceinline__ void skip_item(Place& tiles) {
    for (int tile = 0; tile < 2 * SPLIT_TILES; ++tile) {
        tiles.wait();
        __syncwarp();
        tiles.release();
    }
}

// One item for one warp: 16 of its rows.
__device__ __forceinline__ void attend(const Item& item, WarpRows& rows, Place& tiles, f16* out,
                                       float* partials, int max_blocks, int reach, float scale) {
    const int first = __reduce_max_sync(
        FULL_WARP, max(Row(item, 0, reach).first, Row(item, 1, reach).first));
    rows.start_split();
    const bool has_rows = threadIdx.x / WARP % 4 * 16 < item.num_rows;

    const int base = item.split * SPLIT;
#pragma unroll 1
    for (int key = base; key < base + SPLIT; key += TILE) {
        tiles.wait();
        rows.clear_scores();
        begin_products();
        rows.multiply_keys(tiles.slot());
        wait_for_products<0>();
        touch(rows.s);
        tiles.release();
        if (!has_rows) {
            rows.clear_weights();
        } else {
            if (key < first) {
                const int own[2] = {Row(item, 0, reach).first, Row(item, 1, reach).first};
                mask(rows.s, [&](int half, int i) { return key + i >= own[half]; });
            }
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float top = tile_maximum(rows.s, half, rows.max[half]);
                top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 1));
                top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2));
                const float keep = weigh(rows.s, half, top, rows.max[half], rows.sum[half], scale);
                if (key > base) rescale(rows.o, half, keep);
            }
            rows.pack_weights();
        }
        tiles.wait();
        touch(rows.p);
        touch(rows.o);
        begin_products();
        rows.multiply_values(tiles.slot(), key > base);
        wait_for_products<0>();
        touch(rows.p);
        touch(rows.o);
        tiles.release();
    }
    if (!has_rows) return;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const Row row(item, half, reach);
        const float sum = quad_sum(rows.sum[half]);
        const int split = item.split - row.first / SPLIT;  // counted from the first visible
        if (!row.exists || split < 0) continue;
        if (num_splits(row.context, reach) == 1) {
            const size_t head = item.kv_head * GROUP + row.head;
            write_row(out + ((size_t)row.query * NUM_HEADS + head) * HEAD_DIM, rows.o, half, sum);
            continue;
        }
        const int unit = item.kv_head * GROUP_TILES + row.head / 16;
        store_row(partial_of(partials, row.sequence, split, unit, max_blocks), rows.o, half,
                  row.head % 16, rows.max[half], sum);
    }
}

__device__ __forceinline__ void attend_all(Desk& desk, Place tiles, const f16* queries, f16* out,
                                           float* partials, int max_blocks, int reach,
                                           float scale) {
    const int lane = threadIdx.x % WARP;
    Ring<2> turn;
    Ring<1> read;
    for (;; ++turn.count) {
        wait_for(shared_address(&desk.item_full[turn.place()]), turn.round());
        const Item& item = desk.items[turn.place()];
        if (item.num_rows < 0) return;
        if (item.num_rows == 0) {
            skip_item(tiles);
        } else {
            wait_for(shared_address(&desk.queries_full), read.round());
            ++read.count;
            WarpRows rows;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int own = threadIdx.x / WARP % 4 * 16 + half * 8 + lane / 4;
                const bool exists = own < item.num_rows;
                rows.load_q(half, exists ? queries + own * HEAD_DIM : nullptr);
            }
            __syncwarp();
            if (lane == 0) arrive(shared_address(&desk.queries_empty));
            attend(item, rows, tiles, out, partials, max_blocks, reach, scale);
        }
        __syncwarp();
        if (lane == 0) arrive(shared_address(&desk.item_empty[turn.place()]));
    }
}

__device__ __forceinline__ void init_barriers(Desk& desk) {
    for (int i = 0; i < STAGES; ++i) {
        init_barrier(shared_address(&desk.full[i]), 1);
        init_barrier(shared_address(&desk.empty[i]), 4);
    }
    for (int i = 0; i < 2; ++i) {
        init_barrier(shared_address(&desk.item_full[i]), 1);
        init_barrier(shared_address(&desk.item_empty[i]), 4 + WARP);  // team's warps, loader's lanes
    }
    init_barrier(shared_address(&desk.queries_full), 1);
    init_barrier(shared_address(&desk.queries_empty), 4);
}

extern "C" __global__ void __launch_bounds__(THREADS + OTHER_THREADS, MIN_BLOCKS)
    attention_shared_sm90a(const __grid_constant__ TensorMap keys_map,
                           const __grid_constant__ TensorMap values_map,
                           const f16* __restrict__ q, const i32* __restrict__ query_start,
                           const i32* __restrict__ context_lens,
                           const i32* __restrict__ block_tables, f16* __restrict__ out,
                           int max_blocks, int reach, float scale, float* __restrict__ partials,
                           const i32* num_chunks,  // restrict would let its load move
                           const i32* __restrict__ members, const i32* __restrict__ chunk_start,
                           const i32* __restrict__ chunk_split) {
    extern __shared__ __align__(1024) char dynamic[];
    const u32 slots = shared_address(dynamic);
    f16* const queries = (f16*)(dynamic + TEAMS * STAGES * TILE_BYTES);
    Desk* const desks = (Desk*)(queries + TEAMS * BLOCK_ROWS * HEAD_DIM);
    if (threadIdx.x == 0) {
        for (int team = 0; team < TEAMS; ++team) init_barriers(desks[team]);
        show_to_async_units();
    }
    __syncthreads();
    const int warp = threadIdx.x / WARP;
    const Batch batch = {query_start, context_lens, block_tables, max_blocks,
                         members,     chunk_start,  chunk_split};

    // Until they wait all is from the host. attention_decode, once it may start, relies on all that
    // was before this kernel.
    if (warp < WARPS) {
        take_registers<ROW_REGISTERS>();
        wait_for_previous();
        let_next_start();
        const int team = warp / 4;
        attend_all(desks[team], Place(slots + team * STAGES * TILE_BYTES, desks[team]),
                   queries + team * BLOCK_ROWS * HEAD_DIM, out, partials, max_blocks, reach, scale);
        return;
    }
    give_registers<OTHER_REGISTERS>();
    if (warp < WARPS + TEAMS) {
        const int team = warp - WARPS;
        const int num_items = *num_chunks * NUM_KV_HEADS * ROW_BLOCKS;
        const Lookup first(team * gridDim.x + blockIdx.x, num_items, batch);
        wait_for_previous();
        let_next_start();
        scout_all(desks[team], shared_address(queries + team * BLOCK_ROWS * HEAD_DIM), q, first,
                  num_items, batch);
    } else if (warp == WARPS + 3) {
        wait_for_previous();
        let_next_start();
        load_all(desks, slots, keys_map, values_map);
    }
}

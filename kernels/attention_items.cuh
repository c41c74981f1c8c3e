// attention_items.cuh: what attention_decode has to do, cut into items
//
// mapping:   item = 16 rows of one KV head against one split: those of a chunk come first, then those
//            of one sequence outside of chunks
// order:     only when an item is done depends on the other sequences, never what it computes

constexpr int CHUNK_MEMBERS = 32;
constexpr int CHUNK_TILES = (CHUNK_MEMBERS * GROUP + 15) / 16;  // row tiles of a chunk's KV head

// What a block knows of every sequence, in shared memory.
struct Sequences {
    int* first_item;  // (B + 1,), running number of splits outside of chunks
    int* split;       // (B,), the first of them
    int* context;     // (B,)
    int count;
};

struct Chunks {
    const i32* members;
    const i32* start;
    const i32* split;
    int num_items;
};

// Fills the table: an inclusive sum over the sequences, THREADS at a time.
__device__ __forceinline__ void count_splits(const Sequences& s, const i32* query_start,
                                             const i32* context_lens, const i32* num_shared,
                                             int reach) {
    __shared__ int warp_sums[WARPS];
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    int before = 0;
    if (threadIdx.x == 0) s.first_item[0] = 0;
    for (int start = 0; start < s.count; start += THREADS) {
        const int b = start + threadIdx.x;
        int sum = 0;
        if (b < s.count) {
            const bool mine = query_start[b + 1] - query_start[b] == 1;
            const int context = context_lens[b];
            const int split = max(num_shared[b], first_visible(context - 1, reach) / SPLIT);
            s.context[b] = context;
            s.split[b] = split;
            sum = mine ? (context + SPLIT - 1) / SPLIT - split : 0;
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
        if (b < s.count) s.first_item[b + 1] = before + sum;
        before += total;
    }
    __syncthreads();
}

// One item, from `index` on the first that has rows: the tiles [tile, end) of one split.
struct Item {
    int index, sequence;  // whose block table it is
    int member;           // its place in the chunks' members, or -1
    int kv_head, first_row, num_rows;
    int context, split, tile, end;
    bool valid;

    __device__ __forceinline__ Item(const Sequences& s, const Chunks& chunks, int from, int stride,
                                    int reach)
        : index(from), valid(true) {
        for (; index < chunks.num_items; index += stride) {
            const int chunk = index / (NUM_KV_HEADS * CHUNK_TILES);
            member = chunks.start[chunk];
            first_row = index % CHUNK_TILES * 16;
            num_rows = min(16, (chunks.start[chunk + 1] - member) * GROUP - first_row);
            if (num_rows <= 0) continue;
            kv_head = index / CHUNK_TILES % NUM_KV_HEADS;
            sequence = chunks.members[member];
            context = s.context[sequence];
            split = chunks.split[chunk];
            tile = split * SPLIT_TILES;
            end = tile + SPLIT_TILES;
            return;
        }
        const int pair = (index - chunks.num_items) / UNITS;
        const int unit = (index - chunks.num_items) % UNITS;
        valid = pair < s.first_item[s.count];
        if (!valid) return;
        int low = 0, high = s.count;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (s.first_item[middle] <= pair) low = middle;
            else high = middle;
        }
        member = -1;
        sequence = low;
        kv_head = unit / GROUP_TILES;
        first_row = unit % GROUP_TILES * 16;
        num_rows = min(16, GROUP - first_row);
        context = s.context[low];
        split = s.split[low] + pair - s.first_item[low];
        tile = max(split * SPLIT_TILES, first_visible(context - 1, reach) / TILE);
        end = min((split + 1) * SPLIT_TILES, (context - 1) / TILE + 1);
    }
};

// A lane's row `half` of an item: one head of one sequence.
struct Row {
    int sequence, head, context, first;
    bool exists;

    __device__ __forceinline__ Row(const Sequences& s, const Chunks& chunks, const Item& item,
                                   int half, int reach) {
        const int row = half * 8 + threadIdx.x % WARP / 4;
        exists = row < item.num_rows;
        head = (item.first_row + row) % GROUP;
        sequence = item.sequence;
        if (item.member >= 0 && exists)
            sequence = chunks.members[item.member + (item.first_row + row) / GROUP];
        context = s.context[sequence];
        first = first_visible(context - 1, reach);
    }
};

// attention_items.cuh: what attention_decode has to do, cut into items
//
// mapping:   item = 16 rows of one KV head against one split or a run of them: those of a chunk come
//            first, then those of one sequence outside of chunks
// order:     only when an item is done depends on the other sequences, never what it computes

constexpr int CHUNK_TILES = (CHUNK_MEMBERS * GROUP + 15) / 16;  // row tiles of a chunk's KV head

// What a block knows of every sequence, in shared memory.
struct Sequences {
    int* first_item;  // (B + 1,), running number of items outside of chunks
    int *context, *query;  // (B,)
    u16* start;  // (B,), twice the first split outside of chunks, and 1 where they are one run
    int count;
};

// Fills the table: an inclusive sum, each thread with as many sequences as it takes.
__device__ __forceinline__ void count_splits(const Sequences& s, const i32* query_start,
                                             const i32* context_lens, const i32* num_shared,
                                             int reach, int whole_runs) {
    __shared__ int warp_sums[WARPS];
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    const int each = (s.count + THREADS - 1) / THREADS;
    const int begin = min((int)threadIdx.x * each, s.count);
    const int end = min(begin + each, s.count);
    int sum = 0;
#pragma unroll 4
    for (int b = begin; b < end; ++b) {
        const bool mine = query_start[b + 1] - query_start[b] == 1;
        const int context = context_lens[b];
        const Splits splits(context, num_shared[b], reach, whole_runs);
        const int count = splits.is_run ? 1 : splits.outside;
        s.context[b] = context;
        const int split = first_visible(context - 1, reach) / SPLIT + splits.in_chunks;
        s.query[b] = query_start[b];
        s.start[b] = 2 * split + splits.is_run;
        s.first_item[b + 1] = mine ? count : 0;
        sum += s.first_item[b + 1];
    }
    int before = sum;
#pragma unroll
    for (int step = 1; step < WARP; step <<= 1) {
        const int other = __shfl_up_sync(FULL_WARP, before, step);
        if (lane >= step) before += other;
    }
    if (lane == WARP - 1) warp_sums[warp] = before;
    __syncthreads();
    before -= sum;
#pragma unroll
    for (int w = 0; w < WARPS; ++w)
        if (w < warp) before += warp_sums[w];
    if (threadIdx.x == 0) s.first_item[0] = 0;
    for (int b = begin; b < end; ++b) {
        before += s.first_item[b + 1];
        s.first_item[b + 1] = before;
    }
    __syncthreads();
}

// The chunks' items come first, and every warp takes each `stride`-th up to the first round that has
// none of them; who is done then draws the next of what is left.
struct Chunks {
    const i32 *members, *start, *split;
    int num_chunk_items, num_items;  // in all
    int stride, first_drawn;

    __device__ __forceinline__ Chunks(const Sequences& s, const i32* members, const i32* start,
                                      const i32* split, int num_chunks)
        : members(members), start(start), split(split), stride(gridDim.x * WARPS) {
        num_chunk_items = num_chunks * NUM_KV_HEADS * CHUNK_TILES;
        num_items = num_chunk_items + s.first_item[s.count] * UNITS;
        first_drawn = (num_chunk_items / stride + 1) * stride;
    }

    __device__ __forceinline__ bool is_drawn(int index) const {
        return index >= first_drawn && first_drawn < num_items;
    }
};

// One item, from `index` on the first that has rows: the tiles [tile, end) of one split or of a run.
struct Item {
    int index, sequence;  // whose block table it is
    int member;           // its place in the chunks' members, or -1
    int kv_head, first_row, num_rows;
    int context, tile, end;
    bool is_run, valid;   // is_run: all that its rows see

    __device__ __forceinline__ Item(const Sequences& s, const Chunks& chunks, int from, int reach)
        : index(from) {
        for (; index < chunks.num_chunk_items; index += chunks.stride) {
            const int chunk = index / (NUM_KV_HEADS * CHUNK_TILES);
            member = chunks.start[chunk];
            first_row = index % CHUNK_TILES * 16;
            num_rows = min(16, (chunks.start[chunk + 1] - member) * GROUP - first_row);
            if (num_rows <= 0) continue;
            kv_head = index / CHUNK_TILES % NUM_KV_HEADS;
            sequence = chunks.members[member];
            context = s.context[sequence];
            tile = chunks.split[chunk] * SPLIT_TILES;
            end = tile + SPLIT_TILES;
            is_run = false, valid = true;
            return;
        }
        valid = index < chunks.num_items;
        if (!valid) return;
        const int pair = (index - chunks.num_chunk_items) / UNITS;
        const int unit = (index - chunks.num_chunk_items) % UNITS;
        // Mostly every sequence has one item.
        const int guess = min(pair, s.count - 1);
        const bool is_found = s.first_item[guess] <= pair && s.first_item[guess + 1] > pair;
        int low = is_found ? guess : 0, high = is_found ? guess + 1 : s.count;
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
        const int split = s.start[low] / 2 + pair - s.first_item[low];
        tile = max(split * SPLIT_TILES, first_visible(context - 1, reach) / TILE);
        end = (context - 1) / TILE + 1;
        is_run = s.start[low] % 2;
        if (!is_run) end = min((split + 1) * SPLIT_TILES, end);
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

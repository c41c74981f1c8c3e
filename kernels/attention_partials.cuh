// attention_partials.cuh: what attention_decode leaves for attention_merge
//
// layout:    partials: for each sequence, split, KV head and row tile min(G, 16) x (D + 2) fp32, up to
//            a multiple of 4: the split's unnormalized o, then its maximum and sum

// --- decode and merge: what one leaves for the other -------------------------------------------

constexpr int SPLIT = TILE * SPLIT_TILES;                // positions of a split
constexpr int CHUNK_MEMBERS = 32;                        // sequences that share a split, at most
constexpr int GROUP_TILES = (GROUP + 15) / 16;           // row tiles of a KV head
constexpr int UNITS = NUM_KV_HEADS * GROUP_TILES;        // items of a split
constexpr int ITEM_ROWS = GROUP < 16 ? GROUP : 16;
constexpr int ITEM_FLOATS = (ITEM_ROWS * (HEAD_DIM + 2) + 3) / 4 * 4;  // o, (max, sum), by row

// Splits that a decode query sees, the first being that of its first visible key.
__device__ __forceinline__ int num_splits(int context, int reach) {
    if (context == 0) return 0;
    const int first = first_visible(context - 1, reach) / SPLIT;
    return (context - 1) / SPLIT - first + 1;
}

constexpr int RUN_SPLITS = WARP / SPLIT_TILES;  // at most: a lane looks up one tile

// A decode query's splits: those in chunks and those outside. is_run: one warp takes all of them and
// leaves no partials; whole_runs: sequences are so many that it may take several.
struct Splits {
    int in_chunks, outside;
    bool is_run;

    __device__ __forceinline__ Splits(int context, int num_shared, int reach, int whole_runs) {
        in_chunks = max(num_shared - first_visible(context - 1, reach) / SPLIT, 0);
        outside = num_splits(context, reach) - in_chunks;
        is_run = !in_chunks && outside >= 1 && outside <= (whole_runs ? RUN_SPLITS : 1);
    }
};

__device__ __forceinline__ float* partial_of(float* partials, int sequence, int split, int unit,
                                             int max_blocks) {
    const int max_splits = (max_blocks + SPLIT_TILES - 1) / SPLIT_TILES;
    return partials + (((size_t)sequence * max_splits + split) * UNITS + unit) * ITEM_FLOATS;
}

// Row `row` of an item's rows leaves what it found in a split: o of its tile's half, maximum, sum.
__device__ __forceinline__ void store_row(float* partial, const float (&o)[COLUMN_TILES][4],
                                          int half, int row, float max, float sum) {
    const int t = threadIdx.x % 4;
    float2* target = (float2*)(partial + row * HEAD_DIM) + t;
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; ++n)
        target[n * 4] = make_float2(o[n][2 * half], o[n][2 * half + 1]);
    float2* state = (float2*)(partial + ITEM_ROWS * HEAD_DIM) + row;
    if (t == 0) *state = make_float2(max, sum);
}

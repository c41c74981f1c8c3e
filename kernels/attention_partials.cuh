// attention_partials.cuh: what attention_decode leaves for attention_merge
//
// layout:    partials: for each sequence, split, KV head and row tile min(G, 16) x (D + 2) fp32: the
//            split's unnormalized o, then its maximum and sum

// --- decode and merge: what one leaves for the other -------------------------------------------

constexpr int SPLIT = TILE * SPLIT_TILES;                // positions of a split
constexpr int GROUP_TILES = (GROUP + 15) / 16;           // row tiles of a KV head
constexpr int UNITS = NUM_KV_HEADS * GROUP_TILES;        // items of a split
constexpr int ITEM_ROWS = GROUP < 16 ? GROUP : 16;
constexpr int ITEM_FLOATS = ITEM_ROWS * (HEAD_DIM + 2);  // o, then (max, sum), by row

// Splits that a decode query sees, the first being that of its first visible key.
__device__ __forceinline__ int num_splits(int context, int reach) {
    if (context == 0) return 0;
    const int first = first_visible(context - 1, reach) / SPLIT;
    return (context - 1) / SPLIT - first + 1;
}

__device__ __forceinline__ float* partial_of(float* partials, int sequence, int split, int unit,
                                             int max_blocks) {
    const int max_splits = (max_blocks + SPLIT_TILES - 1) / SPLIT_TILES;
    return partials + (((size_t)sequence * max_splits + split) * UNITS + unit) * ITEM_FLOATS;
}

// attention_rows.cuh: how the prefill kernels cut sequences into blocks of BLOCK_ROWS rows

// Every sequence gets at least enough consecutive row blocks; the few left over stay idle.
__device__ __forceinline__ int first_row_block(const i32* query_start, int sequence) {
    const i64 query = query_start[sequence] - query_start[0];
    return (int)(query * GROUP / BLOCK_ROWS) + sequence;
}

// The last sequence whose row blocks start at or before `block`, by a 32-way search.
__device__ __forceinline__ int find_sequence(const i32* query_start, int num_sequences, int block) {
    const int lane = threadIdx.x % WARP;
    int low = 0, high = num_sequences;
    while (high - low > 1) {
        const int step = (high - low + WARP - 1) / WARP;
        const int probe = low + lane * step;
        const bool before = probe < high && first_row_block(query_start, probe) <= block;
        low += (__popc(__ballot_sync(FULL_WARP, before)) - 1) * step;
        high = min(high, low + step);
    }
    return low;
}

// Where row `row` of a sequence lies in q and out.
__device__ __forceinline__ size_t row_offset(int query, int row, int kv_head) {
    const size_t head = kv_head * GROUP + row % GROUP;
    return ((size_t)(query + row / GROUP) * NUM_HEADS + head) * HEAD_DIM;
}

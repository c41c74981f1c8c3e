// fold: the column and row sums of a chunk of bytes, which stand for it in its checksum
//
// computes:  with the bytes as words w (u64, little-endian, padded with zeros) in rows of 4096:
//            sums[c] = sum over r of w[r][c], then sums[4096 + r] = sum over c of w[r][c], modulo
//            2^64; rows that are not there sum to zero. Any one or two changed words show.
// layout:    bytes: num_bytes of them, 8-byte aligned, at most 256 rows; sums: 4096 + 256 u64
// mapping:   blocks 0 to 15 own 256 columns each, a thread a column; block 16 + r owns row r
// bound by:  bytes, read twice (the second time from the L2 cache)
// order:     integer sums modulo 2^64: the same in any order
// source:    two-dimensional parity, with sums for parities
// architectures: sm_80 sm_90 sm_120
// spills:    none

constexpr int THREADS = 256;
constexpr int ROW_WORDS = 4096;
constexpr int COLUMN_BLOCKS = ROW_WORDS / THREADS;

__device__ __forceinline__ u64 word(const u8* bytes, u64 index, u64 num_bytes) {
    if (index * 8 + 8 <= num_bytes) return ((const u64*)bytes)[index];
    u64 w = 0;
    for (u64 i = index * 8; i < num_bytes; ++i) w |= (u64)bytes[i] << (i % 8 * 8);
    return w;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    fold(const u8* __restrict__ bytes, u64 num_bytes, u64* __restrict__ sums) {
    const int num_rows = (num_bytes + ROW_WORDS * 8 - 1) / (ROW_WORDS * 8);
    if (blockIdx.x < COLUMN_BLOCKS) {
        const int column = blockIdx.x * THREADS + threadIdx.x;
        u64 sum = 0;
        for (int r = 0; r < num_rows; ++r) sum += word(bytes, (u64)r * ROW_WORDS + column, num_bytes);
        sums[column] = sum;
        return;
    }
    __shared__ u64 warp_sums[THREADS / WARP];
    const int row = blockIdx.x - COLUMN_BLOCKS;
    u64 sum = 0;
    if (row < num_rows)
        for (int c = threadIdx.x; c < ROW_WORDS; c += THREADS)
            sum += word(bytes, (u64)row * ROW_WORDS + c, num_bytes);
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) warp_sums[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        u64 total = 0;
        for (int i = 0; i < THREADS / WARP; ++i) total += warp_sums[i];
        sums[ROW_WORDS + row] = total;
    }
}

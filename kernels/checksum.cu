// checksum: a 64-bit hash of bytes in GPU memory, equal to orcd_batch/backend/cuda/checksum.py
//
// computes:  h = sum over j of block_key(j) * sum over i < 4096 of (w key(2 i) + (w >> 32) key(2 i + 1))
//            modulo 2^64, where w = word 4096 j + i of the bytes, read as little-endian u64 and
//            padded with zeros, and the keys are SplitMix64 values. The second term keeps two
//            flips of the top bit of different words from cancelling.
// layout:    bytes: num_bytes of them, 8-byte aligned; out: one u64, zero before the launch
// mapping:   one block per 4096 words (grid-stride), thread t takes words t, t + THREADS, ...
// bound by:  bytes of the input, once
// order:     integer sums modulo 2^64: the same in any order
// source:    multilinear hashing (Carter and Wegman 1979); SplitMix64 (Steele, Lea, Flood 2014)
// architectures: sm_80 sm_90 sm_120
// spills:    none

constexpr int THREADS = 256;
constexpr int BLOCK_WORDS = 4096;

__device__ __forceinline__ u64 key(u64 index) {
    u64 z = (index + 1) * 0x9e3779b97f4a7c15ull;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return (z ^ (z >> 31)) | 1;
}

__device__ __forceinline__ u64 word(const u8* bytes, u64 index, u64 num_bytes) {
    if (index * 8 + 8 <= num_bytes) return ((const u64*)bytes)[index];
    u64 w = 0;
    for (u64 i = index * 8; i < num_bytes; ++i) w |= (u64)bytes[i] << (i % 8 * 8);
    return w;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    checksum(const u8* __restrict__ bytes, u64 num_bytes, u64* __restrict__ out) {
    __shared__ u64 warp_sums[THREADS / WARP];
    const u64 num_words = (num_bytes + 7) / 8;
    u64 sum = 0;
    for (u64 block = blockIdx.x; block * BLOCK_WORDS < num_words; block += gridDim.x) {
        u64 inner = 0;
        for (int i = threadIdx.x; i < BLOCK_WORDS; i += THREADS) {
            const u64 index = block * BLOCK_WORDS + i;
            if (index >= num_words) break;
            const u64 w = word(bytes, index, num_bytes);
            inner += w * key(2 * i) + (w >> 32) * key(2 * i + 1);
        }
        sum += inner * key(2 * BLOCK_WORDS + block);
    }
    sum = warp_sum(sum);
    if (threadIdx.x % WARP == 0) warp_sums[threadIdx.x / WARP] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        u64 total = 0;
        for (int i = 0; i < THREADS / WARP; ++i) total += warp_sums[i];
        atomicAdd(out, total);
    }
}

// gemm_k16: the plain matrix product, and the reference that every other one must equal bit for bit
//
// computes:  y[m][n] = sum over k of x[m][k] w[n][k]; fp16 in, one fp32 accumulator; what is written
//            is OUTPUT's choice, see product.cuh
// layout:    x (M, K), w (N, K), y (M, N), dense row-major; K a multiple of 8; any M and N
// mapping:   block (i, j) owns the TILE_M rows from i TILE_M and the TILE_N columns from j TILE_N
//            (rows fastest: blocks at work together share their piece of w in the L2 cache); its
//            WARPS_M x WARPS_N warps each own an equal rectangle of that tile
// macros:    TILE_M, TILE_N, TILE_K (a multiple of 16), WARPS_M, WARPS_N, STAGES of TILE_K in
//            flight, OUTPUT
// bound by:  bytes of w for M under about 100 (H200, M = 1, w 16384 x 3072: 32 us, 67 % of the read
//            ceiling), else flops (M = 4096: 1.48 ms, 36 %: mma.sync, no warpgroup instructions)
// order:     each y is one chain of mma.m16n8k16 over ascending k, starting from zero; what lies
//            beyond K counts as zero. No split of K, nothing shared between rows: neither the tile
//            shape nor M can change a bit.
// source:    own arrangement of the usual cp.async + ldmatrix + mma.sync pipeline
// architectures: sm_80 sm_90 sm_120
// compile:   TILE_M=16 TILE_N=32 TILE_K=128 WARPS_M=1 WARPS_N=2 STAGES=6 OUTPUT=0 | TILE_M=64 TILE_N=64 TILE_K=64 WARPS_M=2 WARPS_N=2 STAGES=4 OUTPUT=1 | TILE_M=128 TILE_N=128 TILE_K=64 WARPS_M=2 WARPS_N=4 STAGES=3 OUTPUT=2
// spills:    none

#include "product.cuh"

constexpr int THREADS = WARP * WARPS_M * WARPS_N;
constexpr int WARP_M = TILE_M / WARPS_M;
constexpr int WARP_N = TILE_N / WARPS_N;
constexpr int TILES_M = WARP_M / 16;  // 16-row tiles of a warp
constexpr int PAIRS_N = WARP_N / 16;  // pairs of 8-column tiles of a warp
constexpr int PITCH = TILE_K + 8;     // in halves; 16 bytes of padding keep ldmatrix off one bank
constexpr int CHUNKS = TILE_K / 8;    // 16-byte pieces of a tile row
constexpr int STAGE_HALVES = (TILE_M + TILE_N) * PITCH;

static_assert(WARP_M % 16 == 0 && WARP_N % 16 == 0 && TILE_K % 16 == 0, "whole mma tiles");

// ROWS x TILE_K of a (limit, K) matrix from (row, k); rows and columns outside of it become zero.
template <int ROWS>
__device__ __forceinline__ void load_tile(f16* shared, const f16* matrix, int row, int limit, int k,
                                          int K) {
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * CHUNKS; i += THREADS) {
        const int r = i / CHUNKS;
        const int column = k + i % CHUNKS * 8;
        const bool inside = row + r < limit && column < K;
        const f16* source = matrix + (inside ? (size_t)(row + r) * K + column : 0);
        copy_async_16(shared_address(shared + r * PITCH + i % CHUNKS * 8), source, inside ? 16 : 0);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gemm_k16(const f16* __restrict__ x, const f16* __restrict__ w, void* __restrict__ y, int M,
             int N, int K) {
    extern __shared__ __align__(16) f16 stages[];
    let_next_start();
    wait_for_previous();
    const int lane = threadIdx.x % WARP;
    const int warp_m = threadIdx.x / WARP / WARPS_N * WARP_M;
    const int warp_n = threadIdx.x / WARP % WARPS_N * WARP_N;
    const int m0 = blockIdx.x * TILE_M;
    const int n0 = blockIdx.y * TILE_N;
    const int steps = (K + TILE_K - 1) / TILE_K;

    auto load_stage = [&](int step) {
        if (step < steps) {
            f16* stage = stages + step % STAGES * STAGE_HALVES;
            load_tile<TILE_M>(stage, x, m0, M, step * TILE_K, K);
            load_tile<TILE_N>(stage + TILE_M * PITCH, w, n0, N, step * TILE_K, K);
        }
        copy_async_commit();
    };

    float c[TILES_M][2 * PAIRS_N][4] = {};
#pragma unroll
    for (int step = 0; step < STAGES - 1; ++step) load_stage(step);

    for (int step = 0; step < steps; ++step) {
        copy_async_wait<STAGES - 2>();
        __syncthreads();  // this stage has landed, and nobody reads the one about to be overwritten
        load_stage(step + STAGES - 1);
        const f16* stage = stages + step % STAGES * STAGE_HALVES;
        // lane l addresses row l % 16 of a 16-row tile of x, halves 0 or 8; for w the four matrices
        // are (columns 0-7, k 0-7), (0-7, 8-15), (8-15, 0-7), (8-15, 8-15)
        const u32 x_tile = shared_address(stage + (warp_m + lane % 16) * PITCH + lane / 16 * 8);
        const u32 w_tile = shared_address(
            stage + (TILE_M + warp_n + lane / 16 * 8 + lane % 8) * PITCH + lane / 8 % 2 * 8);
        u32 a[2][TILES_M][4], b[2][PAIRS_N][4];  // this step of 16 and the next
        auto load_fragments = [&](int k) {
#pragma unroll
            for (int i = 0; i < TILES_M; ++i)
                load_matrix_x4(a[k / 16 % 2][i], x_tile + (i * 16 * PITCH + k) * 2);
#pragma unroll
            for (int j = 0; j < PAIRS_N; ++j)
                load_matrix_x4(b[k / 16 % 2][j], w_tile + (j * 16 * PITCH + k) * 2);
        };
        load_fragments(0);
#pragma unroll
        for (int k = 0; k < TILE_K; k += 16) {
            if (k + 16 < TILE_K) load_fragments(k + 16);
            const int now = k / 16 % 2;
#pragma unroll
            for (int i = 0; i < TILES_M; ++i)
#pragma unroll
                for (int j = 0; j < 2 * PAIRS_N; ++j)
                    mma_k16(c[i][j], a[now][i], b[now][j / 2][j % 2 * 2],
                            b[now][j / 2][j % 2 * 2 + 1]);
        }
    }

#pragma unroll
    for (int i = 0; i < TILES_M; ++i)
#pragma unroll
        for (int j = 0; j < 2 * PAIRS_N; ++j)
#pragma unroll
            for (int v = 0; v < 4; ++v) {
                const int m = m0 + warp_m + i * 16 + lane / 4 + v / 2 * 8;
                const int n = n0 + warp_n + j * 8 + lane % 4 * 2 + v % 2;
                const size_t index = (size_t)m * N + n;
                if (m < M && n < N) put(y, index, c[i][j][v], to_add(y, index));
            }
}

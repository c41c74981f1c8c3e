// few_rows: the matrix product of a decode step of few sequences, at the speed of reading w
//
// computes:  y[m][n] = sum over k of x[m][k] w[n][k] for M <= 8 rows; fp16 in, one fp32
//            accumulator; what is written is OUTPUT's choice, see product.cuh
// layout:    x (M, K), w (N, K), y (M, N), dense row-major; N a multiple of 8
// mapping:   each of the WARPS chains of a block owns every (WARPS gridDim)-th tile of 8 rows of w,
//            over all of K; PRODUCERS more warps keep the chains' rings (num_stages x STAGE_K
//            columns) filled, the first of them before the kernel before has ended
// macros:    K_SIZE (K, a multiple of 64), STAGE_K (256), WARPS, PRODUCERS, OUTPUT
// bound by:  bytes of w; at long K also the latency of the chain
// order:     each y is one chain of mma.m16n8k16 over ascending k, starting from zero, with x as the
//            16-row side, its missing rows zero: gemm_k16's instruction on gemm_k16's operands
// source:    own
// architectures: sm_90 sm_120
// generic twin: gemm_k16
// compile:   K_SIZE=3072 STAGE_K=256 WARPS=16 PRODUCERS=8 OUTPUT=1 | K_SIZE=8192 STAGE_K=256 WARPS=3 PRODUCERS=2 OUTPUT=2 | K_SIZE=576 STAGE_K=256 WARPS=1 PRODUCERS=1 OUTPUT=0
// spills:    none

#include "barriers.cuh"
#include "product.cuh"

constexpr int THREADS = (WARPS + PRODUCERS) * WARP;
constexpr int TILE_N = 8;
constexpr int GROUP_K = 64;                         // columns whose fragments are loaded together
constexpr int GROUPS = K_SIZE / GROUP_K;            // of a chain
constexpr int STAGE_GROUPS = STAGE_K / GROUP_K;     // of a full stage
constexpr int PITCH = STAGE_K * 2 + 16;             // 16 bytes of padding keep ldmatrix off one bank
constexpr int STAGE_BYTES = TILE_N * PITCH;
constexpr int UNROLL_GROUPS = 2 * STAGE_GROUPS;  // indices of registers become constants
constexpr int X_PITCH = K_SIZE * 2 + 16;
static_assert(STAGE_K == 8 * WARP, "a row of a stage is one copy of a warp");
constexpr int HEADER = 32;  // x's barrier and 16 zero bytes, in front of the rings' barriers

static_assert(K_SIZE % GROUP_K == 0 && STAGE_K % GROUP_K == 0, "whole groups");

// Arrives once the copies of this thread so far have landed.
__device__ __forceinline__ void arrive_with_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

// Shared memory: x's barrier, zeros, a pair of barriers for every stage, the rings, x.
struct Shared {
    u32 base;
    int num_stages;
    __device__ __forceinline__ u32 x_full() const { return base; }
    __device__ __forceinline__ u32 zeros() const { return base + 16; }
    __device__ __forceinline__ u32 full(int warp, int stage) const {
        return base + HEADER + (warp * num_stages + stage) * 16;
    }
    __device__ __forceinline__ u32 empty(int warp, int stage) const {
        return full(warp, stage) + 8;
    }
    __device__ __forceinline__ u32 ring(int warp, int stage) const {
        return full(WARPS, 0) + (warp * num_stages + stage) * STAGE_BYTES;
    }
    __device__ __forceinline__ u32 x() const { return ring(WARPS, 0); }
};

// Fills the rings of the chains producer, producer + PRODUCERS, … in turn; one warp.
__device__ __forceinline__ void produce(const Shared& shared, const f16* w, int producer,
                                        int num_tiles) {
    const int lane = threadIdx.x % WARP;
    const int stride = gridDim.x * WARPS;
    int stage = 0;
    u32 parity = 1;
    for (int first = blockIdx.x * WARPS; first < num_tiles; first += stride) {
#pragma unroll 1
        for (int k = 0; k < K_SIZE; k += STAGE_K) {
            const bool inside = k + lane * 8 < K_SIZE;
#pragma unroll 1
            for (int chain = producer; chain < WARPS; chain += PRODUCERS) {
                const int tile = first + chain;
                if (tile >= num_tiles) break;
                const u32 target = shared.ring(chain, stage) + lane * 16;
                const f16* source = w + (size_t)tile * TILE_N * K_SIZE + k + lane * 8;
                wait_for(shared.empty(chain, stage), parity);
                if (inside) {
#pragma unroll
                    for (int row = 0; row < TILE_N; ++row)
                        copy_async_16(target + row * PITCH, source + row * K_SIZE);
                }
                arrive_with_copies(shared.full(chain, stage));
            }
            if (++stage == shared.num_stages) stage = 0, parity ^= 1;
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    few_rows(const f16* __restrict__ x, const f16* __restrict__ w, void* __restrict__ y, int M,
             int N, int num_stages) {
    extern __shared__ __align__(128) char memory[];
    const Shared shared = {shared_address(memory), num_stages};
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    const int num_tiles = N / TILE_N;
    let_next_start();
    for (int i = threadIdx.x; i < WARPS * num_stages; i += THREADS) {
        init_barrier(shared.full(0, i), WARP);
        init_barrier(shared.empty(0, i), 1);
    }
    if (threadIdx.x == 0) init_barrier(shared.x_full(), WARPS * WARP);
    if (threadIdx.x < 4) ((u32*)memory)[4 + threadIdx.x] = 0;
    __syncthreads();
    if (warp >= WARPS) {
        produce(shared, w, warp - WARPS, num_tiles);
        asm volatile("cp.async.wait_all;" ::: "memory");
        return;
    }
    wait_for_previous();
    for (int i = threadIdx.x; i < M * (K_SIZE / 8); i += WARPS * WARP)
        copy_async_16(shared.x() + i / (K_SIZE / 8) * X_PITCH + i % (K_SIZE / 8) * 16, x + i * 8);
    arrive_with_copies(shared.x_full());

    // Lane l addresses row l % 8 of the l / 8-th 8 columns of 32, of w and of x alike.
    const int row = lane % 8;
    const u32 w_lane = row * PITCH + lane / 8 * 16;
    const u32 x_lane = row < M ? shared.x() + row * X_PITCH + lane / 8 * 16 : shared.zeros();
    const u32 x_mask = row < M ? ~0u : 0u;
    int stage = 0;
    u32 parity = 0;
    bool has_x = false;
    for (int tile = blockIdx.x * WARPS + warp; tile < num_tiles; tile += gridDim.x * WARPS) {
        const int m = lane / 4;
        const size_t place = (size_t)m * N + tile * TILE_N + lane % 4 * 2;
        const float add0 = m < M ? to_add(y, place) : 0.0f;
        const float add1 = m < M ? to_add(y, place + 1) : 0.0f;
        if (!has_x) wait_for(shared.x_full(), 0);
        has_x = true;
        float c[4] = {};
        u32 a[2][2][4], b[2][2][4];  // this group and the next: two loads of 32 columns each
        u32 w_stage = 0;
        // the half-th 32 columns of a group
        auto load_half = [&](int group, int half) {
            const int in_stage = group % STAGE_GROUPS;
            if (half == 0 && in_stage == 0) {
                wait_for(shared.full(warp, stage), parity);
                w_stage = shared.ring(warp, stage) + w_lane;
            }
            load_matrix_x4(b[group % 2][half], w_stage + in_stage * (GROUP_K * 2) + half * 64);
            load_matrix_x4(a[group % 2][half],
                           x_lane + ((group * (GROUP_K * 2) + half * 64) & x_mask));
        };
        auto multiply = [&](int group, int step) {
            const u32(&left)[4] = a[group % 2][step / 2];
            const u32(&right)[4] = b[group % 2][step / 2];
            const int i = step % 2 * 2;
            const u32 rows[4] = {left[i], 0, left[i + 1], 0};
            mma_k16(c, rows, right[i], right[i + 1]);
        };
        load_half(0, 0);
        load_half(0, 1);
#pragma unroll(UNROLL_GROUPS)
        for (int group = 0; group < GROUPS; ++group) {
            const bool ends_stage = group % STAGE_GROUPS == STAGE_GROUPS - 1 || group == GROUPS - 1;
            const u32 empty = shared.empty(warp, stage);
            multiply(group, 0);
            if (ends_stage && ++stage == shared.num_stages) stage = 0, parity ^= 1;
            if (group + 1 < GROUPS) load_half(group + 1, 0);
            multiply(group, 1);
            multiply(group, 2);  // both halves of this group have arrived in registers
            if (ends_stage) {
                __syncwarp();
                if (lane == 0) arrive(empty);
            }
            if (group + 1 < GROUPS) load_half(group + 1, 1);
            multiply(group, 3);
        }
        if (m < M) {
            put(y, place, c[0], add0);
            put(y, place + 1, c[1], add1);
        }
    }
}

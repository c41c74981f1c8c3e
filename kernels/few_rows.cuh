// few_rows.cuh: one tile of 8 rows of w times up to 8 rows of x, w arriving in stages
//
// macros:    STAGE_K (columns of a stage: 256)
// order:     each y is one chain of mma.m16n8k16 over ascending k, starting from zero, with x as the
//            16-row side, its missing rows zero

constexpr int TILE_N = 8;
constexpr int GROUP_K = 64;                       // columns whose fragments are loaded together
constexpr int STAGE_GROUPS = STAGE_K / GROUP_K;   // of a full stage
constexpr int UNROLL_GROUPS = 2 * STAGE_GROUPS;   // indices of registers become constants
static_assert(STAGE_K == 8 * WARP, "a row of a stage is one copy of a warp");

// Arrives once the copies of this thread so far have landed.
__device__ __forceinline__ void arrive_with_copies(u32 barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

#ifndef X_TWICE
#define X_TWICE 0
#endif
// Where a lane reads x: row l % 8, of the l / 8-th 8 columns of 32; zeros for rows beyond M.
struct LaneOfX {
    u32 address, mask, twice[2];

    __device__ __forceinline__ LaneOfX(u32 x, int pitch, int M, u32 zeros) {
        const int lane = threadIdx.x % WARP;
        const int row = lane % 8;
        address = row < M ? x + row * pitch + lane / 8 * 16 : zeros;
        mask = row < M ? ~0u : 0u;
        const u32 start = x + (row < M ? row : 0) * pitch;
        const int low = lane / 8 % 2, high = lane / 16;
        twice[0] = start + (2 * low + high) * 16;
        twice[1] = start + (2 * (1 - low) + high) * 16;
    }
};

// The chain over all of K. stages.wait(): the address of the stage in turn, once it has landed;
// stages.empty(): the barrier that says it has been read; stages.advance(): on to the next one.
// w_lane: from there on, what this lane reads of the halves of 32 columns of a group.
template <int K, class Stages>
__device__ __forceinline__ void run_chain(float (&c)[4], Stages& stages, const u32 (&w_lane)[2],
                                          const LaneOfX& x) {
    static_assert(K % GROUP_K == 0, "whole groups");
    constexpr int GROUPS = K / GROUP_K;
    u32 a[2][2][4], b[2][2][4];  // this group and the next: two loads of 32 columns each
    u32 q[2][4][4];
    u32 stage = 0;
    // the half-th 32 columns of a group
    auto load_half = [&](int group, int half) {
        const int in_stage = group % STAGE_GROUPS;
        if (half == 0 && in_stage == 0) stage = stages.wait();
        load_matrix_x4(b[group % 2][half], stage + w_lane[half] + in_stage * (GROUP_K * 2));
#if X_TWICE
        load_matrix_x4(q[group % 2][half * 2], x.twice[0] + group * (GROUP_K * 2) + half * 64);
        load_matrix_x4(q[group % 2][half * 2 + 1], x.twice[1] + group * (GROUP_K * 2) + half * 64);
#else
        load_matrix_x4(a[group % 2][half],
                       x.address + ((group * (GROUP_K * 2) + half * 64) & x.mask));
#endif
    };
    auto multiply = [&](int group, int step) {
        const u32(&left)[4] = a[group % 2][step / 2];
        const u32(&right)[4] = b[group % 2][step / 2];
        const int i = step % 2 * 2;
        const u32 rows[4] = {left[i], 0, left[i + 1], 0};
#if X_TWICE
        mma_k16(c, q[group % 2][step], right[i], right[i + 1]);
#else
        mma_k16(c, rows, right[i], right[i + 1]);
#endif
    };
    load_half(0, 0);
    load_half(0, 1);
#pragma unroll(UNROLL_GROUPS)
    for (int group = 0; group < GROUPS; ++group) {
        const bool ends_stage = group % STAGE_GROUPS == STAGE_GROUPS - 1 || group == GROUPS - 1;
        const u32 empty = stages.empty();
        multiply(group, 0);
        if (ends_stage) stages.advance();
        if (group + 1 < GROUPS) load_half(group + 1, 0);
        multiply(group, 1);
        multiply(group, 2);  // both halves of this group have arrived in registers
        if (ends_stage) {
            __syncwarp();
            if (threadIdx.x % WARP == 0) arrive(empty);
        }
        if (group + 1 < GROUPS) load_half(group + 1, 1);
        multiply(group, 3);
    }
}

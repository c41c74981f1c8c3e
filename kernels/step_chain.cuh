// step_chain.cuh: a step's product: a tile of 8 rows of w times up to 8 rows of x, w in stages
//
// macros:    STAGE_K (columns of a stage: 256)
// order:     each y is one chain of mma.m16n8k16 over ascending k, starting from zero, with x as the
//            16-row side. Rows do not meet: what the other rows hold changes no bit

constexpr int TILE_N = 8;
constexpr int GROUP_K = 64;                       // columns whose fragments are loaded together
constexpr int STAGE_GROUPS = STAGE_K / GROUP_K;   // of a full stage
constexpr int UNROLL_GROUPS = 2 * STAGE_GROUPS;   // indices of registers become constants

// Where a lane reads x: its row, and of 32 columns 8 of the first step of 16, of the second, again of
// the first and of the second. What is loaded so is an operand of mma as it is: rows 8 to 15, whose
// results nobody reads, hold the other step. Rows beyond M are row 0, as little read.
struct LaneOfX {
    u32 address;

    __device__ __forceinline__ LaneOfX(u32 x, int pitch, int M) {
        const int lane = threadIdx.x % WARP;
        const int row = lane % 8 < M ? lane % 8 : 0;
        address = x + row * pitch + (lane / 8 % 2 * 2 + lane / 16) * 16;
    }
};

// As mma_k16, but where the source has it: a slot is given back once what was read of it is in use.
__device__ __forceinline__ void mma_in_turn(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1)
                 : "memory");
}

// The chain over all of K. stages.wait(): the address of the stage in turn, once it has landed;
// stages.empty(): the barrier that says it has been read; stages.advance(): on to the next one.
// w_lane: from there on, what this lane reads of the halves of 32 columns of a group.
template <int K, class Stages>
__device__ __forceinline__ void run_chain(float (&c)[4], Stages& stages, const u32 (&w_lane)[2],
                                          const LaneOfX& x) {
    static_assert(K % GROUP_K == 0, "whole groups");
    constexpr int GROUPS = K / GROUP_K;
    u32 a[2][4][4], b[2][2][4];  // this group and the next: x by steps, w by halves
    u32 stage = 0;
    // the half-th 32 columns of a group
    auto load_half = [&](int group, int half) {
        const int in_stage = group % STAGE_GROUPS;
        if (half == 0 && in_stage == 0) stage = stages.wait();
        load_matrix_x4(b[group % 2][half], stage + w_lane[half] + in_stage * (TILE_N * GROUP_K * 2));
        load_matrix_x4(a[group % 2][2 * half], x.address + group * (GROUP_K * 2) + half * 64);
        const u32(&even)[4] = a[group % 2][2 * half];
        u32(&odd)[4] = a[group % 2][2 * half + 1];
        odd[0] = even[1], odd[2] = even[3];  // its rows 8 to 15 are whatever the registers hold
    };
    auto multiply = [&](int group, int step) {
        const u32(&w)[4] = b[group % 2][step / 2];
        mma_in_turn(c, a[group % 2][step], w[step % 2 * 2], w[step % 2 * 2 + 1]);
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

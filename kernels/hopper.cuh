// hopper.cuh: what only sm_90a has: products of a warpgroup, the copy engine, and their barriers
//
// A warpgroup is four consecutive warps. c (64 x N, fp32) += a (64 x 16, fp16) b (16 x N, fp16): each
// warp holds 16 rows of a and c, laid out as in mma_k16 of common.cuh, c as N / 8 tiles. b lies in
// shared memory as panels of 64 rows of SPAN 16-byte chunks, each chunk at place chunk ^ flip(row)
// of its row: the 32-, 64- and 128-byte swizzles of the hardware for SPAN 2, 4 and 8.
// source: PTX ISA, "Asynchronous warpgroup level matrix instructions"

#include "barriers.cuh"

// Arrives, and the phase then waits for so many bytes from the copy engine as well.
__device__ __forceinline__ void arrive_expecting(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
}

// What this thread wrote to shared memory, fresh barriers too, may be used by wgmma and the copy
// engine, once a barrier says so.
__device__ __forceinline__ void show_to_async_units() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// --- registers of a warpgroup: what one gives, others may take --------------------------------------

template <int REGISTERS>
__device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

template <int REGISTERS>
__device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS));
}

// --- the copy engine ---------------------------------------------------------------------------------

// A matrix in device memory, as cuTensorMapEncodeTiled describes it: its box is one panel.
struct alignas(64) TensorMap {
    u64 words[16];
};

// The box whose first element is (row, column); its bytes count for `barrier`.
__device__ __forceinline__ void copy_box(u32 shared, const TensorMap& map, int column, int row,
                                         u32 barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared),
        "l"((u64)&map), "r"(column), "r"(row), "r"(barrier)
        : "memory");
}

// The box whose first element is (panel, row, column) of panels of columns, for which the L2 cache
// follows `policy`.
__device__ __forceinline__ void copy_box(u32 shared, const TensorMap& map, int column, int row,
                                         int panel, u32 barrier, u64 policy) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
        "[%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared),
        "l"((u64)&map), "r"(column), "r"(row), "r"(panel), "r"(barrier), "l"(policy)
        : "memory");
}

// This block may use a map that lies in device memory, written before the launch.
__device__ __forceinline__ void acquire_map(const TensorMap& map) {
    asm volatile("fence.proxy.tensormap::generic.acquire.gpu [%0], 128;" ::"l"((u64)&map)
                 : "memory");
}

// The same, to the same place in the blocks of the cluster that `blocks` has bits for; each one's
// bytes count for its own barrier at that place.
__device__ __forceinline__ void copy_box_to_blocks(u32 shared, const TensorMap& map, int column,
                                                   int row, u32 barrier, int blocks) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared),
        "l"((u64)&map), "r"(column), "r"(row), "r"(barrier), "h"((u16)blocks)
        : "memory");
}

// A box back to device memory, but for what lies beyond the matrix. What this thread stored so is
// read from shared memory once `wait_for_stores_to_read` returns.
__device__ __forceinline__ void store_box(const TensorMap& map, int column, int row, u32 shared) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];" ::"l"(
                     (u64)&map),
                 "r"(column), "r"(row), "r"(shared)
                 : "memory");
}

__device__ __forceinline__ void commit_stores() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

__device__ __forceinline__ void wait_for_stores_to_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// --- blocks of a cluster -----------------------------------------------------------------------------

__device__ __forceinline__ u32 block_of_cluster() {
    u32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

// All threads of all blocks of the cluster.
__device__ __forceinline__ void meet_cluster() {
    asm volatile(
        "barrier.cluster.arrive.release;\n\t"
        "barrier.cluster.wait.acquire;" ::
            : "memory");
}

// At the barrier of another block, or of this one, that lies where `barrier` does here.
__device__ __forceinline__ void arrive_at_block(u32 barrier, u32 block) {
    asm volatile(
        "{\n\t.reg .b32 there;\n\t"
        "mapa.shared::cluster.u32 there, %0, %1;\n\t"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n\t}" ::"r"(barrier),
        "r"(block)
        : "memory");
}

// --- matrices in shared memory -----------------------------------------------------------------------

template <int SPAN>
__device__ __forceinline__ int flip(int row) {
    return row / (8 / SPAN) % SPAN;
}

// A panel for wgmma, at `address` plus a multiple of 16 bytes. The address passes through a shuffle,
// so that the compiler knows it for one of the whole warp. next_panel: bytes to the panel of the next
// columns of b.
template <int SPAN>
struct Panel {
    u32 low, high;

    __device__ __forceinline__ Panel(u32 address, u32 next_panel) {
        constexpr u32 SWIZZLE = SPAN == 8 ? 1 : SPAN == 4 ? 2 : 3;
        constexpr u32 NEXT_ROWS = 8 * SPAN * 16;  // bytes to the next eight rows
        low = __shfl_sync(FULL_WARP, (address & 0x3ffff) >> 4, 0) | next_panel >> 4 << 16;
        high = SWIZZLE << 30 | NEXT_ROWS >> 4;
    }

    __device__ __forceinline__ u64 at(u32 offset) const {
        return (u64)high << 32 | (low + (offset >> 4));
    }
};

// Four 8 x 8 fp16 matrices into shared memory; lane l gives the row address of matrix l / 8, row
// l % 8, and holds of each matrix what mma_k16 would leave there.
__device__ __forceinline__ void store_matrix_x4(u32 address, const u32 (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

// --- products of a warpgroup ---------------------------------------------------------------------------

// Before a batch of products whose registers were written since the last.
__device__ __forceinline__ void begin_products() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void commit_products() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// All but the last PENDING batches are done. The registers they use must then pass `touch`.
template <int PENDING>
__device__ __forceinline__ void wait_for_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// Keeps ptxas from putting off what a and b, never negative, are made of until after a wait.
__device__ __forceinline__ void finish_before_waiting(float a, float b) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.lt.f32 p, %0, 0f00000000;\n\t@p trap;\n\t}" ::"f"(a + b)
                 : "memory");
}

// Keeps the compiler from moving uses of c to before this point, or from reusing it earlier.
template <int TILES>
__device__ __forceinline__ void touch(float (&c)[TILES][4]) {
#pragma unroll
    for (int n = 0; n < TILES; ++n)
        asm volatile("" : "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])::"memory");
}

template <int STEPS>
__device__ __forceinline__ void touch(u32 (&a)[STEPS][4]) {
#pragma unroll
    for (int k = 0; k < STEPS; ++k)
        asm volatile("" : "+r"(a[k][0]), "+r"(a[k][1]), "+r"(a[k][2]), "+r"(a[k][3])::"memory");
}

// PTX has no arrays: the registers of c, by the number of its columns.
#define C_16 "%0,%1,%2,%3,%4,%5,%6,%7"
#define C_32 C_16 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define C_48 C_32 ",%16,%17,%18,%19,%20,%21,%22,%23"
#define C_64 C_48 ",%24,%25,%26,%27,%28,%29,%30,%31"
#define C_80 C_64 ",%32,%33,%34,%35,%36,%37,%38,%39"
#define C_96 C_80 ",%40,%41,%42,%43,%44,%45,%46,%47"
#define C_112 C_96 ",%48,%49,%50,%51,%52,%53,%54,%55"
#define C_128 C_112 ",%56,%57,%58,%59,%60,%61,%62,%63"
#define TILE_OF_C(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
#define TILES_16 TILE_OF_C(0), TILE_OF_C(1)
#define TILES_32 TILES_16, TILE_OF_C(2), TILE_OF_C(3)
#define TILES_48 TILES_32, TILE_OF_C(4), TILE_OF_C(5)
#define TILES_64 TILES_48, TILE_OF_C(6), TILE_OF_C(7)
#define TILES_80 TILES_64, TILE_OF_C(8), TILE_OF_C(9)
#define TILES_96 TILES_80, TILE_OF_C(10), TILE_OF_C(11)
#define TILES_112 TILES_96, TILE_OF_C(12), TILE_OF_C(13)
#define TILES_128 TILES_112, TILE_OF_C(14), TILE_OF_C(15)

// TRANSPOSED: the rows of b's panels are k (16 of them), not its columns. add: c += a b, else c = a b.
#define DEFINE_MULTIPLY(N, A0, A1, A2, A3, B, ADD, TURN)                                          \
    template <int TRANSPOSED>                                                                      \
    __device__ __forceinline__ void multiply(float (&c)[N / 8][4], const u32 (&a)[4], u64 b,       \
                                             int add) {                                            \
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #ADD ", 0;\n\t"                     \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" C_##N "}, {%" #A0  \
                     ",%" #A1 ",%" #A2 ",%" #A3 "}, %" #B ", p, 1, 1, %" #TURN ";\n\t}"            \
                     : TILES_##N                                                                   \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add),               \
                       "n"(TRANSPOSED));                                                           \
    }
DEFINE_MULTIPLY(16, 8, 9, 10, 11, 12, 13, 14)
DEFINE_MULTIPLY(32, 16, 17, 18, 19, 20, 21, 22)
DEFINE_MULTIPLY(48, 24, 25, 26, 27, 28, 29, 30)
DEFINE_MULTIPLY(64, 32, 33, 34, 35, 36, 37, 38)
DEFINE_MULTIPLY(80, 40, 41, 42, 43, 44, 45, 46)
DEFINE_MULTIPLY(96, 48, 49, 50, 51, 52, 53, 54)
DEFINE_MULTIPLY(112, 56, 57, 58, 59, 60, 61, 62)
DEFINE_MULTIPLY(128, 64, 65, 66, 67, 68, 69, 70)

// More columns, and a from shared memory like b, its 64 rows those of c.
#define C_144 C_128 ",%64,%65,%66,%67,%68,%69,%70,%71"
#define C_160 C_144 ",%72,%73,%74,%75,%76,%77,%78,%79"
#define C_176 C_160 ",%80,%81,%82,%83,%84,%85,%86,%87"
#define C_192 C_176 ",%88,%89,%90,%91,%92,%93,%94,%95"
#define C_208 C_192 ",%96,%97,%98,%99,%100,%101,%102,%103"
#define C_224 C_208 ",%104,%105,%106,%107,%108,%109,%110,%111"
#define C_240 C_224 ",%112,%113,%114,%115,%116,%117,%118,%119"
#define C_256 C_240 ",%120,%121,%122,%123,%124,%125,%126,%127"
#define TILES_144 TILES_128, TILE_OF_C(16), TILE_OF_C(17)
#define TILES_160 TILES_144, TILE_OF_C(18), TILE_OF_C(19)
#define TILES_176 TILES_160, TILE_OF_C(20), TILE_OF_C(21)
#define TILES_192 TILES_176, TILE_OF_C(22), TILE_OF_C(23)
#define TILES_208 TILES_192, TILE_OF_C(24), TILE_OF_C(25)
#define TILES_224 TILES_208, TILE_OF_C(26), TILE_OF_C(27)
#define TILES_240 TILES_224, TILE_OF_C(28), TILE_OF_C(29)
#define TILES_256 TILES_240, TILE_OF_C(30), TILE_OF_C(31)

#define DEFINE_MULTIPLY_SHARED(N, A, B, ADD)                                                       \
    __device__ __forceinline__ void multiply_shared(float (&c)[N / 8][4], u64 a, u64 b, int add) { \
        asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %" #ADD ", 0;\n\t"                     \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.f16.f16 {" C_##N "}, %" #A    \
                     ", %" #B ", p, 1, 1, 0, 0;\n\t}"                                              \
                     : TILES_##N                                                                   \
                     : "l"(a), "l"(b), "r"(add));                                                  \
    }
DEFINE_MULTIPLY_SHARED(64, 32, 33, 34)
DEFINE_MULTIPLY_SHARED(128, 64, 65, 66)
DEFINE_MULTIPLY_SHARED(256, 128, 129, 130)

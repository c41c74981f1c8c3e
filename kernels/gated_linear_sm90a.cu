// gated_linear_sm90a: the product of gate and up with the gated activation behind it, by wgmma
//
// computes:  y[m][f] = gated(fp16(sum over k of x[m][k] w[f][k]), fp16(same with w[F + f])), see
//            gated.cuh
// layout:    x (M, K), w (2F, K) gate rows first, y (M, F), fp16, dense row-major; K and F multiples
//            of 8 and at least 64; any M. Boxes of x_map have ROW_GROUPS * 64 rows, of w_map TILE_F,
//            of y_map 16; all have 64 columns
// mapping:   tile = ROW_GROUPS * 64 rows by TILE_F columns of y; a block per SM takes the tiles of its
//            cluster in turn. One warp has the copy engine load 64 of K at a time, STAGES ahead; each
//            warpgroup of the others owns 64 rows, gate and up. A cluster of two shares its columns:
//            one loads the gate rows for both, the other the up rows. While a tile's products run, the
//            tile before, already rounded, is gated and stored
// macros:    K_SIZE, INTERMEDIATE (F), TILE_F (64 or 128), ROW_GROUPS (1 or 2), CLUSTER (1 or 2),
//            STAGES, GROUP (tiles of rows that share a sweep over the columns, for the L2 cache)
// bound by:  bytes of w up to M of about 150 (H200, Phi-3, M = 64: 27 us, 81 % of the read ceiling),
//            then flops (M = 768: 110 us, 705 TFLOP/s), and where that lasts the card's power
//            (M = 8192: 1.28 ms, 643 TFLOP/s)
// order:     each gate and up value is one chain of wgmma over ascending k16, from zero; what lies
//            beyond K counts as zero
// architectures: sm_90a
// generic twin: swiglu, after any product
// compile:   K_SIZE=3072 INTERMEDIATE=8192 TILE_F=128 ROW_GROUPS=2 CLUSTER=2 STAGES=4 GROUP=8
//            | K_SIZE=3072 INTERMEDIATE=8192 TILE_F=64 ROW_GROUPS=1 CLUSTER=1 STAGES=8 GROUP=8
//            | K_SIZE=896 INTERMEDIATE=4864 TILE_F=64 ROW_GROUPS=2 CLUSTER=1 STAGES=6 GROUP=16
//            | K_SIZE=64 INTERMEDIATE=72 TILE_F=128 ROW_GROUPS=2 CLUSTER=2 STAGES=4 GROUP=8
// spills:    none

#include "gated.cuh"
#include "hopper.cuh"

constexpr int TILE_M = ROW_GROUPS * 64;
constexpr int TILE_K = 64;
constexpr int K_TILES = (K_SIZE + TILE_K - 1) / TILE_K;
constexpr int CONSUMERS = ROW_GROUPS * 4 * WARP;
constexpr int LOADER_THREADS = 4 * WARP;  // one works, but registers move by warpgroups
constexpr bool MOVE_REGISTERS = ROW_GROUPS == 2;
static_assert(K_SIZE % 8 == 0 && INTERMEDIATE % 8 == 0, "rows of whole 16-byte vectors");

constexpr int SPAN = 8;  // 16-byte chunks of a row in shared memory: 64 halves
constexpr u32 ROW_BYTES = SPAN * 16;
constexpr u32 X_BYTES = TILE_M * ROW_BYTES, HALF_BYTES = TILE_F * ROW_BYTES;
constexpr u32 STAGE_BYTES = X_BYTES + 2 * HALF_BYTES;
// A warp's 16 rows of y, in panels of 64 columns.
constexpr int PANELS = TILE_F / 64;
constexpr u32 Y_PANEL_BYTES = 16 * ROW_BYTES, WARP_Y_BYTES = PANELS * Y_PANEL_BYTES;

// The tile before is gated in so many pieces of 16-column pairs, one beside each first step of K.
constexpr int PAIRS = TILE_F / 16;
__device__ constexpr int pieces() {
    int count = 1;
    while (2 * count <= PAIRS && 2 * count <= K_TILES) count *= 2;
    return count;
}
constexpr int PIECES = pieces();

constexpr int COLUMN_TILES = (INTERMEDIATE + TILE_F - 1) / TILE_F;

// The count of steps so far says which slot of the ring is next, and in which round.
struct Ring {
    u32 slot = 0, round = 0;

    __device__ __forceinline__ void advance() {
        if (++slot == STAGES) slot = 0, round ^= 1;
    }
};

struct Barriers {
    u64 full[STAGES], empty[STAGES];
};

// Where a tile's rows and columns begin; `index` counts clusters' tiles, rows fastest in a group.
struct Tile {
    int row, column;

    __device__ __forceinline__ Tile(int index, int row_tiles, u32 block) {
        const int first = index / (GROUP * COLUMN_TILES) * GROUP;
        const int rows = min(GROUP, row_tiles - first);
        const int within = index % (GROUP * COLUMN_TILES);
        row = ((first + within % rows) * CLUSTER + block) * TILE_M;
        column = within / rows * TILE_F;
    }
};

// --- the loading thread ------------------------------------------------------------------------------

struct Loader {
    const TensorMap &x_map, &w_map;
    u32 slots, full, empty, block;
    Ring ring;

    __device__ __forceinline__ void load_weights(const Tile& tile, int k) const {
        const u32 barrier = full + ring.slot * 8;
        const u32 slot = slots + ring.slot * STAGE_BYTES + X_BYTES;
        arrive_expecting(barrier, STAGE_BYTES);
        if constexpr (CLUSTER == 2) {
            copy_box_to_blocks(slot + block * HALF_BYTES, w_map, k,
                               tile.column + block * INTERMEDIATE, barrier, 3);
        } else {
            copy_box(slot, w_map, k, tile.column, barrier);
            copy_box(slot + HALF_BYTES, w_map, k, tile.column + INTERMEDIATE, barrier);
        }
    }

    __device__ __forceinline__ void load_x(const Tile& tile, int k) const {
        copy_box(slots + ring.slot * STAGE_BYTES, x_map, k, tile.row, full + ring.slot * 8);
    }

    __device__ __forceinline__ void load_all(int first, int num_tiles, int step, int row_tiles) {
        // The first weights before x is there.
        constexpr int AHEAD = STAGES < K_TILES ? STAGES : K_TILES;
        const Tile begun(first, row_tiles, block);
        for (int k = 0; k < AHEAD; ++k, ring.advance()) load_weights(begun, k * TILE_K);
        wait_for_previous();
        ring = {};
        for (int k = 0; k < AHEAD; ++k, ring.advance()) load_x(begun, k * TILE_K);
        for (int index = first, k = AHEAD; index < num_tiles; index += step, k = 0) {
            const Tile tile(index, row_tiles, block);
            for (; k < K_TILES; ++k, ring.advance()) {
                wait_for(empty + ring.slot * 8, ring.round ^ 1);
                load_weights(tile, k * TILE_K);
                load_x(tile, k * TILE_K);
            }
        }
    }
};

// --- a warpgroup's rows ------------------------------------------------------------------------------

struct Rows {
    float c[TILE_F / 4][4];                      // gate, then up
    u32 gate[TILE_F / 8][2], up[TILE_F / 8][2];  // of the tile before, in fp16
    u32 staged;  // where this lane's first row of four 8 x 8 matrices of y goes
    u32 full, empty;
    Ring ring;

    __device__ __forceinline__ void release(u32 slot) const {
        const u32 lane = threadIdx.x % WARP;
        if constexpr (CLUSTER == 2) {
            if (lane < 2) arrive_at_block(empty + slot * 8, lane);
        } else {
            if (lane == 0) arrive(empty + slot * 8);
        }
    }

    // c += the products of the ring's slot, or c = them.
    __device__ __forceinline__ void multiply(const Panel<SPAN>& x, const Panel<SPAN>& w, bool add) {
        wait_for(full + ring.slot * 8, ring.round);
        const u32 slot = ring.slot * STAGE_BYTES;
        begin_products();
#pragma unroll
        for (int k = 0; k < TILE_K / 16; ++k)
            multiply_shared(c, x.at(slot + k * 32), w.at(slot + k * 32), add || k > 0);
        commit_products();
    }

    __device__ __forceinline__ void round_tile() {
#pragma unroll
        for (int n = 0; n < TILE_F / 8; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                gate[n][half] = to_f16x2(c[n][2 * half], c[n][2 * half + 1]);
                const float(&above)[4] = c[n + TILE_F / 8];
                up[n][half] = to_f16x2(above[2 * half], above[2 * half + 1]);
            }
    }

    // One of PIECES parts of the tile before becomes y, in shared memory.
    __device__ __forceinline__ void gate_piece(int piece) const {
#pragma unroll
        for (int pair = piece * (PAIRS / PIECES); pair < (piece + 1) * (PAIRS / PIECES); ++pair) {
            const int n = 2 * pair;
            u32 y[4];
            gate_words({gate[n][0], gate[n][1], gate[n + 1][0], gate[n + 1][1]},
                       {up[n][0], up[n][1], up[n + 1][0], up[n + 1][1]}, y);
            store_matrix_x4((staged + pair / 4 * Y_PANEL_BYTES) ^ pair % 4 * 32, y);
        }
    }

    __device__ __forceinline__ void store(const TensorMap& y_map, const Tile& tile,
                                          u32 warp_y) const {
        show_to_async_units();
        __syncwarp();
        if (threadIdx.x % WARP == 0) {
#pragma unroll
            for (int panel = 0; panel < PANELS; ++panel)
                store_box(y_map, tile.column + panel * 64, tile.row + threadIdx.x / WARP * 16,
                          warp_y + panel * Y_PANEL_BYTES);
            commit_stores();
        }
    }
};

__device__ __forceinline__ void multiply_all(Rows& rows, const TensorMap& y_map, u32 slots,
                                             u32 warp_y, int first, int num_tiles, int step,
                                             int row_tiles, u32 block) {
    const int lane = threadIdx.x % WARP;
    const Panel<SPAN> x(slots + threadIdx.x / (4 * WARP) * 64 * ROW_BYTES, 0);
    const Panel<SPAN> w(slots + X_BYTES, 0);
    int before = -1;
#pragma unroll
    for (int n = 0; n < TILE_F / 8; ++n)
        rows.gate[n][0] = rows.gate[n][1] = rows.up[n][0] = rows.up[n][1] = 0;
    for (int index = first; index < num_tiles; index += step) {
        u32 used = 0;
        // The slot of the step before this one is free once its products are done.
        auto next = [&](bool is_first) {
            if (!is_first) {
                wait_for_products<1>();
                rows.release(used);
            }
            used = rows.ring.slot;
            rows.ring.advance();
        };
        if (lane == 0) wait_for_stores_to_read();
        __syncwarp();
#pragma unroll
        for (int piece = 0; piece < PIECES; ++piece) {
            rows.multiply(x, w, piece > 0);
            rows.gate_piece(piece);
            next(piece == 0);
        }
        if (before >= 0) rows.store(y_map, Tile(before, row_tiles, block), warp_y);
#pragma unroll 2
        for (int k = PIECES; k < K_TILES; ++k) {
            rows.multiply(x, w, true);
            next(false);
        }
        wait_for_products<0>();
        touch(rows.c);
        rows.release(used);
        rows.round_tile();
        before = index;
    }
    if (lane == 0) wait_for_stores_to_read();
    __syncwarp();
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) rows.gate_piece(piece);
    rows.store(y_map, Tile(before, row_tiles, block), warp_y);
    if (lane == 0) wait_for_stores_to_read();
}

extern "C" __global__ void __launch_bounds__(CONSUMERS + LOADER_THREADS, 1)
#if CLUSTER == 2
    __cluster_dims__(2, 1, 1)
#endif
    gated_linear_sm90a(const __grid_constant__ TensorMap x_map,
                       const __grid_constant__ TensorMap w_map,
                       const __grid_constant__ TensorMap y_map, int num_rows) {
    extern __shared__ __align__(1024) char dynamic[];
    let_next_start();
    const u32 slots = shared_address(dynamic);
    const u32 staging = slots + STAGES * STAGE_BYTES;
    Barriers& barriers = *(Barriers*)(dynamic + STAGES * STAGE_BYTES + TILE_M * TILE_F * 2);
    const u32 full = shared_address(barriers.full), empty = shared_address(barriers.empty);
    const int warp = threadIdx.x / WARP;
    const u32 block = CLUSTER == 2 ? block_of_cluster() : 0;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; ++i) {
            init_barrier(full + i * 8, 1);
            init_barrier(empty + i * 8, CLUSTER * ROW_GROUPS * 4);
        }
        show_to_async_units();
    }
    if constexpr (CLUSTER == 2) meet_cluster();
    else __syncthreads();

    const int row_tiles = (num_rows + CLUSTER * TILE_M - 1) / (CLUSTER * TILE_M);
    const int num_tiles = row_tiles * COLUMN_TILES;
    const int first = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER;
    if (warp < CONSUMERS / WARP) {
        if constexpr (MOVE_REGISTERS) take_registers<240>();
        const u32 warp_y = staging + warp * WARP_Y_BYTES;
        const int lane = threadIdx.x % WARP;
        Rows rows;
        rows.staged = warp_y + (lane & 15) * ROW_BYTES + ((lane / 16 ^ lane % 8) << 4);
        rows.full = full, rows.empty = empty;
        multiply_all(rows, y_map, slots, warp_y, first, num_tiles, step, row_tiles, block);
    } else {
        if constexpr (MOVE_REGISTERS) give_registers<24>();
        if (threadIdx.x == CONSUMERS && first < num_tiles) {
            Loader loader = {x_map, w_map, slots, full, empty, block, {}};
            loader.load_all(first, num_tiles, step, row_tiles);
        }
        __syncwarp();
    }
    // Nobody leaves while the other block may still send to it.
    if constexpr (CLUSTER == 2) meet_cluster();
}

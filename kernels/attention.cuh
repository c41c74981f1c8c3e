// attention.cuh: the arithmetic that attention's three kernels share
//
// computes:  out[t][h] = fp16(sum over j of softmax_j(q[t][h] . key_j / sqrt(D)) value_j), over the
//            positions j of t's own sequence with pos - reach < j <= pos (reach: the sliding
//            window, or 2^31 - 1)
// layout:    q, out (T, H, D) fp16; keys, values (num_blocks, Hkv, 64, D) fp16; query_start
//            (B + 1,), context_lens (B,), block_tables (B, max_blocks) i32: as backend/ops.py's
//            Batch. A row is a pair (token, head of the group), token-major; 16 rows of one KV head
//            are one mma tile: a decode step's tile holds the group, a prefill tile group x tokens.
// macros:    NUM_HEADS (H), NUM_KV_HEADS (Hkv), HEAD_DIM (D, a multiple of 16 up to 128), WARPS,
//            MIN_BLOCKS (resident per SM)
// order:     Every row does the same arithmetic wherever it runs, in tiles of 64 keys at absolute
//            positions and splits of 256. Scores: one k16 chain over D. A split, tiles ascending:
//            m' = max(m, tile), o = o * 2^((m - m')c) + P V with P in fp16 and one k16 chain over
//            the keys; sums per lane, then the quad. Splits merge ascending. Masked keys give P = 0
//            and a scale of exactly 1, so a tile or split that a row cannot see changes none of its
//            bits, met or skipped. Rows beyond the context are loaded as zeros: stale memory is
//            harmless.
// source:    online softmax: Milakov & Gimelshein 2018; tiling: Dao 2023 (FlashAttention-2)

static_assert(HEAD_DIM % 16 == 0 && HEAD_DIM <= 128, "head dims are multiples of 16 up to 128");
static_assert(NUM_HEADS % NUM_KV_HEADS == 0, "every KV head serves the same number of heads");

constexpr int GROUP = NUM_HEADS / NUM_KV_HEADS;
constexpr int TILE = BLOCK_SIZE;             // keys; one block of the cache
constexpr int SPLIT_TILES = 4;               // a split is 256 positions
constexpr int K_STEPS = HEAD_DIM / 16;
constexpr int COLUMN_TILES = HEAD_DIM / 8;
constexpr int CHUNKS = HEAD_DIM / 8;         // 16-byte pieces of a key or value
constexpr u32 TILE_BYTES = TILE * HEAD_DIM * 2;
constexpr u32 STAGE_BYTES = 2 * TILE_BYTES;  // keys, then values
constexpr int THREADS = WARPS * WARP;

__device__ __forceinline__ float minus_infinity() { return as_float(0xff800000u); }

// --- a tile in shared memory -------------------------------------------------------------------

// Where chunk `chunk` of row `row` lies: permuted among SPAN neighbours so that eight rows' chunks
// cover all banks.
__device__ __forceinline__ u32 chunk_offset(int row, int chunk) {
    constexpr int SPAN = CHUNKS % 8 == 0 ? 8 : CHUNKS % 4 == 0 ? 4 : 2;
    const int flip = row / (8 / SPAN) % SPAN;
    return (row * CHUNKS + chunk / SPAN * SPAN + (chunk % SPAN ^ flip)) * 16;
}

// One warp's share of loading tiles: ROWS rows of 64, from row `first`, the permutation worked out
// once. Rows from `valid` on become zero.
template <int ROWS>
struct TileLoader {
    static constexpr int PERIOD_ROWS = CHUNKS % 4 == 0 ? 8 : 16;
    static constexpr int PERIOD = PERIOD_ROWS * CHUNKS / WARP;  // copies until the pattern repeats
    static_assert(ROWS % PERIOD_ROWS == 0, "whole periods");
    u32 target[PERIOD];
    int index;

    __device__ __forceinline__ TileLoader(int first) {
        const int lane = threadIdx.x % WARP;
        index = first * CHUNKS + lane;
#pragma unroll
        for (int i = 0; i < PERIOD; ++i)
            target[i] =
                chunk_offset(first + (lane + i * WARP) / CHUNKS, (lane + i * WARP) % CHUNKS);
    }

    // policy: as copy_async_16 takes it, or none.
    template <class... Policy>
    __device__ __forceinline__ void load(u32 shared, const f16* tile, int valid,
                                         Policy... policy) const {
        const char* from = (const char*)tile + index * 16;
        const int limit = valid * CHUNKS - index;
#pragma unroll
        for (int period = 0; period < ROWS / PERIOD_ROWS; ++period)
#pragma unroll
            for (int i = 0; i < PERIOD; ++i) {
                const int step = (period * PERIOD + i) * WARP;
                copy_async_16(shared + target[i] + period * PERIOD_ROWS * CHUNKS * 16,
                              from + step * 16, step < limit ? 16 : 0, policy...);
            }
    }
};

// --- the arithmetic of one warp: TILES row tiles against one tile of keys ----------------------

// Scores of a tile's hidden keys become those of none. visible(half, key): whether row `half` sees key
// `key` of the tile.
template <class Visible>
__device__ __forceinline__ void mask(float (&s)[TILE / 8][4], Visible visible, int halves = 2) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (half == halves) return;
#pragma unroll
        for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
            for (int v = 0; v < 2; ++v)
                if (!visible(half, n * 8 + threadIdx.x % 4 * 2 + v))
                    s[n][2 * half + v] = minus_infinity();
    }
}

// What a warp does besides: after its last look at the keys, and before its first at the values.
struct Turn {
    __device__ __forceinline__ void after_keys() const {}
    __device__ __forceinline__ void before_values() const {}
};

// Lane = 4 g + t holds rows g and g + 8 (index `half`) and, of every 8 columns, 2t and 2t + 1.
template <int TILES>
struct Rows {
    u32 q[TILES][K_STEPS][4];
    float max[TILES][2], sum[TILES][2];   // of the split so far; sum is this lane's share
    float o[TILES][COLUMN_TILES][4];
    int halves = 2;   // 1: there are no more than 8 rows
    bool is_new;      // o is zero

    __device__ __forceinline__ void start_split() {
        is_new = true;
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
            max[i][0] = max[i][1] = minus_infinity();
            sum[i][0] = sum[i][1] = 0.0f;
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; ++n)
#pragma unroll
                for (int v = 0; v < 4; ++v) o[i][n][v] = 0.0f;
        }
    }

    // Row `half` of tile i from global memory; null becomes zero.
    __device__ __forceinline__ void load_q(int i, int half, const f16* row) {
        const int t = threadIdx.x % 4;
#pragma unroll
        for (int k = 0; k < K_STEPS; ++k) {
            const u32* source = (const u32*)(row + k * 16) + t;
            q[i][k][half] = row ? source[0] : 0u;
            q[i][k][half + 2] = row ? source[4] : 0u;
        }
    }

    // Scores of all rows against a tile of keys at a shared address.
    __device__ __forceinline__ void score(float (&s)[TILES][TILE / 8][4], u32 keys) const {
        const int lane = threadIdx.x % WARP;
#pragma unroll
        for (int i = 0; i < TILES; ++i)
#pragma unroll
            for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
                for (int v = 0; v < 4; ++v) s[i][n][v] = 0.0f;
#pragma unroll
        for (int k = 0; k < K_STEPS; ++k)
#pragma unroll
            for (int pair = 0; pair < TILE / 16; ++pair) {
                u32 b[4];
                const u32 from = chunk_offset(lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2);
                load_matrix_x4(b, keys + from + pair * 16 * CHUNKS * 16);
#pragma unroll
                for (int i = 0; i < TILES; ++i) {
                    mma_k16(s[i][2 * pair], q[i][k], b[0], b[1]);
                    mma_k16(s[i][2 * pair + 1], q[i][k], b[2], b[3]);
                }
            }
    }

    // keys, values: shared addresses of the tile. visible(i, half, key): whether row `half` of row
    // tile i sees key `key` of the tile; asked only when all_visible is false. turn: see Turn.
    template <class Visible, class OnTurn = Turn>
    __device__ __forceinline__ void attend(u32 keys, u32 values, bool all_visible, Visible visible,
                                           float scale, OnTurn turn = OnTurn()) {
        const int lane = threadIdx.x % WARP;
        float s[TILES][TILE / 8][4];
        score(s, keys);
        turn.after_keys();

        u32 p[TILES][TILE / 8][2] = {};
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
            if (!all_visible)
                mask(s[i], [&](int half, int key) { return visible(i, half, key); }, halves);
            soften(s[i], p[i], i, scale);
        }
        is_new = false;
        turn.before_values();

#pragma unroll
        for (int k = 0; k < TILE / 16; ++k)
#pragma unroll
            for (int pair = 0; pair < COLUMN_TILES / 2; ++pair) {
                u32 b[4];
                const u32 from = chunk_offset(lane / 8 % 2 * 8 + lane % 8, 2 * pair + lane / 16);
                load_matrix_x4_transposed(b, values + from + k * 16 * CHUNKS * 16);
#pragma unroll
                for (int i = 0; i < TILES; ++i) {
                    const u32 a[4] = {p[i][2 * k][0], p[i][2 * k][1], p[i][2 * k + 1][0],
                                      p[i][2 * k + 1][1]};
                    mma_k16(o[i][2 * pair], a, b[0], b[1]);
                    mma_k16(o[i][2 * pair + 1], a, b[2], b[3]);
                }
            }
    }

    // Row `half` of scores to weights; their sum over this lane's.
    static __device__ __forceinline__ float weigh(const float (&s)[TILE / 8][4],
                                                  u32 (&p)[TILE / 8][2], int half, float origin,
                                                  float scale) {
        const float shift = -__fmul_rn(origin, scale);
        float added = 0.0f;
#pragma unroll
        for (int n = 0; n < TILE / 8; ++n) {
            const float left = exp2_hardware(__fmaf_rn(s[n][2 * half], scale, shift));
            const float right = exp2_hardware(__fmaf_rn(s[n][2 * half + 1], scale, shift));
            added = __fadd_rn(added, __fadd_rn(left, right));
            p[n][half] = to_f16x2(left, right);
        }
        return added;
    }

    // Scores to weights: the running maximum and sum move on, o is rescaled.
    __device__ __forceinline__ void soften(const float (&s)[TILE / 8][4], u32 (&p)[TILE / 8][2],
                                           int i, float scale) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (half == halves) return;
            float top = max[i][half];
#pragma unroll
            for (int n = 0; n < TILE / 8; ++n)
                top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 1));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2));
            const float origin = top == minus_infinity() ? 0.0f : top;
            const float keep = exp2_hardware(__fmul_rn(__fsub_rn(max[i][half], origin), scale));
            const float added = weigh(s, p, half, origin, scale);
            max[i][half] = top;
            sum[i][half] = __fmaf_rn(sum[i][half], keep, added);
            if (is_new) continue;
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; ++n) {
                o[i][n][2 * half] = __fmul_rn(o[i][n][2 * half], keep);
                o[i][n][2 * half + 1] = __fmul_rn(o[i][n][2 * half + 1], keep);
            }
        }
    }

    // The row's sum over the split, in every lane of its quad.
    __device__ __forceinline__ void finish_split() {
#pragma unroll
        for (int i = 0; i < TILES; ++i)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float x = sum[i][half];
                x = __fadd_rn(x, __shfl_xor_sync(FULL_WARP, x, 1));
                sum[i][half] = __fadd_rn(x, __shfl_xor_sync(FULL_WARP, x, 2));
            }
    }
};

// A row's running total over its splits: total = total * keep + split * add, then the next split.
struct Merged {
    float max = minus_infinity(), sum = 0.0f, keep, add;

    __device__ __forceinline__ void take(float split_max, float split_sum, float scale) {
        const float top = fmaxf(max, split_max);
        const float origin = top == minus_infinity() ? 0.0f : top;
        keep = exp2_hardware(__fmul_rn(__fsub_rn(max, origin), scale));
        add = exp2_hardware(__fmul_rn(__fsub_rn(split_max, origin), scale));
        max = top;
        sum = __fmaf_rn(split_sum, add, __fmul_rn(sum, keep));
    }

    __device__ __forceinline__ float value(float total, float split) const {
        return __fmaf_rn(split, add, __fmul_rn(total, keep));
    }
};

// The addition turns -0 into +0: zero has one pattern, however it came about.
__device__ __forceinline__ float normalized(float total, float inverse_sum) {
    return __fadd_rn(__fmul_rn(total, inverse_sum), 0.0f);
}

__device__ __forceinline__ void write_row(f16* row, const float (&o)[COLUMN_TILES][4], int half,
                                          float sum) {
    const float inverse = __frcp_rn(sum);
    u32* target = (u32*)row + threadIdx.x % 4;
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; ++n)
        target[n * 4] = to_f16x2(normalized(o[n][2 * half], inverse),
                                 normalized(o[n][2 * half + 1], inverse));
}

__device__ __forceinline__ int first_visible(int position, int reach) {
    return max(position - reach + 1, 0);
}

// attention: causal grouped-query attention over the paged cache, for prefill and decode alike
//
// computes:  out[t][h] = fp16(sum over j of softmax_j(q[t][h] . key_j / sqrt(D)) value_j), over the
//            positions j of t's own sequence with pos - reach < j <= pos (reach: the sliding
//            window, or 2^31 - 1)
// layout:    q, out (T, H, D) fp16; keys, values (num_blocks, Hkv, 64, D) fp16; query_start
//            (B + 1,), context_lens (B,), block_tables (B, max_blocks) i32: as backend/ops.py's
//            Batch. A row is a pair (token, head of the group), token-major; 16 rows of one KV head
//            are one mma tile: a decode step's tile holds the group, a prefill tile group x tokens.
//            partials: for each sequence, split, KV head and row tile min(G, 16) x (D + 2) fp32
// mapping:   KIND 0, decode: sequences with one query. Item = (sequence, split, KV head, row tile);
//            warp w of the grid owns items w, w + W, … and streams their tiles through its own
//            stages without a gap. A query with one split is done; others leave partials.
//            KIND 1, prefill: sequences with more; query_start[0] need not be 0. Block (i, KV head)
//            owns WARPS * ROW_TILES * 16 rows of one sequence and walks its tiles; warps share the
//            tiles in shared memory.
//            KIND 2, merge: warp = (sequence, head), of the queries that left partials.
// macros:    NUM_HEADS (H), NUM_KV_HEADS (Hkv), HEAD_DIM (D, a multiple of 16 up to 128), KIND,
//            WARPS, ROW_TILES (1 for decode), STAGES (2 for prefill), MIN_BLOCKS (resident per SM)
// bound by:  decode: bytes of keys and values; prefill: flops (mma.sync) and exponentials
// order:     Every row does the same arithmetic wherever it runs, in tiles of 64 keys at absolute
//            positions and splits of 256. Scores: one k16 chain over D. A split, tiles ascending:
//            m' = max(m, tile), o = o * 2^((m - m')c) + P V with P in fp16 and one k16 chain over
//            the keys; sums per lane, then the quad. Splits merge ascending. Masked keys give P = 0
//            and a scale of exactly 1, so a tile or split that a row cannot see changes none of its
//            bits, met or skipped. Rows beyond the context are loaded as zeros: stale memory is
//            harmless.
// source:    online softmax: Milakov & Gimelshein 2018; tiling: Dao 2023 (FlashAttention-2)
// architectures: sm_80 sm_90 sm_120
// compile:   NUM_HEADS=32 NUM_KV_HEADS=32 HEAD_DIM=96 KIND=0 WARPS=4 ROW_TILES=1 STAGES=2 MIN_BLOCKS=1
//            | NUM_HEADS=14 NUM_KV_HEADS=2 HEAD_DIM=64 KIND=0 WARPS=4 ROW_TILES=1 STAGES=2 MIN_BLOCKS=1
//            | NUM_HEADS=32 NUM_KV_HEADS=8 HEAD_DIM=128 KIND=0 WARPS=3 ROW_TILES=1 STAGES=2 MIN_BLOCKS=1
//            | NUM_HEADS=32 NUM_KV_HEADS=32 HEAD_DIM=96 KIND=1 WARPS=4 ROW_TILES=1 STAGES=2 MIN_BLOCKS=2
//            | NUM_HEADS=14 NUM_KV_HEADS=2 HEAD_DIM=64 KIND=1 WARPS=4 ROW_TILES=1 STAGES=2 MIN_BLOCKS=3
//            | NUM_HEADS=32 NUM_KV_HEADS=8 HEAD_DIM=128 KIND=1 WARPS=4 ROW_TILES=1 STAGES=2 MIN_BLOCKS=2
//            | NUM_HEADS=32 NUM_KV_HEADS=32 HEAD_DIM=96 KIND=2 WARPS=4 ROW_TILES=1 STAGES=2 MIN_BLOCKS=1
// spills:    none

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

    __device__ __forceinline__ void load(u32 shared, const f16* tile, int valid) const {
        const char* from = (const char*)tile + index * 16;
        const int limit = valid * CHUNKS - index;
#pragma unroll
        for (int period = 0; period < ROWS / PERIOD_ROWS; ++period)
#pragma unroll
            for (int i = 0; i < PERIOD; ++i) {
                const int step = (period * PERIOD + i) * WARP;
                copy_async_16(shared + target[i] + period * PERIOD_ROWS * CHUNKS * 16,
                              from + step * 16, step < limit ? 16 : 0);
            }
    }
};

// --- the arithmetic of one warp: TILES row tiles against one tile of keys ----------------------

// Lane = 4 g + t holds rows g and g + 8 (index `half`) and, of every 8 columns, 2t and 2t + 1.
template <int TILES>
struct Rows {
    u32 q[TILES][K_STEPS][4];
    float max[TILES][2], sum[TILES][2];   // of the split so far; sum is this lane's share
    float o[TILES][COLUMN_TILES][4];

    __device__ __forceinline__ void start_split() {
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

    // keys, values: shared addresses of the tile. visible(i, half, key): whether row `half` of row
    // tile i sees key `key` of the tile; asked only when all_visible is false.
    template <class Visible>
    __device__ __forceinline__ void attend(u32 keys, u32 values, bool all_visible, Visible visible,
                                           float scale) {
        const int lane = threadIdx.x % WARP;
        float s[TILES][TILE / 8][4] = {};
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

        u32 p[TILES][TILE / 8][2];
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
            if (!all_visible) mask(s[i], i, visible);
            soften(s[i], p[i], i, scale);
        }

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

    template <class Visible>
    __device__ __forceinline__ void mask(float (&s)[TILE / 8][4], int i, Visible visible) const {
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
                for (int v = 0; v < 2; ++v)
                    if (!visible(i, half, n * 8 + threadIdx.x % 4 * 2 + v))
                        s[n][2 * half + v] = minus_infinity();
    }

    // Scores to weights: the running maximum and sum move on, o is rescaled.
    __device__ __forceinline__ void soften(const float (&s)[TILE / 8][4], u32 (&p)[TILE / 8][2],
                                           int i, float scale) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float top = max[i][half];
#pragma unroll
            for (int n = 0; n < TILE / 8; ++n)
                top = fmaxf(top, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 1));
            top = fmaxf(top, __shfl_xor_sync(FULL_WARP, top, 2));
            const float origin = top == minus_infinity() ? 0.0f : top;
            const float keep = exp2_hardware(__fmul_rn(__fsub_rn(max[i][half], origin), scale));
            const float shift = -__fmul_rn(origin, scale);
            float added = 0.0f;
#pragma unroll
            for (int n = 0; n < TILE / 8; ++n) {
                const float left = exp2_hardware(__fmaf_rn(s[n][2 * half], scale, shift));
                const float right = exp2_hardware(__fmaf_rn(s[n][2 * half + 1], scale, shift));
                added = __fadd_rn(added, __fadd_rn(left, right));
                p[n][half] = to_f16x2(left, right);
            }
            max[i][half] = top;
            sum[i][half] = __fmaf_rn(sum[i][half], keep, added);
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

#if KIND == 1

// --- prefill: one block, one sequence, WARPS * ROW_TILES * 16 rows -----------------------------

constexpr int BLOCK_ROWS = WARPS * ROW_TILES * 16;
constexpr int PARKED = ROW_TILES * (COLUMN_TILES + 1) * WARP;  // float4s of a warp: o, max and sum

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

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    attention(const f16* __restrict__ q, const f16* __restrict__ keys,
              const f16* __restrict__ values, const i32* __restrict__ query_start,
              const i32* __restrict__ context_lens, const i32* __restrict__ block_tables,
              f16* __restrict__ out, int num_sequences, int max_blocks, int reach, float scale) {
    extern __shared__ __align__(128) char shared[];
    let_next_start();
    wait_for_previous();
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    const int kv_head = blockIdx.y;

    const int block = gridDim.x - 1 - blockIdx.x;  // a sequence's longest rows first
    const int sequence = find_sequence(query_start, num_sequences, block);
    const int query = query_start[sequence];
    const int num_queries = query_start[sequence + 1] - query;
    const int num_rows = num_queries * GROUP;
    const int block_row = (block - first_row_block(query_start, sequence)) * BLOCK_ROWS;
    if (num_queries < 2 || block_row >= num_rows) return;
    const int context = context_lens[sequence];
    const int position = context - num_queries;  // of the sequence's first query

    Rows<ROW_TILES> rows;
    const int warp_row = block_row + warp * ROW_TILES * 16;
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = warp_row + i * 16 + half * 8 + lane / 4;
            rows.load_q(i, half, row < num_rows ? q + row_offset(query, row, kv_head) : nullptr);
        }

    // Positions of the first and last row, of the block and of this warp.
    const int block_first = position + block_row / GROUP;
    const int block_last = position + (min(block_row + BLOCK_ROWS, num_rows) - 1) / GROUP;
    const int warp_first = position + warp_row / GROUP;
    const int warp_last = position + (min(warp_row + ROW_TILES * 16, num_rows) - 1) / GROUP;
    const int first_tile = first_visible(block_first, reach) / TILE;
    const int last_tile = block_last / TILE;
    const int warp_first_tile = first_visible(warp_first, reach) / TILE;
    const int warp_last_tile = warp_row < num_rows ? warp_last / TILE : -1;

    const TileLoader<TILE / WARPS> loader(warp * (TILE / WARPS));
    const u32 stages = shared_address(shared);
    const i32* table = block_tables + (size_t)sequence * max_blocks;
    auto load = [&](int tile) {
        const size_t offset = ((size_t)table[tile] * NUM_KV_HEADS + kv_head) * TILE * HEAD_DIM;
        const u32 stage = stages + tile % STAGES * STAGE_BYTES;
        loader.load(stage, keys + offset, context - tile * TILE);
        loader.load(stage + TILE_BYTES, values + offset, context - tile * TILE);
        copy_async_commit();
    };

    load(first_tile);
    rows.start_split();
    for (int tile = first_tile; tile <= last_tile; ++tile) {
        copy_async_wait<0>();
        __syncthreads();  // this tile has landed, and nobody reads the stage about to be refilled
        if (tile < last_tile) load(tile + 1);
        if (tile < warp_first_tile || tile > warp_last_tile) continue;

        const int base = tile * TILE;
        const bool all_visible =
            base + TILE - 1 <= warp_first && base >= first_visible(warp_last, reach);
        const u32 stage = stages + tile % STAGES * STAGE_BYTES;
        auto visible = [&](int i, int half, int key) {
            const int row = warp_row + i * 16 + half * 8 + lane / 4;
            const int back = position + row / GROUP - base - key;
            return back >= 0 && back < reach;
        };
        rows.attend(stage, stage + TILE_BYTES, all_visible, visible, scale);

        const bool is_last = tile == warp_last_tile;
        const bool is_parked = tile / SPLIT_TILES > warp_first_tile / SPLIT_TILES;
        if (tile % SPLIT_TILES != SPLIT_TILES - 1 && !is_last) continue;
        rows.finish_split();
        // This warp's totals wait here while a split is under way.
        float4* parked = (float4*)(shared + STAGES * STAGE_BYTES) + warp * PARKED + lane;
#pragma unroll
        for (int i = 0; i < ROW_TILES; ++i) {
            float4* place = parked + i * (COLUMN_TILES + 1) * WARP;
            Merged merged[2];
            if (is_parked) {
                const float4 state = place[COLUMN_TILES * WARP];
                merged[0].max = state.x, merged[0].sum = state.y;
                merged[1].max = state.z, merged[1].sum = state.w;
            }
            merged[0].take(rows.max[i][0], rows.sum[i][0], scale);
            merged[1].take(rows.max[i][1], rows.sum[i][1], scale);
#pragma unroll
            for (int n = 0; n < COLUMN_TILES; ++n) {
                float(&o)[4] = rows.o[i][n];
                if (is_parked) {
                    const float4 total = place[n * WARP];
                    o[0] = merged[0].value(total.x, o[0]);
                    o[1] = merged[0].value(total.y, o[1]);
                    o[2] = merged[1].value(total.z, o[2]);
                    o[3] = merged[1].value(total.w, o[3]);
                }
                if (!is_last) place[n * WARP] = make_float4(o[0], o[1], o[2], o[3]);
            }
            place[COLUMN_TILES * WARP] =
                make_float4(merged[0].max, merged[0].sum, merged[1].max, merged[1].sum);
            rows.sum[i][0] = merged[0].sum, rows.sum[i][1] = merged[1].sum;
        }
        if (!is_last) rows.start_split();
    }
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = warp_row + i * 16 + half * 8 + lane / 4;
            if (row < num_rows)
                write_row(out + row_offset(query, row, kv_head), rows.o[i], half,
                          rows.sum[i][half]);
        }
}

#else

// --- decode and merge: what one leaves for the other -------------------------------------------

constexpr int GROUP_TILES = (GROUP + 15) / 16;           // row tiles of a KV head
constexpr int UNITS = NUM_KV_HEADS * GROUP_TILES;        // items of a split
constexpr int ITEM_ROWS = GROUP < 16 ? GROUP : 16;
constexpr int ITEM_FLOATS = ITEM_ROWS * (HEAD_DIM + 2);  // o, then (max, sum), by row

// Splits that a decode query sees, the first being that of its first visible key.
__device__ __forceinline__ int num_splits(int context, int reach) {
    if (context == 0) return 0;
    const int first = first_visible(context - 1, reach) / (TILE * SPLIT_TILES);
    return (context - 1) / (TILE * SPLIT_TILES) - first + 1;
}

__device__ __forceinline__ float* partial_of(float* partials, int sequence, int split, int unit,
                                             int max_blocks) {
    const int max_splits = (max_blocks + SPLIT_TILES - 1) / SPLIT_TILES;
    return partials + (((size_t)sequence * max_splits + split) * UNITS + unit) * ITEM_FLOATS;
}

#if KIND == 0

// --- decode: one warp, one item ----------------------------------------------------------------

// What a block knows of every sequence, in shared memory.
struct Sequences {
    int* first_split;  // (B + 1,), running number of splits
    int* context;      // (B,)
    int count;
};

// Fills the table: an inclusive sum over the sequences, THREADS at a time.
__device__ __forceinline__ void count_splits(const Sequences& s, const i32* query_start,
                                             const i32* context_lens, int reach) {
    __shared__ int warp_sums[WARPS];
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    int before = 0;
    if (threadIdx.x == 0) s.first_split[0] = 0;
    for (int start = 0; start < s.count; start += THREADS) {
        const int b = start + threadIdx.x;
        int sum = 0;
        if (b < s.count) {
            const bool mine = query_start[b + 1] - query_start[b] == 1;
            s.context[b] = context_lens[b];
            sum = mine ? num_splits(s.context[b], reach) : 0;
        }
#pragma unroll
        for (int step = 1; step < WARP; step <<= 1) {
            const int other = __shfl_up_sync(FULL_WARP, sum, step);
            if (lane >= step) sum += other;
        }
        __syncthreads();
        if (lane == WARP - 1) warp_sums[warp] = sum;
        __syncthreads();
        int total = 0;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) {
            if (w < warp) sum += warp_sums[w];
            total += warp_sums[w];
        }
        if (b < s.count) s.first_split[b + 1] = before + sum;
        before += total;
    }
    __syncthreads();
}

// One item: the tiles [tile, end) of one split, for one row tile of one KV head.
struct Item {
    int sequence, unit, split_count, split;  // split: counted from the first visible one
    int context, first, tile, end;
    bool valid;

    __device__ __forceinline__ Item(const Sequences& s, int index, int reach) {
        const int pair = index / UNITS;
        unit = index % UNITS;
        valid = pair < s.first_split[s.count];
        if (!valid) return;
        int low = 0, high = s.count;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (s.first_split[middle] <= pair) low = middle;
            else high = middle;
        }
        sequence = low;
        split = pair - s.first_split[low];
        split_count = s.first_split[low + 1] - s.first_split[low];
        context = s.context[low];
        first = first_visible(context - 1, reach);
        const int split_tile = (first / (TILE * SPLIT_TILES) + split) * SPLIT_TILES;
        tile = max(split_tile, first / TILE);
        end = min(split_tile + SPLIT_TILES, (context - 1) / TILE + 1);
    }
};

__device__ __forceinline__ void store_split(float* partial, const Rows<1>& rows, int num_rows) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = half * 8 + lane / 4;
        if (row >= num_rows) continue;
        float2* o = (float2*)(partial + row * HEAD_DIM) + lane % 4;
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; ++n)
            o[n * 4] = make_float2(rows.o[0][n][2 * half], rows.o[0][n][2 * half + 1]);
        float2* state = (float2*)(partial + ITEM_ROWS * HEAD_DIM) + row;
        if (lane % 4 == 0) *state = make_float2(rows.max[0][half], rows.sum[0][half]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    attention(const f16* __restrict__ q, const f16* __restrict__ keys,
              const f16* __restrict__ values, const i32* __restrict__ query_start,
              const i32* __restrict__ context_lens, const i32* __restrict__ block_tables,
              f16* __restrict__ out, int num_sequences, int max_blocks, int reach, float scale,
              float* __restrict__ partials) {
    extern __shared__ __align__(128) char shared[];
    let_next_start();
    wait_for_previous();
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
    const u32 stages = shared_address(shared) + warp * STAGES * STAGE_BYTES;
    int* lists = (int*)(shared + WARPS * STAGES * STAGE_BYTES);
    const Sequences sequences = {lists, lists + num_sequences + 1, num_sequences};
    count_splits(sequences, query_start, context_lens, reach);

    const int num_warps = gridDim.x * WARPS;
    int index = warp * gridDim.x + blockIdx.x;
    Item work(sequences, index, reach);
    Item ahead = work;  // the item whose tiles are being loaded
    int ahead_index = index;
    i32 ahead_blocks = 0;  // lane i: the cache block of its i-th tile
    int ahead_start = 0;
    const TileLoader<TILE> loader(0);
    auto look_up_blocks = [&] {
        ahead_start = ahead.tile;
        const int tile = ahead.tile + lane;
        if (ahead.valid && tile < ahead.end)
            ahead_blocks = block_tables[(size_t)ahead.sequence * max_blocks + tile];
    };
    int loaded = 0;
    auto load_next = [&] {
        if (ahead.valid) {
            const size_t block = __shfl_sync(FULL_WARP, ahead_blocks, ahead.tile - ahead_start);
            const int kv_head = ahead.unit / GROUP_TILES;
            const size_t offset = (block * NUM_KV_HEADS + kv_head) * TILE * HEAD_DIM;
            const u32 stage = stages + loaded % STAGES * STAGE_BYTES;
            loader.load(stage, keys + offset, ahead.context - ahead.tile * TILE);
            loader.load(stage + TILE_BYTES, values + offset, ahead.context - ahead.tile * TILE);
            ++loaded;
            if (++ahead.tile == ahead.end) {
                ahead_index += num_warps;
                ahead = Item(sequences, ahead_index, reach);
                look_up_blocks();
            }
        }
        copy_async_commit();
    };
    look_up_blocks();
#pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) load_next();

    int used = 0;
    for (; work.valid; index += num_warps, work = Item(sequences, index, reach)) {
        const int kv_head = work.unit / GROUP_TILES;
        const int first_row = work.unit % GROUP_TILES * 16;
        const int num_rows = min(16, GROUP - first_row);
        const size_t query = query_start[work.sequence];
        const size_t head = query * NUM_HEADS + kv_head * GROUP + first_row;
        Rows<1> rows;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = half * 8 + lane / 4;
            rows.load_q(0, half, row < num_rows ? q + (head + row) * HEAD_DIM : nullptr);
        }
        rows.start_split();
        for (int tile = work.tile; tile < work.end; ++tile, ++used) {
            copy_async_wait<STAGES - 2>();
            __syncwarp();  // this tile has landed, and no lane reads the stage about to be refilled
            load_next();
            const int base = tile * TILE;
            const bool all_visible = base >= work.first && base + TILE <= work.context;
            const u32 stage = stages + used % STAGES * STAGE_BYTES;
            auto visible = [&](int, int, int key) {
                return base + key >= work.first && base + key < work.context;
            };
            rows.attend(stage, stage + TILE_BYTES, all_visible, visible, scale);
        }
        rows.finish_split();

        if (work.split_count == 1) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = half * 8 + lane / 4;
                if (row < num_rows)
                    write_row(out + (head + row) * HEAD_DIM, rows.o[0], half, rows.sum[0][half]);
            }
            continue;
        }
        float* partial = partial_of(partials, work.sequence, work.split, work.unit, max_blocks);
        store_split(partial, rows, num_rows);
    }
}

#else

// --- merge: one warp, one query's head ---------------------------------------------------------

constexpr int LANE_COLUMNS = (HEAD_DIM + WARP - 1) / WARP;  // lane, lane + 32, …
constexpr int AHEAD = 8;                                    // splits under way at once

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
    attention(float* __restrict__ partials, const i32* __restrict__ query_start,
              const i32* __restrict__ context_lens, f16* __restrict__ out, int num_sequences,
              int max_blocks, int reach, float scale) {
    const int lane = threadIdx.x % WARP;
    let_next_start();
    wait_for_previous();
    const int index = blockIdx.x * WARPS + threadIdx.x / WARP;
    const int sequence = index / NUM_HEADS;
    const int head = index % NUM_HEADS;
    if (sequence >= num_sequences) return;
    const int query = query_start[sequence];
    const int split_count = num_splits(context_lens[sequence], reach);
    if (query_start[sequence + 1] - query != 1 || split_count < 2) return;  // written by its decode

    const int row = head % GROUP % 16;
    const int unit = head / GROUP * GROUP_TILES + head % GROUP / 16;
    const float* partial = partial_of(partials, sequence, 0, unit, max_blocks);
    Merged merged;
    float total[LANE_COLUMNS] = {};
    for (int start = 0; start < split_count; start += AHEAD) {
        float2 state[AHEAD];
        float o[AHEAD][LANE_COLUMNS];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (start + i >= split_count) break;
            const float* from = partial + (size_t)(start + i) * UNITS * ITEM_FLOATS;
            state[i] = ((const float2*)(from + ITEM_ROWS * HEAD_DIM))[row];
#pragma unroll
            for (int c = 0; c < LANE_COLUMNS; ++c)
                if (lane + c * WARP < HEAD_DIM) o[i][c] = from[row * HEAD_DIM + lane + c * WARP];
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
            if (start + i >= split_count) break;
            merged.take(state[i].x, state[i].y, scale);
#pragma unroll
            for (int c = 0; c < LANE_COLUMNS; ++c) total[c] = merged.value(total[c], o[i][c]);
        }
    }
    const float inverse = __frcp_rn(merged.sum);
    f16* target = out + ((size_t)query * NUM_HEADS + head) * HEAD_DIM;
#pragma unroll
    for (int c = 0; c < LANE_COLUMNS; ++c)
        if (lane + c * WARP < HEAD_DIM)
            target[lane + c * WARP] = to_f16(normalized(total[c], inverse));
}

#endif
#endif

// attention_warpgroup.cuh: attention's arithmetic as warpgroup products, for the kernels of sm_90a
//
// layout:    a tile in shared memory is CHUNKS / SPAN panels of 64 rows, as hopper.cuh describes them
// order:     that of Rows in attention.cuh, whose soften and finish_split are here in pieces that can
//            be interleaved. Whoever changes one changes the other: the bits must agree.

#include "hopper.cuh"

constexpr int SPAN = CHUNKS % 8 == 0 ? 8 : CHUNKS % 4 == 0 ? 4 : 2;  // chunks of a row in one panel
constexpr u32 PANEL_BYTES = TILE * SPAN * 16;

// The largest of a row's maximum so far and its scores in the tile, of those this lane holds.
__device__ __forceinline__ float tile_maximum(const float (&s)[TILE / 8][4], int half, float max) {
#pragma unroll
    for (int n = 0; n < TILE / 8; ++n) max = fmaxf(max, fmaxf(s[n][2 * half], s[n][2 * half + 1]));
    return max;
}

// One row's scores in a tile become weights, `top` being its new maximum; this lane's share of its
// sum moves on. Returns what the row of o is to be multiplied by.
__device__ __forceinline__ float weigh(float (&s)[TILE / 8][4], int half, float top, float& max,
                                       float& sum, float scale) {
    const float origin = top == minus_infinity() ? 0.0f : top;
    const float keep = exp2_hardware(__fmul_rn(__fsub_rn(max, origin), scale));
    const float shift = -__fmul_rn(origin, scale);
    float added = 0.0f;
#pragma unroll
    for (int n = 0; n < TILE / 8; ++n) {
        float &left = s[n][2 * half], &right = s[n][2 * half + 1];
        left = exp2_hardware(__fmaf_rn(left, scale, shift));
        right = exp2_hardware(__fmaf_rn(right, scale, shift));
        added = __fadd_rn(added, __fadd_rn(left, right));
    }
    max = top;
    sum = __fmaf_rn(sum, keep, added);
    return keep;
}

__device__ __forceinline__ void rescale(float (&o)[COLUMN_TILES][4], int half, float keep) {
#pragma unroll
    for (int n = 0; n < COLUMN_TILES; ++n) {
        o[n][2 * half] = __fmul_rn(o[n][2 * half], keep);
        o[n][2 * half + 1] = __fmul_rn(o[n][2 * half + 1], keep);
    }
}

// A lane's share of a row's sum becomes the row's, in every lane of its quad.
__device__ __forceinline__ float quad_sum(float x) {
    x = __fadd_rn(x, __shfl_xor_sync(FULL_WARP, x, 1));
    return __fadd_rn(x, __shfl_xor_sync(FULL_WARP, x, 2));
}


struct WarpRows {
    u32 q[K_STEPS][4];
    float s[TILE / 8][4];
    u32 p[TILE / 16][4];
    float o[COLUMN_TILES][4];
    float max[2], sum[2];

    __device__ __forceinline__ void load_q(int half, const f16* row) {
        const int t = threadIdx.x % 4;
#pragma unroll
        for (int k = 0; k < K_STEPS; ++k) {
            const u32* source = (const u32*)(row + k * 16) + t;
            q[k][half] = row ? source[0] : 0u;
            q[k][half + 2] = row ? source[4] : 0u;
        }
    }

    __device__ __forceinline__ void start_split() {
        max[0] = max[1] = minus_infinity();
        sum[0] = sum[1] = 0.0f;
    }

    // s = q keys^T
    __device__ __forceinline__ void multiply_keys(u32 keys) {
        const Panel<SPAN> panel(keys, 0);
#pragma unroll
        for (int k = 0; k < K_STEPS; ++k)
            multiply<0>(s, q[k], panel.at(k / (SPAN / 2) * PANEL_BYTES + k % (SPAN / 2) * 32), k > 0);
        commit_products();
    }

    // o += p values, or o = p values
    __device__ __forceinline__ void multiply_values(u32 values, bool add) {
        const Panel<SPAN> panel(values, PANEL_BYTES);
#pragma unroll
        for (int k = 0; k < TILE / 16; ++k)
            multiply<1>(o, p[k], panel.at(k * 16 * SPAN * 16), k > 0 || add);
        commit_products();
    }

    __device__ __forceinline__ void pack_weights() {
#pragma unroll
        for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                p[n / 2][n % 2 * 2 + half] = to_f16x2(s[n][2 * half], s[n][2 * half + 1]);
    }

    // Not for their values, which the next product overwrites: so that registers are free till then.
    __device__ __forceinline__ void clear_scores() {
#pragma unroll
        for (int n = 0; n < TILE / 8; ++n)
#pragma unroll
            for (int v = 0; v < 4; ++v) s[n][v] = 0.0f;
    }

    __device__ __forceinline__ void clear_weights() {
#pragma unroll
        for (int k = 0; k < TILE / 16; ++k)
#pragma unroll
            for (int v = 0; v < 4; ++v) p[k][v] = 0;
    }

    // The split's sums join those of the splits before, if any, and take their place.
    __device__ __forceinline__ void merge_sums(Merged (&merged)[2], float4* parked, bool is_parked,
                                               float scale) const {
        float4& state = parked[COLUMN_TILES * WARP];
        if (is_parked) {
            merged[0].max = state.x, merged[0].sum = state.y;
            merged[1].max = state.z, merged[1].sum = state.w;
        }
        merged[0].take(max[0], quad_sum(sum[0]), scale);
        merged[1].take(max[1], quad_sum(sum[1]), scale);
        state = make_float4(merged[0].max, merged[0].sum, merged[1].max, merged[1].sum);
    }

    __device__ __forceinline__ void merge_parked(const Merged (&merged)[2], const float4* parked) {
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; ++n) {
            const float4 total = parked[n * WARP];
            o[n][0] = merged[0].value(total.x, o[n][0]);
            o[n][1] = merged[0].value(total.y, o[n][1]);
            o[n][2] = merged[1].value(total.z, o[n][2]);
            o[n][3] = merged[1].value(total.w, o[n][3]);
        }
    }

    __device__ __forceinline__ void park(float4* parked) const {
#pragma unroll
        for (int n = 0; n < COLUMN_TILES; ++n)
            parked[n * WARP] = make_float4(o[n][0], o[n][1], o[n][2], o[n][3]);
    }
};

// The count of tiles or items so far says where in its ring the next one is, and in which round.
template <u32 SIZE>
struct Ring {
    u32 count = 0;

    __device__ __forceinline__ u32 place() const { return count % SIZE; }
    __device__ __forceinline__ u32 round() const { return count / SIZE % 2; }
};

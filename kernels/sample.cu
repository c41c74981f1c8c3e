// sample: one token per row of logits, its log-probability and margin, and the row's fingerprint
//
// computes:  what orcd_batch/backend/numpy_sampler.py specifies, bit for bit (token, margin,
//            fingerprint, finite); logprob = (raw[token] - max) - log(sum of exp(raw - max))
// layout:    logits (R, V) fp32; temperature, top_p, min_p, repetition_penalty (R,) fp32; top_k
//            (R,) i32; seed, stream (R,) u64; position (R,) u32; seen_ids (S,) and seen_start
//            (R + 1,) i32;
//            results: token_ids (R,) i32, logprobs and margins (R,) fp32, fingerprints (R,) i64,
//            finite (R,) i32
// mapping:   V is cut into 4 parts, or 8 beyond 65,536 tokens. A cluster of as many blocks owns a
//            row, a block keeps its part's values in shared memory (sm_90 and later); with
//            GENERIC=1, and before sm_90, one block owns a row and reads the parts one after
//            another from memory.
// macros:    VOCAB (V, at most 2^18), GENERIC
// bound by:  bytes (R V 4) when greedy; with noise, integer arithmetic
// order:     everything but logprob is exact: integers, maxima with ties to the lowest id, and fp32
//            sequences per element (elementary.py) written as single rounded operations. logprob:
//            a thread's elements ascending, then lanes, warps and parts by butterfly: fixed by V.
// source:    Philox4x32-10: Salmon et al. 2011; Gumbel-max; radix selection on the value's bits
// architectures: sm_80 sm_90 sm_120
// compile:   VOCAB=32064 GENERIC=0 | VOCAB=151936 GENERIC=0 | VOCAB=151936 GENERIC=1
// spills:    none

#if __CUDA_ARCH__ >= 900 && !GENERIC
#define CLUSTERED 1
#else
#define CLUSTERED 0
#endif

constexpr int THREADS = 512;  // also the number of histogram bins
constexpr int BIN_BITS = 9;
constexpr int NUM_WARPS = THREADS / WARP;
constexpr int PARTS = VOCAB <= 65536 ? 4 : 8;
constexpr int PART = (VOCAB + PARTS - 1) / PARTS;
constexpr int HELD = CLUSTERED ? PART : VOCAB;  // ids that one block answers for
constexpr int SEGMENT = 16384;                  // ids whose weights the counters can hold
constexpr int WEIGHT_SPLIT = 17;                // bits of a weight in the low counter
constexpr int NO_ID = 0x7fffffff;
constexpr float FLOAT_MAX = 3.40282346638528859812e+38f;
constexpr float MAX_GUMBEL = 23.0f;             // above -log(2^-33), the largest possible noise
constexpr u64 GOLDEN = 0x9E3779B97F4A7C15ull;

static_assert(VOCAB <= 1 << 18, "the sampler's sums are exact up to 2^18 tokens");

__device__ __forceinline__ float minus_infinity() { return as_float(0xff800000u); }

// Near log2(x) for normal x, by the hardware.
__device__ __forceinline__ float log2_hardware(float x) {
    float y;
    asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// --- exp, log, random words: elementary.py and philox.py, operation by operation ---------------

__device__ __forceinline__ float exp_fixed(float z) {
    const bool is_zero = z < -86.0f;
    z = fmaxf(z, -86.0f);
    const float shifted = __fadd_rn(__fmul_rn(z, 0x1.715476p+0f), 12582912.0f);  // its low bits: n
    const float n = __fadd_rn(shifted, -12582912.0f);
    float r = __fsub_rn(z, __fmul_rn(n, 0x1.63p-1f));
    r = __fsub_rn(r, __fmul_rn(n, -0x1.bd0106p-13f));
    float q = __fadd_rn(__fmul_rn(r, 0x1.9fb882p-13f), 0x1.6d9408p-10f);
    q = __fadd_rn(__fmul_rn(q, r), 0x1.1111eep-7f);
    q = __fadd_rn(__fmul_rn(q, r), 0x1.555484p-5f);
    q = __fadd_rn(__fmul_rn(q, r), 0x1.555554p-3f);
    q = __fadd_rn(__fmul_rn(q, r), 0x1.000000p-1f);
    const float p = __fadd_rn(__fadd_rn(__fmul_rn(__fmul_rn(r, r), q), r), 1.0f);
    return __fmul_rn(p, is_zero ? 0.0f : as_float(as_bits(shifted) + 127 << 23));
}

__device__ __forceinline__ float log_fixed(float y) {
    const int bits = (int)as_bits(y);
    const int k = (bits - 0x3F3504F3) >> 23;
    const float f = __fsub_rn(as_float((u32)(bits - (k << 23))), 1.0f);
    const float s = __fdiv_rn(f, __fadd_rn(2.0f, f));
    const float w = __fmul_rn(s, s);
    float t = __fadd_rn(__fmul_rn(w, 0x1.dde530p-3f), 0x1.245bd2p-2f);
    t = __fadd_rn(__fmul_rn(t, w), 0x1.9999ecp-2f);
    t = __fadd_rn(__fmul_rn(t, w), 0x1.555556p-1f);
    t = __fmul_rn(w, t);
    const float g = __fsub_rn(f, __fmul_rn(s, __fsub_rn(f, t)));
    const float exponent = (float)k;
    return __fadd_rn(__fmul_rn(exponent, 0x1.63p-1f),
                     __fadd_rn(__fmul_rn(exponent, -0x1.bd0106p-13f), g));
}

__device__ __forceinline__ u32 philox_word(u64 stream, u32 position, u32 id, u64 seed) {
    u32 c0 = (u32)stream, c1 = (u32)(stream >> 32), c2 = position, c3 = id;
    u32 k0 = (u32)seed, k1 = (u32)(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const u32 low1 = 0xCD9E8D57u * c2, high1 = __umulhi(0xCD9E8D57u, c2);
        const u32 low0 = 0xD2511F53u * c0, high0 = __umulhi(0xD2511F53u, c0);
        c0 = high1 ^ c1 ^ k0, c1 = low1;
        c2 = high0 ^ c3 ^ k1, c3 = low0;
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    return c0;
}

__device__ __forceinline__ float gumbel(u32 word) {
    const bool is_low = word < 0x80000000u;
    const float h = __fmul_rn(__fadd_rn(__uint2float_rn(is_low ? word : ~word), 0.5f), 0x1p-32f);
    const float y = __fsub_rn(1.0f, h);
    const float correction = is_low ? __fsub_rn(h, __fsub_rn(1.0f, y)) : 0.0f;
    const float exponential = __fsub_rn(correction, log_fixed(is_low ? y : h));
    return __fsub_rn(0.0f, log_fixed(exponential));
}

// At least gumbel(word), by less than GUMBEL_SLACK for words below 2^31: there E, whose -log the noise
// is, lies between h and 1.387 h; beyond, E is at least log 2. The rest allows for rounding.
[[maybe_unused]] constexpr float GUMBEL_SLACK = 0.35f;
__device__ __forceinline__ float gumbel_bound(u32 word) {
    if (word >= 0x80000000u) return 0.368f;
    const float h = __fmul_rn(__fadd_rn(__uint2float_rn(word), 0.5f), 0x1p-32f);
    return __fmaf_rn(log2_hardware(h), -0x1.62e430p-1f, 0.001f);
}

__device__ __forceinline__ u64 hash_factor(int id) {
    u64 s = (u64)(id + 1) * GOLDEN;
    s = (s ^ s >> 30) * 0xBF58476D1CE4E5B9ull;
    s = (s ^ s >> 27) * 0x94D049BB133111EBull;
    return (s ^ s >> 31) | 1;
}

// --- the blocks of a row -----------------------------------------------------------------------

__device__ __forceinline__ int first_part() { return CLUSTERED ? blockIdx.x % PARTS : 0; }
__device__ __forceinline__ int past_last_part() { return CLUSTERED ? first_part() + 1 : PARTS; }

// Everything written to shared memory before is visible to all blocks of the row after.
__device__ __forceinline__ void row_sync() {
#if CLUSTERED
    asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
#else
    __syncthreads();
#endif
}

// A copy of `slot` from the shared memory of the block that owns `part`.
template <class T>
__device__ __forceinline__ T of_part(const T& slot, int part) {
#if CLUSTERED
    T copy;
    u32 address;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
                 : "=r"(address)
                 : "r"(shared_address(&slot)), "r"(part));
#pragma unroll
    for (int i = 0; i < sizeof(T) / 4; ++i)
        asm volatile("ld.shared::cluster.u32 %0, [%1];"
                     : "=r"(((u32*)&copy)[i])
                     : "r"(address + i * 4)
                     : "memory");
    return copy;
#else
    return slot;
#endif
}

// An unsigned integer in the order of the numbers; both zeros give the same.
__device__ __forceinline__ u32 ordered(float x) {
    const u32 bits = as_bits(__fadd_rn(x, 0.0f));
    return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
__device__ __forceinline__ float number_of(u32 key) {
    return as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}
__device__ __forceinline__ float warp_top(float x) {
    return number_of(__reduce_max_sync(FULL_WARP, ordered(x)));
}

// The largest value, of equal ones the lowest id.
struct Best {
    float value;
    int id;

    static __device__ __forceinline__ Best none() { return {minus_infinity(), NO_ID}; }
    __device__ __forceinline__ void add(float other, int other_id) {
        if (other > value || (other == value && other_id < id)) value = other, id = other_id;
    }
    __device__ __forceinline__ void reduce_warp() {
        const float top = warp_top(value);
        id = __reduce_min_sync(FULL_WARP, value == top ? id : NO_ID);
        value = top;
    }
};

// What one pass over the logits gives; sum is that of exp(raw - best.value).
struct Stats {
    Best best, penalized;
    float second, sum;
    u32 hash_low, hash_high;
    u32 finite;

    static __device__ __forceinline__ Stats none() {
        return {Best::none(), Best::none(), minus_infinity(), 0.0f, 0, 0, 1};
    }
    __device__ __forceinline__ u64 hash() const { return (u64)hash_high << 32 | hash_low; }
    __device__ __forceinline__ void set_hash(u64 hash) {
        hash_low = (u32)hash, hash_high = (u32)(hash >> 32);
    }
    // Ids come in ascending order. penalized_value: left out where it is raw.
    __device__ __forceinline__ void add(float raw, float penalized_value, int id) {
        add(raw, id);
        if (penalized_value > penalized.value) penalized = {penalized_value, id};
    }
    __device__ __forceinline__ void add(float raw, int id) {
        const bool is_better = raw > best.value;
        const float e = exp_fixed(-fabsf(__fsub_rn(raw, best.value)));
        sum = is_better ? __fadd_rn(__fmul_rn(sum, e), 1.0f) : __fadd_rn(sum, e);
        second = is_better ? best.value : fmaxf(second, raw);
        if (is_better) best = {raw, id};
        set_hash(hash() + hash_factor(id) * as_bits(raw));
        finite &= (as_bits(raw) & 0x7f800000u) != 0x7f800000u;
    }
    __device__ __forceinline__ void reduce_warp() {
        const Best own = best;
        best.reduce_warp();
        second = warp_top(own.id == best.id ? second : own.value);
        const float scale = own.id == NO_ID ? 0.0f : exp_fixed(__fsub_rn(own.value, best.value));
        sum = warp_sum(__fmul_rn(sum, scale));
        penalized.reduce_warp();
        set_hash(warp_sum(hash()));
        finite = __reduce_and_sync(FULL_WARP, finite);
    }
};

// Reduces over the block: every thread of the first warp gets the result.
template <class T>
__device__ __forceinline__ T block_reduce(T value, T* scratch) {
    const int lane = threadIdx.x % WARP;
    value.reduce_warp();
    __syncthreads();
    if (lane == 0) scratch[threadIdx.x / WARP] = value;
    __syncthreads();
    if (threadIdx.x < WARP) {
        value = lane < NUM_WARPS ? scratch[lane] : T::none();
        value.reduce_warp();
    }
    return value;
}

// Reduces over the slots of all parts, in every thread. All blocks of the row call it.
template <class T>
__device__ __forceinline__ T reduce_parts(const T* slots) {
    row_sync();
    const int part = threadIdx.x % WARP;
    T value = part < PARTS ? of_part(slots[part], part) : T::none();
    value.reduce_warp();
    return value;
}

// --- the row -----------------------------------------------------------------------------------

struct Row {
    const float* logits;
    float penalty, temperature;
    float top;   // the largest penalized logit
    float* held; // this block's part: penalized logits, later distances (clustered only)
    u32* seen;   // a bit for each id this block answers for
    int origin;  // the first of those ids

    __device__ __forceinline__ float penalized(float raw, int id) const {
        if (penalty == 1.0f) return raw;
        const int i = id - origin;
        float l = raw;
        if (seen[i / 32] >> (i % 32) & 1)
            l = l > 0.0f ? __fdiv_rn(l, penalty) : __fmul_rn(l, penalty);
        return fminf(fmaxf(l, -FLOAT_MAX), FLOAT_MAX);
    }
    // |z| as its bits: z <= 0, so a larger pattern is a less likely token.
    __device__ __forceinline__ u32 distance(float l) const {
        return as_bits(__fadd_rn(__fdiv_rn(__fsub_rn(l, top), temperature), 0.0f)) & 0x7fffffffu;
    }
    __device__ __forceinline__ u32 distance_of(int id) const {
        return CLUSTERED ? as_bits(held[id - origin]) : distance(penalized(logits[id], id));
    }
};

__device__ __forceinline__ float z_of(u32 distance) { return -as_float(distance); }
__device__ __forceinline__ float probability_of(u32 distance) {
    return exp_fixed(__fadd_rn(z_of(distance), 0.0f));
}
__device__ __forceinline__ u64 weight_of(u32 distance) {
    return __float2ull_rz(__fmul_rn(probability_of(distance), 0x1p34f));
}

__device__ __forceinline__ int part_begin(int part) { return min(part * PART, VOCAB); }

// This thread's logits of a part, ascending. The next few are on their way while some are used.
template <class Use>
__device__ __forceinline__ void for_each_logit(const float* logits, int part, Use use) {
    constexpr int FEW = 4;
    const int end = part_begin(part + 1);
    float coming[FEW];
    auto ask = [&](int first) {
#pragma unroll
        for (int i = 0; i < FEW; ++i)
            coming[i] = first + i * THREADS < end ? logits[first + i * THREADS] : 0.0f;
    };
    int first = part_begin(part) + threadIdx.x;
    ask(first);
#pragma unroll 1
    for (; first < end; first += FEW * THREADS) {
        float here[FEW];
#pragma unroll
        for (int i = 0; i < FEW; ++i) here[i] = coming[i];
        ask(first + FEW * THREADS);
        const bool all = first + (FEW - 1) * THREADS < end;
        if (all) {
#pragma unroll
            for (int i = 0; i < FEW; ++i) use(here[i], first + i * THREADS);
        } else {
#pragma unroll
            for (int i = 0; i < FEW - 1; ++i)
                if (first + i * THREADS < end) use(here[i], first + i * THREADS);
        }
    }
}

template <class Use>
__device__ __forceinline__ void for_each_id(Use use) {
    for (int part = first_part(); part < past_last_part(); ++part)
        for (int id = part_begin(part) + threadIdx.x; id < part_begin(part + 1); id += THREADS)
            use(id);
}

__device__ __forceinline__ void mark_seen(Row& row, const i32* ids, int count) {
    for (int i = threadIdx.x; i < (HELD + 31) / 32; i += THREADS) row.seen[i] = 0;
    __syncthreads();
    for (int s = threadIdx.x; s < count; s += THREADS) {
        const int i = ids[s] - row.origin;
        if (i >= 0 && i < HELD) atomicOr(&row.seen[i / 32], 1u << (i % 32));
    }
    __syncthreads();
}

// --- selection: where a running sum over the candidates, in their order, reaches a target ------

// The candidates: ids whose (distance, id) is at most this pair.
struct Limit {
    u32 distance = 0xffffffffu;
    int id = NO_ID;

    __device__ __forceinline__ bool admits(u32 d, int i) const {
        return d < distance || (d == distance && i <= id);
    }
};

struct Histogram {
    u32 low[THREADS], high[THREADS];  // this segment's sums: low bits and the rest
    u64 sums[2][THREADS];             // this block's, alternating so that others may still read
    u64 warp_sums[NUM_WARPS];
    int bin;                          // where the target is reached …
    u64 before, at;                   // … the sum before that bin, and the bin's own
    int turn;
};

// One pass: the bins' sums over the whole row, thread b has bin b. bin_of(id, weight) gives the
// bin, or -1, and sets the weight.
template <class BinOf>
__device__ __forceinline__ u64 count_bins(Histogram& h, int turn, BinOf bin_of) {
    u64 mine = 0;
    h.low[threadIdx.x] = h.high[threadIdx.x] = 0;
    __syncthreads();
    for (int part = first_part(); part < past_last_part(); ++part)
        for (int begin = part_begin(part); begin < part_begin(part + 1); begin += SEGMENT) {
            const int end = min(begin + SEGMENT, part_begin(part + 1));
            for (int id = begin + threadIdx.x; id < end; id += THREADS) {
                u64 weight = 1;
                const int bin = bin_of(id, weight);
                if (bin < 0 || weight == 0) continue;
                const u32 high = (u32)(weight >> WEIGHT_SPLIT);
                atomicAdd(&h.low[bin], (u32)weight & ((1u << WEIGHT_SPLIT) - 1));
                if (high) atomicAdd(&h.high[bin], high);
            }
            __syncthreads();
            mine += h.low[threadIdx.x] + ((u64)h.high[threadIdx.x] << WEIGHT_SPLIT);
            h.low[threadIdx.x] = h.high[threadIdx.x] = 0;
            __syncthreads();
        }
    u64* sums = h.sums[turn % 2];
    sums[threadIdx.x] = mine;
    row_sync();
    if (!CLUSTERED) return mine;
    u64 total = 0;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) total += of_part(sums[threadIdx.x], part);
    return total;
}

// Sum of `value` over threads up to and including this one; `all` is the whole.
__device__ __forceinline__ u64 running_sum(Histogram& h, u64 value, u64& all) {
    const int lane = threadIdx.x % WARP;
    const int warp = threadIdx.x / WARP;
#pragma unroll
    for (int step = 1; step < WARP; step <<= 1) {
        const u64 other = __shfl_up_sync(FULL_WARP, value, step);
        if (lane >= step) value += other;
    }
    __syncthreads();
    if (lane == WARP - 1) h.warp_sums[warp] = value;
    __syncthreads();
    all = 0;
    for (int w = 0; w < NUM_WARPS; ++w) {
        if (w < warp) value += h.warp_sums[w];
        all += h.warp_sums[w];
    }
    return value;
}

// The bin that takes the running sum from below `target` to it or beyond, into h.
__device__ __forceinline__ void find_bin(Histogram& h, u64 bin_sum, u64 running, u64 before,
                                         u64 target) {
    const u64 start = before + running - bin_sum;
    if (start < target && target <= start + bin_sum)
        h.bin = threadIdx.x, h.before = start, h.at = bin_sum;
    __syncthreads();
}

// Narrows [low, high) to the one key at which the running sum reaches target. key_of(id, weight)
// gives the key; ids whose key lies outside do not count.
template <class KeyOf>
__device__ __forceinline__ u32 descend(Histogram& h, int& turn, u32 low, u32 high, u64 before,
                                       u64 target, KeyOf key_of) {
    while (high - low > 1) {
        const int width = 32 - __clz(high - low - 1);
        const int shift = max(width - BIN_BITS, 0);
        const u64 bin_sum = count_bins(h, turn++, [&](int id, u64& weight) {
            const u32 key = key_of(id, weight);
            return key >= low && key < high ? (int)((key - low) >> shift) : -1;
        });
        u64 all;
        find_bin(h, bin_sum, running_sum(h, bin_sum, all), before, target);
        low += (u32)h.bin << shift;
        high = min(high, low + (1u << shift));
        before = h.before;
    }
    return low;
}

// First bins: linear in |z|, a sixteenth wide, because the bits alone would crowd into few.
__device__ __forceinline__ int linear_bin(u32 distance) {
    return (int)min(__float2uint_rz(__fmul_rn(as_float(distance), 16.0f)), (u32)THREADS - 1);
}
__device__ __forceinline__ u32 linear_bin_begin(int bin) {
    return bin < THREADS ? as_bits(__fmul_rn((float)bin, 0.0625f)) : 0x7f800001u;
}

// The tightest limit within `limit` whose candidates' weights reach the target; weights are 1
// (top-k) or the probabilities as integers (top-p), target_of(total) gives the target.
template <bool WEIGHTED, class TargetOf>
__device__ __forceinline__ Limit select(Histogram& h, int& turn, const Row& row, Limit limit,
                                        TargetOf target_of) {
    auto distance_within = [&](int id, u64& weight) {
        const u32 d = row.distance_of(id);
        if (!limit.admits(d, id)) return 0xffffffffu;
        if (WEIGHTED) weight = weight_of(d);
        return d;
    };
    const u64 bin_sum = count_bins(h, turn++, [&](int id, u64& weight) {
        const u32 d = distance_within(id, weight);
        return d == 0xffffffffu ? -1 : linear_bin(d);
    });
    u64 total;
    const u64 running = running_sum(h, bin_sum, total);
    const u64 target = target_of(total);
    find_bin(h, bin_sum, running, 0, target);
    const u32 low = linear_bin_begin(h.bin), high = linear_bin_begin(h.bin + 1);
    const u32 d = descend(h, turn, low, high, h.before, target, distance_within);

    // Equally likely ids: the lowest few, as many as it takes.
    const u64 each = WEIGHTED ? weight_of(d) : 1;
    const u64 wanted = (target - h.before + each - 1) / each;
    if (wanted * each == h.at) return {d, limit.distance == d ? limit.id : NO_ID};
    auto id_of_equal = [&](int id, u64&) {
        const bool counts = row.distance_of(id) == d && limit.admits(d, id);
        return counts ? (u32)id : 0xffffffffu;
    };
    return {d, (int)descend(h, turn, 0, VOCAB, 0, wanted, id_of_equal)};
}

extern "C" __global__ void __launch_bounds__(THREADS, CLUSTERED ? 2 : 1)
#if CLUSTERED
    __cluster_dims__(PARTS, 1, 1)
#endif
    sample(const float* __restrict__ logits, const float* __restrict__ temperature,
           const i32* __restrict__ top_k, const float* __restrict__ top_p,
           const float* __restrict__ min_p, const float* __restrict__ repetition_penalty,
           const u64* __restrict__ seed, const u64* __restrict__ stream,
           const u32* __restrict__ position, const i32* __restrict__ seen_ids,
           const i32* __restrict__ seen_start, i32* token_ids, float* logprobs, float* margins,
           i64* fingerprints, i32* finite) {
    extern __shared__ __align__(16) u32 shared[];
    __shared__ Stats stats_scratch[NUM_WARPS], stats_of[PARTS];
    __shared__ Best best_scratch[NUM_WARPS], best_of[PARTS];
    __shared__ Histogram histogram;
    let_next_start();
    wait_for_previous();
    const int r = CLUSTERED ? blockIdx.x / PARTS : blockIdx.x;

    Row row;
    row.logits = logits + (size_t)r * VOCAB;
    row.penalty = repetition_penalty[r];
    row.temperature = temperature[r];
    row.seen = shared;
    row.held = (float*)(shared + (HELD + 31) / 32);
    row.origin = CLUSTERED ? part_begin(first_part()) : 0;
    if (row.penalty != 1.0f)
        mark_seen(row, seen_ids + seen_start[r], seen_start[r + 1] - seen_start[r]);

    for (int part = first_part(); part < past_last_part(); ++part) {
        Stats stats = Stats::none();
        if (row.penalty != 1.0f) {
            for_each_logit(row.logits, part, [&](float raw, int id) {
                const float penalized = row.penalized(raw, id);
                if (CLUSTERED) row.held[id - row.origin] = penalized;
                stats.add(raw, penalized, id);
            });
        } else {
            const bool holds = CLUSTERED && row.temperature != 0.0f;
            for_each_logit(row.logits, part, [&](float raw, int id) {
                if (holds) row.held[id - row.origin] = raw;
                stats.add(raw, id);
            });
            stats.penalized = stats.best;
        }
        stats = block_reduce(stats, stats_scratch);
        if (threadIdx.x == 0) stats_of[part] = stats;
    }
    const Stats stats = reduce_parts(stats_of);

    int token = stats.penalized.id;
    if (stats.finite && row.temperature != 0.0f) {
        row.top = stats.penalized.value;
        if (CLUSTERED)
            for_each_id([&](int id) {
                float& value = row.held[id - row.origin];
                value = as_float(row.distance(value));
            });
        __syncthreads();

        int turn = 0;
        Limit limit;
        const int k = top_k[r];
        const double p = top_p[r];
        if (k > 0 && k < VOCAB)
            limit = select<false>(histogram, turn, row, limit, [&](u64) { return (u64)k; });
        if (p < 1.0)
            limit = select<true>(histogram, turn, row, limit, [&](u64 total) {
                const double target = ceil(__dmul_rn(p, (double)total));
                return target < 1.0 ? 1ull : (u64)target;
            });

        const float least = fminf(min_p[r], 1.0f);
        const float floor = gumbel(philox_word(stream[r], position[r], token, seed[r]));
        auto is_candidate = [&](u32 d, int id) {
            return z_of(d) + MAX_GUMBEL >= floor && limit.admits(d, id) &&
                   !(least > 0.0f && probability_of(d) < least);
        };
        Best best = Best::none();
        auto try_id = [&](u32 d, int id) {
            const float noise = gumbel(philox_word(stream[r], position[r], id, seed[r]));
            best.add(__fadd_rn(z_of(d), noise), id);
        };
#if CLUSTERED
        __shared__ Best reached_of[PARTS];
        // Bounds of all scores first, in place of the distances: few reach the best one's.
        Best reached = {floor, token};
        for_each_id([&](int id) {
            float& value = row.held[id - row.origin];
            const u32 d = as_bits(value);
            value = minus_infinity();
            if (!is_candidate(d, id)) return;
            const u32 word = philox_word(stream[r], position[r], id, seed[r]);
            const float bound = gumbel_bound(word);
            value = __fadd_rn(z_of(d), bound);
            if (word < 0x80000000u) reached.add(__fadd_rn(z_of(d), bound - GUMBEL_SLACK), id);
        });
        reached = block_reduce(reached, best_scratch);
        if (threadIdx.x == 0) reached_of[first_part()] = reached;
        reached = reduce_parts(reached_of);
        for_each_id([&](int id) {
            if (row.held[id - row.origin] >= reached.value)
                try_id(row.distance(row.penalized(row.logits[id], id)), id);
        });
#else
        for_each_id([&](int id) {
            const u32 d = row.distance_of(id);
            if (is_candidate(d, id)) try_id(d, id);
        });
#endif
        // One value per row here, so the first part's slot carries a block's result.
        best = block_reduce(best, best_scratch);
        if (threadIdx.x == 0)
            for (int part = first_part(); part < past_last_part(); ++part) best_of[part] = best;
        token = reduce_parts(best_of).id;
    }

    if (threadIdx.x == 0 && first_part() == 0) {
        const bool ok = stats.finite;
        const float shifted = ok ? __fsub_rn(row.logits[token], stats.best.value) : 0.0f;
        token_ids[r] = ok ? token : 0;
        logprobs[r] = ok ? (float)((double)shifted - log((double)stats.sum)) : 0.0f;
        margins[r] = ok && VOCAB > 1 ? __fsub_rn(stats.best.value, stats.second) : 0.0f;
        fingerprints[r] = ok ? (i64)(stats.hash() + (u64)VOCAB * GOLDEN) : 0;
        finite[r] = ok;
    }
    row_sync();  // no block leaves while another may read its shared memory
}

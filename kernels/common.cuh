// What every kernel shares. Prepended as text by orcd_batch/backend/cuda/program.py: no include
// path, no toolkit headers, so a kernel compiles wherever NVRTC itself is found.
//
// Shape letters: T tokens, R logits rows, H query heads, Hkv KV heads, D head dim, C hidden,
// F ffn, V vocab, M/N/K rows, outputs and inputs of a linear.
// Architectures: sm_80 and later unless a kernel's header says otherwise.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char i8;
typedef short i16;
typedef int i32;
typedef long long i64;

// IEEE half as its 16 bits: storage only, arithmetic is fp32.
typedef u16 f16;

constexpr int WARP = 32;
constexpr u32 FULL_WARP = 0xffffffffu;
constexpr int BLOCK_SIZE = 64;  // positions per KV block, as in backend/ops.py

// --- conversions, all round-to-nearest-even ---------------------------------------------------

__device__ __forceinline__ f16 to_f16(float x) {
    f16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(x));
    return h;
}

__device__ __forceinline__ float to_f32(f16 h) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h));
    return x;
}

// Two halves in one register: `low` at the lower address.
__device__ __forceinline__ u32 to_f16x2(float low, float high) {
    u32 packed;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
    return packed;
}

__device__ __forceinline__ float low_f32(u32 packed) { return to_f32((f16)(packed & 0xffffu)); }
__device__ __forceinline__ float high_f32(u32 packed) { return to_f32((f16)(packed >> 16)); }

__device__ __forceinline__ u32 as_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float as_float(u32 bits) { return __uint_as_float(bits); }

// --- the canonical matrix step ------------------------------------------------------------------
// c (16 x 8, fp32) += a (16 x 16, fp16) b (16 x 8, fp16). Lane = 4 g + t holds
//   a[0] = rows g,   k 2t..2t+1    a[1] = rows g+8, same k    b[0] = k 2t..2t+1,  column g
//   a[2] = rows g,   k 2t+8..2t+9  a[3] = rows g+8, same k    b[1] = k 2t+8..2t+9, column g
//   c[0], c[1] = row g, columns 2t, 2t+1                      c[2], c[3] = row g+8
__device__ __forceinline__ void mma_k16(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// --- shared memory --------------------------------------------------------------------------------

__device__ __forceinline__ u32 shared_address(const void* p) {
    return (u32)__cvta_generic_to_shared(p);
}

// Four 8 x 8 fp16 matrices; lane l gives the row address of matrix l / 8, row l % 8.
__device__ __forceinline__ void load_matrix_x4(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

__device__ __forceinline__ void load_matrix_x4_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

// 16 bytes from global to shared memory, asynchronously; only the first `bytes` are read, the rest
// of the 16 is zero.
__device__ __forceinline__ void copy_async_16(u32 shared, const void* global, int bytes = 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global),
                 "r"(bytes)
                 : "memory");
}

// The same of what is read once: it is the first to leave the L2 cache. policy: from read_once().
__device__ __forceinline__ void copy_async_16(u32 shared, const void* global, int bytes,
                                              u64 policy) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared),
                 "l"(global), "r"(bytes), "l"(policy)
                 : "memory");
}

__device__ __forceinline__ u64 read_once() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ u64 read_again() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}

__device__ __forceinline__ void copy_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int PENDING>
__device__ __forceinline__ void copy_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// --- one kernel's start beside the end of the one before (sm_90 and later) ------------------------

// The next kernel may be set up from here on; it waits for this one by itself.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Every kernel before this one has run, and what it wrote is there. A kernel that calls this is
// launched before that; until then it may read only what no kernel writes: weights, and what the
// host placed for the step.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// --- reductions in a fixed order ------------------------------------------------------------------
// A butterfly: every lane ends with the same bits, and the order depends on nothing but the lane.

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(FULL_WARP, x, step);
    return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL_WARP, x, step));
    return x;
}

__device__ __forceinline__ u64 warp_sum(u64 x) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(FULL_WARP, x, step);
    return x;
}

// Threads that wait for each other: all of a block, unless a kernel has another group of its own.
struct WholeBlock {
    static __device__ __forceinline__ void wait() { __syncthreads(); }
};

// Sum over a group's first NUM_WARPS warps, in warp order; `scratch` holds one float per warp, and
// every thread gets the result. All threads of the group must call it.
template <int NUM_WARPS, class Group = WholeBlock>
__device__ __forceinline__ float block_sum(float x, float* scratch) {
    x = warp_sum(x);
    Group::wait();
    if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = x;
    Group::wait();
    float total = 0.0f;
#pragma unroll
    for (int warp = 0; warp < NUM_WARPS; ++warp) total += scratch[warp];
    return total;
}

// --- the exponential of attention and swiglu ---------------------------------------------------

// 2^x by the hardware: deterministic on one GPU model, 2 ulp; exactly 1 at 0 and exactly 0 at -inf.
__device__ __forceinline__ float exp2_hardware(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// --- one row of RMSNorm, held by one block -----------------------------------------------------
// Thread t holds vectors t, t + BLOCK_THREADS, … of four columns. Order of the sum of squares: a
// thread's columns ascending, lanes by butterfly, warps ascending: fixed by COLUMNS and
// BLOCK_THREADS.

template <int COLUMNS, int BLOCK_THREADS, class Group = WholeBlock>
struct NormRow {
    static_assert(COLUMNS % 4 == 0, "whole vectors of four columns");
    static constexpr int VECTORS = COLUMNS / 4;
    static constexpr int HELD = (VECTORS + BLOCK_THREADS - 1) / BLOCK_THREADS;
    float4 x[HELD];

    __device__ __forceinline__ void load(const float* row) { load(x, row); }

    static __device__ __forceinline__ void load(float4 (&to)[HELD], const float* row) {
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            const int v = threadIdx.x + i * BLOCK_THREADS;
            to[i] = v < VECTORS ? ((const float4*)row)[v] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
    }

    // y = x / sqrt(mean(x^2) + eps) * weight, rounded to fp16.
    __device__ __forceinline__ void normalize(const float* weight, float eps, f16* y) {
        float4 w[HELD];
        load(w, weight);
        normalize(w, eps, y);
    }

    __device__ __forceinline__ void normalize(const float4 (&w)[HELD], float eps, f16* y) {
        __shared__ float scratch[BLOCK_THREADS / WARP];
        float sum = 0.0f;
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            sum = __fmaf_rn(x[i].x, x[i].x, sum);
            sum = __fmaf_rn(x[i].y, x[i].y, sum);
            sum = __fmaf_rn(x[i].z, x[i].z, sum);
            sum = __fmaf_rn(x[i].w, x[i].w, sum);
        }
        const float total = block_sum<BLOCK_THREADS / WARP, Group>(sum, scratch);
        const float mean = __fdiv_rn(total, (float)COLUMNS);
        // mean * 0 is 0, or NaN where the sum overflowed: that must show, not become zeros.
        const float scale = __fadd_rn(__frsqrt_rn(__fadd_rn(mean, eps)), __fmul_rn(mean, 0.0f));
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
            const int v = threadIdx.x + i * BLOCK_THREADS;
            if (v >= VECTORS) break;
            const u32 low = to_f16x2(x[i].x * scale * w[i].x, x[i].y * scale * w[i].y);
            const u32 high = to_f16x2(x[i].z * scale * w[i].z, x[i].w * scale * w[i].w);
            ((uint2*)y)[v] = make_uint2(low, high);
        }
    }
};

// few_rows_step: a whole decode step of few sequences, from the first norm to the logits
//
// computes:  the instructions of a program, in turn: a matrix product of M <= 8 rows (few_rows) of
//            what it reads (rms_norm's, attention_merge's or swiglu's result), which it leaves as
//            fp32, fp16, added to fp32, or gated (swiglu); or attention of one layer
//            (rope_and_cache and attention_decode)
// layout:    program: see Instruction, written by backend/cuda/step_program.py; the rest as in the
//            kernels named
// mapping:   one block per SM, all resident; WARPS warps compute, and meet those of all blocks after
//            each instruction; PRODUCERS warps stream the weights of all products, in order, through
//            one ring, never waiting for another block. A block owns an equal share of consecutive
//            tiles of 8 rows of w; each computes all of x for itself, in shared memory
// macros:    those of attention.cuh, HIDDEN (C), INTERMEDIATE (F), STAGE_K (256), PRODUCERS,
//            NORM_THREADS (rms_norm's THREADS), SPIN_LIMIT
// bound by:  bytes of w; latency of the instructions beyond what the ring holds
// order:     that of the kernels named, whose code it shares: who computes a value changes no bit
// architectures: sm_90a
// generic twin: the kernels named, one launch each
// compile:   NUM_HEADS=32 NUM_KV_HEADS=32 HEAD_DIM=96 HIDDEN=3072 INTERMEDIATE=8192 WARPS=8 PRODUCERS=4 STAGE_K=256 NORM_THREADS=256 MIN_BLOCKS=1 SPIN_LIMIT=0
//            | NUM_HEADS=14 NUM_KV_HEADS=2 HEAD_DIM=64 HIDDEN=1024 INTERMEDIATE=4864 WARPS=8 PRODUCERS=4 STAGE_K=256 NORM_THREADS=256 MIN_BLOCKS=1 SPIN_LIMIT=5000000000
// spills:    none

#include "attention.cuh"
#include "attention_partials.cuh"
#include "hopper.cuh"
#include "few_rows.cuh"
#include "gated.cuh"
#include "grid_barrier.cuh"
#include "product.cuh"
#include "rope.cuh"
#include "attention_step.cuh"
#include "weight_ring.cuh"

constexpr int ALL_THREADS = (WARPS + PRODUCERS) * WARP;
constexpr int MAX_ROWS = 8;
constexpr int PRODUCER_REGISTERS = 40, COMPUTE_REGISTERS = 232;  // 168 a thread, shared out
constexpr int GATED = 3;  // one more output than product.cuh has

enum Op { NORM, MERGE, COPY, ATTEND };  // where a product's x comes from, or attention

struct Instruction {
    i32 op, output;
    i32 num_units, width;  // tiles of w, or pairs of a gate and an up tile; columns of y
    const f16* w;
    const void* x;        // the product's input before its op; qkv
    const float* vector;  // the norm's weight; the bias of qkv
    void* y;
    f16 *keys, *values;
};
static_assert(sizeof(Instruction) == 64, "as step_program.py writes it");

__device__ __forceinline__ int size_of_k(int op) {
    return op == NORM ? HIDDEN : op == MERGE ? ATTENDED : INTERMEDIATE;
}

// The warps that compute.
struct Computing {
    static __device__ __forceinline__ void wait() {
        asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
    }
};

// Those of them that share a norm.
struct Norming {
    static __device__ __forceinline__ void wait() {
        asm volatile("bar.sync 2, %0;" ::"n"(NORM_THREADS) : "memory");
    }
};

// The warps that stream weights.
struct Producing {
    static __device__ __forceinline__ void wait() {
        asm volatile("bar.sync 3, %0;" ::"n"(PRODUCERS * WARP) : "memory");
    }
};

// This block's units of a product, `chains` of them side by side.
struct Share {
    int first, count, chains;

    __device__ __forceinline__ Share(int num_units) {
        first = (int)((i64)blockIdx.x * num_units / gridDim.x);
        count = (int)((i64)(blockIdx.x + 1) * num_units / gridDim.x) - first;
        const int rounds = (count + WARPS - 1) / WARPS;
        chains = rounds > 0 ? (count + rounds - 1) / rounds : 1;
    }
};

__device__ __forceinline__ int stages_of(int k) { return (k + STAGE_K - 1) / STAGE_K; }

// Streams the weights of the whole program; one warp, which takes every
// PRODUCERS-th chain of a stage.
__device__ __forceinline__ void produce(const WeightRing& ring, const Instruction* program,
                                        int num_instructions, int in_flight, int producer) {
    Cursor cursor;
    int position = 0;
#pragma unroll 1
    for (int i = 0; i < num_instructions; ++i) {
        const Instruction& now = program[i];
        if (now.op == ATTEND) continue;
        const int K = size_of_k(now.op);
        const int parts = now.output == GATED ? 2 : 1;
        const Share share(now.num_units);
        for (int start = 0; start < share.count; start += share.chains) {
            const int active = min(share.chains, share.count - start);
            for (int part = 0; part < parts; ++part) {
                const int tile = share.first + start + part * now.num_units;
#pragma unroll 1
                for (int k = 0; k < K; k += STAGE_K) {
                    for (int c = producer; c < active; c += PRODUCERS) {
                        Cursor at = cursor;
                        at.move(c, ring.num_slots);
                        if (position + c >= in_flight) ring.wait_for_landing(at, in_flight);
                        ring.fill(at, now.w + (size_t)(tile + c) * TILE_N * K + k, K, K - k);
                    }
                    cursor.move(active, ring.num_slots);
                    position += active;
                    Producing::wait();
                }
            }
        }
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}

struct Rest {
    int num_rows;
    float eps;
    char* x;  // M rows of up to K columns in shared memory
};

using Norm = NormRow<HIDDEN, NORM_THREADS, Norming>;
__device__ __forceinline__ bool norms() { return threadIdx.x < NORM_THREADS; }

// The block's share of x w^T, x being in shared memory.
template <int K>
__device__ __forceinline__ void multiply(const Instruction& now, const Rest& rest,
                                         const WeightRing& ring, Cursor& cursor) {
    const int warp = threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;
    const int row = lane % 8;
    const u32 w_lane[2] = {row * SLOT_PITCH + (lane / 8 ^ row) * 16u,
                           row * SLOT_PITCH + ((4 + lane / 8) ^ row) * 16u};
    const LaneOfX x(shared_address(rest.x), K * 2 + 16, rest.num_rows);
    const int m = lane / 4;
    const bool exists = m < rest.num_rows;
    const int parts = now.output == GATED ? 2 : 1;
    const Share share(now.num_units);
    for (int start = 0; start < share.count; start += share.chains) {
        const int active = min(share.chains, share.count - start);
        const int unit = share.first + start + warp;
        const size_t place = (size_t)m * now.width + unit * TILE_N + lane % 4 * 2;
        float gate[2];
        for (int part = 0; part < parts; ++part) {
            if (warp < active) {
                const float add0 = exists ? to_add(now.output, now.y, place) : 0.0f;
                const float add1 = exists ? to_add(now.output, now.y, place + 1) : 0.0f;
                ChainStages stages = {ring, cursor, active};
                stages.at.move(warp, ring.num_slots);
                float c[4] = {};
#ifdef STREAM_ONLY
                for (int s = 0; s < stages_of(K); ++s) {
                    stages.wait();
                    const u32 e = stages.empty();
                    __syncwarp();
                    if (lane == 0) arrive(e);
                    stages.advance();
                }
#else
                run_chain<K>(c, stages, w_lane, x);
#endif
                if (part + 1 < parts) {
                    gate[0] = c[0], gate[1] = c[1];
                } else if (exists && now.output == GATED) {
                    const u32 y = gated_two(to_f16x2(gate[0], gate[1]), to_f16x2(c[0], c[1]));
                    *(u32*)((f16*)now.y + place) = y;
                } else if (exists) {
                    put(now.output, now.y, place, c[0], add0);
                    put(now.output, now.y, place + 1, c[1], add1);
                }
            }
            cursor.jump(active * stages_of(K), ring.num_slots);
        }
    }
}

// x of a product into shared memory. norm: the weight, where it is normalized.
__device__ __forceinline__ void prepare_x(const Instruction& now, const Rest& rest,
                                          const Step& step, const float4 (&norm)[Norm::HELD]) {
    if (now.op == NORM) {
        for (int m = 0; norms() && m < rest.num_rows; ++m) {
            Norm row;
            row.load((const float*)now.x + (size_t)m * HIDDEN);
            row.normalize(norm, rest.eps, (f16*)(rest.x + m * (HIDDEN * 2 + 16)));
        }
    } else if (now.op == MERGE) {
        for (int m = 0; m < rest.num_rows; ++m)
            merge_row(step, m, (u32*)(rest.x + m * (ATTENDED * 2 + 16)));
    } else {
        constexpr int VECTORS = INTERMEDIATE / 8;
        for (int i = threadIdx.x; i < rest.num_rows * VECTORS; i += THREADS)
            copy_async_16(shared_address(rest.x) + i / VECTORS * (INTERMEDIATE * 2 + 16) +
                              i % VECTORS * 16,
                          (const f16*)now.x + i * 8);
        copy_async_commit();
        copy_async_wait<0>();
    }
    Computing::wait();
}

// The warps that compute.
__device__ __forceinline__ void compute(const Instruction* program, int num_instructions,
                                        const Step& step, const Rest& rest, const WeightRing& ring,
                                        char* attention, int attention_warps, u64* counter) {
    const int warp = threadIdx.x / WARP;
    GridBarrier<Computing> everyone(counter);
    Cursor cursor;
    float4 norm[Norm::HELD];  // the weight of the norm before the next product, ahead of its use
    auto load_norm = [&](int i) {
        if (i < num_instructions && program[i].op == NORM && norms()) {
            Norm::load(norm, program[i].vector);
        } else {
#pragma unroll
            for (float4& held : norm) held = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        }
    };
    load_norm(0);
#pragma unroll 1
    for (int i = 0; i < num_instructions; ++i) {
        const Instruction& now = program[i];
        auto wait = [&] {
            if (i > 0) everyone.wait();
        };
        if (now.op == ATTEND) {
            const LayerCache cache = {(const f16*)now.x, now.vector, now.keys, now.values};
            const bool attends = warp < attention_warps;
            const int index = attends ? warp * gridDim.x + blockIdx.x : 1 << 30;
            char* const own = attention + warp * ATTENTION_WARP_BYTES;
            StepStream stream(step, cache, index, attention_warps * gridDim.x,
                              shared_address(own + SCRATCH_BYTES));
            wait();
            attend_items(stream, index, own);
            load_norm(i + 1);
        } else {
            wait();
            prepare_x(now, rest, step, norm);
            load_norm(i + 1);
            const int K = size_of_k(now.op);
            if (K == HIDDEN) multiply<HIDDEN>(now, rest, ring, cursor);
            else if (K == ATTENDED) multiply<ATTENDED>(now, rest, ring, cursor);
            else multiply<INTERMEDIATE>(now, rest, ring, cursor);
        }
        if (i + 1 < num_instructions) everyone.arrive();
    }
}

extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1)
    few_rows_step(const uint4* __restrict__ program, int num_instructions, u64* counter,
                  const float* __restrict__ rope_table, const i32* positions,
                  const i32* slot_mapping, const i32* context_lens, const i32* block_tables,
                  f16* attended, float* partials, int num_sequences, int max_blocks, int reach,
                  float scale, float eps, int num_slots, int in_flight, int x_bytes,
                  int attention_warps) {
    extern __shared__ __align__(128) char memory[];
    __shared__ StepRow rows[MAX_ROWS];
    Instruction* const instructions = (Instruction*)memory;
    char* const x = (char*)(instructions + (num_instructions + 1) / 2 * 2);
    char* const attention = x + x_bytes;
    const u32 slots = shared_address(attention + attention_warps * ATTENTION_WARP_BYTES);
    const WeightRing ring = {slots + num_slots * SLOT_BYTES, slots, num_slots};
    const int warp = threadIdx.x / WARP;
    ring.init();
    for (int i = threadIdx.x; i < num_instructions * (int)(sizeof(Instruction) / 16);
         i += ALL_THREADS)
        ((uint4*)instructions)[i] = program[i];
    __syncthreads();
    if (warp >= WARPS) {
        give_registers<PRODUCER_REGISTERS>();
        produce(ring, instructions, num_instructions, in_flight, warp - WARPS);
    } else {
        take_registers<COMPUTE_REGISTERS>();
        wait_for_previous();
        for (int i = threadIdx.x; i < num_sequences * HEAD_DIM; i += THREADS) {
            StepRow& row = rows[i / HEAD_DIM];
            const int m = i / HEAD_DIM;
            row.context = context_lens[m];
            row.slot = slot_mapping[m];
            row.turn[i % HEAD_DIM] = rope_table[(size_t)positions[m] * HEAD_DIM + i % HEAD_DIM];
        }
        Computing::wait();
        const Step step = {rows, block_tables, attended, partials, num_sequences, max_blocks, reach,
                           scale};
        const Rest rest = {num_sequences, eps, x};
        compute(instructions, num_instructions, step, rest, ring, attention, attention_warps,
                counter);
    }
    let_next_start();
}

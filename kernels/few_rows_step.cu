// few_rows_step: a whole decode step of one or two sequences, from the first norm to the logits
//
// computes:  the instructions of a program, in turn: a matrix product of M <= 2 rows (few_rows) of
//            what it reads (rms_norm's, attention's or swiglu's result), which it leaves as
//            fp32, fp16, added to fp32, or gated (swiglu); or attention of one layer
//            (rope_and_cache, attention_decode and attention_merge)
// layout:    program: see Instruction, written by backend/cuda/step_program.py; maps: the weights of
//            its products in turn; what an instruction leaves for the next are packets (packets.cuh),
//            tagged with its number, which counts on from step to step; the rest as in the kernels
//            named
// mapping:   one block per SM, all resident; WARPS warps compute; COPIERS threads stream the weights
//            of all products, in order, through one ring, never waiting for another block. A block
//            owns an equal share of consecutive tiles of 8 rows of w; each computes all of x for
//            itself, in shared memory
// reuse:     packets are written again a layer later, and nobody waits for their readers: (1) a block
//            that owns no share of a product does not read its x, one that does reads all of it before
//            it leaves anything; a team reads an item's q, k and v, or a head's splits, before it leaves
//            anything of it, and nothing that is left is read by nobody. (2) So whoever leaves a
//            packet of instruction i knows, down the chain of those who left what it has read, that
//            all readers of instruction i - 3 have read, and i - 2 where i and i - 1 are products.
//            (3) Instruction i writes over i - 2 or i - 3 (residual: down, o) or over i - 5. A tag comes
//            back after 2^32 instructions, millions of steps, in which its packet is written again. tests/test_backend_cuda_packets.py plays it with slow blocks
// macros:    those of attention.cuh, HIDDEN (C), INTERMEDIATE (F), STAGE_K (256), COPIERS,
//            NORM_THREADS (rms_norm's THREADS), SPIN_LIMIT (see packets.cuh)
// bound by:  bytes of w; latency of the instructions beyond what the ring holds
// order:     that of the kernels named: norm, gate and rotary embedding are their code, attention and the
//            products' chains follow the same order; who computes a value changes no bit
// architectures: sm_90a
// generic twin: the kernels named, one launch each
// compile:   NUM_HEADS=32 NUM_KV_HEADS=32 HEAD_DIM=96 HIDDEN=3072 INTERMEDIATE=8192 WARPS=8 COPIERS=4 STAGE_K=256 NORM_THREADS=256 MIN_BLOCKS=1 SPIN_LIMIT=16777216
//            | NUM_HEADS=14 NUM_KV_HEADS=2 HEAD_DIM=64 HIDDEN=896 INTERMEDIATE=4864 WARPS=8 COPIERS=4 STAGE_K=256 NORM_THREADS=224 MIN_BLOCKS=1 SPIN_LIMIT=0
// spills:    up to 21 registers around the merge of large heads, none inside a chain

#include "attention.cuh"
#include "attention_partials.cuh"
#include "hopper.cuh"
#include "step_chain.cuh"
#include "gated.cuh"
#include "rope.cuh"
#include "packets.cuh"
#include "attention_step.cuh"
#include "weight_ring.cuh"

// Each copier is a thread of a warp of its own: registers move between groups of four warps.
constexpr int ALL_THREADS = (WARPS + COPIERS) * WARP;
constexpr int MAX_ROWS = 2;
constexpr int COPIER_REGISTERS = 56, COMPUTE_REGISTERS = 224;  // 168 a thread, shared out

// Where a product's x comes from: the residual stream, attention, swiglu; or attention itself.
enum Op { NORM, ATTENTION, SWIGLU, ATTEND, FIRST_NORM };
enum Output { FP32, FP16, ADDED, GATED };  // FP32 alone is no packets

// This block's units of a product, `chains` of them side by side.
struct Share {
    i32 first;
    u16 count, chains;

    static __device__ __forceinline__ Share of(int num_units) {
        const int first = (int)((i64)blockIdx.x * num_units / gridDim.x);
        const int count = (int)((i64)(blockIdx.x + 1) * num_units / gridDim.x) - first;
        const int rounds = (count + WARPS - 1) / WARPS;
        return {first, (u16)count, (u16)(rounds > 0 ? (count + rounds - 1) / rounds : 1)};
    }
};

struct Instruction {
    i32 op, output;
    i32 num_units, width;  // tiles of w, or pairs of a gate and an up tile; columns of y
    Share share;           // each block works out its own
    const void* x;         // packets; fp32 for FIRST_NORM
    const float* vector;   // the norm's weight; the bias of qkv
    void* y;
    union {
        f16* keys;
        const float* addend;  // of ADDED, where that is not what y holds
    };
    f16* values;
};
static_assert(sizeof(Instruction) == 64, "as step_program.py writes it");

__device__ __forceinline__ int size_of_k(int op) {
    return op == ATTENTION ? ATTENDED : op == SWIGLU ? INTERMEDIATE : HIDDEN;
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

// The warps of one team.
struct Team {
    int index;  // in its block

    __device__ __forceinline__ void wait() const {
        asm volatile("bar.sync %0, %1;" ::"r"(4 + index), "n"(TEAM_THREADS) : "memory");
    }
};

__device__ __forceinline__ int stages_of(int k) { return (k + STAGE_K - 1) / STAGE_K; }

// How far each copier is, in shared memory.
struct Progress {
    int position[COPIERS];

    __device__ __forceinline__ void wait_for_all(int position) {
        Patience patience;
        while (least() < position) patience.check();
    }
    __device__ __forceinline__ int least() {
        int found = 1 << 30;
#pragma unroll
        for (int copier = 0; copier < COPIERS; ++copier)
            found = min(found, atomicAdd(&position[copier], 0));
        return found;
    }
    __device__ __forceinline__ void set(int copier, int reached) {
        atomicExch(&position[copier], reached);
    }
};

// Streams the weights of the whole program, at most in_flight slots at once; one thread, which takes
// every COPIERS-th slot.
__device__ __forceinline__ void copy_weights(const WeightRing& ring, const Instruction* program,
                                             int num_instructions, const TensorMap* maps,
                                             int in_flight, int copier, Progress& progress) {
    const u64 policy = read_once();
    Cursor cursor;
    cursor.move(copier, ring.num_slots);
    int position = copier;  // of the next slot to fill, in the whole program
    int before = 0;         // slots of the stages before
#pragma unroll 1
    for (int i = 0; i < num_instructions; ++i) {
        const Instruction& now = program[i];
        if (now.op == ATTEND) continue;
        const TensorMap& w = *maps++;
        const int num_stages = stages_of(size_of_k(now.op));
        const int parts = now.output == GATED ? 2 : 1;
        const Share share = now.share;
        for (int start = 0; start < share.count; start += share.chains) {
            const int active = min((int)share.chains, share.count - start);
            for (int part = 0; part < parts; ++part) {
                const int tile = share.first + start + part * now.num_units;
#pragma unroll 1
                for (int stage = 0; stage < num_stages; ++stage) {
                    for (; position < before + active; position += COPIERS) {
                        progress.wait_for_all(position - LAG);
                        if (position >= in_flight) ring.wait_for_landing(cursor, in_flight);
                        ring.fill(cursor, w, (tile + position - before) * TILE_N,
                                  stage * STAGE_GROUPS, policy);
                        cursor.move(COPIERS, ring.num_slots);
                        progress.set(copier, position + COPIERS);
                    }
                    before += active;
                }
            }
        }
    }
    progress.set(copier, 1 << 30);
}

static_assert(sizeof(TeamMemory) == SPLIT_TILES * (TILE * 32 + 320) + 18 * HEAD_DIM * 2, "as few_rows_step.py");

struct Rest {
    int num_rows;
    float eps;
    char* x;  // M rows of up to K columns in shared memory
};

using Norm = NormRow<HIDDEN, NORM_THREADS, Norming>;
__device__ __forceinline__ bool norms() { return threadIdx.x < NORM_THREADS; }

// What two results are added to: this thread left it itself.
__device__ __forceinline__ float2 addend(const Instruction& now, size_t place) {
    if (now.output != ADDED) return make_float2(0.0f, 0.0f);
    if (now.addend) return *(const float2*)(now.addend + place);
    const TwoPackets two = look_at_two((const u64*)now.y + place);
    return make_float2(as_float(two.value(0)), as_float(two.value(1)));
}

__device__ __forceinline__ void leave(const Instruction& now, size_t place, const float (&c)[4],
                                      float2 add, u32 tag) {
    if (now.output == FP32) *(float2*)((float*)now.y + place) = make_float2(c[0], c[1]);
    if (now.output == FP16) put_packet((u64*)now.y + place / 2, to_f16x2(c[0], c[1]), tag);
    if (now.output == ADDED)
        put_two((u64*)now.y + place, __fadd_rn(c[0], add.x), __fadd_rn(c[1], add.y), tag);
}

// The block's share of x w^T, x being in shared memory.
template <int K>
__device__ __forceinline__ void multiply(const Instruction& now, const Rest& rest,
                                         const WeightRing& ring, Cursor& cursor, u32 tag) {
    const int warp = threadIdx.x / WARP;
    const int lane = threadIdx.x % WARP;
    const int row = lane % 8;
    const u32 w_lane[2] = {row * GROUP_K * 2 + (lane / 8 ^ row) * 16u,
                           row * GROUP_K * 2 + ((4 + lane / 8) ^ row) * 16u};
    const LaneOfX x(shared_address(rest.x), K * 2 + 16, rest.num_rows);
    const int m = lane / 4;
    const bool exists = m < rest.num_rows;
    const int parts = now.output == GATED ? 2 : 1;
    const Share share = now.share;
    for (int start = 0; start < share.count; start += share.chains) {
        const int active = min((int)share.chains, share.count - start);
        const int unit = share.first + start + warp;
        const size_t place = (size_t)m * now.width + unit * TILE_N + lane % 4 * 2;
        u32 gate = 0;
        for (int part = 0; part < parts; ++part) {
            if (warp < active) {
                float2 add = make_float2(0.0f, 0.0f);
                if (exists) add = addend(now, place);
                ChainStages stages = {ring, cursor, active};
                stages.at.move(warp, ring.num_slots);
                float c[4] = {};
                run_chain<K>(c, stages, w_lane, x);
                if (part + 1 < parts) {
                    gate = to_f16x2(c[0], c[1]);
                } else if (exists && now.output == GATED) {
                    const u32 y = gated_two(gate, to_f16x2(c[0], c[1]));
                    put_packet((u64*)now.y + place / 2, y, tag);
                } else if (exists) {
                    leave(now, place, c, add, tag);
                }
            }
            ring.jump(cursor, active * stages_of(K));
        }
    }
}

// A row of the residual stream, as packets.
__device__ __forceinline__ void take_row(Norm& row, const u64* packets, u32 tag) {
    auto vector = [](int i) { return threadIdx.x + i * NORM_THREADS; };
    TwoPackets two[2 * Norm::HELD];
    take_packets(two, tag, [&](int i) {
        return packets + min(vector(i / 2), Norm::VECTORS - 1) * 4 + i % 2 * 2;
    });
#pragma unroll
    for (int i = 0; i < Norm::HELD; ++i) {
        const TwoPackets &low = two[2 * i], &high = two[2 * i + 1];
        row.x[i] = make_float4(as_float(low.value(0)), as_float(low.value(1)),
                               as_float(high.value(0)), as_float(high.value(1)));
        if (vector(i) >= Norm::VECTORS) row.x[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    }
}

// A row of COLUMNS that attention or swiglu left, fp16, to `target`.
template <int COLUMNS>
__device__ __forceinline__ void take_halves(const u64* packets, uint2* target, u32 tag) {
    constexpr int QUADS = COLUMNS / 4;
    constexpr int HELD = (QUADS + THREADS - 1) / THREADS;
    constexpr int AT_ONCE = HELD < 8 ? HELD : 8;
#pragma unroll 1
    for (int start = threadIdx.x; start < QUADS; start += AT_ONCE * THREADS) {
        TwoPackets two[AT_ONCE];
        const int count = (QUADS - start + THREADS - 1) / THREADS;
        take_packets(two, tag, [&](int i) { return packets + (start + i * THREADS) * 2; }, count);
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i)
            if (i < count) target[start + i * THREADS] = make_uint2(two[i].value(0), two[i].value(1));
    }
}

// x of a product into shared memory. norm: the weight, where it is normalized; tag: of what it reads.
__device__ __forceinline__ void prepare_x(const Instruction& now, const Rest& rest,
                                          const float4 (&norm)[Norm::HELD], u32 tag) {
    Computing::wait();  // the product before has been read
    for (int m = 0; m < rest.num_rows; ++m) {
        const auto* from = (const u64*)now.x;
        if (now.op == ATTENTION) {
            take_halves<ATTENDED>(from + m * (ATTENDED / 2),
                                  (uint2*)(rest.x + m * (ATTENDED * 2 + 16)), tag);
        } else if (now.op == SWIGLU) {
            take_halves<INTERMEDIATE>(from + m * (INTERMEDIATE / 2),
                                      (uint2*)(rest.x + m * (INTERMEDIATE * 2 + 16)), tag);
        } else if (norms()) {
            Norm row;
            if (now.op == NORM) take_row(row, from + m * HIDDEN, tag);
            else row.load((const float*)now.x + m * HIDDEN);
            row.normalize(norm, rest.eps, (f16*)(rest.x + m * (HIDDEN * 2 + 16)));
        }
    }
    Computing::wait();
}

// The warps that compute.
__device__ __forceinline__ void compute(const Instruction* program, int num_instructions,
                                        const Step& step, const Rest& rest, const WeightRing& ring,
                                        char* tiles, int num_teams, u32 first_tag) {
    const Team team = {TEAMS - 1 - (int)threadIdx.x / TEAM_THREADS};  // idle in short products
    const bool attends = team.index < num_teams;
    const int first_item = team.index * gridDim.x + blockIdx.x, all_teams = num_teams * gridDim.x;
    char* const own_tiles = tiles + team.index * TEAM_TILES_BYTES;
    auto cache_of = [&](int i) {
        const Instruction& now = program[i];
        return LayerCache{(const u64*)now.x, now.vector, now.keys, now.values, first_tag + i - 1};
    };
    Cursor cursor;
    float4 norm[Norm::HELD];  // the weight of the norm before the next product, ahead of its use
    auto load_norm = [&](int i) {
        const bool is_norm = i < num_instructions && program[i].op % FIRST_NORM == NORM;
#pragma unroll
        for (int j = 0; j < Norm::HELD; ++j) {
            const int vector = threadIdx.x + j * NORM_THREADS;
            const bool holds = is_norm && norms() && vector < Norm::VECTORS;
            norm[j] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (holds) norm[j] = load_now(program[i].vector + vector * 4);
        }
    };
    auto prefetch_layer = [&](int i) {
        if (attends) prefetch(step, cache_of(i), first_item, shared_address(own_tiles));
    };
    load_norm(0);
    prefetch_layer(1);
#pragma unroll 1
    for (int i = 0; i < num_instructions; ++i) {
        const Instruction& now = program[i];
        const u32 tag = first_tag + i;
        if (now.op == ATTEND) {
            Computing::wait();  // x is no longer read
            TeamMemory& memory = ((TeamMemory*)rest.x)[team.index];
            if (attends) {
                attend_items(step, cache_of(i), first_item, all_teams, own_tiles, memory, team);
                merge_heads(step, first_item, all_teams, tag);
            }
            load_norm(i + 1);
        } else if (now.share.count > 0) {
            prepare_x(now, rest, norm, tag - 1);
            load_norm(i + 1);
            if (i + 2 < num_instructions && program[i + 2].op == ATTEND) prefetch_layer(i + 2);
            const int K = size_of_k(now.op);
            if (K == HIDDEN) multiply<HIDDEN>(now, rest, ring, cursor, tag);
            else if (K == ATTENDED) multiply<ATTENDED>(now, rest, ring, cursor, tag);
            else multiply<INTERMEDIATE>(now, rest, ring, cursor, tag);
        } else {
            load_norm(i + 1);
            if (i + 2 < num_instructions && program[i + 2].op == ATTEND) prefetch_layer(i + 2);
        }
    }
}

extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1)
    few_rows_step(const uint4* __restrict__ program, const TensorMap* maps, int num_instructions,
                  u64* counter, const float* __restrict__ rope_table, const i32* positions,
                  const i32* slot_mapping, const i32* context_lens, const i32* block_tables,
                  u64* attended, u64* partials, int num_sequences, int max_blocks, int reach,
                  float scale, float eps, int num_slots, int in_flight, int x_bytes, int num_teams) {
    extern __shared__ __align__(1024) char memory[];
    __shared__ StepRow rows[MAX_ROWS];
    __shared__ u32 first_tag;
    __shared__ Progress progress;
    const u32 slots = shared_address(memory);
    char* const after_slots = memory + num_slots * SLOT_BYTES;
    const WeightRing ring = {shared_address(after_slots), slots, num_slots,
                             0xffffffffu / num_slots + 1};
    Instruction* const instructions = (Instruction*)(after_slots + num_slots * 16);
    char* const x = (char*)(instructions + (num_instructions + 1) / 2 * 2);
    const int warp = threadIdx.x / WARP;
    ring.init();
    if (threadIdx.x < COPIERS) progress.set(threadIdx.x, threadIdx.x);
    for (int i = threadIdx.x; i < num_instructions * (int)(sizeof(Instruction) / 16);
         i += ALL_THREADS)
        ((uint4*)instructions)[i] = program[i];
    __syncthreads();
    for (int i = threadIdx.x; i < num_instructions; i += ALL_THREADS)
        instructions[i].share = Share::of(instructions[i].num_units);
    __syncthreads();
    if (warp >= WARPS) {
        give_registers<COPIER_REGISTERS>();
        {
            int num_products = 0;
            for (int i = 0; i < num_instructions; ++i) num_products += instructions[i].op != ATTEND;
            for (int i = threadIdx.x % WARP; i < num_products; i += WARP) acquire_map(maps[i]);
            __syncwarp();
            if (threadIdx.x % WARP == 0)
                copy_weights(ring, instructions, num_instructions, maps, in_flight, warp - WARPS,
                             progress);
        }
    } else {
        take_registers<COMPUTE_REGISTERS>();
        wait_for_previous();
        if (threadIdx.x == 0) {
            // Launches follow each other, and every block counts itself once in each.
            const u32 launch = (u32)(atomicAdd(counter, 1ull) / gridDim.x) + 1;
            first_tag = launch * (u32)(num_instructions | 1);
        }
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
        compute(instructions, num_instructions, step, rest, ring, x + x_bytes, num_teams, first_tag);
    }
    let_next_start();
}

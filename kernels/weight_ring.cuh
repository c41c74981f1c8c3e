// weight_ring.cuh: one ring in shared memory through which a block streams all its weights, of
//                  product after product, in the order in which they are used
//
// layout:    a slot holds 8 rows by STAGE_K columns of w; 16-byte pieces of row r are permuted by r, so
//            that ldmatrix meets all banks
// mapping:   every slot is filled by a whole producer warp and emptied by one chain. Producers fill
//            a stage of all chains before any of them goes on to the next, and a ring holds at least
//            three: so nobody takes a turn of a slot for the one after next, whose parity it has

constexpr int SLOT_PITCH = STAGE_K * 2;
constexpr int SLOT_BYTES = TILE_N * SLOT_PITCH;

// The slots of one product or several, counted on: which slot, and which turn of it.
struct Cursor {
    int slot = 0;
    u32 turn = 0;  // its lowest bit is the parity of the barriers

    __device__ __forceinline__ void move(int count, int num_slots) {  // count <= num_slots
        slot += count;
        if (slot >= num_slots) slot -= num_slots, turn ^= 1;
    }
    __device__ __forceinline__ void jump(int count, int num_slots) {
        turn ^= (slot + count) / num_slots & 1;
        slot = (slot + count) % num_slots;
    }
};

struct WeightRing {
    u32 barriers, slots;  // shared addresses
    int num_slots;

    __device__ __forceinline__ u32 full(int slot) const { return barriers + slot * 16; }
    __device__ __forceinline__ u32 empty(int slot) const { return full(slot) + 8; }
    __device__ __forceinline__ u32 slot(int slot) const { return slots + slot * SLOT_BYTES; }

    __device__ __forceinline__ void init() const {
        for (int i = threadIdx.x; i < num_slots; i += blockDim.x) {
            init_barrier(full(i), WARP);
            init_barrier(empty(i), 1);
        }
    }
    static __device__ __forceinline__ void wait(u32 barrier, u32 parity) {
        Patience patience;
        while (!is_over(barrier, parity)) patience.check();
    }
    // What was copied into the `before`-th slot before this one has landed.
    __device__ __forceinline__ void wait_for_landing(Cursor at, int before) const {
        at.move(num_slots - before, num_slots);
        wait(full(at.slot), at.turn ^ 1);
    }
    // A whole warp copies 8 rows, `columns` wide at most, from `source` on.
    __device__ __forceinline__ void fill(const Cursor& at, const f16* source, int row_stride,
                                         int columns) const {
        const int lane = threadIdx.x % WARP;
        const u32 target = slot(at.slot);
        wait(empty(at.slot), at.turn ^ 1);
        if (lane * 8 < columns) {
#pragma unroll
            for (int row = 0; row < TILE_N; ++row)
                copy_async_16(target + row * SLOT_PITCH + (lane ^ row) * 16,
                              source + (size_t)row * row_stride + lane * 8);
        }
        arrive_with_copies(full(at.slot));
    }
};

// What `run_chain` takes: every `stride`-th slot.
struct ChainStages {
    const WeightRing& ring;
    Cursor at;
    int stride;

    __device__ __forceinline__ u32 wait() const {
        WeightRing::wait(ring.full(at.slot), at.turn);
        return ring.slot(at.slot);
    }
    __device__ __forceinline__ u32 empty() const { return ring.empty(at.slot); }
    __device__ __forceinline__ void advance() { at.move(stride, ring.num_slots); }
};

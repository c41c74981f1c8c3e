// weight_ring.cuh: one ring in shared memory through which a block streams all its weights, of
//                  product after product, in the order in which they are used
//
// layout:    a slot holds 8 rows by STAGE_K columns of w, as panels of 64 columns with the 128-byte
//            swizzle of the copy engine: 16-byte piece p of row r of a panel lies at place p ^ r
// mapping:   every slot is filled by one copy and emptied by one chain. COPIERS threads take turns, as
//            one cannot issue copies as fast as they land; with numbers of slots that are multiples of
//            COPIERS a slot has one copier, and so has the slot `in_flight` before, whose landing it
//            awaits first
// turns:     a parity tells a turn of a slot from the next one, not from the one after: nobody may wait
//            for a slot whose last turn has not landed. A chain that waits for slot p has had p - a, its
//            last one (a <= WARPS; before that, all up to p - 2 WARPS are over with the product before).
//            Whoever copied that saw every copier beyond p - a - LAG, whose own slots up to
//            p - a - LAG - COPIERS - in_flight had then landed. So the ring has at least
//            in_flight + COPIERS + LAG + WARPS slots

constexpr int PANEL_BYTES = TILE_N * GROUP_K * 2;
constexpr int SLOT_BYTES = STAGE_GROUPS * PANEL_BYTES;
constexpr int LAG = WARPS;  // slots that a copier may be ahead of another

// The slots of one product or several, counted on: which slot, and which turn of it.
struct Cursor {
    int slot = 0;
    u32 turn = 0;  // its lowest bit is the parity of the barriers

    __device__ __forceinline__ void move(int count, int num_slots) {  // count <= num_slots
        slot += count;
        if (slot >= num_slots) slot -= num_slots, turn ^= 1;
    }
};

struct WeightRing {
    u32 barriers, slots;  // shared addresses
    int num_slots;
    u32 reciprocal;  // 2^32 / num_slots, rounded up: exact quotients of what is far below 2^16

    __device__ __forceinline__ void jump(Cursor& cursor, int count) const {
        const int at = cursor.slot + count, turns = __umulhi(at, reciprocal);
        cursor.turn ^= turns & 1;
        cursor.slot = at - turns * num_slots;
    }
    __device__ __forceinline__ u32 full(int slot) const { return barriers + slot * 16; }
    __device__ __forceinline__ u32 empty(int slot) const { return full(slot) + 8; }
    __device__ __forceinline__ u32 slot(int slot) const { return slots + slot * SLOT_BYTES; }

    __device__ __forceinline__ void init() const {
        for (int i = threadIdx.x; i < num_slots; i += blockDim.x) {
            init_barrier(full(i), 1);
            init_barrier(empty(i), 1);
        }
        show_to_async_units();
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
    // One thread: the copy engine brings 8 rows from `row` on, STAGE_K columns from panel `panel` on;
    // columns that w does not have become zeros.
    __device__ __forceinline__ void fill(const Cursor& at, const TensorMap& w, int row, int panel,
                                         u64 policy) const {
        wait(empty(at.slot), at.turn ^ 1);
        arrive_expecting(full(at.slot), SLOT_BYTES);
        copy_box(slot(at.slot), w, 0, row, panel, full(at.slot), policy);
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

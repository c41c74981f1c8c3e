// grid_barrier.cuh: blocks of one launch that wait for each other; all of them must be resident
//
// layout:    one counter in global memory, which every launch leaves at a multiple of the grid's size
//            and no launch resets
// macros:    SPIN_LIMIT: a wait of more cycles traps; 0: waits for ever

// Ends a kernel whose wait has no end, instead of hanging the card.
struct Patience {
    i64 started = 0;

    __device__ __forceinline__ void check() {
        if constexpr (SPIN_LIMIT > 0) {
            if (started == 0) started = clock64();
            if (clock64() - started > SPIN_LIMIT) __trap();
        }
    }
};

// What the threads of Group wrote before `arrive` is seen by those of every block after `wait`;
// both are called by all of them, and thread 0 is one of them.
template <class Group>
struct GridBarrier {
    u64* counter;
    u64 target;

    // Not before the launch that used the counter last has ended. A block that is here has not
    // arrived yet, so fewer than all of this launch have.
    __device__ __forceinline__ GridBarrier(u64* counter) : counter(counter), target(0) {
        if (threadIdx.x == 0) {
            const u64 arrived = load();
            target = arrived - arrived % gridDim.x;
        }
    }
    __device__ __forceinline__ void arrive() {
        Group::wait();
        if (threadIdx.x == 0)
            asm volatile("red.release.gpu.global.add.u64 [%0], 1;" ::"l"(counter) : "memory");
        target += gridDim.x;
    }
    __device__ __forceinline__ void wait() const {
        Patience patience;
        if (threadIdx.x == 0)
            while (load() < target) patience.check();
        Group::wait();
    }

private:
    __device__ __forceinline__ u64 load() const {
        u64 value;
        asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(counter) : "memory");
        return value;
    }
};

// grid_barrier.cuh: blocks of one launch that wait for each other; all of them must be resident
//
// layout:    one counter in global memory, which every launch leaves at a multiple of the grid's size
//            and no launch resets
// macros:    SPIN_LIMIT: a wait of more cycles traps; 0: waits for ever

// Ends a kernel whose wait has no end, instead of hanging the card.
#ifdef DEBUG_SPIN
__device__ int broken, guilty;
__device__ int printed;
extern "C" __device__ int printf(const char*, ...);
__device__ __forceinline__ u64 raw(u32 address) {
    u64 v;
    asm volatile("ld.shared.u64 %0, [%1];" : "=l"(v) : "r"(address));
    return v;
}
#endif
struct Patience {
    i64 started = 0;

    __device__ __forceinline__ bool check(int site, u32 a, u32 b, u32 c = 0) {
        if constexpr (SPIN_LIMIT > 0) {
            if (started == 0) started = clock64();
#ifdef DEBUG_SPIN
            const i64 waited = clock64() - started;
            if (site == 1 && waited > SPIN_LIMIT && !*(volatile int*)&broken) atomicCAS(&guilty, 0, blockIdx.x + 1);
            if (waited > 2 * (i64)SPIN_LIMIT) {
                if (site != 0 && *(volatile int*)&guilty == blockIdx.x + 1 && threadIdx.x % 32 == 0) {
                    printf("stuck block %d warp %d site %d slot %d parity %d full %llx empty %llx\n", blockIdx.x, threadIdx.x / 32, site, c, b, raw(a & ~15u), raw((a & ~15u) + 8));
                    if (atomicAdd(&printed, 1) == 0)
                        for (int s = 0; s < 39; ++s)
                            printf("   slot %d full %llx empty %llx\n", s, raw((a & ~15u) + (s - (int)c) * 16), raw((a & ~15u) + (s - (int)c) * 16 + 8));
                }
                if (site == 0 && *(volatile int*)&guilty == blockIdx.x + 1) printf("stuck block %d at the grid\n", blockIdx.x);
            }
            if (waited > 3 * (i64)SPIN_LIMIT) broken = 1;
            return *(volatile int*)&broken != 0;
#else
            if (clock64() - started > SPIN_LIMIT) __trap();
#endif
        }
        return false;
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
            while (load() < target) if (patience.check(0, 0, 0)) break;
        Group::wait();
    }

private:
    __device__ __forceinline__ u64 load() const {
        u64 value;
        asm volatile("ld.acquire.gpu.global.u64 %0, [%1];" : "=l"(value) : "l"(counter) : "memory");
        return value;
    }
};

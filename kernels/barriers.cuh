// barriers.cuh: barriers in shared memory (sm_90 and later)
//
// `count` arrivals complete a phase; waiting names the parity of the phase.
// source: PTX ISA, "Parallel Synchronization and Communication Instructions: mbarrier"

__device__ __forceinline__ void init_barrier(u32 barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}

__device__ __forceinline__ void arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Whether the phase of this parity is over, asked for a while; on a fresh barrier, parity 1 is.
__device__ __forceinline__ bool is_over(u32 barrier, u32 parity) {
    u32 done;
    asm volatile(
        "{\n\t.reg .pred p;\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
        "selp.u32 %0, 1, 0, p;\n\t}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
    return done;
}

// Returns once it is.
__device__ __forceinline__ void wait_for(u32 barrier, u32 parity) {
    while (!is_over(barrier, parity)) {
    }
}

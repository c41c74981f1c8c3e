// packets.cuh: values between blocks of one launch, each with the tag of who left it and when
//
// layout:    packet = 8 bytes: a value of 4 (fp32, or two fp16), then its tag. Two neighbours travel
//            as one access of 16 bytes, which is two of 8 that are not torn (PTX ISA, memory
//            consistency model: a vector access is its elements' accesses in any order)
// mapping:   a reader asks for the packets themselves until all carry the tag it expects: one way
//            through L2 where data, fence, flag and data again would be three
// order:     nobody waits before a packet is written again; why that is safe is few_rows_step's to say
// macros:    SPIN_LIMIT: a wait that looks more often traps; 0: waits for ever
// source:    the idea is NCCL's "LL" protocol

// Ends a kernel whose wait has no end, instead of hanging the card.
struct Patience {
    u32 tries = 0;

    __device__ __forceinline__ void check() {
        if constexpr (SPIN_LIMIT > 0) {
            if (++tries > SPIN_LIMIT) __trap();
        }
    }
};

struct TwoPackets {
    u64 packets[2];

    __device__ __forceinline__ u32 value(int i) const { return (u32)packets[i]; }
    __device__ __forceinline__ bool carry(u32 tag) const {
        return (u32)(packets[0] >> 32) == tag && (u32)(packets[1] >> 32) == tag;
    }
};

__device__ __forceinline__ u64 packet(u32 value, u32 tag) { return (u64)tag << 32 | value; }

__device__ __forceinline__ void put_packet(u64* target, u32 value, u32 tag) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(target), "l"(packet(value, tag))
                 : "memory");
}

__device__ __forceinline__ void put_two(u64* target, u32 first, u32 second, u32 tag) {
    asm volatile("st.relaxed.gpu.global.v2.u64 [%0], {%1, %2};" ::"l"(target),
                 "l"(packet(first, tag)), "l"(packet(second, tag))
                 : "memory");
}

__device__ __forceinline__ void put_two(u64* target, float first, float second, u32 tag) {
    put_two(target, as_bits(first), as_bits(second), tag);
}

__device__ __forceinline__ TwoPackets look_at_two(const u64* from) {
    TwoPackets two;
    asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
                 : "=l"(two.packets[0]), "=l"(two.packets[1])
                 : "l"(from)
                 : "memory");
    return two;
}

// Two packets each from the first `count` of COUNT places `from(i)`, once all carry the tag. All that
// are missing are asked for again and again: to ask for one of them first costs another way through L2.
template <int COUNT, class From>
__device__ __forceinline__ void take_packets(TwoPackets (&two)[COUNT], u32 tag, From from,
                                             int count = COUNT) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
        if (i < count) two[i] = look_at_two(from(i));
    Patience patience;
    bool complete;
    do {
        patience.check();
        complete = true;
#pragma unroll
        for (int i = 0; i < COUNT; ++i) {
            if (i >= count || two[i].carry(tag)) continue;
            two[i] = look_at_two(from(i));
            complete = false;
        }
    } while (!complete);
}

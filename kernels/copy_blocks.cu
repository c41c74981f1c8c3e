// copy_blocks: the beginnings of cache blocks copied to other blocks, in every layer
//
// computes:  positions 0 … n - 1 of block `target` = those of block `source`, for each copy (source,
//            target, n), in all keys and values; no target is another copy's source
// layout:    copies (m, 3) i32; cache: 2 L arrays (num_blocks, Hkv, 64, D) fp16, keys and values of
//            each layer in turn, array_values values apart
// mapping:   block (copy, array and KV head) owns one head's n x D values
// macros:    NUM_KV_HEADS (Hkv), HEAD_DIM (D, a multiple of 8), THREADS
// bound by:  bytes: n D 4 for each head and array
// order:     no reduction
// architectures: sm_80 sm_90 sm_120
// compile:   NUM_KV_HEADS=32 HEAD_DIM=96 THREADS=128 | NUM_KV_HEADS=2 HEAD_DIM=64 THREADS=128
// spills:    none

static_assert(HEAD_DIM % 8 == 0, "whole vectors of 8 values");
constexpr int VECTORS = HEAD_DIM / 8;

extern "C" __global__ void __launch_bounds__(THREADS)
    copy_blocks(f16* __restrict__ cache, const i32* __restrict__ copies, i64 array_values) {
    let_next_start();
    wait_for_previous();
    const i32* copy = copies + blockIdx.x * 3;
    const int head = blockIdx.y % NUM_KV_HEADS;
    f16* array = cache + blockIdx.y / NUM_KV_HEADS * array_values;
    auto tile = [&](i32 block) {
        return (uint4*)(array + ((size_t)block * NUM_KV_HEADS + head) * BLOCK_SIZE * HEAD_DIM);
    };
    const uint4* source = tile(copy[0]);
    uint4* target = tile(copy[1]);
    for (int i = threadIdx.x; i < copy[2] * VECTORS; i += THREADS) target[i] = source[i];
}

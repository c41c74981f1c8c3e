// rope_and_cache: bias, rotary embedding, and the new keys and values into the paged cache
//
// computes:  v = qkv[t] + bias (bias may be null); for each head of Q and K and i < D/2, with cos
//            and sin from rope_table[positions[t]], low = v[i] and high = v[i + D/2]:
//                low' = low cos - high sin, high' = high cos + low sin
//            Q' -> q[t]; K' and V -> the cache slot slot_mapping[t]; all rounded to fp16.
//            A negative slot writes no cache. A V that fp16 cannot hold is cached as 0 and its pair
//            in K as NaN: who sees the key gets NaN, and attention's 0 * V is 0 for who does not.
// layout:    qkv (T, (H + 2 Hkv) D) fp16: Q heads, K heads, V heads; bias ((H + 2 Hkv) D,) fp32;
//            rope_table (positions, 2, D/2) fp32; q (T, H, D) fp16;
//            keys, values (num_blocks, Hkv, 64, D) fp16; slot = block * 64 + offset; D a multiple
//            of 8
// mapping:   block (t, j) owns THREADS of token t's units: 4 pairs of one Q head, or of one K head
//            and its V
// macros:    NUM_HEADS (H), NUM_KV_HEADS (Hkv), HEAD_DIM (D), THREADS
// bound by:  bytes: T (H + 2 Hkv) D (2 + 2)
// order:     no reduction
// architectures: sm_80 sm_90 sm_120
// compile:   NUM_HEADS=32 NUM_KV_HEADS=32 HEAD_DIM=96 THREADS=256 | NUM_HEADS=14 NUM_KV_HEADS=2 HEAD_DIM=64 THREADS=256
// spills:    none

#include "rope.cuh"

extern "C" __global__ void __launch_bounds__(THREADS)
    rope_and_cache(const f16* __restrict__ qkv, const float* __restrict__ bias,
                   const float* __restrict__ rope_table, const i32* __restrict__ positions,
                   const i32* __restrict__ slot_mapping, f16* __restrict__ q,
                   f16* __restrict__ keys, f16* __restrict__ values) {
    let_next_start();
    wait_for_previous();
    const size_t t = blockIdx.x;
    const int unit = blockIdx.y * THREADS + threadIdx.x;
    if (unit >= (NUM_HEADS + NUM_KV_HEADS) * HEAD_UNITS) return;
    const int head = unit / HEAD_UNITS;
    const int i = unit % HEAD_UNITS * 4;
    const int column = head * HEAD_DIM + i;
    const f16* row = qkv + t * HEADS * HEAD_DIM;

    Pairs rotated(row + column, bias ? bias + column : nullptr);
    rotated.rotate(rope_table + (size_t)positions[t] * HEAD_DIM + i);
    if (head < NUM_HEADS) {
        rotated.store(q + (t * NUM_HEADS + head) * HEAD_DIM + i);
        return;
    }
    const i32 slot = slot_mapping[t];
    if (slot < 0) return;
    const int value_column = column + NUM_KV_HEADS * HEAD_DIM;
    Pairs value(row + value_column, bias ? bias + value_column : nullptr);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        move_overflow(value.low[j], rotated.low[j]);
        move_overflow(value.high[j], rotated.high[j]);
    }
    const size_t tile = (size_t)(slot / BLOCK_SIZE) * NUM_KV_HEADS + head - NUM_HEADS;
    const size_t place = (tile * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM + i;
    rotated.store(keys + place);
    value.store(values + place);
}

// product.cuh: how a matrix product leaves its fp32 accumulators
//
// OUTPUT (a macro): 0 writes fp32, 1 fp16 rounded to nearest even (beyond fp16 is infinite), 2 adds
// to the fp32 that is there, in one rounding.

// What precedes the store at `y + index`: 0, or the value to be added to.
__device__ __forceinline__ float to_add(const void* y, size_t index) {
    return OUTPUT == 2 ? ((const float*)y)[index] : 0.0f;
}

__device__ __forceinline__ void put(void* y, size_t index, float value, float added) {
    if constexpr (OUTPUT == 0) ((float*)y)[index] = value;
    if constexpr (OUTPUT == 1) ((f16*)y)[index] = to_f16(value);
    if constexpr (OUTPUT == 2) ((float*)y)[index] = __fadd_rn(value, added);
}

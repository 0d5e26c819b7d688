// How many values are NaN or infinite.
//
// Defines: SOURCE (Bf16, F16, F32).
#include "source_dtypes.cuh"

// source: (n,), 16-byte aligned; bad_count is increased.
extern "C" __global__ void __launch_bounds__(256) count_nonfinite(
    const SOURCE::Bits* __restrict__ source, int64 num_values, uint64* bad_count) {
    uint32 count = 0;
    int64 stride = int64(gridDim.x) * blockDim.x * OCTET;
    for (int64 first = (int64(blockIdx.x) * blockDim.x + threadIdx.x) * OCTET; first < num_values;
         first += stride) {
        Octet<SOURCE> octet;
        if (first + OCTET <= num_values) octet.load(source + first);
        else octet.load_partly(source + first, num_values - first);
        float values[OCTET];
        octet.widen(values);
#pragma unroll
        for (int i = 0; i < OCTET; i++) count += !(fabsf(values[i]) <= LARGEST_FLOAT);
    }
    if (count) atomicAdd(bad_count, uint64(count));
}

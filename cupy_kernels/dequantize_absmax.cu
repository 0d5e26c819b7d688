// absmax from its 8-bit codes; the rules are in qtool/formats/double_quant.py.
#include "source_dtypes.cuh"
#include "code_tables.cuh"

// codes: uint8 (m,), nested_absmax: (ceil(m/256),), nested_code: (256,) -> absmax: (m,).
extern "C" __global__ void __launch_bounds__(256) dequantize_absmax(
    const uint8* __restrict__ codes, int64 count, const float* __restrict__ nested_absmax,
    const float* __restrict__ nested_code, const float* __restrict__ nested_offset,
    float* __restrict__ absmax) {
    float offset = *nested_offset;
    int64 stride = int64(gridDim.x) * blockDim.x;
    for (int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += stride) {
        float nested = nested_absmax[uint64(i) / NESTED_BLOCKSIZE];
        absmax[i] = flushed_product(nested_code[codes[i]], nested) + offset;
    }
}

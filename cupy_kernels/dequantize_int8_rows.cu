// LLM.int8() rows back to floats; the rules are in qtool/formats/int8.py.
//
// Defines: TARGET (Bf16, F16, F32).
#include "source_dtypes.cuh"
#include "code_tables.cuh"

struct Arguments {
    const signed char* codes;  // (num_rows, row_size), 16-byte aligned
    const float* scb;          // (num_rows,)
    TARGET::Bits* target;      // (num_rows, row_size), 16-byte aligned
    int64 num_rows, row_size;
};

extern "C" __global__ void __launch_bounds__(256) dequantize_int8_rows(const __grid_constant__ Arguments args) {
    const signed char* __restrict__ codes = args.codes;
    TARGET::Bits* __restrict__ target = args.target;
    const int64 num_rows = args.num_rows, row_size = args.row_size;
    const bool aligned = row_size % OCTET == 0;
    for (int64 row = blockIdx.y; row < num_rows; row += gridDim.y) {
        float scale = __ldg(args.scb + row);
        int64 stride = int64(gridDim.x) * blockDim.x * OCTET;
        for (int64 first = (int64(blockIdx.x) * blockDim.x + threadIdx.x) * OCTET; first < row_size;
             first += stride) {
            int64 start = row * row_size + first;
            bool whole = aligned && first + OCTET <= row_size;
            float values[OCTET];
            if (whole) {
                uint2 packed = __ldcs(reinterpret_cast<const uint2*>(codes + start));
#pragma unroll
                for (int i = 0; i < OCTET; i++) {
                    uint32 word = i < 4 ? packed.x : packed.y;
                    values[i] = float(static_cast<signed char>(word >> (8 * (i % 4))));
                }
            } else {
#pragma unroll
                for (int i = 0; i < OCTET; i++)
                    values[i] = first + i < row_size ? float(codes[start + i]) : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < OCTET; i++) values[i] = values[i] * scale * INVERSE_127;
            Octet<TARGET> octet;
            octet.narrow(values);
            if (whole) octet.store(target + start);
            else octet.store_partly(target + start, row_size - first);
        }
    }
}

// The RMS norm of many tokens.
//
// Defines: ACTIVATION (Bf16, F16), NORM (1; 2: the weight plus one), COLUMNS (a multiple of 8), WARPS.
//
// A thread block has one token. Bytes moved per value: 2 read, 2 written.
#include "source_dtypes.cuh"
#include "products.cuh"

using Bits = ACTIVATION::Bits;

struct Arguments {
    const Bits* x;       // (tokens, COLUMNS)
    const Bits* weight;  // (COLUMNS,)
    Bits* out;           // (tokens, COLUMNS)
    float epsilon;
};

extern "C" __global__ void __launch_bounds__(WARPS * 32) norm_rows(const __grid_constant__ Arguments args) {
    __shared__ float scratch[WARPS];
    const int64 row = int64(blockIdx.x) * COLUMNS;
    Activations<ACTIVATION, 1, WARPS, NORM, COLUMNS, COLUMNS> activations;
    activations.prepare(args.weight);
    activations.load(args.x + row, COLUMNS, 1, 0, args.weight, args.epsilon, scratch,
                     [&](int octet, int) { return reinterpret_cast<uint4*>(args.out + row) + octet; });
}

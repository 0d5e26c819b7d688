// Rows of the embedding: hidden = embedding[token] * scale, rounded once.
//
// Defines: ACTIVATION (Bf16, F16).
//
// Bytes per value: 2 read, 2 written.
#include "source_dtypes.cuh"
#include "products.cuh"

constexpr int THREADS = 256;

struct Arguments {
    const ACTIVATION::Bits* embedding;  // (vocabulary, hidden_size)
    const int64* tokens;                // (batch,)
    ACTIVATION::Bits* hidden;           // (batch, hidden_size), rows `stride` values apart
    int64 stride;
    int hidden_size;                    // a multiple of eight
    float scale;                        // 1: values stay as they are
};

// Thread block (part of the row, sequence).
extern "C" __global__ void __launch_bounds__(THREADS) embed(const __grid_constant__ Arguments args) {
    const int first = (blockIdx.x * THREADS + threadIdx.x) * OCTET;
    start_dependents();
    wait_for_prerequisites();
    if (first >= args.hidden_size) return;
    const int64 token = __ldcg(args.tokens + blockIdx.y);
    Octet<ACTIVATION> octet;
    octet.words[0] = __ldg(reinterpret_cast<const uint4*>(args.embedding + token * args.hidden_size + first));
    float values[OCTET];
    octet.widen(values);
#pragma unroll
    for (float& value : values) value *= args.scale;
    octet.narrow(values);
    *reinterpret_cast<uint4*>(args.hidden + blockIdx.y * args.stride + first) = octet.words[0];
}

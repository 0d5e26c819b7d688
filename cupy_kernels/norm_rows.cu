// The RMS norm of many tokens, stored or added to what is there.
//
// Defines: ACTIVATION (Bf16, F16), NORM (1; 2: the weight plus one), COLUMNS (a multiple of 8), WARPS, ADDED (0;
// 1: `out` is a sum that the norm is added to).
//
// A thread block has one token. Bytes moved per value: 2 read, 2 written; added: 4 read, 2 written.
#include "source_dtypes.cuh"
#include "products.cuh"

#ifndef ADDED
#define ADDED 0
#endif

using Bits = ACTIVATION::Bits;

struct Arguments {
    const Bits* x;       // (tokens, COLUMNS)
    const Bits* weight;  // (COLUMNS,)
    Bits* out;           // (tokens, COLUMNS)
    float epsilon;
};

using Row = Activations<ACTIVATION, 1, WARPS, NORM, COLUMNS, COLUMNS>;

// A thread's octets of the sum. What it can hold it asks for before the norm has to wait for all of the row.
struct Sum {
    uint4* row;
    Octet<ACTIVATION> held[Row::ONCE ? Row::THREAD_OCTETS : 1];

    __device__ explicit Sum(Bits* row) : row(reinterpret_cast<uint4*>(row)) {
        if constexpr (Row::ONCE) {
#pragma unroll
            for (int i = 0; i < Row::THREAD_OCTETS; i++)
                if (Row::octet_of(i) < COLUMNS / OCTET) held[i].words[0] = __ldcg(this->row + Row::octet_of(i));
        }
    }

    __device__ void add(int i, int octet, uint4 words) {
        Octet<ACTIVATION> sum = held[Row::ONCE ? i : 0], more;
        if constexpr (!Row::ONCE) sum.words[0] = __ldcg(row + octet);
        more.words[0] = words;
        float sums[OCTET], values[OCTET];
        sum.widen(sums);
        more.widen(values);
#pragma unroll
        for (int j = 0; j < OCTET; j++) sums[j] += values[j];
        sum.narrow(sums);
        row[octet] = sum.words[0];
    }
};

// Where the norm of octet number `i` of a thread goes: assigning adds.
struct Added {
    Sum& sum;
    int i, octet;

    __device__ Added& operator*() { return *this; }
    __device__ void operator=(uint4 words) { sum.add(i, octet, words); }
};

extern "C" __global__ void __launch_bounds__(WARPS * 32) norm_rows(const __grid_constant__ Arguments args) {
    __shared__ float scratch[WARPS];
    start_dependents();
    Row activations;
    activations.prepare(args.weight);
    wait_for_prerequisites();
    const int64 row = int64(blockIdx.x) * COLUMNS;
#if ADDED
    Sum sum(args.out + row);
    int count = 0;
    auto place = [&](int octet, int) { return Added{sum, count++, octet}; };
#else
    auto place = [&](int octet, int) { return reinterpret_cast<uint4*>(args.out + row) + octet; };
#endif
    activations.load(args.x + row, COLUMNS, 1, 0, args.weight, args.epsilon, scratch, place, [] {});
}

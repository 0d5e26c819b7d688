// The index of the largest value of each row; of equal ones the first, a NaN counts as the largest.
//
// Defines: ACTIVATION (Bf16, F16), BLOCKS (thread blocks that share a row), WARPS.
//
// Grid (BLOCKS, rows). The last block of a row to arrive looks at what the others found. Bytes read per value: 2.
#include "source_dtypes.cuh"
#include "products.cuh"

using Bits = ACTIVATION::Bits;

constexpr int THREADS = WARPS * WARP;

struct Arguments {
    const Bits* values;    // (rows, columns), rows `stride` values apart
    int64 stride;
    int columns;
    float* maxima;         // (rows, BLOCKS)
    int* indices;          // (rows, BLOCKS)
    uint32* arrived;       // (rows,), zero before and after
    int64* out;            // (rows,)
};

struct Best {
    float value;
    int index;

    __device__ void take(float other, int other_index) {
        bool is_nan = value != value, other_is_nan = other != other;
        bool larger = other_is_nan ? !is_nan : other > value;
        bool equal = other_is_nan ? is_nan : other == value;
        if (larger || (equal && other_index < index)) {
            value = other;
            index = other_index;
        }
    }

    __device__ void merge_warp() {
#pragma unroll
        for (int step = 16; step > 0; step /= 2)
            take(__shfl_xor_sync(FULL_WARP, value, step), __shfl_xor_sync(FULL_WARP, index, step));
    }
};

// What all threads of a block found, in thread 0.
__device__ inline Best merge_block(Best best) {
    __shared__ Best of_warps[WARPS];
    best.merge_warp();
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = best;
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll
        for (int w = 1; w < WARPS; w++) best.take(of_warps[w].value, of_warps[w].index);
    }
    __syncthreads();
    return best;
}

extern "C" __global__ void __launch_bounds__(THREADS) argmax_rows(const __grid_constant__ Arguments args) {
    __shared__ bool is_last;
    start_dependents();
    wait_for_prerequisites();
    const int row = blockIdx.y;
    const Bits* values = args.values + row * args.stride;
    Best best{-__uint_as_float(0x7f800000u), 0x7fffffff};
    for (int i = blockIdx.x * THREADS + threadIdx.x; i < args.columns; i += BLOCKS * THREADS)
        best.take(ACTIVATION::widen(__ldcg(values + i)), i);
    best = merge_block(best);
    if (threadIdx.x == 0) {
        args.maxima[row * BLOCKS + blockIdx.x] = best.value;
        args.indices[row * BLOCKS + blockIdx.x] = best.index;
        __threadfence();
        is_last = atomicAdd(args.arrived + row, 1u) == BLOCKS - 1;
    }
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    Best found{-__uint_as_float(0x7f800000u), 0x7fffffff};
    for (int i = threadIdx.x; i < BLOCKS; i += THREADS)
        found.take(__ldcg(args.maxima + row * BLOCKS + i), __ldcg(args.indices + row * BLOCKS + i));
    found = merge_block(found);
    if (threadIdx.x == 0) {
        args.out[row] = found.index;
        args.arrived[row] = 0;  // for the next launch
    }
}

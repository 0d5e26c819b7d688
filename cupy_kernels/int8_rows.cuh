// Rows that threads keep in registers between their maximum and their codes.
//
// Wants SOURCE (Bf16, F16, F32), ROW_THREADS (32 ... 1024), OCTETS (that a thread holds).
#pragma once

#include "source_dtypes.cuh"

constexpr int ROW_CAPACITY = ROW_THREADS * OCTETS * OCTET;
constexpr int THREADS = ROW_THREADS > 256 ? ROW_THREADS : 256;
constexpr int ROWS_PER_BLOCK = THREADS / ROW_THREADS;
// Threads that must fit on a multiprocessor, which bounds their registers.
#if __CUDA_ARCH__ >= 800 && __CUDA_ARCH__ < 1000
constexpr int USUAL_THREADS = sizeof(SOURCE::Bits) == 2 ? 1536 : 1024;
#else
constexpr int USUAL_THREADS = 1024;
#endif
constexpr int RESIDENT_THREADS = OCTETS > 4 || ROW_THREADS == 1024 ? THREADS : USUAL_THREADS;

__device__ void load_octet(Octet<SOURCE>& octet, const SOURCE::Bits* row, int64 first, int64 size,
                           bool aligned) {
    if (aligned && first + OCTET <= size) octet.load(row + first);
    else octet.load_partly(row + first, size - first);
}

// The maximum over the threads of a row.
__device__ float row_max(float largest) {
#pragma unroll
    for (int step = WARP / 2; step; step /= 2)
        largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, step));
    if constexpr (ROW_THREADS > WARP) {
        __shared__ float of_warps[THREADS / WARP];
        of_warps[threadIdx.x / WARP] = largest;
        __syncthreads();
        constexpr int ROW_WARPS = ROW_THREADS / WARP;
        int first_warp = threadIdx.x / ROW_THREADS * ROW_WARPS;
        largest = of_warps[first_warp + threadIdx.x % WARP % ROW_WARPS];
#pragma unroll
        for (int step = ROW_WARPS / 2; step; step /= 2)
            largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, step));
    }
    return largest;
}

// Four codes to a word, the first in the lowest byte. NaN converts to 0.
__device__ uint32 pack_codes(float a, float b, float c, float d) {
    uint32 upper, word;
    asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;"
        : "=r"(upper) : "r"(__float2int_rn(d)), "r"(__float2int_rn(c)), "r"(0));
    asm("cvt.pack.sat.s8.s32.b32 %0, %1, %2, %3;"
        : "=r"(word) : "r"(__float2int_rn(b)), "r"(__float2int_rn(a)), "r"(upper));
    return word;
}

// LLM.int8() rows; the rules are in qtool/formats/int8.py.
//
// Defines: SOURCE (Bf16, F16, F32), ROW_THREADS (32 ... 1024), OCTETS (that a thread holds).
//
// The threads of a row keep it in registers between its maximum and its codes, so it is read once.
// Rows longer than ROW_THREADS * OCTETS * 8 values are read again, from the L2 cache.
#include "reciprocal.cuh"

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

// The format prescribes a detour through float16.
__device__ void widen_float16(const Octet<SOURCE>& octet, float (&values)[OCTET]) {
    octet.widen(values);
    if constexpr (!SOURCE::IS_FLOAT16) {
#pragma unroll
        for (int i = 0; i < OCTET; i++) values[i] = F16::widen(F16::narrow(values[i]));
    }
}

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

__device__ void store_codes(const Octet<SOURCE>& octet, float scale, char* codes, int64 first,
                            int64 size, bool aligned) {
    if (first >= size) return;
    float v[OCTET];
    widen_float16(octet, v);
#pragma unroll
    for (int i = 0; i < OCTET; i++) v[i] *= scale;
    uint2 packed = make_uint2(pack_codes(v[0], v[1], v[2], v[3]), pack_codes(v[4], v[5], v[6], v[7]));
    if (aligned && first + OCTET <= size) {
        __stcs(reinterpret_cast<uint2*>(codes + first), packed);
    } else {
#pragma unroll
        for (int i = 0; i < OCTET; i++)
            if (first + i < size) codes[first + i] = char((i < 4 ? packed.x : packed.y) >> (8 * (i % 4)));
    }
}

// source: (num_rows, row_size), codes: int8 of that shape, scb: (num_rows,). `aligned`: rows are a
// multiple of eight values, and the arrays 16-byte aligned. bad_count as in quantize_4bit.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT_THREADS / THREADS) quantize_int8_rows(
    const SOURCE::Bits* __restrict__ source, int64 num_rows, int64 row_size, bool aligned,
    char* __restrict__ codes, float* __restrict__ scb, uint64* bad_count) {
    int64 row = int64(blockIdx.x) * ROWS_PER_BLOCK + threadIdx.x / ROW_THREADS;
    bool exists = row < num_rows;
    if (!exists) row = num_rows - 1;  // it meets the others at the barrier
    int64 begin = threadIdx.x % ROW_THREADS * OCTET;
    source += row * row_size;
    codes += row * row_size;

    Octet<SOURCE> octets[OCTETS];
#pragma unroll
    for (int i = 0; i < OCTETS; i++)
        load_octet(octets[i], source, begin + i * ROW_THREADS * OCTET, row_size, aligned);
    float largest = 0.0f;
    float nan_if_bad = 0.0f;
    auto look_at = [&](const Octet<SOURCE>& octet) {
        float values[OCTET];
        widen_float16(octet, values);
#pragma unroll
        for (int i = 0; i < OCTET; i++) {
            largest = fmaxf(largest, fabsf(values[i]));  // NaN does not count
            nan_if_bad = __fmaf_rn(values[i], 0.0f, nan_if_bad);
        }
    };
#pragma unroll
    for (int i = 0; i < OCTETS; i++) look_at(octets[i]);
    for (int64 first = ROW_CAPACITY + begin; first < row_size; first += ROW_THREADS * OCTET) {
        Octet<SOURCE> octet;
        load_octet(octet, source, first, row_size, aligned);
        look_at(octet);
    }
    float own_largest = row_max(largest);
    if (!exists) return;

    if (begin == 0) scb[row] = own_largest;
    float scale = 127.0f * reciprocal(own_largest);
#pragma unroll
    for (int i = 0; i < OCTETS; i++)
        store_codes(octets[i], scale, codes, begin + i * ROW_THREADS * OCTET, row_size, aligned);
    for (int64 first = ROW_CAPACITY + begin; first < row_size; first += ROW_THREADS * OCTET) {
        Octet<SOURCE> octet;
        load_octet(octet, source, first, row_size, aligned);
        store_codes(octet, scale, codes, first, row_size, aligned);
    }

    if (nan_if_bad != nan_if_bad) {
        uint64 count = 0;
        for (int64 first = begin; first < row_size; first += ROW_THREADS * OCTET)
#pragma unroll 1
            for (int i = 0; i < OCTET && first + i < row_size; i++)
                count += !(fabsf(F16::widen(F16::narrow(SOURCE::widen(source[first + i])))) <= LARGEST_FLOAT);
        atomicAdd(bad_count, count);
    }
}

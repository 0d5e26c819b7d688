// LLM.int8() rows; the rules are in qtool/formats/int8.py.
//
// Defines: SOURCE (Bf16, F16, F32), ROW_THREADS (32 ... 1024), OCTETS (that a thread holds).
//
// The threads of a row keep it in registers between its maximum and its codes, so it is read once.
// Rows longer than ROW_THREADS * OCTETS * 8 values are read again, from the L2 cache.
#include "int8_rows.cuh"
#include "reciprocal.cuh"

// The format prescribes a detour through float16.
__device__ void widen_float16(const Octet<SOURCE>& octet, float (&values)[OCTET]) {
    octet.widen(values);
    if constexpr (!SOURCE::IS_FLOAT16) {
#pragma unroll
        for (int i = 0; i < OCTET; i++) values[i] = F16::widen(F16::narrow(values[i]));
    }
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

// Activations rounded to INT8 rows, without their outlier columns, and these beside them in 16 bit.
//
// Defines: SOURCE (Bf16, F16), ROW_THREADS, OCTETS as in int8_rows.cuh.
//
// A row's absmax is that of its values below the threshold, those in outlier columns too, as bitsandbytes has it;
// codes are made of it as those of weights. Bytes moved per value: 2 read, 1 written; per outlier 2 read, 2 written.
#include "int8_rows.cuh"
#include "reciprocal.cuh"

constexpr int GROUP = 16;  // outliers that a reader takes at once

struct Arguments {
    const SOURCE::Bits* x;       // (num_rows, columns), 16-byte aligned
    int64 num_rows, columns;     // a multiple of 16
    float threshold;             // infinity where there are no outliers
    const unsigned char* marks;  // (columns,), 1 for outliers; or null
    const int* list;             // how many columns are outliers, and which
    signed char* codes;          // (num_rows, columns), 16-byte aligned
    float* absmax;               // (num_rows,)
    SOURCE::Bits* outliers;      // (num_rows, columns): those of the list, then zeros up to a whole group
};

__device__ void store_rounded(const Octet<SOURCE>& octet, float scale, const unsigned char* marks,
                              signed char* codes, int64 first, int64 columns) {
    if (first >= columns) return;
    float v[OCTET];
    octet.widen(v);
#pragma unroll
    for (int i = 0; i < OCTET; i++) v[i] *= scale;
    uint2 packed = make_uint2(pack_codes(v[0], v[1], v[2], v[3]), pack_codes(v[4], v[5], v[6], v[7]));
    if (marks) {
        uint2 marked = __ldg(reinterpret_cast<const uint2*>(marks + first));
        packed.x &= ~(marked.x * 255u);
        packed.y &= ~(marked.y * 255u);
    }
    *reinterpret_cast<uint2*>(codes + first) = packed;
}

extern "C" __global__ void __launch_bounds__(THREADS, OCTETS > 4 ? 1 : 1024 / THREADS)
    int8_activations(const __grid_constant__ Arguments args) {
    int64 row = int64(blockIdx.x) * ROWS_PER_BLOCK + threadIdx.x / ROW_THREADS;
    bool exists = row < args.num_rows;
    if (!exists) row = args.num_rows - 1;  // it meets the others at the barrier
    int own = threadIdx.x % ROW_THREADS;
    const int64 columns = args.columns, begin = own * OCTET;
    const SOURCE::Bits* x = args.x + row * columns;

    Octet<SOURCE> octets[OCTETS];
#pragma unroll
    for (int i = 0; i < OCTETS; i++)
        load_octet(octets[i], x, begin + i * ROW_THREADS * OCTET, columns, true);
    float largest = 0.0f;
    bool is_beyond = false;
    auto look_at = [&](const Octet<SOURCE>& octet) {
        float values[OCTET];
        octet.widen(values);
#pragma unroll
        for (int i = 0; i < OCTET; i++) {
            bool is_below = fabsf(values[i]) < args.threshold;
            if (is_below) largest = fmaxf(largest, fabsf(values[i]));
            is_beyond |= !is_below;
        }
    };
#pragma unroll
    for (int i = 0; i < OCTETS; i++) look_at(octets[i]);
    for (int64 first = ROW_CAPACITY + begin; first < columns; first += ROW_THREADS * OCTET) {
        Octet<SOURCE> octet;
        load_octet(octet, x, first, columns, true);
        look_at(octet);
    }
    // Infinity and NaN, which no outlier columns take up, spoil the row: only infinity is that large.
    if (!args.marks && is_beyond) largest = __uint_as_float(0x7f800000u);
    largest = row_max(largest);
    if (!exists) return;

    if (own == 0) args.absmax[row] = largest;
    float scale = 127.0f * reciprocal(largest);
    signed char* codes = args.codes + row * columns;
#pragma unroll
    for (int i = 0; i < OCTETS; i++)
        store_rounded(octets[i], scale, args.marks, codes, begin + i * ROW_THREADS * OCTET, columns);
    for (int64 first = ROW_CAPACITY + begin; first < columns; first += ROW_THREADS * OCTET) {
        Octet<SOURCE> octet;
        load_octet(octet, x, first, columns, true);
        store_rounded(octet, scale, args.marks, codes, first, columns);
    }
    if (!args.marks) return;
    int count = __ldg(args.list);
    SOURCE::Bits* outliers = args.outliers + row * columns;
    for (int i = own; i < (count + GROUP - 1) / GROUP * GROUP; i += ROW_THREADS)
        outliers[i] = i < count ? x[__ldg(args.list + 1 + i)] : SOURCE::Bits(0);
}

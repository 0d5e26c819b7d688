// From the INT32 sums of an INT8 product to its result: scales, outlier columns, bias, one rounding.
//
//     out = (sums * absmax / 127 + outliers @ codes[:, list].T) * scb / 127 + bias
//
// Defines: ACTIVATION (Bf16, F16), ADDED (0; 1: to what is in `out`).
//
// A warp has 32 columns of the result, for which it fetches the codes of up to 64 outlier columns at a time; where
// there are no more, it fetches them once. Tensor cores add up the products of codes and outliers, both exact in
// 16 bit, onto the scaled sums. How many there are it reads on the device.
//
//     thread (g, t) of the 32     rows g and g + 8 of a fragment, columns 8 t to 8 t + 7
//     column 2 t + i of tile j    is column 8 t + 2 j + i: so a thread's columns lie side by side
//     place 4 t + i of a group    is what thread t multiplies, which is 2 t + i and 2 t + 8 + i - 2 to the product
//
// Bytes moved per value: 4 read, 2 written.
#include "source_dtypes.cuh"
#include "code_tables.cuh"
#include "products.cuh"

#ifndef ADDED
#define ADDED 0
#endif

using Bits = ACTIVATION::Bits;

constexpr int WARPS = 8;
constexpr int WARP_COLUMNS = 32;
constexpr int TILE_ROWS = 32;
constexpr int FRAGMENTS = TILE_ROWS / 16;
constexpr int TILES = WARP_COLUMNS / 8;
constexpr int GROUP = 16;           // outlier columns of a product
constexpr int CHUNK = 4 * GROUP;    // that are fetched at a time
constexpr int LINE = CHUNK + 16;    // bytes; eight rows of four words lie in 32 banks

struct Arguments {
    const int* sums;           // (num_rows, num_columns)
    const float* absmax;       // (num_rows,)
    const Bits* outliers;      // (num_rows, depth), in order of the list, zeros up to a whole group
    const int* list;           // how many columns of the weight are outliers, and which; or null
    const signed char* codes;  // (num_columns, depth)
    const float* scb;          // (num_columns,)
    const Bits* bias;          // (num_columns,) or null
    Bits* out;                 // (num_rows, num_columns), rows `out_stride` values apart, 16-byte aligned
    int64 num_rows, num_columns, depth, out_stride, block_rows;  // num_columns a multiple of 8
};

// The codes of outlier columns [first, first + CHUNK) of the list, of one row of the weight, a lane each.
__device__ void fetch_codes(const Arguments& args, int64 first_column, int first, int count,
                            unsigned char (&table)[WARP_COLUMNS][LINE]) {
    int lane = threadIdx.x % WARP, in_tile = lane % 8;
    int64 column = first_column + in_tile / 2 * 8 + lane / 8 * 2 + in_tile % 2;
    const signed char* weight = args.codes + min(column, args.num_columns - 1) * args.depth;
    for (int group = 0; group < CHUNK && first + group < count; group += GROUP) {
        uint32 words[GROUP / 4];
#pragma unroll
        for (int i = 0; i < GROUP / 4; i++) {
            words[i] = 0;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                int at = first + group + 4 * i + j;  // beyond the last, its outliers are zero
                int column_of_weight = __ldg(args.list + 1 + min(at, count - 1));
                words[i] |= uint32(static_cast<unsigned char>(__ldg(weight + column_of_weight))) << (8 * j);
            }
        }
        *reinterpret_cast<uint4*>(table[lane] + group) = make_uint4(words[0], words[1], words[2], words[3]);
    }
}

__device__ void add_outliers(const Arguments& args, int64 first_row, int first, int count,
                             const unsigned char (&table)[WARP_COLUMNS][LINE],
                             float (&sums)[FRAGMENTS][TILES][4]) {
    int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
#pragma unroll 1
    for (int group = 0; group < CHUNK && first + group < count; group += GROUP) {
        uint2 x[FRAGMENTS][2];  // rows g and g + 8
#pragma unroll
        for (int fragment = 0; fragment < FRAGMENTS; fragment++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int64 row = min(first_row + fragment * 16 + half * 8 + g, args.num_rows - 1);
                const Bits* outliers = args.outliers + row * args.depth + first + group + 4 * t;
                x[fragment][half] = __ldg(reinterpret_cast<const uint2*>(outliers));
            }
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            uint32 b0, b1;
            widen_int8<ACTIVATION>(*reinterpret_cast<const uint32*>(table[tile * 8 + g] + group + 4 * t), b0, b1);
#pragma unroll
            for (int fragment = 0; fragment < FRAGMENTS; fragment++)
                multiply<ACTIVATION>(sums[fragment][tile], x[fragment][0].x, x[fragment][1].x, x[fragment][0].y,
                                     x[fragment][1].y, b0, b1);
        }
    }
}

extern "C" __global__ void __launch_bounds__(WARPS * WARP) int8_sums(const __grid_constant__ Arguments args) {
    __shared__ __align__(16) unsigned char tables[WARPS][WARP_COLUMNS][LINE];
    auto& table = tables[threadIdx.x / WARP];
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    const int64 first_column = (int64(blockIdx.x) * WARPS + threadIdx.x / WARP) * WARP_COLUMNS;
    if (first_column >= args.num_columns) return;  // there are no barriers of the thread block
    const int64 column = first_column + t * OCTET;
    const bool inside = column < args.num_columns;
    float factors[OCTET] = {}, biases[OCTET] = {};
    if (inside) {
#pragma unroll
        for (int i = 0; i < OCTET; i++) factors[i] = __ldg(args.scb + column + i) * INVERSE_127;
        if (args.bias) {
#pragma unroll
            for (int i = 0; i < OCTET; i++) biases[i] = ACTIVATION::widen(__ldg(args.bias + column + i));
        }
    }
    const int count = args.list ? __ldg(args.list) : 0;
    const int64 begin = int64(blockIdx.y) * args.block_rows, end = min(begin + args.block_rows, args.num_rows);
    for (int64 first_row = begin; first_row < end; first_row += TILE_ROWS) {
        float sums[FRAGMENTS][TILES][4];
#pragma unroll
        for (int fragment = 0; fragment < FRAGMENTS; fragment++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int64 row = first_row + fragment * 16 + half * 8 + g;
                int4 integers[2] = {};
                float scale = 0.0f;
                if (row < end && inside) {
                    const int* place = args.sums + row * args.num_columns + column;
                    const int4* source = reinterpret_cast<const int4*>(place);
                    integers[0] = __ldcs(source);
                    integers[1] = __ldcs(source + 1);
                    scale = __ldg(args.absmax + row) * INVERSE_127;
                }
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
                    const int4& four = integers[tile / 2];
                    sums[fragment][tile][2 * half] = float(tile % 2 ? four.z : four.x) * scale;
                    sums[fragment][tile][2 * half + 1] = float(tile % 2 ? four.w : four.y) * scale;
                }
            }
        for (int first = 0; first < count; first += CHUNK) {
            if (count > CHUNK || first_row == begin) {
                __syncwarp();  // the chunk before was read
                fetch_codes(args, first_column, first, count, table);
                __syncwarp();
            }
            add_outliers(args, first_row, first, count, table, sums);
        }
#pragma unroll
        for (int fragment = 0; fragment < FRAGMENTS; fragment++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                int64 row = first_row + fragment * 16 + half * 8 + g;
                if (row >= end || !inside) continue;
                uint4* out = reinterpret_cast<uint4*>(args.out + row * args.out_stride + column);
                Octet<ACTIVATION> octet;
                float values[OCTET];
#if ADDED
                octet.words[0] = *out;
                octet.widen(values);
#else
#pragma unroll
                for (int i = 0; i < OCTET; i++) values[i] = 0.0f;
#endif
#pragma unroll
                for (int i = 0; i < OCTET; i++)
                    values[i] += sums[fragment][i / 2][2 * half + i % 2] * factors[i] + biases[i];
                octet.narrow(values);
                *out = octet.words[0];
            }
    }
}

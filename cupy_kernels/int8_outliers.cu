// Which columns of the activations hold an outlier, as a list that stays on the device.
//
// Defines: SOURCE (Bf16, F16).
//
// Each thread looks at eight columns of a few rows and marks those where one of |x| is not below the threshold
// (NaN is not). The thread block that arrives last makes a list of the marks, in the order of the columns.
// Bytes moved per value: 2 read.
#include "source_dtypes.cuh"

constexpr int THREADS = 256;
constexpr int BLOCK_ROWS = 16;
constexpr int MARKS = 16;  // that a thread reads at a time

struct Scan {
    int warps[THREADS / WARP];
    int arrived;
};

// How many columns the threads before this one count, and how many all do.
__device__ int count_before(int own, Scan& scan, int& all) {
    int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, sum = own;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        int other = __shfl_up_sync(FULL_WARP, sum, step);
        if (lane >= step) sum += other;
    }
    __syncthreads();  // the sums of the round before are read
    if (lane == WARP - 1) scan.warps[warp] = sum;
    __syncthreads();
    int before = sum - own;
    all = 0;
#pragma unroll
    for (int i = 0; i < THREADS / WARP; i++) {
        if (i < warp) before += scan.warps[i];
        all += scan.warps[i];
    }
    return before;
}

__device__ void make_list(const unsigned char* marks, int columns, int* list, Scan& scan) {
    int count = 0;
    for (int first = 0; first < columns; first += THREADS * MARKS) {
        int own_first = first + threadIdx.x * MARKS;
        uint4 words = make_uint4(0, 0, 0, 0);
        if (own_first < columns) words = __ldcg(reinterpret_cast<const uint4*>(marks + own_first));
        int own = __popc(words.x) + __popc(words.y) + __popc(words.z) + __popc(words.w);
        int all, at = count + count_before(own, scan, all);
        if (own) {
#pragma unroll
            for (int i = 0; i < MARKS; i++) {
                uint32 word = i < 4 ? words.x : i < 8 ? words.y : i < 12 ? words.z : words.w;
                if (word >> (8 * (i % 4)) & 1) list[1 + at++] = own_first + i;
            }
        }
        count += all;
    }
    if (threadIdx.x == 0) list[0] = count;
}

// x: (num_rows, columns), columns a multiple of 16. marks: (columns,) bytes of 0. Both are 16-byte aligned.
// arrived: 0. list: (1 + columns,), how many columns, and which.
extern "C" __global__ void __launch_bounds__(THREADS) int8_outliers(const SOURCE::Bits* __restrict__ x,
                                                                    int64 num_rows, int64 columns,
                                                                    float threshold, unsigned char* marks,
                                                                    uint32* arrived, int* list) {
    __shared__ Scan scan;
    int64 column = (int64(blockIdx.x) * THREADS + threadIdx.x) * OCTET;
    int64 row = int64(blockIdx.y) * BLOCK_ROWS;
    if (column < columns) {
        uint32 found = 0;
#pragma unroll 8
        for (int i = 0; i < BLOCK_ROWS; i++) {
            Octet<SOURCE> octet;
            // Read again soon, when it is rounded. Beyond the last row the last one is looked at twice.
            int64 own_row = row + i < num_rows ? row + i : num_rows - 1;
            octet.words[0] = *reinterpret_cast<const uint4*>(x + own_row * columns + column);
            float values[OCTET];
            octet.widen(values);
#pragma unroll
            for (int j = 0; j < OCTET; j++) found |= uint32(!(fabsf(values[j]) < threshold)) << j;
        }
        for (int j = 0; found; j++, found >>= 1)
            if (found & 1) marks[column + j] = 1;
    }
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) scan.arrived = atomicAdd(arrived, 1);
    __syncthreads();
    if (scan.arrived + 1 < int(gridDim.x * gridDim.y)) return;
    __threadfence();
    make_list(marks, int(columns), list, scan);
}

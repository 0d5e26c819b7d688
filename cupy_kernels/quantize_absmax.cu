// Double quantization of absmax; the rules are in qtool/formats/double_quant.py.
//
// The mean of all absmax must be known before the first one can be quantized. One cooperative launch
// does both: warps add up groups of 256, all blocks meet, and each block then adds up the groups'
// sums for itself, in the prescribed order, rather than wait for one that does it.
//
// The code of a scaled value: its upper 15 bits are its slot. No slot has more than one threshold, so
// one look at a table and one comparison tell.
#include "code_tables.cuh"
#include "reciprocal.cuh"

constexpr int THREADS = 1024;
constexpr int WARPS = THREADS / WARP;
constexpr int SUM_PER_LANE = SUM_GROUP / WARP;
constexpr int LAST_GROUPS = 64;  // of sums that are left for every block to add up
static_assert(NESTED_BLOCKSIZE == WARP * OCTET);

__device__ constexpr int64 ceil_div(int64 a, int64 b) { return (a + b - 1) / b; }

// The sum of a group in lane 0: s[i] += s[i + 128], then 64, 32 ... 1. Lane j brings the values j,
// j + 32, j + 64 ...
template <class T>
__device__ double halving_sum(const T (&values)[SUM_PER_LANE]) {
    double own[SUM_PER_LANE];
#pragma unroll
    for (int i = 0; i < SUM_PER_LANE; i++) own[i] = double(values[i]);
#pragma unroll
    for (int half = SUM_PER_LANE / 2; half; half /= 2)
#pragma unroll
        for (int i = 0; i < half; i++) own[i] += own[i + half];
    double sum = own[0];
#pragma unroll
    for (int half = WARP / 2; half; half /= 2) sum += __shfl_down_sync(FULL_WARP, sum, half);
    return sum;
}

// What lane j brings to the sum of a group; what is missing is zero.
template <class T>
__device__ void load_group(const T* values, int64 group, int64 count, T (&own)[SUM_PER_LANE]) {
    int64 first = group * SUM_GROUP + threadIdx.x % WARP;
    bool whole = (group + 1) * SUM_GROUP <= count;
#pragma unroll
    for (int i = 0; i < SUM_PER_LANE; i++)  // other blocks wrote sums: not from the first-level cache
        own[i] = whole || first + i * WARP < count ? __ldcg(values + first + i * WARP) : T(0);
}

// Blocks of the launch meet in two steps, between which they can do something else. `arrivals` is zero
// before the first launch. All steps of a meeting together add 2^31: the highest bit flips when the
// last block has come, and the next meeting goes on from there.
__device__ uint32 arrive(uint32* arrivals) {
    uint32 before = 0;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        before = atomicAdd(arrivals, blockIdx.x == 0 ? 0x80000000u - (gridDim.x - 1) : 1u);
    }
    return before;
}

__device__ void wait_for_all(uint32* arrivals, uint32 before) {
    if (threadIdx.x == 0) {
        while (((before ^ *const_cast<volatile uint32*>(arrivals)) >> 31) == 0) {
        }
        __threadfence();
    }
    __syncthreads();
}

// One level of sums, by all blocks: values (count,) -> sums (ceil(count/256),). A warp loads BATCH
// groups at once.
template <int BATCH, class T>
__device__ void add_up_groups(const T* values, int64 count, double* sums) {
    int64 num_groups = ceil_div(count, SUM_GROUP);
    int64 stride = int64(gridDim.x) * WARPS;
    int64 group = int64(blockIdx.x) * WARPS + threadIdx.x / WARP;
    for (; group < num_groups; group += BATCH * stride) {
        T own[BATCH][SUM_PER_LANE];
#pragma unroll
        for (int b = 0; b < BATCH; b++) load_group(values, group + b * stride, count, own[b]);
#pragma unroll
        for (int b = 0; b < BATCH; b++) {
            double sum = halving_sum(own[b]);
            if (threadIdx.x % WARP == 0 && group + b * stride < num_groups)
                sums[group + b * stride] = sum;
        }
    }
}

// The sum of `sums` (count,), at most LAST_GROUPS groups of them, in thread 0.
__device__ double last_sum(const double* sums, int64 count) {
    __shared__ double of_groups[SUM_GROUP];
    double own[SUM_PER_LANE];
    if (threadIdx.x < SUM_GROUP) of_groups[threadIdx.x] = 0.0;
    __syncthreads();
#pragma unroll
    for (int b = 0; b < LAST_GROUPS / WARPS; b++) {
        int group = threadIdx.x / WARP + b * WARPS;
        load_group(sums, group, count, own);
        double sum = halving_sum(own);
        if (threadIdx.x % WARP == 0) of_groups[group] = sum;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < SUM_PER_LANE; i++) own[i] = of_groups[threadIdx.x % WARP + i * WARP];
    return halving_sum(own);
}

// The mean, in every thread, of the `num_sums` groups' sums of `count` values.
__device__ float mean(double* sums, int64 num_sums, int64 count, uint32* arrivals) {
    __shared__ float result;
    while (num_sums > LAST_GROUPS * SUM_GROUP) {
        add_up_groups<1>(sums, num_sums, sums + num_sums);
        wait_for_all(arrivals, arrive(arrivals));
        sums += num_sums;
        num_sums = ceil_div(num_sums, SUM_GROUP);
    }
    double sum = last_sum(sums, num_sums);
    if (threadIdx.x == 0) {
        float mean = float(sum / double(count));
        result = fabsf(mean) < SMALLEST_NORMAL ? copysignf(0.0f, mean) : mean;
    }
    __syncthreads();
    return result;
}

__device__ uint32 dynamic_code(float v, const DecisionBin* slots) {
    uint32 bits = __float_as_uint(v);
    int slot = int((bits & 0x7fffffffu) >> DYNAMIC_SLOT_SHIFT) - DYNAMIC_FIRST_SLOT;
    slot = min(max(slot, 0), DYNAMIC_SLOTS - 1);  // NaN takes the last one: code 0
    DecisionBin bin = slots[slot + (bits >> 31) * DYNAMIC_SLOTS];
    return bin.code + (v > bin.threshold);
}

// A block of 256 absmax, of which a lane has eight.
struct Block {
    Octet<F32> octet;
    int64 first;
    bool whole;

    __device__ void load(const float* absmax, int64 block, int64 count) {
        first = block * NESTED_BLOCKSIZE + threadIdx.x % WARP * OCTET;
        whole = first + OCTET <= count;
        const uint32* source = reinterpret_cast<const uint32*>(absmax) + first;
        if (whole) octet.load(source);
        else octet.load_partly(source, count - first);
    }

    __device__ void quantize(int64 count, float offset, const DecisionBin* slots, uint8* codes,
                             float* nested_absmax) const {
        float v[OCTET];
        octet.widen(v);
        float largest = LOWEST;
#pragma unroll
        for (int i = 0; i < OCTET; i++) {
            v[i] = whole || first + i < count ? v[i] - offset : 0.0f;
            largest = fmaxf(largest, fabsf(v[i]));
        }
#pragma unroll
        for (int step = WARP / 2; step; step /= 2)
            largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, step));
        if (threadIdx.x % WARP == 0) nested_absmax[first / NESTED_BLOCKSIZE] = largest;

        float inverse = reciprocal(largest);
        uint32 words[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < OCTET; i++)
            words[i / 4] |= dynamic_code(v[i] * inverse, slots) << (8 * (i % 4));
        if (whole) {
            *reinterpret_cast<uint2*>(codes + first) = make_uint2(words[0], words[1]);
        } else {
#pragma unroll
            for (int i = 0; i < OCTET; i++)
                if (first + i < count) codes[first + i] = uint8(words[i / 4] >> (8 * (i % 4)));
        }
    }
};

// absmax: (count,) with count > 0; codes: uint8 (count,), nested_absmax: (ceil(count/256),), offset:
// (1,). sums: scratch, see quantize_absmax.py. Every block of the launch must be resident.
extern "C" __global__ void __launch_bounds__(THREADS, 1) quantize_absmax(
    const float* __restrict__ absmax, int64 count, double* sums, uint32* arrivals,
    uint8* __restrict__ codes, float* __restrict__ nested_absmax, float* offset_out) {
    add_up_groups<2>(absmax, count, sums);
    uint32 before = arrive(arrivals);

    // While the others come: the table, and the first block to quantize.
    __shared__ DecisionBin slots[2 * DYNAMIC_SLOTS];
    for (int i = threadIdx.x; i < 2 * DYNAMIC_SLOTS; i += THREADS) slots[i] = dynamic_bins[i];
    int64 num_blocks = ceil_div(count, NESTED_BLOCKSIZE);
    int64 stride = int64(gridDim.x) * WARPS;
    int64 index = int64(blockIdx.x) * WARPS + threadIdx.x / WARP;
    Block next;
    next.load(absmax, index, count);

    wait_for_all(arrivals, before);
    float offset = mean(sums, ceil_div(count, SUM_GROUP), count, arrivals);
    if (blockIdx.x == 0 && threadIdx.x == 0) *offset_out = offset;
    while (index < num_blocks) {
        Block block = next;
        index += stride;
        next.load(absmax, index, count);
        block.quantize(count, offset, slots, codes, nested_absmax);
    }
}

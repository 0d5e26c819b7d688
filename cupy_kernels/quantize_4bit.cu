// NF4 and FP4 quantization; the rules are in qtool/formats/four_bit.py.
//
// Defines: SOURCE (Bf16, F16, F32), QUANT_TYPE (Nf4, Fp4), BLOCKSIZE (32 ... 4096).
//
// A warp reads chunks of 256 consecutive values, a lane eight of them. Blocks are a power of two of
// values, so a block is a few neighbouring lanes, or one or more whole chunks: absmax is a maximum
// over lanes, or over registers and lanes, and no warp waits for another.
//
// The code of a scaled value v is found without comparing it to 15 thresholds: the range of v is cut
// into bins so narrow that each contains one threshold at most, and lane i of the warp holds bin i.
// One shuffle fetches the bin's threshold, one the code below it. NaN lands in the last bin, whose
// code is 0.
#include "code_tables.cuh"
#include "reciprocal.cuh"

constexpr int THREADS = 256;
constexpr int CHUNK = WARP * OCTET;
constexpr int LANES_PER_BLOCK = BLOCKSIZE < CHUNK ? BLOCKSIZE / OCTET : WARP;
constexpr int CHUNKS_PER_BLOCK = BLOCKSIZE < CHUNK ? 1 : BLOCKSIZE / CHUNK;
constexpr int CHUNKS = CHUNKS_PER_BLOCK > 4 ? CHUNKS_PER_BLOCK : 4;  // that a warp loads at once
constexpr int WARP_TILE = CHUNKS * CHUNK;
constexpr int BLOCKS_PER_CHUNK = WARP / LANES_PER_BLOCK;
constexpr int GROUPS = CHUNKS / CHUNKS_PER_BLOCK;  // 4, or 2 or 1 of several chunks each

// Threads that must fit on a multiprocessor, which bounds their registers: as many as do without
// spilling any.
#if __CUDA_ARCH__ >= 800 && __CUDA_ARCH__ < 1000
constexpr int USUAL_THREADS = 1536;
constexpr int LARGE_BLOCK_THREADS = 2 * THREADS;
#else
constexpr int USUAL_THREADS = 1024;
constexpr int LARGE_BLOCK_THREADS = THREADS;
#endif
constexpr int RESIDENT_THREADS =
    sizeof(SOURCE::Bits) == 4 ? THREADS : CHUNKS > 4 ? LARGE_BLOCK_THREADS : USUAL_THREADS;

// bin = round(v * SCALE) + ZERO_BIN is left in the lowest five bits of the sum with this.
template <class Q>
__device__ constexpr float bin_magic() { return 8388608.0f + Q::ZERO_BIN; }

struct Nf4 {
    static constexpr float SCALE = NF4_BIN_SCALE;
    static constexpr int ZERO_BIN = NF4_ZERO_BIN;
    __device__ static DecisionBin bin(int i) { return nf4_bins[i]; }
    __device__ static float scaled(float value, float inverse) { return value * inverse; }
    __device__ static float decided(float v) { return v; }
    __device__ static uint32 finish(uint32 codes, uint32) { return codes; }
};

// The magnitude is decided like NF4, by rank; the sign is added.
struct Fp4 {
    static constexpr float SCALE = FP4_BIN_SCALE;
    static constexpr int ZERO_BIN = FP4_ZERO_BIN;
    __device__ static DecisionBin bin(int i) { return fp4_bins[i]; }
    // The sign needs the last bit of the smallest values; adding zero flushes a subnormal one.
    __device__ static float scaled(float value, float inverse) {
        return rounded_product(SOURCE::IS_FLOAT16 ? value : value + 0.0f, inverse);
    }
    __device__ static float decided(float v) { return fabsf(v); }

    __device__ static uint32 finish(uint32 ranks, uint32 signs) {
        // Ranks 0 ... 7 have the codes 0 1 6 7 4 5 2 3: bit 2 is flipped where bit 1 is set.
        return (ranks ^ (ranks & 0x22222222u) << 1) + (signs << 3);
    }
};

// Eight codes, the first in the highest four bits.
template <class Q>
__device__ uint32 encode(const float (&values)[OCTET], float inverse, DecisionBin own_bin) {
    uint32 codes = 0;
    uint32 signs = 0;
#pragma unroll
    for (int i = 0; i < OCTET; i++) {
        float v = Q::scaled(values[i], inverse);
        float decided = Q::decided(v);
        int bin = __float_as_int(__fmaf_rn(decided, Q::SCALE, bin_magic<Q>()));
        float threshold = __shfl_sync(FULL_WARP, own_bin.threshold, bin);
        uint32 code = __shfl_sync(FULL_WARP, own_bin.code, bin);
        // The sign bit of the difference: is v above the threshold?
        codes = (codes << 4) + (code + (__float_as_uint(threshold - decided) >> 31));
        signs = (signs << 4) + (__float_as_uint(v + 0.0f) >> 31);  // -0 + 0 is +0
    }
    return Q::finish(codes, signs);
}

// The block of the tile whose absmax a lane ends up with, to store it and to invert it.
struct OwnBlock {
    float absmax;
    int index;
    bool stores;  // several lanes may own the same

    // `largest`: the lane's maxima, per chunk, or per block of several chunks.
    __device__ OwnBlock(float (&largest)[GROUPS], int lane) {
        if constexpr (CHUNKS_PER_BLOCK == 1) {
            // Two exchanges, in which a lane hands over what it does not keep, leave it with chunk
            // lane % 4 alone: fewer shuffles than a reduction of each chunk.
            bool upper = lane & 2, odd = lane & 1;
            float first = exchange(largest[0], largest[2], upper, 2);
            float second = exchange(largest[1], largest[3], upper, 2);
            absmax = exchange(first, second, odd, 1);
            reduce(absmax, 4, LANES_PER_BLOCK / 2);
            index = lane % 4 * BLOCKS_PER_CHUNK + lane / LANES_PER_BLOCK;
            stores = lane % LANES_PER_BLOCK < 4;
        } else {
#pragma unroll
            for (int g = 0; g < GROUPS; g++) reduce(largest[g], 1, WARP / 2);
            absmax = lane == 0 ? largest[0] : largest[GROUPS - 1];
            index = lane;
            stores = lane < GROUPS;
        }
    }

    // The lane that owns the block of a lane's values in chunk c.
    __device__ static int owner(int c, int lane) {
        return CHUNKS_PER_BLOCK == 1 ? lane / LANES_PER_BLOCK * LANES_PER_BLOCK + c
                                     : c / CHUNKS_PER_BLOCK;
    }

private:
    __device__ static float exchange(float a, float b, bool keeps_b, int step) {
        float received = __shfl_xor_sync(FULL_WARP, keeps_b ? a : b, step);
        return fmaxf(keeps_b ? b : a, received);
    }

    __device__ static void reduce(float& value, int first_step, int last_step) {
#pragma unroll
        for (int step = first_step; step <= last_step; step *= 2)
            value = fmaxf(value, __shfl_xor_sync(FULL_WARP, value, step));
    }
};

// packed: uint8 (ceil(n/2),), absmax: float32 (ceil(n/BLOCKSIZE),); bad_count is increased by the
// number of values that are not finite.
extern "C" __global__ void __launch_bounds__(THREADS, RESIDENT_THREADS / THREADS) quantize_4bit(
    const SOURCE::Bits* __restrict__ source, int64 num_values, uint8* __restrict__ packed,
    float* __restrict__ absmax, uint64* bad_count) {
    int lane = threadIdx.x % WARP;
    int64 warp = int64(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;
    int64 tile = warp * WARP_TILE;
    DecisionBin own_bin = QUANT_TYPE::bin(lane);

    Octet<SOURCE> octets[CHUNKS];
    bool whole = tile + WARP_TILE <= num_values;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        int64 first = tile + c * CHUNK + lane * OCTET;
        if (whole) octets[c].load(source + first);
        else octets[c].load_partly(source + first, num_values - first);
    }

    float largest[GROUPS];
    float nan_if_bad = 0.0f;
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        largest[g] = LOWEST;
#pragma unroll
        for (int c = g * CHUNKS_PER_BLOCK; c < (g + 1) * CHUNKS_PER_BLOCK; c++) {
            float values[OCTET];
            octets[c].widen(values);
#pragma unroll
            for (int i = 0; i < OCTET; i++) {
                largest[g] = fmaxf(largest[g], fabsf(values[i]));  // NaN does not count
                nan_if_bad = __fmaf_rn(values[i], 0.0f, nan_if_bad);
            }
        }
    }
    OwnBlock own(largest, lane);
    int64 block = tile / BLOCKSIZE + own.index;
    if (own.stores && block * BLOCKSIZE < num_values) absmax[block] = own.absmax;
    float own_inverse = reciprocal(own.absmax);

#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        float inverse = __shfl_sync(FULL_WARP, own_inverse, OwnBlock::owner(c, lane));
        float values[OCTET];
        octets[c].widen(values);
        uint32 bytes = __byte_perm(encode<QUANT_TYPE>(values, inverse, own_bin), 0, 0x0123);
        int64 first = tile + c * CHUNK + lane * OCTET;
        if (whole) {
            __stcs(reinterpret_cast<uint32*>(packed + first / 2), bytes);
        } else {
#pragma unroll
            for (int i = 0; i < OCTET / 2; i++)
                if (first + 2 * i < num_values) packed[first / 2 + i] = uint8(bytes >> (8 * i));
        }
    }
    if (nan_if_bad != nan_if_bad) {
        uint64 count = 0;
#pragma unroll 1
        for (int c = 0; c < CHUNKS; c++) {
            int64 first = tile + c * CHUNK + lane * OCTET;
#pragma unroll 1
            for (int i = 0; i < OCTET && first + i < num_values; i++)
                count += !(fabsf(SOURCE::widen(source[first + i])) <= LARGEST_FLOAT);
        }
        atomicAdd(bad_count, count);
    }
}

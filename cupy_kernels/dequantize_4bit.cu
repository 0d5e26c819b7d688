// NF4 and FP4 back to floats; the rules are in qtool/formats/four_bit.py and double_quant.py.
//
// Defines: TARGET (Bf16, F16, F32), QUANT_TYPE (nf4, fp4), NESTED (0, 1: absmax itself in 8 bit).
//
// A lane turns four bytes into eight values. The code table lies in the warp's registers, one entry
// per lane, and is read by shuffles, whose index is taken modulo 32: no masks.
#include "source_dtypes.cuh"
#include "code_tables.cuh"

constexpr int CHUNK = WARP * OCTET;
constexpr int CHUNKS = 4;  // that a warp loads at once
constexpr int WARP_TILE = CHUNKS * CHUNK;

#define CONCATENATE_(a, b) a##b
#define CONCATENATE(a, b) CONCATENATE_(a, b)
#define CODE_TABLE CONCATENATE(QUANT_TYPE, _code)

struct Arguments {
    const uint8* packed;         // (ceil(n/2),)
    const float* absmax;         // float32 (m,), unless nested
    const uint8* absmax_codes;   // (m,)
    const float* nested_absmax;  // (ceil(m/256),)
    const float* nested_code;    // (256,), the dynamic map
    const float* nested_offset;  // (), the mean that was taken off
    TARGET::Bits* target;        // (n,)
    int64 num_values;            // n
    int blocksize_log2;
};


// absmax of a block. Nothing writes to what is read here.
__device__ inline float scale_of(const Arguments& args, int64 block, float offset) {
#if NESTED
    float entry = __ldg(args.nested_code + __ldg(args.absmax_codes + block));
    return flushed_product(entry, __ldg(args.nested_absmax + uint64(block) / NESTED_BLOCKSIZE)) + offset;
#else
    return __ldg(args.absmax + block);
#endif
}

extern "C" __global__ void __launch_bounds__(256) dequantize_4bit(const __grid_constant__ Arguments args) {
    const uint8* __restrict__ packed = args.packed;
    TARGET::Bits* __restrict__ target = args.target;
    const int64 num_values = args.num_values;
    int lane = threadIdx.x % WARP;
    int64 warp = int64(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;
    int64 tile = warp * WARP_TILE + lane * OCTET;
    if (warp * WARP_TILE >= num_values) return;
    float own_entry = CODE_TABLE[lane % 16];
    const float offset = NESTED ? __ldg(args.nested_offset) : 0.0f;

    uint32 codes[CHUNKS];
    float scale[CHUNKS];
    bool whole = warp * WARP_TILE + WARP_TILE <= num_values;
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        int64 first = tile + c * CHUNK;
        codes[c] = 0;
        scale[c] = 0.0f;
        if (whole) {
            codes[c] = __ldcs(reinterpret_cast<const uint32*>(packed + first / 2));
        } else {
#pragma unroll
            for (int i = 0; i < OCTET / 2; i++)
                if (first + 2 * i < num_values) codes[c] |= uint32(packed[first / 2 + i]) << (8 * i);
        }
        if (whole || first < num_values) scale[c] = scale_of(args, first >> args.blocksize_log2, offset);
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        float values[OCTET];
#pragma unroll
        for (int i = 0; i < OCTET; i++) {
            // The first code of a byte is the upper one.
            float entry = __shfl_sync(FULL_WARP, own_entry, codes[c] >> (4 * (i ^ 1)));
            values[i] = flushed_product(entry, scale[c]);
        }
        Octet<TARGET> octet;
        octet.narrow(values);
        int64 first = tile + c * CHUNK;
        if (whole) octet.store(target + first);
        else octet.store_partly(target + first, num_values - first);
    }
}

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

// What the scale of a block is read from.
struct Scales {
    const float* absmax;         // float32 (m,), unless nested
    const uint8* absmax_codes;   // uint8 (m,)
    const float* nested_absmax;  // float32 (ceil(m/256),)
    const float* nested_code;    // float32 (256,), the dynamic map
    float offset;                // the mean that was taken off

    __device__ float of(int64 block) const {
#if NESTED
        float nested = nested_absmax[uint64(block) / NESTED_BLOCKSIZE];
        return flushed_product(nested_code[absmax_codes[block]], nested) + offset;
#else
        return absmax[block];
#endif
    }
};

// packed: uint8 (ceil(n/2),), target: (n,). A block has 2^blocksize_log2 values.
extern "C" __global__ void __launch_bounds__(256) dequantize_4bit(
    const uint8* __restrict__ packed, int64 num_values, int blocksize_log2,
    const float* __restrict__ absmax, const uint8* __restrict__ absmax_codes,
    const float* __restrict__ nested_absmax, const float* __restrict__ nested_code,
    const float* __restrict__ nested_offset,
    TARGET::Bits* __restrict__ target) {
    int lane = threadIdx.x % WARP;
    int64 warp = int64(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;
    int64 tile = warp * WARP_TILE + lane * OCTET;
    if (warp * WARP_TILE >= num_values) return;
    float own_entry = CODE_TABLE[lane % 16];
    Scales scales{absmax, absmax_codes, nested_absmax, nested_code, NESTED ? *nested_offset : 0.0f};

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
        if (whole || first < num_values) scale[c] = scales.of(first >> blocksize_log2);
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

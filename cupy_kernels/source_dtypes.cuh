// The floating-point dtypes of weights, eight values at a time.
//
// Compiled with --ftz=true: float32 subnormals are zero in every operation, as in qtool.formats. But
// the hardware takes a product for subnormal before it rounds it, which the products below mend.
// No CUDA header is needed, so that a machine with a driver and NVRTC alone compiles this.
#pragma once

using uint8 = unsigned char;
using uint16 = unsigned short;
using uint32 = unsigned int;
using uint64 = unsigned long long;
using int64 = long long;

constexpr int OCTET = 8;           // values that a lane handles at a time: 16 bytes of 16-bit ones
constexpr uint32 FULL_WARP = 0xffffffffu;
constexpr int WARP = 32;

constexpr float LARGEST_FLOAT = 3.402823466e38f;
constexpr float LOWEST = -LARGEST_FLOAT;  // absmax of nothing but NaN
constexpr float SMALLEST_NORMAL = 1.175494351e-38f;

// a * b rounded, subnormal results too; what reads it next takes those for zero.
__device__ inline float rounded_product(float a, float b) {
    float product;
    asm("mul.rn.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
    return product;
}

// a * b rounded, and then zero if it is subnormal.
__device__ inline float flushed_product(float a, float b) {
    float flushed;
    asm("mul.rn.ftz.f32 %0, %1, 0f3F800000;" : "=f"(flushed) : "f"(rounded_product(a, b)));
    return flushed;
}

struct Bf16 {
    using Bits = uint16;
    static constexpr bool IS_FLOAT16 = false;
    static constexpr Bits NAN_BITS = 0x7fff;

    __device__ static float widen(Bits bits) { return __uint_as_float(uint32(bits) << 16); }

    // The two values of a 32-bit word, the one at the lower address first.
    __device__ static void widen_pair(uint32 word, float& first, float& second) {
        first = __uint_as_float(word << 16);
        second = __uint_as_float(word & 0xffff0000u);
    }

    __device__ static uint32 narrow_pair(float first, float second) {
#if __CUDA_ARCH__ >= 800
        uint32 word;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
        return word;
#else
        return narrow(first) | uint32(narrow(second)) << 16;
#endif
    }

    __device__ static Bits narrow(float value) {
#if __CUDA_ARCH__ >= 800
        return Bits(narrow_pair(value, 0.0f));
#else
        uint32 bits = __float_as_uint(value);
        uint32 rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
        return value == value ? Bits(rounded) : NAN_BITS;
#endif
    }
};

struct F16 {
    using Bits = uint16;
    static constexpr bool IS_FLOAT16 = true;

    __device__ static float widen(Bits bits) {
        float value;
        asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
        return value;
    }

    __device__ static Bits narrow(float value) {
        Bits bits;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
        return bits;
    }

    __device__ static void widen_pair(uint32 word, float& first, float& second) {
        first = widen(Bits(word));
        second = widen(Bits(word >> 16));
    }

    __device__ static uint32 narrow_pair(float first, float second) {
        return narrow(first) | uint32(narrow(second)) << 16;
    }
};

struct F32 {
    using Bits = uint32;
    static constexpr bool IS_FLOAT16 = false;

    __device__ static float widen(Bits bits) { return __uint_as_float(bits); }
    __device__ static Bits narrow(float value) { return __float_as_uint(value); }
};

// Eight consecutive values of T as they lie in memory, in one or two 16-byte words.
template <class T>
struct Octet {
    static constexpr int WORDS = sizeof(typename T::Bits) / 2;
    uint4 words[WORDS];

    // `source` is 16-byte aligned; the data is not read again.
    __device__ void load(const typename T::Bits* source) {
#pragma unroll
        for (int i = 0; i < WORDS; i++) words[i] = __ldcs(reinterpret_cast<const uint4*>(source) + i);
    }

    // Fewer than eight values; what is missing is zero.
    __device__ void load_partly(const typename T::Bits* source, int64 count) {
        typename T::Bits bits[OCTET];
#pragma unroll
        for (int i = 0; i < OCTET; i++) bits[i] = i < count ? source[i] : typename T::Bits(0);
#pragma unroll
        for (int i = 0; i < WORDS; i++) {
            uint32 lane_words[4];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if constexpr (WORDS == 1) {
                    lane_words[j] = bits[2 * j] | uint32(bits[2 * j + 1]) << 16;
                } else {
                    lane_words[j] = bits[4 * i + j];
                }
            }
            words[i] = make_uint4(lane_words[0], lane_words[1], lane_words[2], lane_words[3]);
        }
    }

    __device__ void store(typename T::Bits* target) const {
#pragma unroll
        for (int i = 0; i < WORDS; i++) __stcs(reinterpret_cast<uint4*>(target) + i, words[i]);
    }

    __device__ void store_partly(typename T::Bits* target, int64 count) const {
#pragma unroll
        for (int i = 0; i < OCTET; i++)
            if (i < count) target[i] = bits(i);
    }

    __device__ void widen(float (&values)[OCTET]) const {
#pragma unroll
        for (int i = 0; i < OCTET; i += 2) {
            if constexpr (WORDS == 1) {
                T::widen_pair(word(i / 2), values[i], values[i + 1]);
            } else {
                values[i] = __uint_as_float(word(i));
                values[i + 1] = __uint_as_float(word(i + 1));
            }
        }
    }

    __device__ void narrow(const float (&values)[OCTET]) {
        uint32 packed[4 * WORDS];
#pragma unroll
        for (int i = 0; i < 4 * WORDS; i++) {
            if constexpr (WORDS == 1) {
                packed[i] = T::narrow_pair(values[2 * i], values[2 * i + 1]);
            } else {
                packed[i] = __float_as_uint(values[i]);
            }
        }
#pragma unroll
        for (int i = 0; i < WORDS; i++)
            words[i] = make_uint4(packed[4 * i], packed[4 * i + 1], packed[4 * i + 2], packed[4 * i + 3]);
    }

private:
    __device__ uint32 word(int i) const {
        const uint4& four = words[i / 4];
        return i % 4 == 0 ? four.x : i % 4 == 1 ? four.y : i % 4 == 2 ? four.z : four.w;
    }

    __device__ typename T::Bits bits(int i) const {
        if constexpr (WORDS == 1) return typename T::Bits(word(i / 2) >> (16 * (i % 2)));
        else return word(i);
    }
};

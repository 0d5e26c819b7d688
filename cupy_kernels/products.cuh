// What the products share: asynchronous copies, tensor core fragments, activations in shared memory.
//
// Before Ampere there are neither asynchronous copies nor bf16 fragments; the launchers refuse it.
#pragma once

// -- order of launches (PDL): a launch may begin while the one before still runs --------------------

// From here on the next launch may begin; it waits itself for what this one writes.
__device__ inline void start_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Until the launch before has ended and what it wrote is visible; and so all before it, as each waits itself before it
// ends.
__device__ inline void wait_for_prerequisites() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Where dynamic shared memory begins if there is no static one: behind what the driver keeps for itself.
// Kernels that count on it check it.
#if __CUDA_ARCH__ >= 900
constexpr uint32 DYNAMIC_SHARED_ADDRESS = 1024;
#else
constexpr uint32 DYNAMIC_SHARED_ADDRESS = 0;
#endif

// -- asynchronous copies ---------------------------------------------------------------------------

// 16 bytes from global to shared memory.
__device__ inline void copy_async(void* target, const void* source) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(
                     uint32(__cvta_generic_to_shared(target))),
                 "l"(source)
                 : "memory");
}

__device__ inline void copy_async_or_zero(void* target, const void* source, bool inside) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(
                     uint32(__cvta_generic_to_shared(target))),
                 "l"(source), "r"(inside ? 16 : 0)
                 : "memory");
}

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int PENDING>
__device__ inline void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// -- fragments -------------------------------------------------------------------------------------

// sums (16 rows, 8 tokens) += a (16 rows, 16 columns) * b (16 columns, 8 tokens).
template <class T>
__device__ inline void multiply(float (&sums)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0,
                                uint32 b1) {
    if constexpr (T::IS_FLOAT16) {
        asm(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    } else {
        asm(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
}

// Four INT8 codes as two pairs of 16-bit values, exactly.
template <class T>
__device__ inline void widen_int8(uint32 codes, uint32& first, uint32& second) {
    codes ^= 0x80808080u;  // 0 to 255, for -128 to 127
    if constexpr (T::IS_FLOAT16) {
        // 0x6400 | u is 1024 + u
        uint32 pairs[2] = {__byte_perm(codes, 0x64646464u, 0x4140), __byte_perm(codes, 0x64646464u, 0x4342)};
        asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(first) : "r"(pairs[0]), "r"(0x64806480u));
        asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(second) : "r"(pairs[1]), "r"(0x64806480u));
    } else {
        // 0x4b000000 | u is 2^23 + u
        float values[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            values[i] = __uint_as_float(__byte_perm(codes, 0x4b000000u, 0x7650 | i)) - 8388736.0f;
        first = T::narrow_pair(values[0], values[1]);
        second = T::narrow_pair(values[2], values[3]);
    }
}

// -- activations -----------------------------------------------------------------------------------
//
// They are read past the first-level cache, which does not see what a launch that still runs writes.

// Columns [first, first + COUNT) of the tokens into shared memory, by all threads of a block. `place(octet,
// token)` is where eight columns go; zeros stand for columns and tokens that are not there. With
// NORM_KIND the RMS norm is taken of them, which needs all columns at once. `scratch` are float32
// (MAX_TOKENS, NUM_WARPS).
template <class T, int MAX_TOKENS, int NUM_WARPS, int NORM_KIND, int ALL_COLUMNS, int COUNT>
struct Activations {
    static constexpr int THREAD_OCTETS = (COUNT / OCTET + NUM_WARPS * WARP - 1) / (NUM_WARPS * WARP);
    // Few enough to stay in registers between the norm and shared memory; else they are read twice.
    static constexpr int HELD = MAX_TOKENS * THREAD_OCTETS <= 8 ? THREAD_OCTETS : 1;
    static constexpr bool ONCE = HELD == THREAD_OCTETS;

    Octet<T> factors[NORM_KIND ? HELD : 1];  // of the norm

    __device__ static int octet_of(int i) { return threadIdx.x + i * NUM_WARPS * WARP; }

    // What does not depend on launches before.
    __device__ void prepare(const typename T::Bits* norm_weight) {
        if constexpr (NORM_KIND != 0 && ONCE) {
#pragma unroll
            for (int i = 0; i < HELD; i++) read_factors(norm_weight, octet_of(i), factors[i]);
        }
    }

    // `meanwhile` is called once; those that stay in registers are on their way then.
    template <class Place, class Meanwhile>
    __device__ void load(const typename T::Bits* x, int64 stride, int num_tokens, int first,
                         const typename T::Bits* norm_weight, float epsilon, float* scratch, Place place,
                         Meanwhile meanwhile) {
        Octet<T> held[MAX_TOKENS][HELD];
        if constexpr (ONCE) {
#pragma unroll
            for (int token = 0; token < MAX_TOKENS; token++)
#pragma unroll
                for (int i = 0; i < HELD; i++)
                    read(x + token * stride, token < num_tokens, first, octet_of(i), held[token][i]);
        }
        meanwhile();
        float scales[MAX_TOKENS];
        if constexpr (NORM_KIND != 0) norm_scales(x, stride, num_tokens, epsilon, scratch, held, scales);
#pragma unroll
        for (int token = 0; token < MAX_TOKENS; token++) {
#pragma unroll (ONCE ? THREAD_OCTETS : 1)
            for (int i = 0; i < THREAD_OCTETS; i++) {
                int octet = octet_of(i);
                if (octet >= COUNT / OCTET) break;
                Octet<T> values = held[token][ONCE ? i : 0], own_factors = factors[NORM_KIND && ONCE ? i : 0];
                if constexpr (!ONCE) {
                    read(x + token * stride, token < num_tokens, first, octet, values);
                    if constexpr (NORM_KIND != 0) read_factors(norm_weight, octet, own_factors);
                }
                if constexpr (NORM_KIND != 0) normalize(values, own_factors, scales[token]);
                *place(octet, token) = values.words[0];
            }
        }
    }

private:
    __device__ static void read(const typename T::Bits* x, bool is_there, int first, int octet,
                                Octet<T>& into) {
        into.words[0] = make_uint4(0, 0, 0, 0);
        if (is_there && octet < COUNT / OCTET && first + octet * OCTET < ALL_COLUMNS)
            into.words[0] = __ldcg(reinterpret_cast<const uint4*>(x + first) + octet);
    }

    __device__ static void read_factors(const typename T::Bits* norm_weight, int octet, Octet<T>& into) {
        into.words[0] = make_uint4(0, 0, 0, 0);
        if (octet * OCTET < ALL_COLUMNS)
            into.words[0] = __ldg(reinterpret_cast<const uint4*>(norm_weight) + octet);
    }

    // 1 / sqrt(mean(x^2) + epsilon) of each token, in all threads.
    __device__ static void norm_scales(const typename T::Bits* x, int64 stride, int num_tokens, float epsilon,
                                       float* scratch, const Octet<T> (&held)[MAX_TOKENS][HELD],
                                       float (&scales)[MAX_TOKENS]) {
#pragma unroll
        for (int token = 0; token < MAX_TOKENS; token++) {
            float sum = 0.0f;
#pragma unroll (ONCE ? THREAD_OCTETS : 1)
            for (int i = 0; i < THREAD_OCTETS; i++) {
                Octet<T> octet = held[token][ONCE ? i : 0];
                if constexpr (!ONCE) read(x + token * stride, token < num_tokens, 0, octet_of(i), octet);
                float values[OCTET];
                octet.widen(values);
#pragma unroll
                for (float value : values) sum = __fmaf_rn(value, value, sum);
            }
#pragma unroll
            for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, step);
            if (threadIdx.x % WARP == 0) scratch[token * NUM_WARPS + threadIdx.x / WARP] = sum;
        }
        __syncthreads();
#pragma unroll
        for (int token = 0; token < MAX_TOKENS; token++) {
            float sum = 0.0f;
#pragma unroll
            for (int i = 0; i < NUM_WARPS; i++) sum += scratch[token * NUM_WARPS + i];
            scales[token] = rsqrtf(sum / ALL_COLUMNS + epsilon);
        }
    }

    __device__ static void normalize(Octet<T>& octet, const Octet<T>& factors, float scale) {
        float values[OCTET], weights[OCTET];
        octet.widen(values);
        factors.widen(weights);
#pragma unroll
        for (int j = 0; j < OCTET; j++) {
            values[j] *= scale;
            // Gemma multiplies in float32 by the weight plus one; others round in between.
            values[j] = NORM_KIND == 2 ? values[j] * (1.0f + weights[j])
                                       : T::widen(T::narrow(values[j])) * weights[j];
        }
        octet.narrow(values);
    }
};

// -- gates -----------------------------------------------------------------------------------------

#define SILU 0
#define GELU_TANH 1
#define GELU 2

#ifndef GATE
#define GATE SILU
#endif

__device__ inline float activate(float x) {
#if GATE == SILU
    return x / (1.0f + expf(-x));
#elif GATE == GELU_TANH
    float inner = 0.7978845608028654f * __fmaf_rn(0.044715f * x * x, x, x);
    return 0.5f * x * (1.0f + tanhf(inner));
#else
    return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
#endif
}

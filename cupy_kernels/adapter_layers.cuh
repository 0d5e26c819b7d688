// What an adapter adds to a linear layer: y += B z, of inner values z that adapter_inner.cu has made.
//
// Part of linear_few.cu, whose ACTIVATION and NUM_WEIGHTS it uses.
#pragma once

struct Adapter {
    const Bits* b;           // (rows, rank)
    int rank;                // a multiple of 8; 0: nothing is added
    int first;               // of its inner values among a token's
};

struct AdaptedArguments {
    Arguments layers;
    Adapter adapters[NUM_WEIGHTS];
    const float* inner;      // float32 (tokens, `inner_stride`)
    int64 inner_stride;
    const int* x_is_there;   // not 0 from when on x may be read; null: when the launch before has ended
};

// B goes to the second-level cache, so that it is near when sums are through; it depends on no launch.
__device__ inline void fetch_ahead(const Adapter& adapter, int row) {
    const char* bytes = reinterpret_cast<const char*>(adapter.b + int64(row) * adapter.rank);
    for (int i = 0; i < adapter.rank * int(sizeof(Bits)); i += 128)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(bytes + i));
}

// The launch before makes the inner values and has seen that x is there; its blocks all run when this launch
// begins, so that nobody waits for who waits.
__device__ inline void wait_for_activations(const int* x_is_there) {
    if (x_is_there == nullptr) {
        wait_for_prerequisites();
        return;
    }
    if (threadIdx.x == 0) {
        int is_there;
        do {
            asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(is_there) : "l"(x_is_there) : "memory");
        } while (is_there == 0);
    }
    __syncthreads();
}

// What is added to row `row`, of a token's inner values.
__device__ inline float adapter_sum(const Adapter& adapter, int row, const float* inner) {
    const uint4* weights = reinterpret_cast<const uint4*>(adapter.b + int64(row) * adapter.rank);
    const float4* values = reinterpret_cast<const float4*>(inner + adapter.first);
    float sum = 0.0f;
#pragma unroll 2
    for (int i = 0; i < adapter.rank / OCTET; i++) {
        Octet<ACTIVATION> octet;
        octet.words[0] = __ldg(weights + i);
        float b[OCTET];
        octet.widen(b);
        float4 first = __ldcg(values + 2 * i), second = __ldcg(values + 2 * i + 1);
        const float z[OCTET] = {first.x, first.y, first.z, first.w, second.x, second.y, second.z, second.w};
#pragma unroll
        for (int j = 0; j < OCTET; j++) sum = __fmaf_rn(b[j], z[j], sum);
    }
    return sum;
}

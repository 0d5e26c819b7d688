// Words of 8 bytes into device memory, as a kernel's argument: such a copy needs no page-locked buffer
// that must outlive it, and a CUDA graph keeps it.
#include "source_dtypes.cuh"

#ifndef MAX_WORDS
#define MAX_WORDS 500
#endif

// words[i] goes to target[i / run * stride + i % run].
struct Arguments {
    uint64* target;
    int run;
    int stride;
    int count;
    uint64 words[MAX_WORDS];
};

extern "C" __global__ void __launch_bounds__(512) store_words(const __grid_constant__ Arguments args) {
    int i = threadIdx.x;
    if (i < args.count) args.target[int64(i / args.run) * args.stride + i % args.run] = args.words[i];
}

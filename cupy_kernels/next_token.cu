// The likeliest token of each sequence, and on to the next step: position and step move on the device.
//
// Defines: LOGITS (Bf16, F16, F32).
//
// Thread block (part, sequence): the largest of every gridDim.x-th tile of the logits. A logit and its
// index make one 64-bit rank, so that the largest rank is the answer whatever the order in which ranks are
// compared. The last block to arrive compares the parts and stores the tokens.
//
// Bytes read: the logits, once.
#include "source_dtypes.cuh"
#include "products.cuh"

constexpr int WARPS = 8;
constexpr int THREADS = WARPS * WARP;
constexpr int TILE = THREADS * OCTET;

struct Arguments {
    const LOGITS::Bits* logits;  // (batch, vocabulary), rows `stride` values apart, a multiple of eight
    int64 stride;
    uint64* parts;               // (batch, blocks along x)
    uint32* arrived;             // (), zero before and after
    int64* ring;                 // (ring_size, batch): row step % ring_size gets the tokens
    int64* next_token;           // (batch,)
    int64* position;             // (), counted up
    int64* step;                 // (), counted up
    int vocabulary, batch, ring_size;
};

// Larger for a larger logit, then for a lower index; NaN is below all numbers.
__device__ inline uint64 rank_of(float logit, int index) {
    uint32 bits = __float_as_uint(logit);
    if (bits == 0x80000000u) bits = 0;  // -0 is 0
    uint32 order = bits >> 31 ? ~bits : bits | 0x80000000u;
    if (logit != logit) order = 0;
    return uint64(order) << 32 | ~uint32(index);
}

__device__ inline uint64 larger(uint64 a, uint64 b) { return a > b ? a : b; }

// The largest rank of a warp, in all its lanes.
__device__ inline uint64 largest_of_warp(uint64 rank) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) rank = larger(rank, __shfl_xor_sync(FULL_WARP, rank, step));
    return rank;
}

__device__ inline uint64 largest_of_tile(const Arguments& args, const LOGITS::Bits* row, int first) {
    Octet<LOGITS> octet;
    if (first + OCTET <= args.vocabulary) {
#pragma unroll
        for (int i = 0; i < Octet<LOGITS>::WORDS; i++)
            octet.words[i] = __ldcg(reinterpret_cast<const uint4*>(row + first) + i);
    } else {
        octet.load_partly(row + first, args.vocabulary - first);
    }
    float logits[OCTET];
    octet.widen(logits);
    uint64 largest = 0;
#pragma unroll
    for (int j = 0; j < OCTET; j++)
        if (first + j < args.vocabulary) largest = larger(largest, rank_of(logits[j], first + j));
    return largest;
}

extern "C" __global__ void __launch_bounds__(THREADS) next_token(const __grid_constant__ Arguments args) {
    __shared__ uint64 warp_largest[WARPS];
    __shared__ bool is_last;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    start_dependents();
    wait_for_prerequisites();

    // -- the block's part
    const LOGITS::Bits* row = args.logits + blockIdx.y * args.stride;
    uint64 largest = 0;
    for (int first = (blockIdx.x * THREADS + threadIdx.x) * OCTET; first < args.vocabulary; first += gridDim.x * TILE)
        largest = larger(largest, largest_of_tile(args, row, first));
    largest = largest_of_warp(largest);
    if (lane == 0) warp_largest[warp] = largest;
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll
        for (int w = 1; w < WARPS; w++) largest = larger(largest, warp_largest[w]);
        args.parts[blockIdx.y * gridDim.x + blockIdx.x] = largest;
        __threadfence();
        is_last = atomicAdd(args.arrived, 1u) == gridDim.x * gridDim.y - 1;
    }
    __syncthreads();
    if (!is_last) return;

    // -- all parts, by the last block: a sequence per warp
    __threadfence();
    const int64 step = __ldcg(args.step);
    for (int sequence = warp; sequence < args.batch; sequence += WARPS) {
        uint64 best = 0;
        for (int part = lane; part < int(gridDim.x); part += WARP)
            best = larger(best, __ldcg(args.parts + sequence * int(gridDim.x) + part));
        best = largest_of_warp(best);
        if (lane == 0) {
            const int64 token = ~uint32(best);
            args.next_token[sequence] = token;
            args.ring[step % args.ring_size * args.batch + sequence] = token;
        }
    }
    __syncthreads();  // everyone has read the step
    if (threadIdx.x == 0) {
        *args.arrived = 0;  // for the next launch
        *args.step = step + 1;
        *args.position = __ldcg(args.position) + 1;
    }
}

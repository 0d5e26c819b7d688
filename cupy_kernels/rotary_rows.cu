// Queries, keys and values of a prompt's tokens: norm of heads, rotary embedding, keys and values into their
// caches.
//
// Defines: ACTIVATION (Bf16, F16), HEAD_DIM (up to 256), ROTARY_DIM, HEAD_NORM (see rotary_heads.cuh), WARPS, HEADS
// (of a warp).
//
// Grid (tokens, groups of WARPS * HEADS heads, sequences); a warp has some heads of one token, which share its angles.
#include "source_dtypes.cuh"
#include "products.cuh"

using Bits = ACTIVATION::Bits;

#include "rotary_heads.cuh"

struct Arguments {
    const Bits* qkv;          // (batch, tokens, (heads + 2 * kv_heads) * HEAD_DIM)
    const float* cosines;     // (capacity, HALF_ROTARY)
    const float* sines;
    Bits* queries;            // (batch, tokens, heads, HEAD_DIM)
    Bits* keys;               // (batch, kv_heads, capacity, HEAD_DIM)
    Bits* values;
    const Bits* query_norm;   // (HEAD_DIM,)
    const Bits* key_norm;
    float epsilon;
    int heads, kv_heads, capacity;
    int start;                // the first token's position
};

// Where head number `head` of a token goes: queries, keys and values, one after the other.
__device__ inline Bits* target_of(const Arguments& args, int head, int sequence, int64 token) {
    if (head < args.heads)
        return args.queries + ((int64(sequence) * gridDim.x + token) * args.heads + head) * HEAD_DIM;
    const int cached = head - args.heads;
    Bits* cache = cached < args.kv_heads ? args.keys : args.values;
    const int64 row = int64(sequence) * args.kv_heads + cached % args.kv_heads;
    return cache + (row * args.capacity + args.start + token) * HEAD_DIM;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) rotary_rows(const __grid_constant__ Arguments args) {
    start_dependents();
    const int token = blockIdx.x, sequence = blockIdx.z;
    const int num_turned = args.heads + args.kv_heads, num_heads = num_turned + args.kv_heads;
    const int first = (blockIdx.y * WARPS + threadIdx.x / WARP) * HEADS, end = min(first + HEADS, num_heads);
    Angles angles;
    angles.load(args.cosines, args.sines, int64(args.start) + token);
#if HEAD_NORM
    Head query_norm, key_norm;
    query_norm.load(args.query_norm);
    key_norm.load(args.key_norm);
#endif
    wait_for_prerequisites();
    const Bits* source = args.qkv + ((int64(sequence) * gridDim.x + token) * num_heads + first) * HEAD_DIM;
    Head heads[HEADS];
#pragma unroll
    for (int i = 0; i < HEADS; i++)
        if (first + i < end) heads[i].load(source + i * HEAD_DIM);
#pragma unroll
    for (int i = 0; i < HEADS; i++) {
        const int head = first + i;
        if (head >= end) return;
        if (head < num_turned) {
#if HEAD_NORM
            Head norm;  // by value: a reference to one of two would put both into memory
#pragma unroll
            for (int j = 0; j < Head::COUNT; j++)
                norm.values[j] = head < args.heads ? query_norm.values[j] : key_norm.values[j];
            heads[i].normalize(norm, args.epsilon);
#endif
            heads[i].turn(angles);
        }
        heads[i].store(target_of(args, head, sequence, token));
    }
}

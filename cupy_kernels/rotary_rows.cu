// Queries, keys and values of a prompt's tokens: norm of heads, rotary embedding, keys and values into their
// caches.
//
// Defines: ACTIVATION (Bf16, F16), HEAD_DIM (up to 256), ROTARY_DIM, HEAD_NORM (see rotary_heads.cuh), WARPS.
//
// Grid (tokens, groups of WARPS heads, sequences); a warp has one head of one token.
#include "source_dtypes.cuh"

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

extern "C" __global__ void __launch_bounds__(WARPS * 32) rotary_rows(const __grid_constant__ Arguments args) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int token = blockIdx.x, num_tokens = gridDim.x, sequence = blockIdx.z;
    const int head = blockIdx.y * WARPS + warp, all_heads = args.heads + 2 * args.kv_heads;
    if (head >= all_heads) return;
    const int64 position = args.start + token;
    const Bits* source =
        args.qkv + ((int64(sequence) * num_tokens + token) * all_heads + head) * HEAD_DIM;
    if (head >= args.heads + args.kv_heads) {
        const int kv_head = head - args.heads - args.kv_heads;
        Bits* target =
            args.values + ((int64(sequence) * args.kv_heads + kv_head) * args.capacity + position) * HEAD_DIM;
        for (int i = lane; i < HEAD_DIM; i += WARP) target[i] = source[i];
        return;
    }
    const bool is_key = head >= args.heads;
    Angles angles;
    angles.load(args.cosines, args.sines, position);
    Head own;
    own.load(source);
#if HEAD_NORM
    Head norm;
    norm.load(is_key ? args.key_norm : args.query_norm);
    own.normalize(norm, args.epsilon);
#endif
    own.turn(angles);
    own.store(is_key ? args.keys + ((int64(sequence) * args.kv_heads + head - args.heads) * args.capacity + position) *
                                       HEAD_DIM
                     : args.queries + ((int64(sequence) * num_tokens + token) * args.heads + head) * HEAD_DIM);
}

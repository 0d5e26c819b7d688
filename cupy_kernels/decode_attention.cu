// Attention of one new token per sequence: norm of query and key heads, rotary embedding, cache update,
// attention.
//
// Defines: ACTIVATION, HEAD_DIM (a multiple of 16, up to 256), ROTARY_DIM, HEAD_NORM (see rotary_heads.cuh),
// GROUP (query heads per key head), HEADS (of them that a thread block serves), SOFTCAP (0, 1), WARPS (more than
// HEADS), UNROLL (keys that a lane loads at once).
//
// Thread block ((sequence, key head, part of the group), split): a strip of the old tokens for some query heads
// that share a key head; the first split has the new token too. How many strips there are depends on
// the position, which is known on the device alone; blocks without one leave. Lanes hold eight values of a key
// each, and a warp looks at several keys side by side. The last block to arrive adds the strips'
// results in the strips' order, so that the sum is the same every time.
//
// Bytes read: the keys and values that are visible, once per part of the group (the second time from L2).
#include "source_dtypes.cuh"
#include "products.cuh"

using Bits = ACTIVATION::Bits;

#include "rotary_heads.cuh"

constexpr int THREADS = WARPS * WARP;
constexpr int PARTS = (GROUP + HEADS - 1) / HEADS;  // of a group; the last may have fewer heads
constexpr int OCTETS = HEAD_DIM / OCTET;            // of a head
// Lanes that share a key, a power of two; those beyond the last octet idle.
constexpr int KEY_LANES = OCTETS <= 2 ? 2 : OCTETS <= 4 ? 4 : OCTETS <= 8 ? 8 : OCTETS <= 16 ? 16 : 32;
constexpr int KEYS = WARP / KEY_LANES;              // that a warp looks at side by side
constexpr int STEP = WARPS * KEYS * UNROLL;         // keys that a thread block takes at once; the least strip
constexpr int RESULT = HEAD_DIM + 2;                // floats of a strip's result for a head: sums, maximum, weight
constexpr int MERGED = 16;                          // strips whose results are loaded at once
constexpr float NOTHING = -1e30f;                   // the maximum of no scores
constexpr float LOG2_E = 1.4426950408889634f;
static_assert(WARPS > HEADS, "a warp per query head and one for the new key");

struct Arguments {
    const Bits* qkv;          // (batch, (kv_heads * GROUP + 2 * kv_heads) * HEAD_DIM): queries, keys, values
    int64 qkv_stride;
    const float* cosines;     // (capacity, HALF_ROTARY)
    const float* sines;
    const int64* position;    // () of the new token, the same for all sequences, less than capacity
    Bits* keys;               // (batch, kv_heads, capacity, HEAD_DIM)
    Bits* values;
    Bits* out;                // (batch, kv_heads * GROUP * HEAD_DIM)
    int64 out_stride;
    float* results;           // (blocks along x, splits, HEADS, RESULT)
    uint32* arrived;          // (blocks along x,), zero before and after
    const Bits* query_norm;   // (HEAD_DIM,), with HEAD_NORM
    const Bits* key_norm;
    const float* sinks;       // (kv_heads * GROUP,) scores that take weight and give no value, or null
    float epsilon, scale, softcap;
    int window;               // tokens that are visible; 0: all
    int capacity, kv_heads;
};

// Which heads and which tokens are a thread block's.
struct Share {
    int sequence, kv_head, first_head;  // first_head: in the group
    int position, begin, end;           // of the old tokens
    int num_strips;

    __device__ explicit Share(const Arguments& args) {
        const int head = blockIdx.x / PARTS;
        sequence = head / args.kv_heads;
        kv_head = head % args.kv_heads;
        first_head = blockIdx.x % PARTS * HEADS;
    }

    // False: no strip for this block.
    __device__ bool find_strip(const Arguments& args, int64 at) {
        position = int(at);
        const int first = args.window > 0 ? max(0, position - args.window + 1) : 0;
        const int num_old = position - first, splits = gridDim.y;
        int strip = max((num_old + splits - 1) / splits, STEP);
        strip = (strip + STEP - 1) / STEP * STEP;
        num_strips = max((num_old + strip - 1) / strip, 1);
        begin = first + blockIdx.y * strip;
        end = min(begin + strip, position);
        return int(blockIdx.y) < num_strips;
    }

    // Of the group's head `h` of this block; the last part repeats the group's last one.
    __device__ int query_head(int h) const { return kv_head * GROUP + min(first_head + h, GROUP - 1); }

    __device__ int64 cache_row(const Arguments& args) const {
        return (int64(sequence) * args.kv_heads + kv_head) * args.capacity;
    }
};

// Sum of values weighted by exp2(score - maximum), and of the weights.
struct Sum {
    float maximum = NOTHING, weight = 0.0f, value = 0.0f;

    template <int COUNT>
    __device__ void add(const float (&maxima)[COUNT], const float (&weights)[COUNT], const float (&values)[COUNT]) {
        float largest = maximum;
#pragma unroll
        for (float other : maxima) largest = fmaxf(largest, other);
        const float shrink = exp2f(maximum - largest);
        maximum = largest;
        weight *= shrink;
        value *= shrink;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            float scale = exp2f(maxima[i] - largest);
            weight = __fmaf_rn(weights[i], scale, weight);
            value = __fmaf_rn(values[i], scale, value);
        }
    }
};

// The softmax so far of the keys that a lane has seen, for all heads of the block.
struct Softmax {
    float maximum[HEADS], weight[HEADS], sums[HEADS][OCTET];

    __device__ Softmax() {
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            maximum[h] = NOTHING;
            weight[h] = 0.0f;
#pragma unroll
            for (int j = 0; j < OCTET; j++) sums[h][j] = 0.0f;
        }
    }

    // Takes COUNT more keys with their values; scores in powers of two.
    template <int COUNT>
    __device__ void take(int h, const float (&scores)[COUNT], const bool (&valid)[COUNT],
                         const float (&values)[COUNT][OCTET]) {
        float largest = maximum[h];
#pragma unroll
        for (int u = 0; u < COUNT; u++) largest = valid[u] ? fmaxf(largest, scores[u]) : largest;
        const float shrink = exp2f(maximum[h] - largest);
        maximum[h] = largest;
        weight[h] *= shrink;
#pragma unroll
        for (int j = 0; j < OCTET; j++) sums[h][j] *= shrink;
#pragma unroll
        for (int u = 0; u < COUNT; u++) {
            float p = valid[u] ? exp2f(scores[u] - largest) : 0.0f;
            weight[h] += p;
#pragma unroll
            for (int j = 0; j < OCTET; j++) sums[h][j] = __fmaf_rn(p, values[u][j], sums[h][j]);
        }
    }

    // Adds up what the lanes of a warp have that look at different keys.
    __device__ void merge_keys() {
#pragma unroll
        for (int step = KEY_LANES; step < WARP; step *= 2) {
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                float other = __shfl_xor_sync(FULL_WARP, maximum[h], step);
                float largest = fmaxf(maximum[h], other);
                float shrink = exp2f(maximum[h] - largest), other_shrink = exp2f(other - largest);
                maximum[h] = largest;
                // both lanes round alike
                weight[h] = weight[h] * shrink + __shfl_xor_sync(FULL_WARP, weight[h], step) * other_shrink;
#pragma unroll
                for (int j = 0; j < OCTET; j++) {
                    float other_sum = __shfl_xor_sync(FULL_WARP, sums[h][j], step);
                    sums[h][j] = sums[h][j] * shrink + other_sum * other_shrink;
                }
            }
        }
    }

    __device__ void store(float (&results)[HEADS][RESULT], int octet) const {
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
#pragma unroll
            for (int j = 0; j < OCTET; j++) results[h][octet * OCTET + j] = sums[h][j];
            if (octet == 0) {
                results[h][HEAD_DIM] = maximum[h];
                results[h][HEAD_DIM + 1] = weight[h];
            }
        }
    }
};

__device__ inline Octet<ACTIVATION> load_octet(const Bits* source, bool is_there) {
    Octet<ACTIVATION> octet;
    octet.words[0] = is_there ? __ldcg(reinterpret_cast<const uint4*>(source)) : make_uint4(0, 0, 0, 0);
    return octet;
}

__device__ inline void store_octet(Bits* target, const Octet<ACTIVATION>& octet) {
    *reinterpret_cast<uint4*>(target) = octet.words[0];
}

// The query heads of the block and the new key, one by each warp: first what does not depend on the position.
struct NewHead {
    Head head, norm;

    __device__ static bool is_key() { return threadIdx.x / WARP == HEADS; }
    __device__ static bool is_there() { return threadIdx.x / WARP <= HEADS; }

    __device__ void load_norm(const Arguments& args) {
#if HEAD_NORM
        if (is_there()) norm.load(is_key() ? args.key_norm : args.query_norm);
#endif
    }

    __device__ void load(const Arguments& args, const Share& share) {
        const int warp = threadIdx.x / WARP, num_heads = args.kv_heads * GROUP;
        const int at = is_key() ? num_heads + share.kv_head : share.query_head(warp);
        if (is_there()) head.load(args.qkv + share.sequence * args.qkv_stride + at * HEAD_DIM);
    }

    __device__ void finish(const Arguments& args, const Angles& angles, float (&heads)[HEADS + 1][HEAD_DIM]) {
        if (!is_there()) return;
#if HEAD_NORM
        head.normalize(norm, args.epsilon);
#endif
        head.turn(angles);
        head.store(heads[threadIdx.x / WARP]);
    }
};

// Scores of the block's heads, in powers of two.
struct Scores {
    float queries[HEADS][OCTET];

    __device__ Scores(const float (&heads)[HEADS + 1][HEAD_DIM], int octet, bool has_octet) {
#pragma unroll
        for (int h = 0; h < HEADS; h++)
#pragma unroll
            for (int j = 0; j < OCTET; j++) queries[h][j] = has_octet ? heads[h][octet * OCTET + j] : 0.0f;
    }

    // By all lanes of a warp.
    __device__ float of(const Arguments& args, int h, const float (&key)[OCTET]) const {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < OCTET; j++) sum = __fmaf_rn(queries[h][j], key[j], sum);
#pragma unroll
        for (int step = 1; step < KEY_LANES; step *= 2) sum += __shfl_xor_sync(FULL_WARP, sum, step);
        sum *= args.scale;
#if SOFTCAP
        sum = args.softcap * tanhf(sum / args.softcap);
#endif
        return sum * LOG2_E;
    }
};

// The attention of value `i` of the block's heads.
__device__ inline void store_out(const Arguments& args, const Share& share, int i, Sum sum) {
    const int h = i / HEAD_DIM, head = share.query_head(h);
    if (share.first_head + h >= GROUP) return;
    if (args.sinks != nullptr) {
        const float score[1] = {__ldg(args.sinks + head) * LOG2_E}, weight[1] = {1.0f}, nothing[1] = {0.0f};
        sum.add(score, weight, nothing);
    }
    args.out[share.sequence * args.out_stride + int64(head) * HEAD_DIM + i % HEAD_DIM] =
        ACTIVATION::narrow(sum.value / sum.weight);
}

// Adds the results of all strips.
__device__ inline void merge_strips(const Arguments& args, const Share& share, const float* results) {
    for (int i = threadIdx.x; i < HEADS * HEAD_DIM; i += THREADS) {
        const float* result = results + i / HEAD_DIM * RESULT;
        Sum sum;
#pragma unroll 1
        for (int first = 0; first < share.num_strips; first += MERGED) {
            float maxima[MERGED], weights[MERGED], values[MERGED];
#pragma unroll
            for (int s = 0; s < MERGED; s++) {
                const bool is_there = first + s < share.num_strips;
                const float* strip = result + (is_there ? first + s : 0) * (HEADS * RESULT);
                values[s] = __ldcg(strip + i % HEAD_DIM);
                maxima[s] = __ldcg(strip + HEAD_DIM);
                weights[s] = __ldcg(strip + HEAD_DIM + 1);
                if (!is_there) {
                    maxima[s] = NOTHING;
                    weights[s] = values[s] = 0.0f;
                }
            }
            sum.add(maxima, weights, values);
        }
        store_out(args, share, i, sum);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) decode_attention(const __grid_constant__ Arguments args) {
    __shared__ float heads[HEADS + 1][HEAD_DIM];  // queries, and the new key
    __shared__ float warp_results[WARPS][HEADS][RESULT];
    __shared__ bool is_last;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int octet = lane % KEY_LANES, slot = lane / KEY_LANES;
    const bool has_octet = octet < OCTETS;
    const bool takes_new = blockIdx.y == 0 && warp == 0;

    start_dependents();

    // -- what does not depend on the launch before: the position and the old tokens were written before that one
    // began, so that only the new token has to be waited for
    Share share(args);
    NewHead own;
    own.load_norm(args);
    if (!share.find_strip(args, __ldcg(args.position))) return;
    const int64 in_cache = share.cache_row(args) * HEAD_DIM + octet * OCTET;
    Octet<ACTIVATION> keys[UNROLL], values[UNROLL];
    auto token_of = [&](int from, int u) { return from + (u * WARPS + warp) * KEYS + slot; };
    auto load = [&](int from) {
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            const int token = token_of(from, u);
            const int64 at = in_cache + int64(token) * HEAD_DIM;
            keys[u] = load_octet(args.keys + at, token < share.end && has_octet);
            values[u] = load_octet(args.values + at, token < share.end && has_octet);
        }
    };
    load(share.begin);
    Angles angles;
    angles.load(args.cosines, args.sines, share.position);

    // -- the new token
    wait_for_prerequisites();
    own.load(args, share);
    const int num_heads = args.kv_heads * GROUP;
    const Bits* value_source = args.qkv + share.sequence * args.qkv_stride +
                               (num_heads + args.kv_heads + share.kv_head) * HEAD_DIM + octet * OCTET;
    const Octet<ACTIVATION> new_value = load_octet(value_source, takes_new && has_octet);
    own.finish(args, angles, heads);
    __syncthreads();

    // -- the old tokens of the strip
    const Scores scores(heads, octet, has_octet);
    Softmax softmax;
    for (int from = share.begin; from < share.end; from += STEP) {
        float key[UNROLL][OCTET], value[UNROLL][OCTET];
        bool valid[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            keys[u].widen(key[u]);
            values[u].widen(value[u]);
            valid[u] = token_of(from, u) < share.end;
        }
        load(from + STEP);
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float of_keys[UNROLL];
#pragma unroll
            for (int u = 0; u < UNROLL; u++) of_keys[u] = scores.of(args, h, key[u]);
            softmax.take(h, of_keys, valid, value);
        }
    }

    // -- the new token
    if (takes_new) {
        float key[1][OCTET], value[1][OCTET];
        const bool valid[1] = {slot == 0};
#pragma unroll
        for (int j = 0; j < OCTET; j++) key[0][j] = has_octet ? heads[HEADS][octet * OCTET + j] : 0.0f;
        new_value.widen(value[0]);
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            const float of_key[1] = {scores.of(args, h, key[0])};
            softmax.take(h, of_key, valid, value);
        }
        if (slot == 0 && has_octet && share.first_head == 0) {
            Octet<ACTIVATION> new_key;
            new_key.narrow(key[0]);
            const int64 at = in_cache + int64(share.position) * HEAD_DIM;
            store_octet(args.keys + at, new_key);
            store_octet(args.values + at, new_value);
        }
    }

    // -- over the warps
    softmax.merge_keys();
    if (slot == 0 && has_octet) softmax.store(warp_results[warp], octet);
    __syncthreads();
    float* results = args.results + int64(blockIdx.x) * gridDim.y * (HEADS * RESULT);
    for (int i = threadIdx.x; i < HEADS * HEAD_DIM; i += THREADS) {
        const int h = i / HEAD_DIM, dim = i % HEAD_DIM;
        float maxima[WARPS], weights[WARPS], sums[WARPS];
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            maxima[w] = warp_results[w][h][HEAD_DIM];
            weights[w] = warp_results[w][h][HEAD_DIM + 1];
            sums[w] = warp_results[w][h][dim];
        }
        Sum sum;
        sum.add(maxima, weights, sums);
        if (share.num_strips == 1) {
            store_out(args, share, i, sum);
        } else {
            float* result = results + (blockIdx.y * HEADS + h) * RESULT;
            result[dim] = sum.value;
            if (dim == 0) {
                result[HEAD_DIM] = sum.maximum;
                result[HEAD_DIM + 1] = sum.weight;
            }
        }
    }
    if (share.num_strips == 1) return;

    // -- over the strips, by the last block to arrive
    __threadfence();
    __syncthreads();
    uint32* arrived = args.arrived + blockIdx.x;
    if (threadIdx.x == 0) is_last = atomicAdd(arrived, 1u) == uint32(share.num_strips - 1);
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    if (threadIdx.x == 0) *arrived = 0;  // for the next launch
    merge_strips(args, share, results);
}

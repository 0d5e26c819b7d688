// Attention of one new token per sequence: norm of query and key heads, rotary embedding, cache update,
// attention.
//
// Defines: ACTIVATION (Bf16, F16), HEAD_DIM (a multiple of 8, up to 256), ROTARY_DIM (even, up to HEAD_DIM),
// GROUP (query heads per key head, up to 8), SPLITS, HEAD_NORM (0; 1: RMS norm of query and key heads; 2: its
// weight plus one), SOFTCAP (0, 1), WARPS.
//
// Thread block (key head, split, sequence): a strip of the old tokens for all query heads of the group; the
// first split has the new token too. How many strips there are depends on the position, which is known
// on the device alone; blocks without one leave. The last block of a key head to arrive adds the strips' results,
// in their order, so that the sum is the same every time.
//
// Bytes read: the keys and values that are visible, once.
#include "source_dtypes.cuh"
#include "products.cuh"

using Bits = ACTIVATION::Bits;

constexpr int THREADS = WARPS * WARP;
constexpr int OCTETS = HEAD_DIM / OCTET;  // of a head
// Lanes that share a key: each has eight of its values; lanes beyond the last octet idle.
constexpr int KEY_LANES = OCTETS <= 1 ? 1 : OCTETS <= 2 ? 2 : OCTETS <= 4 ? 4 : OCTETS <= 8 ? 8 : OCTETS <= 16 ? 16 : 32;
constexpr int KEYS = WARP / KEY_LANES;    // that a warp looks at side by side
constexpr int UNROLL = GROUP > 4 ? 2 : 4; // of them, one after the other, that are loaded at once
constexpr int LEAST_STRIP = WARPS * KEYS * UNROLL;
constexpr int RESULT = HEAD_DIM + 2;      // floats of a strip's result for one head: sums, maximum, weight
constexpr float NOTHING = -1e30f;         // the maximum of no scores
constexpr float LOG2_E = 1.4426950408889634f;

struct Arguments {
    const Bits* qkv;          // (batch, (kv_heads * GROUP + 2 * kv_heads) * HEAD_DIM): queries, keys, values
    int64 qkv_stride;
    const float* cosines;     // (capacity, HALF_ROTARY)
    const float* sines;
    const int64* position;    // () of the new token, the same for all sequences
    Bits* keys;               // (batch, kv_heads, capacity, HEAD_DIM)
    Bits* values;
    Bits* out;                // (batch, kv_heads * GROUP * HEAD_DIM)
    int64 out_stride;
    float* results;           // (batch, kv_heads, SPLITS, GROUP, RESULT)
    uint32* arrived;          // (batch, kv_heads), zero before and after
    const Bits* query_norm;   // (HEAD_DIM,)
    const Bits* key_norm;
    float epsilon, scale, softcap;
    int window;               // tokens that are visible; 0: all
    int capacity, kv_heads;
};

#include "rotary_heads.cuh"

// The softmax so far of the keys that a lane has seen, for all heads of the group.
struct Softmax {
    float maximum[GROUP], weight[GROUP], sums[GROUP][OCTET];

    __device__ Softmax() {
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            maximum[g] = NOTHING;
            weight[g] = 0.0f;
#pragma unroll
            for (int j = 0; j < OCTET; j++) sums[g][j] = 0.0f;
        }
    }

    // Takes COUNT more keys with their values; scores in powers of two.
    template <int COUNT>
    __device__ void take(int g, const float (&scores)[COUNT], const bool (&valid)[COUNT],
                         const float (&values)[COUNT][OCTET]) {
        float largest = maximum[g];
#pragma unroll
        for (int u = 0; u < COUNT; u++) largest = valid[u] ? fmaxf(largest, scores[u]) : largest;
        const float shrink = exp2f(maximum[g] - largest);
        maximum[g] = largest;
        weight[g] *= shrink;
#pragma unroll
        for (int j = 0; j < OCTET; j++) sums[g][j] *= shrink;
#pragma unroll
        for (int u = 0; u < COUNT; u++) {
            float p = valid[u] ? exp2f(scores[u] - largest) : 0.0f;
            weight[g] += p;
#pragma unroll
            for (int j = 0; j < OCTET; j++) sums[g][j] = __fmaf_rn(p, values[u][j], sums[g][j]);
        }
    }

    // Adds up what the lanes of a warp have that look at different keys.
    __device__ void merge_keys() {
#pragma unroll
        for (int step = KEY_LANES; step < WARP; step *= 2) {
#pragma unroll
            for (int g = 0; g < GROUP; g++) {
                float other = __shfl_xor_sync(FULL_WARP, maximum[g], step);
                float largest = fmaxf(maximum[g], other);
                float shrink = exp2f(maximum[g] - largest), other_shrink = exp2f(other - largest);
                maximum[g] = largest;
                weight[g] = weight[g] * shrink + __shfl_xor_sync(FULL_WARP, weight[g], step) * other_shrink;
#pragma unroll
                for (int j = 0; j < OCTET; j++)
                    sums[g][j] = sums[g][j] * shrink + __shfl_xor_sync(FULL_WARP, sums[g][j], step) * other_shrink;
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS) decode_attention(const __grid_constant__ Arguments args) {
    __shared__ float heads[GROUP + 1][HEAD_DIM];  // queries, and the new key
    __shared__ float warp_results[WARPS][GROUP][RESULT];
    __shared__ bool is_last;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int kv_head = blockIdx.x, split = blockIdx.y, sequence = blockIdx.z;
    const int octet = lane % KEY_LANES, slot = lane / KEY_LANES;
    const bool has_octet = octet < OCTETS;

    start_dependents();

    // -- strips of the old tokens. Their keys and values, and the position, were written before the launch
    // before began; only the new token has to be waited for.
    const int position = int(__ldcg(args.position));
    const int first = args.window > 0 ? max(0, position - args.window + 1) : 0;
    const int old_tokens = position - first;
    int strip = (old_tokens + SPLITS - 1) / SPLITS;
    strip = max((strip + OCTET - 1) / OCTET * OCTET, LEAST_STRIP);
    const int num_strips = max((old_tokens + strip - 1) / strip, 1);
    if (split >= num_strips) return;
    const int begin = first + split * strip, end = min(begin + strip, position);

    const int64 head_at = (int64(sequence) * args.kv_heads + kv_head) * args.capacity;
    Octet<ACTIVATION> keys[UNROLL], values[UNROLL];
    auto load = [&](int from) {
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            int token = from + (u * WARPS + warp) * KEYS + slot;
            keys[u].words[0] = values[u].words[0] = make_uint4(0, 0, 0, 0);
            if (token < end && has_octet) {
                int64 at = (head_at + token) * HEAD_DIM + octet * OCTET;
                keys[u].words[0] = __ldcg(reinterpret_cast<const uint4*>(args.keys + at));
                values[u].words[0] = __ldcg(reinterpret_cast<const uint4*>(args.values + at));
            }
        }
    };
    load(begin);
    Angles angles;
    angles.load(args.cosines, args.sines, position);

    // -- the new token
    wait_for_prerequisites();
    const Bits* row = args.qkv + sequence * args.qkv_stride;
    const Bits* new_key = row + (args.kv_heads * GROUP + kv_head) * HEAD_DIM;
    const Bits* new_value = new_key + args.kv_heads * HEAD_DIM;
    for (int i = warp; i < GROUP + (split == 0); i += WARPS) {
        const Bits* source = i == GROUP ? new_key : row + (kv_head * GROUP + i) * HEAD_DIM;
        prepare_head(source, i == GROUP ? args.key_norm : args.query_norm, args.epsilon, angles, heads[i]);
    }
    __syncthreads();
    if (split == 0) {
        for (int i = threadIdx.x; i < HEAD_DIM; i += THREADS) {
            int64 at = (head_at + position) * HEAD_DIM + i;
            args.keys[at] = ACTIVATION::narrow(heads[GROUP][i]);
            args.values[at] = __ldcg(new_value + i);
        }
    }
    float queries[GROUP][OCTET];
#pragma unroll
    for (int g = 0; g < GROUP; g++)
#pragma unroll
        for (int j = 0; j < OCTET; j++) queries[g][j] = has_octet ? heads[g][octet * OCTET + j] : 0.0f;

    // -- scores, in powers of two, and sums of values
    Softmax softmax;
    auto score = [&](int g, const float (&key)[OCTET]) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < OCTET; j++) sum = __fmaf_rn(queries[g][j], key[j], sum);
#pragma unroll
        for (int step = 1; step < KEY_LANES; step *= 2) sum += __shfl_xor_sync(FULL_WARP, sum, step);
        sum *= args.scale;
#if SOFTCAP
        sum = args.softcap * tanhf(sum / args.softcap);
#endif
        return sum * LOG2_E;
    };
    for (int from = begin; from < end; from += LEAST_STRIP) {
        float key[UNROLL][OCTET], value[UNROLL][OCTET];
        bool valid[UNROLL];
#pragma unroll
        for (int u = 0; u < UNROLL; u++) {
            keys[u].widen(key[u]);
            values[u].widen(value[u]);
            valid[u] = from + (u * WARPS + warp) * KEYS + slot < end;
        }
        load(from + LEAST_STRIP);
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            float scores[UNROLL];
#pragma unroll
            for (int u = 0; u < UNROLL; u++) scores[u] = score(g, key[u]);
            softmax.take(g, scores, valid, value);
        }
    }
    if (split == 0 && warp == 0) {
        float key[1][OCTET], value[1][OCTET];
        const bool valid[1] = {slot == 0};
#pragma unroll
        for (int j = 0; j < OCTET; j++) {
            key[0][j] = has_octet ? heads[GROUP][octet * OCTET + j] : 0.0f;
            value[0][j] = has_octet ? ACTIVATION::widen(__ldcg(new_value + octet * OCTET + j)) : 0.0f;
        }
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            const float scores[1] = {score(g, key[0])};
            softmax.take(g, scores, valid, value);
        }
    }

    // -- over the warps
    softmax.merge_keys();
    if (slot == 0) {
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
            float* result = warp_results[warp][g];
#pragma unroll
            for (int j = 0; j < OCTET; j++)
                if (has_octet) result[octet * OCTET + j] = softmax.sums[g][j];
            if (octet == 0) {
                result[HEAD_DIM] = softmax.maximum[g];
                result[HEAD_DIM + 1] = softmax.weight[g];
            }
        }
    }
    __syncthreads();
    Bits* out = args.out + sequence * args.out_stride + kv_head * GROUP * HEAD_DIM;
    const int64 result_at = (int64(sequence) * args.kv_heads + kv_head) * SPLITS * GROUP * RESULT;
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS) {
        int g = i / HEAD_DIM, dim = i % HEAD_DIM;
        float largest = NOTHING, sum = 0.0f, weight = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, warp_results[w][g][HEAD_DIM]);
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            float shrink = exp2f(warp_results[w][g][HEAD_DIM] - largest);
            sum = __fmaf_rn(warp_results[w][g][dim], shrink, sum);
            weight = __fmaf_rn(warp_results[w][g][HEAD_DIM + 1], shrink, weight);
        }
        if (num_strips == 1) {
            out[i] = ACTIVATION::narrow(sum / weight);
        } else {
            float* result = args.results + result_at + (split * GROUP + g) * RESULT;
            result[dim] = sum;
            if (dim == 0) {
                result[HEAD_DIM] = largest;
                result[HEAD_DIM + 1] = weight;
            }
        }
    }
    if (num_strips == 1) return;

    // -- over the strips, by the last block to arrive
    __threadfence();
    __syncthreads();
    uint32* arrived = args.arrived + sequence * args.kv_heads + kv_head;
    if (threadIdx.x == 0) is_last = atomicAdd(arrived, 1u) == uint32(num_strips - 1);
    __syncthreads();
    if (!is_last) return;
    __threadfence();
    if (threadIdx.x == 0) *arrived = 0;  // for the next launch
    for (int i = threadIdx.x; i < GROUP * HEAD_DIM; i += THREADS) {
        const float* result = args.results + result_at + i / HEAD_DIM * RESULT;
        float maxima[SPLITS], weights[SPLITS], sums[SPLITS];  // all on their way before the first is used
#pragma unroll
        for (int s = 0; s < SPLITS; s++) {
            const float* part = result + s * GROUP * RESULT;
            maxima[s] = s < num_strips ? __ldcg(part + HEAD_DIM) : NOTHING;
            weights[s] = s < num_strips ? __ldcg(part + HEAD_DIM + 1) : 0.0f;
            sums[s] = s < num_strips ? __ldcg(part + i % HEAD_DIM) : 0.0f;
        }
        float largest = NOTHING, sum = 0.0f, weight = 0.0f;
#pragma unroll
        for (int s = 0; s < SPLITS; s++) largest = fmaxf(largest, maxima[s]);
#pragma unroll
        for (int s = 0; s < SPLITS; s++) {
            float shrink = exp2f(maxima[s] - largest);
            sum = __fmaf_rn(sums[s], shrink, sum);
            weight = __fmaf_rn(weights[s], shrink, weight);
        }
        out[i] = ACTIVATION::narrow(sum / weight);
    }
}

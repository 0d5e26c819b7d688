// Query and key heads made ready for attention: norm, then rotary embedding, rounded where transformers rounds.
//
// Defines: ACTIVATION, HEAD_DIM, ROTARY_DIM (even, up to HEAD_DIM), HEAD_NORM (0; 1: RMS norm; 2: its weight
// plus one). Dimension i is turned with i + ROTARY_DIM / 2; those beyond ROTARY_DIM stay.
#pragma once

constexpr int HALF_ROTARY = ROTARY_DIM / 2;

__device__ inline float rounded(float value) { return ACTIVATION::widen(ACTIVATION::narrow(value)); }

// The angles of a position that a lane turns by.
struct Angles {
    static constexpr int OWN = (HALF_ROTARY + WARP - 1) / WARP;
    float cosines[OWN], sines[OWN];

    // From tables (capacity, HALF_ROTARY).
    __device__ void load(const float* all_cosines, const float* all_sines, int64 position) {
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            int at = threadIdx.x % WARP + i * WARP;
            cosines[i] = at < HALF_ROTARY ? all_cosines[position * HALF_ROTARY + at] : 0.0f;
            sines[i] = at < HALF_ROTARY ? all_sines[position * HALF_ROTARY + at] : 0.0f;
        }
    }
};

// One head from global memory to `head` (HEAD_DIM,), normalized and turned; by one warp.
__device__ inline void prepare_head(const Bits* source, const Bits* norm, float epsilon, const Angles& angles,
                                    float* head) {
    const int lane = threadIdx.x % WARP;
    float sum = 0.0f;
#pragma unroll
    for (int i = lane; i < HEAD_DIM; i += WARP) {
        head[i] = ACTIVATION::widen(__ldcg(source + i));
        sum = __fmaf_rn(head[i], head[i], sum);
    }
#if HEAD_NORM
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, step);
    const float scale = rsqrtf(sum / HEAD_DIM + epsilon);
    for (int i = lane; i < HEAD_DIM; i += WARP) {
        float weight = ACTIVATION::widen(norm[i]);
        head[i] = HEAD_NORM == 2 ? rounded(head[i] * scale * (1.0f + weight))
                                 : rounded(rounded(head[i] * scale) * weight);
    }
#endif
    __syncwarp();
#pragma unroll
    for (int i = 0; i < Angles::OWN; i++) {
        const int at = lane + i * WARP;
        if (at >= HALF_ROTARY) break;
        float first = head[at], second = head[at + HALF_ROTARY];
        head[at] = rounded(rounded(first * angles.cosines[i]) - rounded(second * angles.sines[i]));
        head[at + HALF_ROTARY] = rounded(rounded(second * angles.cosines[i]) + rounded(first * angles.sines[i]));
    }
    __syncwarp();
}

// A head of queries or keys in the registers of a warp: RMS norm, rotary embedding.
//
// Defines: ACTIVATION (Bf16, F16), HEAD_DIM, ROTARY_DIM (even, 2 to HEAD_DIM), HEAD_NORM (0; 1: RMS norm of the
// head; 2: its weight plus one).
//
// Every operation is rounded to ACTIVATION, as where a model computes in it: with tables that were rounded
// to it the results are the same bit by bit, but for the order of the norm's sum.
#pragma once

constexpr int HALF_ROTARY = ROTARY_DIM / 2;
static_assert(ROTARY_DIM >= 2 && ROTARY_DIM % 2 == 0 && ROTARY_DIM <= HEAD_DIM, "no rotary embedding");

__device__ inline float rounded(float value) { return ACTIVATION::widen(ACTIVATION::narrow(value)); }

constexpr int PAIRS = (HALF_ROTARY + WARP - 1) / WARP;            // of a lane, that are turned
constexpr int RESTS = (HEAD_DIM - ROTARY_DIM + WARP - 1) / WARP;  // of a lane, that stay

// cos and sin of a lane's pairs. The tables are float32 (positions, HALF_ROTARY).
struct Angles {
    float cosines[PAIRS], sines[PAIRS];

    __device__ void load(const float* cosine_table, const float* sine_table, int64 position) {
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            int pair = i * WARP + threadIdx.x % WARP;
            int64 at = position * HALF_ROTARY + (pair < HALF_ROTARY ? pair : 0);
            cosines[i] = __ldg(cosine_table + at);
            sines[i] = __ldg(sine_table + at);
        }
    }
};

// A lane's values: those of its pairs, first and second in turn, then those that stay.
struct Head {
    static constexpr int COUNT = 2 * PAIRS + RESTS;
    float values[COUNT];

    // Where value `i` lies in the head; -1: the lane has none.
    __device__ static int place(int i) {
        const int lane = threadIdx.x % WARP;
        if (i < 2 * PAIRS) {
            int pair = i / 2 * WARP + lane;
            return pair < HALF_ROTARY ? pair + i % 2 * HALF_ROTARY : -1;
        }
        int rest = ROTARY_DIM + (i - 2 * PAIRS) * WARP + lane;
        return rest < HEAD_DIM ? rest : -1;
    }

    __device__ void load(const Bits* source) {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            values[i] = place(i) >= 0 ? ACTIVATION::widen(__ldcg(source + place(i))) : 0.0f;
    }

    // By all lanes of a warp. `weight`: what `load` makes of the norm's weight.
    __device__ void normalize(const Head& weight, float epsilon) {
        float sum = 0.0f;
#pragma unroll
        for (float value : values) sum = __fmaf_rn(value, value, sum);
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, step);
        const float scale = rsqrtf(sum / HEAD_DIM + epsilon);
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            float value = values[i] * scale;
            values[i] = HEAD_NORM == 2 ? rounded(value * (1.0f + weight.values[i]))
                                       : rounded(rounded(value) * weight.values[i]);
        }
    }

    __device__ void turn(const Angles& angles) {
#pragma unroll
        for (int i = 0; i < PAIRS; i++) {
            float cosine = angles.cosines[i], sine = angles.sines[i];
            float first = values[2 * i], second = values[2 * i + 1];
            values[2 * i] = rounded(rounded(first * cosine) - rounded(second * sine));
            values[2 * i + 1] = rounded(rounded(second * cosine) + rounded(first * sine));
        }
    }

    __device__ void store(Bits* target) const {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            if (place(i) >= 0) target[place(i)] = ACTIVATION::narrow(values[i]);
    }

    __device__ void store(float* target) const {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            if (place(i) >= 0) target[place(i)] = values[i];
    }
};

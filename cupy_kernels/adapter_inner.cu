// Inner values of adapters: z = scale * A x, which linear_few.cu multiplies by B and adds to its layers.
//
// Defines: ACTIVATION (Bf16, F16), TOKENS (1, 2, 4, 8: the most that a launch takes), NORM (0; 1: RMS norm before;
// 2: its weight plus one), COLUMNS (a multiple of 8), WARPS, ROWS (of A, that a thread block has).
//
// Adapters of all layers that share x lie one under the other in A. What bounds it is latency: A is asked for
// before the launch before has ended, and a thread has the same columns of x and of A, so that between x and
// the sums there is nothing but the norm. Bytes read per value of A: 2; x comes from the second-level cache.
#include "source_dtypes.cuh"
#include "products.cuh"

using Bits = ACTIVATION::Bits;

struct Arguments {
    const Bits* x;            // (tokens, COLUMNS), `x_stride` apart
    int64 x_stride;
    const Bits* norm_weight;  // (COLUMNS,)
    const Bits* a;            // (rows, COLUMNS)
    const float* scales;      // float32 (rows,)
    float* inner;             // float32 (tokens, rows)
    int* x_is_there;          // set to 1 when x may be read; or null
    float epsilon;
    int num_rows, num_tokens;
};

constexpr int THREADS = WARPS * WARP;
using Row = Activations<ACTIVATION, TOKENS, WARPS, NORM, COLUMNS, COLUMNS>;

struct Sums {
    const Bits* a;  // the thread block's rows
    // Where a thread holds its part of x, it holds that of A as well.
    Octet<ACTIVATION> held[ROWS][Row::HELD];
    float values[ROWS][TOKENS] = {};

    __device__ explicit Sums(const Bits* a) : a(a) {
        if constexpr (Row::ONCE) {
#pragma unroll
            for (int row = 0; row < ROWS; row++)
#pragma unroll
                for (int i = 0; i < Row::HELD; i++)
                    if (Row::octet_of(i) < COLUMNS / OCTET) held[row][i] = read(row, Row::octet_of(i));
        }
    }

    __device__ Octet<ACTIVATION> read(int row, int octet) const {
        Octet<ACTIVATION> found;
        found.words[0] = __ldg(reinterpret_cast<const uint4*>(a + int64(row) * COLUMNS) + octet);
        return found;
    }

    __device__ void add(int octet, int token, uint4 words) {
        Octet<ACTIVATION> activations;
        activations.words[0] = words;
        float x[OCTET];
        activations.widen(x);
#pragma unroll
        for (int row = 0; row < ROWS; row++) {
            const int i = Row::ONCE ? (octet - int(threadIdx.x)) / THREADS : 0;
            float weights[OCTET];
            (Row::ONCE ? held[row][i] : read(row, octet)).widen(weights);
#pragma unroll
            for (int j = 0; j < OCTET; j++)
                values[row][token] = __fmaf_rn(weights[j], x[j], values[row][token]);
        }
    }
};

// Where an octet of x goes: assigning multiplies.
struct Multiplied {
    Sums& sums;
    int octet, token;

    __device__ Multiplied& operator*() { return *this; }
    __device__ void operator=(uint4 words) { sums.add(octet, token, words); }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) adapter_inner(const __grid_constant__ Arguments args) {
    __shared__ float scratch[TOKENS * WARPS];
    __shared__ float of_warps[WARPS][ROWS * TOKENS];
    start_dependents();
    const int first_row = int(blockIdx.x) * ROWS, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    Row activations;
    activations.prepare(args.norm_weight);
    Sums sums(args.a + int64(first_row) * COLUMNS);
    wait_for_prerequisites();
    if (args.x_is_there != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
        __threadfence();
        asm volatile("st.release.gpu.global.s32 [%0], 1;" ::"l"(args.x_is_there) : "memory");
    }
    auto place = [&](int octet, int token) { return Multiplied{sums, octet, token}; };
    activations.load(args.x, args.x_stride, args.num_tokens, 0, args.norm_weight, args.epsilon, scratch, place, [] {});
#pragma unroll
    for (int row = 0; row < ROWS; row++)
#pragma unroll
        for (int token = 0; token < TOKENS; token++) {
            float sum = sums.values[row][token];
#pragma unroll
            for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, step);
            if (lane == 0) of_warps[warp][row * TOKENS + token] = sum;
        }
    __syncthreads();
    const int row = threadIdx.x / TOKENS, token = threadIdx.x % TOKENS;
    if (row >= ROWS || token >= args.num_tokens) return;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < WARPS; i++) sum += of_warps[i][threadIdx.x];
    args.inner[int64(token) * args.num_rows + first_row + row] = sum * args.scales[first_row + row];
}

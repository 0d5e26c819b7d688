// One step of AdamW, Lion or SGD with momentum for many tensors of a dtype in one launch; the rules are
// in qtool/optim/reference.py, the format of 8-bit states in qtool/formats/optimizer_states.py.
//
// Defines: ALGORITHM (ADAM, LION, MOMENTUM), SOURCE (Bf16, F16, F32), STATE_BITS (8, 32), COPIES,
// THREADS, RUN.
//
// Bytes moved per value: SOURCE three times, states twice. 10 for Adam with 8-bit states in bf16.
//
// A block of 256 values is a warp's work, eight neighbours a lane's. A warp takes RUN blocks of a tensor
// in a row; the runs of all tensors are numbered one after the other, and a warp that goes on to its
// next one looks for the tensor from where it was, 32 at a time.
//
// What codes cost decides whether memory is the limit. Decoding: the maps lie in shared memory, one copy
// per lane and bank, so that no two lanes meet; a row of 256 bytes per code, so that one byte permutation
// makes an address. Encoding: the upper bits of a scaled value tell its slot, of which none has more than
// one threshold; adding the bits to the slot's entry carries into the code if they exceed it. Values are
// scaled such that all that has zero's code is subnormal and flushed, which saves a clamp.
//
// All other operations are rounded once and keep subnormals, so that the host computes the same bits. Root
// and reciprocal are approximations with a Newton step each, which is correct rounding for the numbers
// that come here.
#include "optimizer_records.cuh"

constexpr int BLOCKSIZE = 256;  // values that share an absmax
constexpr bool TWO_STATES = ALGORITHM == ADAM;
constexpr uint32 INFINITY_BITS = 0x7f800000u;

constexpr float SMALLEST = 7.888609052210118e-31f;      // 2^-100: the least absmax, and under a root
constexpr float LARGE = 1048576.0f;                     // 2^20: a larger absmax is scaled first
constexpr float LARGE_SCALE = 7.52316384526264e-37f;    // 2^-120
constexpr float SLOT_SCALE = 9.860761315262648e-32f;    // 2^-103
constexpr float MOST_NEGATIVE = -0.99f * SLOT_SCALE;    // has the code of -1; 0.99 and 1 differ

constexpr int NUM_CODES = 256;
constexpr int NUM_SLOTS = 25 << 7;
constexpr int ROW_BYTES = 8 * COPIES;  // of both maps for one code
constexpr int MAPS_BYTES = NUM_CODES * ROW_BYTES;
constexpr int MAPS_AT = 1024;  // addresses; the driver may keep what is before
constexpr int SLOTS_AT = MAPS_AT + MAPS_BYTES;
constexpr uint32 ZERO_CODES = 0x7f7f7f7fu;  // of the signed map

struct Tables {  // `tables` in optimizer_8bit.py
    uint32 maps[2][NUM_CODES];  // float32
    uint32 slots[2][NUM_SLOTS];
};

struct Arguments {
    const Record* records;  // (num_records,)
    const int64* firsts;    // (num_records,): the first run of each
    const Tables* tables;
    int64 num_runs;
    int num_records;
};

extern __shared__ __align__(16) uint8 shared[];

// -- arithmetic: rounded to nearest, subnormals kept ------------------------------------------------

__device__ float add(float a, float b) {
    float sum;
    asm("add.rn.f32 %0, %1, %2;" : "=f"(sum) : "f"(a), "f"(b));
    return sum;
}

__device__ float mul(float a, float b) { return rounded_product(a, b); }

__device__ float fma(float a, float b, float c) {
    float sum;
    asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(sum) : "f"(a), "f"(b), "f"(c));
    return sum;
}

// c - a * b. Negated in here, since the compiler's own negation flushes, which costs an instruction.
__device__ float rest(float a, float b, float c) {
    float difference;
    asm("{ .reg .f32 n; neg.f32 n, %1; fma.rn.f32 %0, n, %2, %3; }" : "=f"(difference) : "f"(a), "f"(b), "f"(c));
    return difference;
}

// For x from 2^-100 on.
__device__ float root(float x) {
    float inverse;
    asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
    float guess = mul(x, inverse);
    return fma(rest(guess, guess, x), mul(inverse, 0.5f), guess);
}

// 1/x for x from 2^-100 to 2^100.
__device__ float inverse_of(float x) {
    float guess;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(guess) : "f"(x));
    return fma(guess, rest(x, guess, 1.0f), guess);
}

__device__ uint32 magnitude_bits(float x) { return __float_as_uint(x) & 0x7fffffffu; }

__device__ uint32 warp_max(uint32 value) {
#if __CUDA_ARCH__ >= 800
    return __reduce_max_sync(FULL_WARP, value);
#else
#pragma unroll
    for (int step = WARP / 2; step; step /= 2) value = max(value, __shfl_xor_sync(FULL_WARP, value, step));
    return value;
#endif
}

// -- codes ------------------------------------------------------------------------------------------

// Addresses in shared memory are numbers here, so that the tables' are constants in the loads.
template <int OFFSET>
__device__ uint32 load_shared(uint32 address) {
    uint32 word;
    asm("ld.shared.u32 %0, [%1+%2];" : "=r"(word) : "r"(address), "n"(OFFSET));
    return word;
}

__device__ void store_shared(uint32 address, uint32 word) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}

__device__ void fill_tables(const Tables* tables) {
    if (__cvta_generic_to_shared(shared) > MAPS_AT) __trap();  // the launcher asks for MAPS_AT bytes more
    for (int i = threadIdx.x; i < MAPS_BYTES / 4; i += THREADS)
        store_shared(MAPS_AT + 4 * i, tables->maps[i / COPIES % 2][i / (2 * COPIES)]);
    for (int i = threadIdx.x; i < 2 * NUM_SLOTS; i += THREADS)
        store_shared(SLOTS_AT + 4 * i, tables->slots[0][i]);
    __syncthreads();
}

// Byte i of `word` in the map of which this lane's column begins at `column` bytes.
__device__ float decode(uint32 word, int i, uint32 column) {
    uint32 address;
    if constexpr (ROW_BYTES == 256) address = __byte_perm(word, column, 0x5504 | i << 4);
    else address = (word >> (8 * i) & 255) * ROW_BYTES + column;
    return __uint_as_float(load_shared<MAPS_AT>(address));
}

__device__ uint32 permute(uint32 a, uint32 b, uint32 selector) {
    uint32 bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(a), "r"(b), "r"(selector));
    return bytes;
}

// Bits 16 to 23 of four words.
__device__ uint32 third_bytes(const uint32 (&words)[4]) {
    return permute(permute(words[0], words[1], 0x62), permute(words[2], words[3], 0x62), 0x5410);
}

// The signs of four numbers: bytes of ones for negative ones.
__device__ uint32 sign_bytes(const uint32 (&words)[4]) {
    return permute(permute(words[0], words[1], 0xfb), permute(words[2], words[3], 0xfb), 0x5410);
}

// `inverse` is that of absmax, times SLOT_SCALE.
template <int MAP>
__device__ uint32 encode_four(const float* state, float inverse) {
    uint32 bits[4], found[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        float scaled = state[i] * inverse;  // flushed
        if constexpr (MAP == 0) scaled = fmaxf(scaled, MOST_NEGATIVE);
        bits[i] = __float_as_uint(scaled);
        found[i] = bits[i] + load_shared<SLOTS_AT + MAP * NUM_SLOTS * 4>(bits[i] >> 14 & 0x3ffcu);
    }
    uint32 codes = third_bytes(found);
    if constexpr (MAP == 0) {  // c is the code of a positive value, 254 - c that of its negative
        uint32 negative = sign_bytes(bits);
        codes = (codes ^ negative) - (negative & 0x01010101u);
    }
    return codes;
}

// -- states of a lane -------------------------------------------------------------------------------

template <int MAP>
struct State8 {
    using Value = uint8;
    uint32 words[2];
    float absmax;

    __device__ void load(const uint8* source, const float* absmax_at, int num, bool wide) {
        if (wide) {
            uint2 both = __ldcs(reinterpret_cast<const uint2*>(source));
            words[0] = both.x, words[1] = both.y;
        } else {
            words[0] = words[1] = MAP == 0 ? ZERO_CODES : 0;
#pragma unroll
            for (int i = 0; i < OCTET; i++)
                if (i < num) words[i / 4] = words[i / 4] & ~(255u << 8 * (i % 4)) | uint32(source[i]) << 8 * (i % 4);
        }
        absmax = *absmax_at;
    }

    // The states times `factor`, as two numbers each: the product is left to who adds to it.
    __device__ float factors(float factor, float (&x)[OCTET]) const {
        uint32 column = (threadIdx.x % COPIES + MAP * COPIES) * 4;
#pragma unroll
        for (int i = 0; i < OCTET; i++) x[i] = decode(words[i / 4], i % 4, column);
        return mul(absmax, factor);
    }

    // `largest` has the bits of the lane's largest magnitude; `x` may be scaled.
    __device__ static void store(float (&x)[OCTET], uint32 largest, uint8* target, float* absmax_at, int num,
                                 bool wide) {
        float absmax = __uint_as_float(warp_max(largest)), divisor = absmax;
        if (absmax > LARGE) {
            divisor = mul(absmax, LARGE_SCALE);
#pragma unroll
            for (int i = 0; i < OCTET; i++) x[i] = mul(x[i], LARGE_SCALE);
        }
        bool is_zero = absmax < SMALLEST;
        float inverse = is_zero ? 0.0f : inverse_of(divisor) * SLOT_SCALE;
        uint32 first = encode_four<MAP>(x, inverse), second = encode_four<MAP>(x + 4, inverse);
        if (wide) {
            __stcs(reinterpret_cast<uint2*>(target), make_uint2(first, second));
        } else {
#pragma unroll
            for (int i = 0; i < OCTET; i++)
                if (i < num) target[i] = uint8((i < 4 ? first : second) >> 8 * (i % 4));
        }
        if (threadIdx.x % WARP == 0) *absmax_at = is_zero ? 0.0f : absmax;
    }
};

template <int>
struct State32 {
    using Value = uint32;
    Octet<F32> octet;

    __device__ void load(const uint32* source, const float*, int num, bool wide) {
        if (wide) octet.load(source);
        else octet.load_partly(source, num);
    }

    __device__ float factors(float factor, float (&x)[OCTET]) const {
        octet.widen(x);
        return factor;
    }

    __device__ static void store(float (&x)[OCTET], uint32, uint32* target, float*, int num, bool wide) {
        Octet<F32> octet;
        octet.narrow(x);
        if (wide) octet.store(target);
        else octet.store_partly(target, num);
    }
};

#if STATE_BITS == 8
using State1 = State8<0>;
using State2 = State8<1>;
#else
using State1 = State32<0>;
using State2 = State32<1>;
#endif

// -- a lane's part of a block -----------------------------------------------------------------------

struct Place {
    SOURCE::Bits* values;
    const SOURCE::Bits* gradient;
    State1::Value* state1;
    State2::Value* state2;
    float* absmax1;
    float* absmax2;
    int left;      // values of the lane's and behind them in the run
    bool aligned;  // for words of 16 bytes, of 8 in uint8

    __device__ Place(const Record& record, int64 first) {
        int64 lane_first = first + threadIdx.x % WARP * OCTET;
        values = reinterpret_cast<SOURCE::Bits*>(record.values) + lane_first;
        gradient = reinterpret_cast<const SOURCE::Bits*>(record.gradient) + lane_first;
        state1 = reinterpret_cast<State1::Value*>(record.state1) + lane_first;
        state2 = reinterpret_cast<State2::Value*>(record.state2) + lane_first;
        absmax1 = reinterpret_cast<float*>(record.absmax1) + first / BLOCKSIZE;
        absmax2 = reinterpret_cast<float*>(record.absmax2) + first / BLOCKSIZE;
        left = int(min(record.count - lane_first, int64(RUN * BLOCKSIZE)));
        uint64 states = (record.state1 | record.state2) * (STATE_BITS == 8 ? 2 : 1);
        aligned = ((record.values | record.gradient | states) & 15) == 0;
    }

    __device__ void advance() {
        values += BLOCKSIZE;
        gradient += BLOCKSIZE;
        state1 += BLOCKSIZE;
        absmax1++;
        if constexpr (TWO_STATES) {
            state2 += BLOCKSIZE;
            absmax2++;
        }
        left -= BLOCKSIZE;
    }
};

// Eight values on the way from their old states to the new ones.
struct Update {
    float m[OCTET], v[OCTET];
    float direction[OCTET];     // LION: its sign is the step's
    uint32 largest1, largest2;  // bits of the largest magnitudes of m and v

    __device__ void begin(const State1& state1, const State2& state2, const float (&g)[OCTET],
                          const float (&p)[OCTET], const Scalars& scalars) {
        float decay1 = state1.factors(scalars.beta1, m), decay2 = 0.0f;
        if constexpr (TWO_STATES) decay2 = state2.factors(scalars.beta2, v);
        if constexpr (ALGORITHM == LION) decay2 = state1.factors(scalars.beta2, v);
#pragma unroll
        for (int i = 0; i < OCTET; i++) {
            if constexpr (ALGORITHM == MOMENTUM) {
                m[i] = fma(m[i], decay1, fma(p[i], scalars.epsilon, g[i]));
            } else if constexpr (ALGORITHM == LION) {
                direction[i] = fma(m[i], decay1, mul(g[i], scalars.keep1));
                m[i] = fma(m[i], decay2, mul(g[i], scalars.keep2));
            } else {
                m[i] = fma(m[i], decay1, mul(g[i], scalars.keep1));
                v[i] = fma(v[i], decay2, mul(mul(g[i], scalars.keep2), g[i]));
            }
        }
        measure();
    }

    // Where m is not finite, v is not either; the bits of NaN are above those of infinity.
    __device__ void measure() {
        largest1 = largest2 = 0;
#pragma unroll
        for (int i = 0; i < OCTET; i++) {
            if constexpr (TWO_STATES) {
                largest1 = __float_as_uint(fmaxf(__uint_as_float(largest1), fabsf(m[i])));
                largest2 = max(largest2, __float_as_uint(v[i]));
            } else {
                largest1 = max(largest1, magnitude_bits(m[i]));
            }
        }
    }

    __device__ bool is_bad(int i) const {
        return max(magnitude_bits(m[i]), TWO_STATES ? magnitude_bits(v[i]) : 0) >= INFINITY_BITS;
    }

    __device__ float updated(int i, float p, const Scalars& scalars) const {
        if constexpr (ALGORITHM == MOMENTUM) return fma(m[i], scalars.step_size, p);
        float step;
        if constexpr (ALGORITHM == LION) {
            uint32 sign = __float_as_uint(direction[i]) & 0x80000000u;
            uint32 bits = __float_as_uint(scalars.step_size) ^ sign;
            step = magnitude_bits(direction[i]) ? __uint_as_float(bits) : 0.0f;
        } else {
            float spread = add(root(fmaxf(v[i], SMALLEST)), scalars.epsilon);
            step = mul(mul(m[i], inverse_of(spread)), scalars.step_size);
        }
        return fma(p, scalars.decay, step);
    }
};

__device__ void update_block(const Place& place, const Scalars& scalars) {
    const int num = min(place.left, OCTET);
    const bool wide = place.aligned & (place.left >= OCTET);
    Octet<SOURCE> gradient, values;
    State1 state1;
    State2 state2;
    if (wide) {
        gradient.load(place.gradient);
        values.load(place.values);
    } else {
        gradient.load_partly(place.gradient, num);
        values.load_partly(place.values, num);
    }
    state1.load(place.state1, place.absmax1, num, wide);
    if constexpr (TWO_STATES) state2.load(place.state2, place.absmax2, num, wide);

    float g[OCTET], p[OCTET];
    gradient.widen(g);
    values.widen(p);
    Update update;
    update.begin(state1, state2, g, p, scalars);
    uint32 bad = 0;  // values whose states are not finite: these become zero, the values stay
    if (max(update.largest1, update.largest2) >= INFINITY_BITS) {
#pragma unroll
        for (int i = 0; i < OCTET; i++) {
            bool is_bad = update.is_bad(i);
            bad |= uint32(is_bad) << i;
            update.m[i] = is_bad ? 0.0f : update.m[i];
            if constexpr (TWO_STATES) update.v[i] = is_bad ? 0.0f : update.v[i];
        }
        update.measure();
    }
#pragma unroll
    for (int i = 0; i < OCTET; i++) p[i] = update.updated(i, p[i], scalars);
    if (bad) {
        float old[OCTET];
        values.widen(old);
#pragma unroll
        for (int i = 0; i < OCTET; i++) p[i] = bad >> i & 1 ? old[i] : p[i];
    }
    values.narrow(p);
    if (wide) values.store(place.values);
    else values.store_partly(place.values, num);
    State1::store(update.m, update.largest1, place.state1, place.absmax1, num, wide);
    if constexpr (TWO_STATES) State2::store(update.v, update.largest2, place.state2, place.absmax2, num, wide);
}

// The last tensor from `tensor` on whose first run is `run` or before.
__device__ int find_tensor(const Arguments& args, int64 run, int tensor) {
    while (true) {
        int next = tensor + 1 + threadIdx.x % WARP;
        bool begins = next < args.num_records && args.firsts[next] <= run;
        int count = __popc(__ballot_sync(FULL_WARP, begins));
        tensor += count;
        if (count < WARP) return tensor;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) optimizer_8bit(const __grid_constant__ Arguments args) {
    if constexpr (STATE_BITS == 8) fill_tables(args.tables);
    constexpr int WARPS = THREADS / WARP;
    int tensor = 0;
    for (int64 run = int64(blockIdx.x) * WARPS + threadIdx.x / WARP; run < args.num_runs;
         run += int64(gridDim.x) * WARPS) {
        tensor = find_tensor(args, run, tensor);
        const Record& record = args.records[tensor];
        if (record.gradient == 0) continue;
        const Scalars scalars = record.scalars;
        int64 first = (run - args.firsts[tensor]) * (RUN * BLOCKSIZE);
        int64 blocks = (record.count - first + BLOCKSIZE - 1) / BLOCKSIZE;
        Place place(record, first);
#pragma unroll 1
        for (int i = 0; i < RUN && i < blocks; i++) {
            update_block(place, scalars);
            place.advance();
        }
    }
}

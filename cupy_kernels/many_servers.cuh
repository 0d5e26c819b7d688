// What the warps do that do not multiply, in products of many tokens (see linear_many.cu): they make the values of
// 4-bit codes, and one of them has the copy engine bring tokens and packed weights and store results.
#pragma once

__device__ inline void store_words(uint32 at, const uint32 (&words)[4]) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(words[0]), "r"(words[1]), "r"(words[2]),
                 "r"(words[3])
                 : "memory");
}

// What all 16 codes are worth where this is absmax, as dequantizing has it.
__device__ inline void store_values(uint32 at, float absmax) {
    uint32 lower[4], upper[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        auto value = [&](int j) { return rounded_product(value_of(4 * i + j), absmax); };
        const uint32 first = ACTIVATION::narrow_pair(value(0), value(1));
        const uint32 second = ACTIVATION::narrow_pair(value(2), value(3));
        lower[i] = __byte_perm(first, second, 0x6420);
        upper[i] = __byte_perm(first, second, 0x7531);
    }
    store_words(at, lower);
    store_words(at + PLANE_BYTES, upper);
}

// Maps of nested absmax, of all layers. By all threads.
__device__ inline void fill_maps(const ManyArguments& args, const Ring& ring) {
#if NESTED
#pragma unroll
    for (int i = 0; i < NUM_WEIGHTS; i++) {
        const float* map = args.layers.weights[i].nested_code;
        if (map == nullptr || threadIdx.x >= 256) continue;
        store_word(ring.map(i) + threadIdx.x * sizeof(float), __float_as_uint(__ldg(map + threadIdx.x)));
    }
#endif
}

// absmax of one row in a chunk's blocks of 64.
struct RowScales {
    float values[BLOCKS];  // if absmax is not nested
    float nested_absmax;
    uint32 codes;          // of all four

    // From block `first` of the weight on, a multiple of four: codes of four blocks have one nested absmax.
    __device__ void load(const ManyArguments& args, const Weight& weight, uint32 first) {
        const int shift = args.layers.blocksize_log2 - 6;
#if NESTED
        nested_absmax = __ldg(weight.nested_absmax + (first >> shift) / NESTED_BLOCKSIZE);
        if (shift == 0 && (reinterpret_cast<uint64>(weight.absmax_codes) & 3) == 0) {
            codes = __ldg(reinterpret_cast<const uint32*>(weight.absmax_codes + first));
        } else {
            codes = 0;
#pragma unroll
            for (int b = 0; b < BLOCKS; b++)
                codes |= uint32(__ldg(weight.absmax_codes + ((first + b) >> shift))) << 8 * b;
        }
#else
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) values[b] = __ldg(weight.absmax + ((first + b) >> shift));
#endif
    }

    __device__ float decode(int b, uint32 map, float offset) const {
#if NESTED
        const uint32 code = codes >> 8 * b & 0xff;
        const float value = __uint_as_float(load_word(map + code * uint32(sizeof(float))));
        return flushed_product(value, nested_absmax) + offset;
#else
        return values[b];
#endif
    }
};

// A warp, and its lane. What one thread does alone is short: a warp whose lanes have gone different ways may stay
// divided, and does all twice.
struct Server {
    const Work& work;
    Ring ring;
    int warp, lane;         // of SERVERS / WARP; the first has the copy engine
    int row;                // of a tile, whose values the lane makes
    int round = 0;          // of the ring, over all tiles
    int before = -1;        // the tile before, whose results are handed over, if any
    uint32 handed_phase = 0;
    RowScales scales;

    __device__ Server(const Work& work, Ring ring, int warp, int lane)
        : work(work), ring(ring), warp(warp), lane(lane) {
        row = warp * WARP + lane % 16 * 2 + lane / 16;  // so that a quarter of a warp stores to all banks
    }

    __device__ bool copies() const { return warp == 0; }

    __device__ void serve_tiles() {
        if (IS_4BIT) load_scales(work.at(work.first()), 0);
        if (copies()) wait_for_prerequisites();
        for (int i = work.first(); work.is_there(i); i = work.next(i)) {
            const Tile tile = work.at(i);
            if (IS_4BIT || copies()) serve_tile(tile, i);
            if (tile.is_shared) {  // as `merge`
                __syncwarp();
                meet_cluster();
                meet_cluster();
                __syncthreads();
            }
        }
        if (HANDS_IN_RING && copies()) wait_until_written();
    }

    // Scales of the tile's first chunk are there, and those of the next one's when it ends.
    __device__ void serve_tile(const Tile& tile, int number) {
        const int after = work.next(number);
        const Tile next = work.at(work.is_there(after) ? after : number);
        const float offset = IS_4BIT && NESTED ? __ldg(work.args.layers.weights[tile.which].nested_offset) : 0.0f;
        bool has_results = HANDS_IN_RING && before >= 0;
#pragma unroll 1
        for (int chunk = tile.first_chunk; chunk < tile.end_chunk; chunk++) {
            float absmax[BLOCKS];
            if constexpr (IS_4BIT) {
#pragma unroll
                for (int b = 0; b < BLOCKS; b++) absmax[b] = scales.decode(b, ring.map(tile.which), offset);
                const bool ends = chunk + 1 == tile.end_chunk;
                load_scales(ends ? next : tile, ends ? 0 : chunk + 1 - tile.first_chunk);
            }
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                const int stage = ring.stage(b), group = b - (BLOCKS - GROUPS);
                if (round > 0) sleep_for_phase(ring.empty(stage), (round - 1) % 2);
                if (copies()) {
                    if (has_results && group >= 0) store_results(work.at(before), group);
                    if (lane == 0) bring_block(tile, chunk, b);
                    __syncwarp();
                }
                if constexpr (IS_4BIT) {
                    store_values(ring.values(stage, row), absmax[b]);
                    arrive(ring.full(stage));
                }
            }
            if (has_results) handed_phase ^= 1;
            has_results = false;
            if (ring.advance()) round++;
        }
        before = work.hands_over(number) ? number : -1;
    }

    __device__ void load_scales(const Tile& tile, int chunk) {
        const Weight& weight = work.args.layers.weights[tile.which];
        const uint32 first = min(tile.row + row, weight.rows - 1) * (work.args.chunks * BLOCKS);
        scales.load(work.args, weight, first + (tile.first_chunk + chunk) * BLOCKS);
    }

    __device__ void bring_block(const Tile& tile, int chunk, int b) const {
        const int stage = ring.stage(b), column = chunk * CHUNK + b * BLOCK;
        expect_bytes(ring.full(stage), X_BYTES + PACKED_BYTES);
        copy_box(ring.tokens(stage), &work.args.tokens, column, tile.token, ring.full(stage));
        copy_box(ring.packed(stage), &work.args.packed[tile.which], column * BITS / 8, tile.row, ring.full(stage));
    }

    // Until they have been read, so that their place is free.
    __device__ void store_results(const Tile& tile, int group) const {
        sleep_for_phase(ring.handed(group), handed_phase);
        if (lane == 0)
            store_box(&work.args.outs[tile.which], ring.results(group), tile.row + group * GROUP_ROWS, tile.token);
        wait_until_read();
        __syncwarp();
    }
};

// Stores results that are not where the ring is: by one thread that does nothing else.
struct Storer {
    const Work& work;
    Ring ring;

    __device__ void store_tiles() const {
        uint32 phase = 0;
#pragma unroll 1
        for (int i = work.first(); work.hands_over(i); i = work.next(i), phase ^= 1) {
            const Tile tile = work.at(i);
#pragma unroll 1
            for (int group = 0; group < GROUPS; group++) {
                sleep_for_phase(ring.handed(group), phase);
                store_box(&work.args.outs[tile.which], ring.results(group),
                          tile.row + group * GROUP_ROWS, tile.token);
                wait_until_read();
                arrive_alone(ring.fetched(group));
            }
        }
        wait_until_written();
    }
};

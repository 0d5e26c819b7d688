// Products of many tokens (more than 64) with one to three packed linear layers (Hopper alone): y = x W^T + bias,
// or also + residual, straight on the layout of the files.
//
// Defines: ACTIVATION (Bf16, F16), FORMAT (NF4, FP4, INT8), NESTED (0, 1), TOKENS (of a tile: 128, 192, 256),
// SPLIT (thread blocks that share a tile: 1, 2); LINE (of 256 columns, in bytes), NUM_WEIGHTS (3), EPILOGUE (0),
// UNIT (64) and WARPGROUPS (1) as the files that all products share want them.
//
// A tile is 128 rows of weights times TOKENS tokens. Two groups of four warps have 64 rows each: they make 16-bit
// values of a block of 64 columns, all in registers, and give them to the tensor cores, which read the tokens from
// shared memory; while these have one group's block the other group makes its next. 4-bit weights are looked up, scaled
// in float32 and rounded, as dequantizing does; INT8 codes are exact, and sums are scaled at the end. Sums stay in
// registers. A third group gives up registers. One of its threads has the copy engine bring tokens and packed weights,
// two warps load and decode absmax, and one thread has the copy engine store results that the other groups put into
// shared memory.
//
// Groups begin in turns, and the next is let in only when most of the products before are through: tensor cores that
// have both groups' products at once are slower.
//
// Thread blocks take every so many tiles, columns that SPLIT blocks of a cluster share: at the end each of them
// gives the others the sums of their tokens, over shared memory, and adds up its own in a fixed order.
//
// Bytes read per weight and tile: 1/2 + 4/blocksize, or 1/2 + 1/blocksize when nested; 1. Nothing is written but
// y.
#include "source_dtypes.cuh"
#include "code_tables.cuh"
#include "products.cuh"
#include "barriers.cuh"
#include "packed_lines.cuh"
#include "linear_layers.cuh"
#include "warpgroups.cuh"
#include "token_copies.cuh"
#include "clusters.cuh"

constexpr int WARPS = 8;                        // that multiply
constexpr int WORKERS = WARPS * WARP;
constexpr int GROUPS = 2, GROUP_WARPS = WARPS / GROUPS;
constexpr int THREADS = WORKERS + 4 * WARP;
constexpr int WORKER_REGISTERS = 224, OTHER_REGISTERS = 56;
constexpr int ROWS = WARPS * FRAGMENT_ROWS;     // of a tile
constexpr int GROUP_ROWS = ROWS / GROUPS;
constexpr int TOKEN_TILES = TOKENS / 8;
constexpr int DEPTH = TOKENS > 128 || IS_4BIT ? 1 : 2;  // chunks that the ring holds
constexpr int STAGES = DEPTH * BLOCKS;
constexpr int SCALERS = IS_4BIT ? 2 : 0;        // warps that load and decode absmax
constexpr int COPIER = WARPS, STORER = WARPS + 3;  // warps of one thread each
constexpr int SCALE_TURNS = 2;                  // chunks whose scales are there
constexpr bool HANDS_OVER = TOKENS == 256 && SPLIT == 1;  // results to the copy engine, if it can store them
constexpr bool HANDS_IN_RING = HANDS_OVER && IS_4BIT;     // where tokens were; INT8 has room besides
static_assert(!HANDS_IN_RING || DEPTH == 1, "a tile's last blocks are in the ring's last places");
constexpr int X_BYTES = TOKENS * BLOCK * 2;     // of a stage
static_assert(GROUP_ROWS == BLOCK, "a group's results have the room of a stage's tokens");
constexpr int LINE_BYTES = BLOCK * BITS / 8;    // of a row's block
constexpr int PACKED_BYTES = ROWS * LINE_BYTES;
constexpr int PART = TOKEN_TILES / SPLIT;       // of a block's sums, once they are merged
static_assert((IS_4BIT || FORMAT == INT8) && UNIT == 64 && BLOCKS == 4, "what the copies and lookups are written for");

// -- shared memory: the table of 4-bit pairs, a copy for each lane; the ring; scales; results; barriers. The ring is also
// where sums are merged.
constexpr int VALUES_STRIDE = WARP * sizeof(float2);
constexpr int X_AT = IS_4BIT ? 256 * VALUES_STRIDE : 0;
constexpr int PACKED_AT = X_AT + STAGES * X_BYTES;
constexpr int SCALES_AT = PACKED_AT + STAGES * PACKED_BYTES;
constexpr int SCALES_BYTES = ROWS * BLOCKS * sizeof(float);  // of a chunk: [block][row]
constexpr int RESULTS_AT = SCALES_AT + (IS_4BIT ? SCALE_TURNS * SCALES_BYTES : 0);
constexpr int BARRIERS_AT = RESULTS_AT + (HANDS_OVER && !HANDS_IN_RING ? GROUPS * X_BYTES : 0);
static_assert((SPLIT - 1) * PART * WARPS * WARP * sizeof(float4) <= STAGES * X_BYTES, "room for the sums of others");

struct ManyArguments {
    TokenMap tokens;                 // boxes of TOKENS
    TokenMap packed[NUM_WEIGHTS];    // (rows, bytes of a row), in boxes of ROWS times LINE_BYTES
    TokenMap outs[NUM_WEIGHTS];      // if `has_outs`: (tokens, rows), in boxes of TOKENS times GROUP_ROWS
    Arguments layers;                // tiles: of rows; the first_tile of a layer that is not there is behind all
    int token_tiles;
    int chunks;                      // of a row: columns / 256
    int has_outs;                    // the copy engine can store all outputs
};

// Both values of the byte of `word` that `selected` names, for which the instruction has the table's address: the byte
// is the second of an entry's place, the lane's copy the first, and the block's rank in the cluster the last.
__device__ inline float2 look_up_values(uint32 word, uint32 selected, uint32 lane_offset) {
    float2 values;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2+%3];"
                 : "=f"(values.x), "=f"(values.y)
                 : "r"(__byte_perm(word, lane_offset, selected)), "n"(DYNAMIC_SHARED_ADDRESS));
    return values;
}

__device__ inline float2 load_scales(uint32 at) {
    float2 scales;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(scales.x), "=f"(scales.y) : "r"(at) : "memory");
    return scales;
}

__device__ inline void store_scales(uint32 at, const float (&scales)[2]) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(scales[0]), "f"(scales[1]) : "memory");
}

__device__ inline void fill_values(uint8* shared) {
    const int lane = threadIdx.x % WARP;
    const float own = (FORMAT == FP4 ? fp4_code : nf4_code)[lane % 16];
    for (int byte = threadIdx.x / WARP; byte < 256; byte += WARPS) {
        const float first = __shfl_sync(FULL_WARP, own, byte >> 4), second = __shfl_sync(FULL_WARP, own, byte & 15);
        reinterpret_cast<float2*>(shared + byte * VALUES_STRIDE)[lane] = make_float2(first, second);
    }
}

// absmax of two rows in one of a chunk's 4-bit blocks.
struct Scales {
    float values[2];  // absmax, or the nested absmax of it
    uint32 codes[2];

    __device__ void load(const ManyArguments& args, const Weight& weight, int row, int chunk, int b) {
        const uint32 column_block = chunk * BLOCKS + b, row_blocks = args.chunks * BLOCKS;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const uint32 block =
                (min(row + i, weight.rows - 1) * row_blocks + column_block) >> (args.layers.blocksize_log2 - 6);
#if NESTED
            codes[i] = __ldg(weight.absmax_codes + block);
            values[i] = __ldg(weight.nested_absmax + block / NESTED_BLOCKSIZE);
#else
            values[i] = __ldg(weight.absmax + block);
#endif
        }
    }

    __device__ void decode(const Weight& weight, float offset) {
#if NESTED
#pragma unroll
        for (int i = 0; i < 2; i++)
            values[i] = flushed_product(__ldg(weight.nested_code + codes[i]), values[i]) + offset;
#endif
    }
};

// A tile: which weight it belongs to, its first row and its first token.
struct Tile {
    int which, row, token;

    __device__ Tile(const ManyArguments& args, int tile) : which(0) {
        const int row_tile = tile / args.token_tiles;
        while (which + 1 < NUM_WEIGHTS && row_tile >= args.layers.weights[which + 1].first_tile) which++;
        row = (row_tile - args.layers.weights[which].first_tile) * ROWS;
        token = tile % args.token_tiles * TOKENS;
    }
};

// What a thread block does; `rank` is its place in the cluster.
struct Work {
    const ManyArguments& args;
    int rank;

    __device__ int first_tile() const { return blockIdx.x / SPLIT; }
    __device__ int tiles_apart() const { return gridDim.x / SPLIT; }
    __device__ int first_chunk() const { return rank * args.chunks / SPLIT; }
    __device__ int end_chunk() const { return (rank + 1) * args.chunks / SPLIT; }
    // Results of a tile, unless it is the last: then there is nothing to do meanwhile.
    __device__ bool hands_over(int tile) const {
        return HANDS_OVER && args.has_outs && tile + tiles_apart() < args.layers.num_tiles;
    }
};

// A block of a chunk always has one of DEPTH places; chunks take these in turn.
struct Ring {
    uint8* shared;
    int turn = 0;

    __device__ int stage(int b) const { return turn * BLOCKS + b; }
    __device__ int stage_before(int b) const {
        return b > 0 ? stage(b - 1) : (turn ^ (DEPTH - 1)) * BLOCKS + BLOCKS - 1;
    }

    // Whether what follows is a new round of the whole ring.
    __device__ bool advance() {
        turn ^= DEPTH - 1;
        return turn == 0;
    }

    __device__ uint64* full(int stage) const { return reinterpret_cast<uint64*>(shared + BARRIERS_AT) + stage; }
    __device__ uint64* empty(int stage) const { return full(STAGES + stage); }
    __device__ uint64* scales_full(int turn) const { return full(2 * STAGES + turn); }
    __device__ uint64* scales_empty(int turn) const { return scales_full(SCALE_TURNS + turn); }
    __device__ uint32 scales(int turn, int b, int row) const {
        return shared_address(shared) + SCALES_AT + turn * SCALES_BYTES + (b * ROWS + row) * uint32(sizeof(float));
    }
    // Of a group's results: they are there; they have been read.
    __device__ uint64* handed(int group) const { return scales_empty(SCALE_TURNS + group); }
    __device__ uint64* fetched(int group) const { return handed(GROUPS + group); }
    __device__ static int stage_of_results(int group) { return STAGES - GROUPS + group; }
    __device__ uint8* results(int group) const {
        return HANDS_IN_RING ? tokens(stage_of_results(group)) : shared + RESULTS_AT + group * X_BYTES;
    }
    __device__ uint8* tokens(int stage) const { return shared + X_AT + stage * X_BYTES; }
    __device__ uint8* packed(int stage) const { return shared + PACKED_AT + stage * PACKED_BYTES; }
};

// Brings what the tiles need, by one thread.
struct Copier {
    const Work& work;
    Ring ring;
    int round = 0;  // of the ring, over all tiles
    int tiles = 0;

    __device__ void bring_tile(const Tile& tile) {
#pragma unroll 1
        for (int chunk = work.first_chunk(); chunk < work.end_chunk(); chunk++) {
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                const int stage = ring.stage(b), group = b - ring.stage_of_results(0);
                if (round > 0) sleep_for_phase(ring.empty(stage), (round - 1) % 2);
                if (HANDS_IN_RING && group >= 0 && chunk == 0 && tiles > 0 && work.args.has_outs)
                    sleep_for_phase(ring.fetched(group), (tiles - 1) % 2);
                expect_bytes(ring.full(stage), X_BYTES + PACKED_BYTES);
                const int column = chunk * CHUNK + b * BLOCK;
                copy_box(ring.tokens(stage), &work.args.tokens, column, tile.token, ring.full(stage));
                copy_box(ring.packed(stage), &work.args.packed[tile.which], column * BITS / 8, tile.row,
                         ring.full(stage));
            }
            if (ring.advance()) round++;
        }
        tiles++;
    }
};

// Stores the results that groups hand over, by one thread.
struct Storer {
    const Work& work;
    Ring ring;

    __device__ void store_tiles() const {
        int phase = 0;
#pragma unroll 1
        for (int i = work.first_tile(); work.hands_over(i); i += work.tiles_apart(), phase ^= 1) {
            const Tile tile(work.args, i);
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

// A warp that loads and decodes the scales of half of a tile's rows, a chunk at a time: lane `member` of a quad those
// of block `member`.
struct Scaler {
    static constexpr int PASSES = ROWS / (SCALERS > 0 ? SCALERS : 1) / FRAGMENT_ROWS;
    const Work& work;
    Ring ring;
    int lane, half;
    int turn = 0, round = 0;

    __device__ void make_tile(const Tile& tile) {
        const Weight& weight = work.args.layers.weights[tile.which];
        const float offset = NESTED ? __ldg(weight.nested_offset) : 0.0f;
#pragma unroll 1
        for (int chunk = work.first_chunk(); chunk < work.end_chunk(); chunk++) {
            Scales scales[PASSES];
#pragma unroll
            for (int i = 0; i < PASSES; i++)
                scales[i].load(work.args, weight, tile.row + row_of(i), chunk, lane % 4);
#pragma unroll
            for (int i = 0; i < PASSES; i++) scales[i].decode(weight, offset);
            if (round > 0) sleep_for_phase(ring.scales_empty(turn), (round - 1) % 2);
#pragma unroll
            for (int i = 0; i < PASSES; i++)
                store_scales(ring.scales(turn, lane % 4, row_of(i)), scales[i].values);
            arrive(ring.scales_full(turn));
            turn ^= 1;
            if (turn == 0) round++;
        }
    }

    __device__ int row_of(int i) const { return (half * PASSES + i) * FRAGMENT_ROWS + lane / 4 * 2; }
};

// A warp that multiplies, and its lane.
struct Worker {
    const ManyArguments& args;
    const Work& work;
    Ring ring;
    int warp, lane;
    int group, member;     // of a lane quad, and in it
    int own_row;           // the first of the lane's two rows, in the tile
    uint32 lane_offset, own_byte;
    uint32 phase = 0;      // of the ring
    float sums[TOKEN_TILES][4];
    uint32 pairs[2][4][4];  // of the block that is multiplied and of the next: [16 columns][fragment's registers]
    uint32 scales_turn = 0, scales_phase = 0, results_phase = 0;
    bool is_there;          // the next block, for certain
    float row_bias[2], row_scale[2];  // of the lane's rows

    __device__ Worker(const ManyArguments& args, const Work& work, Ring ring, int warp, int lane)
        : args(args), work(work), ring(ring), warp(warp), lane(lane) {
        group = lane / 4;
        member = lane % 4;
        own_row = warp * FRAGMENT_ROWS + 2 * group;
        // An address in shared memory has the block's rank in the cluster in its uppermost byte.
        lane_offset = lane * sizeof(float2) | shared_address(ring.shared) >> 24 << 16;
        own_byte = 0x6504u | member << 4;
    }

    // The lane's values of block `b`, as pairs. `pass` is called when it is time for the other group's products; of INT8
    // it has been time before.
    template <class Pass>
    __device__ void make_pairs(int b, Pass pass) {
        const int stage = ring.stage(b);
        if (!is_there) sleep_for_phase(ring.full(stage), phase);
        const uint32 line = shared_address(ring.packed(stage)) + own_row * LINE_BYTES;
        if constexpr (IS_4BIT) {
            if (b == 0) sleep_for_phase(ring.scales_full(scales_turn), scales_phase);
            const float2 scales = load_scales(ring.scales(scales_turn, b, own_row));
            look_up_codes(line, scales, pairs[b % 2], pass);
            if (b == BLOCKS - 1) {
                arrive(ring.scales_empty(scales_turn));
                scales_turn ^= 1;
                if (scales_turn == 0) scales_phase ^= 1;
            }
        } else {
            widen_codes(line, pairs[b % 2]);
        }
    }

    // The copy engine swaps both halves of a line in every other four lines.
    template <class Pass>
    __device__ void look_up_codes(uint32 line, float2 scales, uint32 (&into)[4][4], Pass pass) const {
        line += own_row / 4 % 2 * 16;
        uint4 lines[2][2];
#pragma unroll
        for (int half = 0; half < 2; half++) {
            lines[half][0] = load_words<0>(line ^ half * 16);
            lines[half][1] = load_words<LINE_BYTES>(line ^ half * 16);
        }
        pass();
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint4 first = lines[half][0], second = lines[half][1];
            const uint32 words[2][4] = {{first.x, first.y, first.z, first.w},
                                        {second.x, second.y, second.z, second.w}};
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float2 values = look_up_values(words[i % 2][i / 2], own_byte, lane_offset);
                const float scale = i % 2 ? scales.y : scales.x;
                into[2 * half + i / 4][i % 4] = ACTIVATION::narrow_pair(rounded_product(values.x, scale),
                                                                        rounded_product(values.y, scale));
            }
        }
    }

    // Of 16 columns, 16 bytes, a lane has two and the two that are eight further. The copy engine swaps these
    // quarters of a line by the number of its pair.
    __device__ void widen_codes(uint32 line, uint32 (&into)[4][4]) const {
        const uint32 own_half = member % 2 ? 0x7632u : 0x5410u;
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const uint32 at = line + (k ^ own_row / 2 % 4) * 16 + member / 2 * 4;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const uint32 first = load_word(at + i * LINE_BYTES), second = load_word(at + i * LINE_BYTES + 8);
                widen_int8<ACTIVATION>(__byte_perm(first, second, own_half), into[k][i], into[k][2 + i]);
            }
        }
    }

    // Groups of warps begin in turns, of which the first group has the first.
    __device__ void await_turn() const {
        asm volatile("bar.sync %0, %1;" ::"r"(2 + warp / 4), "n"(WORKERS) : "memory");
    }

    __device__ void pass_turn() const {
        asm volatile("bar.arrive %0, %1;" ::"r"(3 - warp / 4), "n"(WORKERS) : "memory");
    }

    // The products of block `b`. A warp is held up before the third until the first has ended: what it does meanwhile
    // is free.
    template <class Meanwhile>
    __device__ void begin_block(int b, bool adds, Meanwhile meanwhile) {
        const uint32 tokens = describe_swizzled_tokens(ring.tokens(ring.stage(b)));
        begin_products();
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if (k == 2) meanwhile();
            multiply_group<ACTIVATION>(sums, pairs[b % 2][k][0], pairs[b % 2][k][1], pairs[b % 2][k][2],
                                       pairs[b % 2][k][3], swizzled_tokens(tokens + k * 2), k > 0 || adds);
        }
        commit_products();
    }

    // The products of the block before block `b` have ended, which was in `stage`.
    __device__ void end_block_before(int b, int stage, bool is_one) {
#pragma unroll
        for (int i = 0; i < 16; i++) settle(pairs[(b + 1) % 2][i / 4][i % 4]);
        arrive_if(ring.empty(stage), is_one);
    }

    // What is to be known of block `b` before its weights are read.
    __device__ void look_ahead(int b) {
        is_there = has_phase_ended(ring.full(ring.stage(b)), phase);
    }

    __device__ void multiply_tile(const Tile& tile) {
        const int first = work.first_chunk(), end = work.end_chunk();
        if constexpr (SPLIT > 1) {  // of whose blocks some may have no products
#pragma unroll
            for (int i = 0; i < TOKEN_TILES * 4; i++) sums[i / 4][i % 4] = 0.0f;
            if (first == end) return load_of_rows(tile);
        }
        look_ahead(0);
        make_pairs(0, [] {});
#pragma unroll 1
        for (int chunk = first; chunk < end; chunk++) {
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                const int stage_before = ring.stage_before(b);
                const bool is_first = b == 0 && chunk == first, is_last = b == BLOCKS - 1 && chunk + 1 == end;
                await_turn();
                begin_block(b, SPLIT > 1 || !is_first, [&] {
                    if (b == BLOCKS - 1 && ring.advance()) phase ^= 1;
                    look_ahead((b + 1) % BLOCKS);
                });
                if (!IS_4BIT) pass_turn();
                wait_products<1>();
                end_block_before(b, stage_before, !is_first);
                if (!is_last) {
                    make_pairs((b + 1) % BLOCKS, [&] { pass_turn(); });
                } else if (IS_4BIT) {
                    pass_turn();
                }
            }
        }
        load_of_rows(tile);
        wait_products();
        end_block_before(0, ring.stage_before(0), true);
#pragma unroll
        for (int i = 0; i < TOKEN_TILES * 4; i++) settle(sums[i / 4][i % 4]);
    }

    // What results need besides sums.
    __device__ void load_of_rows(const Tile& tile) {
        const Weight& weight = args.layers.weights[tile.which];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = min(tile.row + own_row + i, weight.rows - 1);
            row_bias[i] = weight.bias != nullptr ? ACTIVATION::widen(weight.bias[row]) : 0.0f;
            if (FORMAT == INT8) row_scale[i] = weight.absmax[row] * INVERSE_127;
        }
    }

    // -- sums of the cluster's blocks, of which each keeps those of a part of the tokens: [giver][warp][sums][lane]

    __device__ uint32 place_of(int giver, int keeper) const {
        const int place = (giver - (giver > keeper)) * WARPS + warp;
        return shared_address(ring.shared) + X_AT + (place * PART * WARP + lane) * uint32(sizeof(float4));
    }

    __device__ void give() const {
#pragma unroll
        for (int keeper = 0; keeper < SPLIT; keeper++) {
            if (keeper == work.rank) continue;
            const uint32 there = address_in_block(place_of(work.rank, keeper), keeper);
#pragma unroll
            for (int i = 0; i < PART; i++) store_there(there + i * (WARP * sizeof(float4)), sums[keeper * PART + i]);
        }
    }

    __device__ void take(int keeper) {
#pragma unroll
        for (int giver = 0; giver < SPLIT; giver++) {
            if (giver == keeper) continue;
            const uint32 here = place_of(giver, keeper);
#pragma unroll
            for (int i = 0; i < PART; i++) {
                const uint4 words = load_words<0>(here + i * (WARP * sizeof(float4)));
                float(&own)[4] = sums[keeper * PART + i];
                own[0] += __uint_as_float(words.x);
                own[1] += __uint_as_float(words.y);
                own[2] += __uint_as_float(words.z);
                own[3] += __uint_as_float(words.w);
            }
        }
    }

    // -- results: of rows own_row and the next, tokens 2 * member and the next of every eight

    static constexpr int AT_ONCE = 8;  // residuals that are loaded before any is used: y may be where they are
    static_assert(PART * 2 % AT_ONCE == 0, "whole groups of tokens");

    __device__ static constexpr int token_of(int i) { return i / 2 * 8 + i % 2; }

    // Both rows' result of a token, from sum number `i`; `residual` has both rows'.
    template <bool HAS_RESIDUAL>
    __device__ uint32 make_result(int i, uint32 residual) const {
        float first = sums[i / 2][i % 2], second = sums[i / 2][2 + i % 2];
        if constexpr (FORMAT == INT8) {
            first *= row_scale[0];
            second *= row_scale[1];
        }
        first += row_bias[0];
        second += row_bias[1];
        if constexpr (HAS_RESIDUAL) {
            first += ACTIVATION::widen(Bits(residual));
            second += ACTIVATION::widen(Bits(residual >> 16));
        }
        return ACTIVATION::narrow_pair(first, second);
    }

    // IN_PAIRS: both rows' values are one word.
    template <bool IN_PAIRS>
    __device__ void load_residuals(uint32 (&residuals)[AT_ONCE], const Bits* residual, int some, int left,
                                   bool has_second) const {
#pragma unroll
        for (int j = 0; j < AT_ONCE; j++) {
            const int token = token_of(some + j);
            residuals[j] = 0;
            if (token >= left) continue;
            const Bits* at = residual + token * args.layers.residual_stride;
            if constexpr (IN_PAIRS) {
                residuals[j] = __ldcg(reinterpret_cast<const uint32*>(at));
            } else {
                residuals[j] = __ldcg(at) | (has_second ? uint32(__ldcg(at + 1)) << 16 : 0);
            }
        }
    }

    template <bool HAS_RESIDUAL, bool IN_PAIRS>
    __device__ void store_results(const Tile& tile, int keeper) const {
        const Weight& weight = args.layers.weights[tile.which];
        const int row = tile.row + own_row, first_token = tile.token + keeper * (PART * 8) + 2 * member;
        if (row >= weight.rows) return;
        const bool has_second = IN_PAIRS || row + 1 < weight.rows;
        const int left = args.layers.num_tokens - first_token;
        const Bits* residual = args.layers.residual + first_token * args.layers.residual_stride + row;
        // Addresses follow from those before, lest the compiler make all of them first.
        uint64 targets[2] = {reinterpret_cast<uint64>(weight.out + first_token * weight.out_stride + row)};
        targets[1] = targets[0] + weight.out_stride * sizeof(Bits);
        const uint64 apart = weight.out_stride * (8 * sizeof(Bits));
#pragma unroll
        for (int some = 0; some < PART * 2; some += AT_ONCE) {
            uint32 residuals[AT_ONCE] = {};
            if (HAS_RESIDUAL) load_residuals<IN_PAIRS>(residuals, residual, some, left, has_second);
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                const int i = some + j;
                const uint32 both = make_result<HAS_RESIDUAL>(keeper * PART * 2 + i, residuals[j]);
                Bits* at = reinterpret_cast<Bits*>(targets[i % 2]);
                targets[i % 2] += apart;
                settle(targets[i % 2]);
                if (token_of(i) >= left) continue;
                if constexpr (IN_PAIRS) {
                    *reinterpret_cast<uint32*>(at) = both;
                } else {
                    at[0] = Bits(both);
                    if (has_second) at[1] = Bits(both >> 16);
                }
            }
        }
    }

    // The same by the copy engine: a token's results of the group are put into 128 bytes of shared memory, whose
    // 16-byte parts are swizzled by the token, so that a warp's words are in all banks.
    template <bool HAS_RESIDUAL>
    __device__ void hand_over(const Tile& tile) {
        const int row = tile.row + own_row, token = tile.token + 2 * member, left = args.layers.num_tokens - token;
        const Bits* residual = args.layers.residual + token * args.layers.residual_stride + row;
        const int group = warp / GROUP_WARPS;
        const uint32 line = shared_address(ring.results(group)) + 2 * member * 128 + own_row % 8 * 2;
        const uint32 part = own_row % GROUP_ROWS / 8 ^ 2 * member;
        const uint32 targets[2] = {line + part * 16, line + 128 + (part ^ 1) * 16};
        if (HANDS_IN_RING) {  // no group needs the tokens that are there
            sleep_for_phase(ring.empty(ring.stage_of_results(group)), phase ^ 1);
        } else {  // the results before have been read, if there were any
            sleep_for_phase(ring.fetched(group), results_phase ^ 1);
        }
        results_phase ^= 1;
#pragma unroll
        for (int some = 0; some < TOKEN_TILES * 2; some += AT_ONCE) {
            uint32 residuals[AT_ONCE] = {};
            if (HAS_RESIDUAL && row < args.layers.weights[tile.which].rows)
                load_residuals<true>(residuals, residual, some, left, true);
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                const int i = some + j;
                store_word(targets[i % 2] + i / 2 * (8 * 128), make_result<HAS_RESIDUAL>(i, residuals[j]));
            }
        }
        publish_to_tensor_cores();  // or to the copy engine
        arrive(ring.handed(group));
    }

    template <bool HAS_RESIDUAL>
    __device__ void store_either(const Tile& tile, int keeper, bool hands_over) {
        if constexpr (HANDS_OVER) {
            if (hands_over) return hand_over<HAS_RESIDUAL>(tile);
        }
        const Weight& weight = args.layers.weights[tile.which];
        int64 strides = weight.out_stride;
        uint64 addresses = reinterpret_cast<uint64>(weight.out);
        if (HAS_RESIDUAL) {
            strides |= args.layers.residual_stride;
            addresses |= reinterpret_cast<uint64>(args.layers.residual);
        }
        if (((weight.rows | int(strides)) & 1) == 0 && (addresses & 3) == 0) {
            store_results<HAS_RESIDUAL, true>(tile, keeper);
        } else {
            store_results<HAS_RESIDUAL, false>(tile, keeper);
        }
    }

    __device__ void store(const Tile& tile, int keeper, bool hands_over) {
        if (args.layers.residual != nullptr) {
            store_either<true>(tile, keeper, hands_over);
        } else {
            store_either<false>(tile, keeper, hands_over);
        }
        __syncwarp();  // for what warps do together
    }

    __device__ void finish_tile(const Tile& tile, bool hands_over) {
        if constexpr (SPLIT == 1) {
            store(tile, 0, hands_over);
        } else {
            meet_cluster();  // all have multiplied, so that rings are free
            give();
            meet_cluster();
#pragma unroll
            for (int keeper = 0; keeper < SPLIT; keeper++) {
                if (keeper != work.rank) continue;
                take(keeper);
                publish_to_tensor_cores();
                __syncthreads();  // the ring is free again, for the copy engine
                store(tile, keeper, false);
            }
        }
    }
};

// What a warp that does not multiply does for each tile.
template <class Serve>
__device__ inline void serve_tiles(const Work& work, Serve serve) {
    for (int i = work.first_tile(); i < work.args.layers.num_tiles; i += work.tiles_apart()) {
        serve(Tile(work.args, i));
        if constexpr (SPLIT > 1) {  // as `finish_tile`
            __syncwarp();
            meet_cluster();
            meet_cluster();
            __syncthreads();
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) __attribute__((cluster_dims(SPLIT, 1, 1)))
linear_many(const __grid_constant__ ManyArguments args) {
    extern __shared__ __align__(1024) uint8 shared[];
    if ((shared_address(shared) & 0xffffff) != DYNAMIC_SHARED_ADDRESS) __trap();
    const int lane = threadIdx.x % WARP, warp = __shfl_sync(FULL_WARP, threadIdx.x / WARP, 0);
    const Work work{args, SPLIT == 1 ? 0 : rank_in_cluster()};
    Ring ring{shared};

    // -- before the launch before has ended: all that does not depend on it
    start_dependents();
    if (warp == COPIER && lane == 0) {
        for (int i = 0; i < STAGES; i++) {
            init_barrier(ring.full(i), 1);
            init_barrier(ring.empty(i), WARPS);
        }
        for (int i = 0; i < (IS_4BIT ? SCALE_TURNS : 0); i++) {
            init_barrier(ring.scales_full(i), SCALERS);
            init_barrier(ring.scales_empty(i), WARPS);
        }
        for (int i = 0; i < GROUPS; i++) {
            init_barrier(ring.handed(i), GROUP_WARPS);
            init_barrier(ring.fetched(i), 1);
        }
        publish_barriers();
    }
    if (IS_4BIT && warp < WARPS) fill_values(shared);
    if (warp == COPIER) {  // which needs no table
        announce<THREADS>();
    } else {
        meet<THREADS>();
    }

    if (warp >= WARPS) {
        release_registers<OTHER_REGISTERS>();
        if (warp == COPIER) {
            Copier copier{work, ring};
            wait_for_prerequisites();
            serve_tiles(work, [&](const Tile& tile) {
                if (lane == 0) copier.bring_tile(tile);
            });
        } else if (IS_4BIT && warp <= COPIER + SCALERS) {
            Scaler scaler{work, ring, lane, warp - COPIER - 1};
            serve_tiles(work, [&](const Tile& tile) { scaler.make_tile(tile); });
        } else {
            if (warp == STORER && lane == 0) Storer{work, ring}.store_tiles();
            serve_tiles(work, [](const Tile&) {});
        }
    } else {
        take_registers<WORKER_REGISTERS>();
        wait_for_prerequisites();
        Worker worker(args, work, ring, warp, lane);
        if (warp >= GROUP_WARPS) worker.pass_turn();
        for (int i = work.first_tile(); i < args.layers.num_tiles; i += work.tiles_apart()) {
            const Tile tile(args, i);
            worker.multiply_tile(tile);
            worker.finish_tile(tile, work.hands_over(i));
        }
        if (warp < GROUP_WARPS) worker.await_turn();
    }
}

// Products of many tokens (more than 64) with one to three packed linear layers (Hopper alone): y = x W^T + bias,
// or also + residual, straight on the layout of the files.
//
// Defines: ACTIVATION (Bf16, F16), FORMAT (NF4, FP4, INT8), NESTED (0, 1), TOKENS (of a tile: 128, 192, 256),
// SPLIT (thread blocks that share a tile: 1, 2); LINE (of 256 columns, in bytes), NUM_WEIGHTS (3), EPILOGUE (0),
// UNIT (64) and WARPGROUPS (1) as the files that all products share want them.
//
// A tile is 128 rows of weights times TOKENS tokens. Two groups of four warps have 64 rows each: they make 16-bit
// values of a block of 64 columns, all in registers, and give them to the tensor cores, which read the tokens from
// shared memory; while these have one group's block the other group makes its next (they begin in turns). 4-bit
// weights are looked up, scaled in float32 and rounded, as dequantizing does; INT8 codes are exact, and sums are
// scaled at the end. Sums stay in registers. A third group gives up its registers; one of its threads has the copy
// engine bring tokens and packed weights.
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
constexpr int THREADS = WORKERS + 4 * WARP;
constexpr int WORKER_REGISTERS = 232, COPIER_REGISTERS = 40;
constexpr int ROWS = WARPS * FRAGMENT_ROWS;     // of a tile
constexpr int TOKEN_TILES = TOKENS / 8;
constexpr int DEPTH = TOKENS > 128 || IS_4BIT ? 1 : 2;  // chunks that the ring holds
constexpr int STAGES = DEPTH * BLOCKS;
constexpr int X_BYTES = TOKENS * BLOCK * 2;     // of a stage
constexpr int LINE_BYTES = BLOCK * BITS / 8;    // of a row's block
constexpr int PACKED_BYTES = ROWS * LINE_BYTES;
constexpr int PART = TOKEN_TILES / SPLIT;       // of a block's sums, once they are merged
static_assert((IS_4BIT || FORMAT == INT8) && UNIT == 64 && BLOCKS == 4, "what the copies and lookups are written for");

// -- shared memory: the table of 4-bit pairs, a copy for each lane; the ring; barriers. The ring is also where sums
// are merged.
constexpr int VALUES_STRIDE = WARP * sizeof(float2);
constexpr int X_AT = IS_4BIT ? 256 * VALUES_STRIDE : 0;
constexpr int PACKED_AT = X_AT + STAGES * X_BYTES;
constexpr int BARRIERS_AT = PACKED_AT + STAGES * PACKED_BYTES;
static_assert((SPLIT - 1) * PART * WARPS * WARP * sizeof(float4) <= STAGES * X_BYTES, "room for the sums of others");

struct ManyArguments {
    TokenMap tokens;                 // boxes of TOKENS
    TokenMap packed[NUM_WEIGHTS];    // (rows, bytes of a row), in boxes of ROWS times LINE_BYTES
    Arguments layers;                // tiles: of rows; the first_tile of a layer that is not there is behind all
    int token_tiles;
    int chunks;                      // of a row: columns / 256
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

__device__ inline void fill_values(uint8* shared) {
    const int lane = threadIdx.x % WARP;
    const float own = (FORMAT == FP4 ? fp4_code : nf4_code)[lane % 16];
    for (int byte = threadIdx.x / WARP; byte < 256; byte += WARPS) {
        const float first = __shfl_sync(FULL_WARP, own, byte >> 4), second = __shfl_sync(FULL_WARP, own, byte & 15);
        reinterpret_cast<float2*>(shared + byte * VALUES_STRIDE)[lane] = make_float2(first, second);
    }
}

// absmax of a lane's two rows in a chunk of 4-bit blocks, loaded one chunk ahead; lane `member` of a quad has those of
// block `member`.
struct Scales {
    float values[2];  // absmax, or the nested absmax of it
    uint32 codes[2];

    __device__ void load(const ManyArguments& args, const Weight& weight, int row, int chunk, int member) {
        const uint32 column_block = chunk * BLOCKS + member, row_blocks = args.chunks * BLOCKS;
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
    __device__ uint8* tokens(int stage) const { return shared + X_AT + stage * X_BYTES; }
    __device__ uint8* packed(int stage) const { return shared + PACKED_AT + stage * PACKED_BYTES; }
};

// Brings what the tiles need, by one thread. `round` counts those of the ring, over all tiles.
__device__ inline void bring_tile(const Work& work, Ring& ring, const Tile& tile, int& round) {
#pragma unroll 1
    for (int chunk = work.first_chunk(); chunk < work.end_chunk(); chunk++) {
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            const int stage = ring.stage(b);
            if (round > 0) sleep_for_phase(ring.empty(stage), (round - 1) % 2);
            expect_bytes(ring.full(stage), X_BYTES + PACKED_BYTES);
            const int column = chunk * CHUNK + b * BLOCK;
            copy_box(ring.tokens(stage), &work.args.tokens, column, tile.token, ring.full(stage));
            copy_box(ring.packed(stage), &work.args.packed[tile.which], column * BITS / 8, tile.row,
                     ring.full(stage));
        }
        if (ring.advance()) round++;
    }
}

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
    Scales scales, next;    // of a chunk and the one behind it
    float scale[2];         // of the next block
    bool is_there;          // the next block, for certain

    __device__ Worker(const ManyArguments& args, const Work& work, Ring ring, int warp, int lane)
        : args(args), work(work), ring(ring), warp(warp), lane(lane) {
        group = lane / 4;
        member = lane % 4;
        own_row = warp * FRAGMENT_ROWS + 2 * group;
        // An address in shared memory has the block's rank in the cluster in its uppermost byte.
        lane_offset = lane * sizeof(float2) | shared_address(ring.shared) >> 24 << 16;
        own_byte = 0x6504u | member << 4;
    }

    // The lane's values of block `b`, as pairs.
    __device__ void make_pairs(int b) {
        const int stage = ring.stage(b);
        if (!is_there) sleep_for_phase(ring.full(stage), phase);
        const uint32 line = shared_address(ring.packed(stage)) + own_row * LINE_BYTES;
        if constexpr (IS_4BIT) {
            look_up_codes(line, pairs[b % 2]);
        } else {
            widen_codes(line, pairs[b % 2]);
        }
    }

    // The copy engine swaps both halves of a line in every other four lines.
    __device__ void look_up_codes(uint32 line, uint32 (&into)[4][4]) const {
        line += own_row / 4 % 2 * 16;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint4 first = load_words<0>(line ^ half * 16), second = load_words<LINE_BYTES>(line ^ half * 16);
            const uint32 words[2][4] = {{first.x, first.y, first.z, first.w},
                                        {second.x, second.y, second.z, second.w}};
#pragma unroll
            for (int i = 0; i < 8; i++) {
                const float2 values = look_up_values(words[i % 2][i / 2], own_byte, lane_offset);
                into[2 * half + i / 4][i % 4] = ACTIVATION::narrow_pair(rounded_product(values.x, scale[i % 2]),
                                                                        rounded_product(values.y, scale[i % 2]));
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
    __device__ void begin_block(int b, Meanwhile meanwhile) {
        const uint32 tokens = describe_swizzled_tokens(ring.tokens(ring.stage(b)));
#pragma unroll
        for (int i = 0; i < 16; i++) settle(pairs[b % 2][i / 4][i % 4]);  // made before what follows
        begin_products();
#pragma unroll
        for (int k = 0; k < 4; k++) {
            if (k == 2) meanwhile();
            multiply_group<ACTIVATION>(sums, pairs[b % 2][k][0], pairs[b % 2][k][1], pairs[b % 2][k][2],
                                       pairs[b % 2][k][3], swizzled_tokens(tokens + k * 2), 1);
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
        if constexpr (IS_4BIT) {
#pragma unroll
            for (int i = 0; i < 2; i++) scale[i] = __shfl_sync(FULL_WARP, scales.values[i], group * 4 + b);
        }
    }

    __device__ void multiply_tile(const Tile& tile) {
        const Weight& weight = args.layers.weights[tile.which];
        const int row = tile.row + own_row;
        const float offset = NESTED ? __ldg(weight.nested_offset) : 0.0f;
        const int first = work.first_chunk(), end = work.end_chunk();
#pragma unroll
        for (int i = 0; i < TOKEN_TILES * 4; i++) sums[i / 4][i % 4] = 0.0f;
        if (first == end) return;
        if constexpr (IS_4BIT) {
            scales.load(args, weight, row, first, member);
            next.load(args, weight, row, min(first + 1, end - 1), member);
            scales.decode(weight, offset);
        }
        look_ahead(0);
#pragma unroll 1
        for (int chunk = first; chunk < end; chunk++) {
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                const int stage_before = ring.stage_before(b);
                make_pairs(b);
                await_turn();
                begin_block(b, [&] {
                    if (b == BLOCKS - 1) {
                        if (ring.advance()) phase ^= 1;
                        if constexpr (IS_4BIT) {
                            scales = next;
                            scales.decode(weight, offset);
                            next.load(args, weight, row, min(chunk + 2, end - 1), member);
                        }
                    }
                    look_ahead((b + 1) % BLOCKS);
                });
                pass_turn();
                wait_products<1>();
                end_block_before(b, stage_before, b > 0 || chunk > first);
            }
        }
        wait_products();
        end_block_before(0, ring.stage_before(0), true);
#pragma unroll
        for (int i = 0; i < TOKEN_TILES * 4; i++) settle(sums[i / 4][i % 4]);
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

    // Rows 2 * group and the next of a fragment, tokens 2 * member and the next of every eight.
    template <bool HAS_RESIDUAL>
    __device__ void store_sums(const Tile& tile, int keeper) const {
        constexpr int AT_ONCE = 8;  // residuals that are loaded before any is used: y may be where they are
        static_assert(PART * 2 % AT_ONCE == 0, "whole groups of tokens");
        const Weight& weight = args.layers.weights[tile.which];
        const int row = tile.row + own_row, first_token = tile.token + keeper * (PART * 8) + 2 * member;
        if (row >= weight.rows) return;
        const bool has_second = row + 1 < weight.rows;
        float bias[2] = {0.0f, 0.0f};
        if (weight.bias != nullptr) {
            bias[0] = ACTIVATION::widen(weight.bias[row]);
            if (has_second) bias[1] = ACTIVATION::widen(weight.bias[row + 1]);
        }
        float scale[2] = {1.0f, 1.0f};
        if constexpr (FORMAT == INT8) {
            scale[0] = weight.absmax[row] * INVERSE_127;
            if (has_second) scale[1] = weight.absmax[row + 1] * INVERSE_127;
        }
        const int64 residual_stride = HAS_RESIDUAL ? args.layers.residual_stride : 0;
        const uint64 addresses =
            reinterpret_cast<uint64>(weight.out) |
            (HAS_RESIDUAL ? reinterpret_cast<uint64>(args.layers.residual) : 0);
        const bool in_pairs =
            ((weight.rows | int(weight.out_stride | residual_stride)) & 1) == 0 && (addresses & 3) == 0;
        Bits* target = weight.out + first_token * weight.out_stride + row;
        const Bits* residual = args.layers.residual + first_token * residual_stride + row;
#pragma unroll
        for (int some = 0; some < PART * 2; some += AT_ONCE) {
            uint32 others[AT_ONCE];
            if constexpr (HAS_RESIDUAL) {
#pragma unroll
                for (int j = 0; j < AT_ONCE; j++) {
                    const int token = (some + j) / 2 * 8 + j % 2;
                    const Bits* other = residual + token * residual_stride;
                    others[j] = 0;
                    if (first_token + token >= args.layers.num_tokens) continue;
                    if (in_pairs) {
                        others[j] = __ldcg(reinterpret_cast<const uint32*>(other));
                    } else {
                        others[j] = __ldcg(other) | (has_second ? uint32(__ldcg(other + 1)) << 16 : 0);
                    }
                }
            }
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++) {
                const int i = some + j, token = i / 2 * 8 + i % 2;
                if (first_token + token >= args.layers.num_tokens) return;
                const float(&own)[4] = sums[keeper * PART + i / 2];
                float first = own[i % 2], second = own[2 + i % 2];
                if constexpr (FORMAT == INT8) {
                    first *= scale[0];
                    second *= scale[1];
                }
                first += bias[0];
                second += bias[1];
                if constexpr (HAS_RESIDUAL) {
                    first += ACTIVATION::widen(Bits(others[j]));
                    second += ACTIVATION::widen(Bits(others[j] >> 16));
                }
                Bits* at = target + token * weight.out_stride;
                if (in_pairs) {
                    *reinterpret_cast<uint32*>(at) = ACTIVATION::narrow_pair(first, second);
                } else {
                    at[0] = ACTIVATION::narrow(first);
                    if (has_second) at[1] = ACTIVATION::narrow(second);
                }
            }
        }
    }

    __device__ void store(const Tile& tile, int keeper) const {
        if (args.layers.residual != nullptr) {
            store_sums<true>(tile, keeper);
        } else {
            store_sums<false>(tile, keeper);
        }
        __syncwarp();  // for what warps do together
    }

    __device__ void finish_tile(const Tile& tile) {
        if constexpr (SPLIT == 1) {
            store(tile, 0);
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
                store(tile, keeper);
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) __attribute__((cluster_dims(SPLIT, 1, 1)))
linear_many(const __grid_constant__ ManyArguments args) {
    extern __shared__ __align__(1024) uint8 shared[];
    if ((shared_address(shared) & 0xffffff) != DYNAMIC_SHARED_ADDRESS) __trap();
    const int lane = threadIdx.x % WARP, warp = __shfl_sync(FULL_WARP, threadIdx.x / WARP, 0);
    const Work work{args, SPLIT == 1 ? 0 : rank_in_cluster()};
    Ring ring{shared};

    // -- before the launch before has ended: all that does not depend on it
    start_dependents();
    if (threadIdx.x == WORKERS) {
        for (int i = 0; i < STAGES; i++) {
            init_barrier(ring.full(i), 1);
            init_barrier(ring.empty(i), WARPS);
        }
        publish_barriers();
    }
    if (IS_4BIT && warp < WARPS) fill_values(shared);
    __syncthreads();

    if (warp >= WARPS) {
        release_registers<COPIER_REGISTERS>();
        int round = 0;
        if (threadIdx.x == WORKERS) wait_for_prerequisites();
        for (int i = work.first_tile(); i < args.layers.num_tiles; i += work.tiles_apart()) {
            if (threadIdx.x == WORKERS) bring_tile(work, ring, Tile(args, i), round);
            if constexpr (SPLIT > 1) {
                meet_cluster();
                meet_cluster();
                __syncthreads();
            }
        }
    } else {
        take_registers<WORKER_REGISTERS>();
        wait_for_prerequisites();
        Worker worker(args, work, ring, warp, lane);
        if (warp >= WARPS / 2) worker.pass_turn();
        for (int i = work.first_tile(); i < args.layers.num_tiles; i += work.tiles_apart()) {
            const Tile tile(args, i);
            worker.multiply_tile(tile);
            worker.finish_tile(tile);
        }
        if (warp < WARPS / 2) worker.await_turn();
    }
}

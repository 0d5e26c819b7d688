// Products of many tokens (more than 64) with one to three packed linear layers (Hopper alone): y = x W^T + bias,
// or also + residual, straight on the layout of the files.
//
// Defines: ACTIVATION (Bf16, F16), FORMAT (NF4, FP4, INT8), NESTED (0, 1), TOKENS (of a tile: 128, 192, 256),
// SPLIT (2 if pairs of thread blocks share the last tiles, or 1); LINE (of 256 columns, in bytes), NUM_WEIGHTS (3),
// EPILOGUE (0), UNIT (64) and WARPGROUPS (1) as the files that all products share want them.
//
// A tile is 128 rows of weights times TOKENS tokens. Two groups of four warps, the workers, have 64 rows each: they
// make 16-bit values of a block of 64 columns, all in registers, and give them to the tensor cores, which read the
// tokens from shared memory; while these have one group's block the other group makes its next. Sums stay in
// registers.
//
// INT8 codes are exact, and sums are scaled at the end. 4-bit weights are scaled in float32 and rounded, as
// dequantizing does, but once for all equal codes of a row's block: four more warps, the servers, make the 16 values
// that it can have, and workers look their codes up in these, by bytes, in registers. One of the servers has the copy
// engine bring tokens and packed weights, and store results that workers put into shared memory.
//
// Groups begin in turns, and the next is let in only when most of the products before are through: tensor cores that
// have both groups' products at once are slower. There is little time to spare: what servers do is felt.
//
// Thread blocks take every so many tiles, in an order in which those that run at once read few different bytes: memory
// takes power, of which tensor cores have what is left. The last ones, which would leave some blocks idle, may be
// shared by the two blocks of a cluster: each has half of the columns, gives the other the sums of half of the tokens,
// over shared memory, and adds up its own.
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
#include "many_tiles.cuh"
#include "many_servers.cuh"

// Four bytes of two words, by the lower four hexadecimal digits of `selected`. A digit from 8 on stands for the sign,
// eight times, of byte digit - 8.
__device__ inline uint32 select_bytes(uint32 first, uint32 second, uint32 selected) {
    uint32 bytes;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(first), "r"(second), "r"(selected));
    return bytes;
}

// The four codes in the lower half of a word, to look up bytes of their values: of 16, which are two times as many as
// an instruction can select from.
struct CodeBytes {
    uint32 codes, from_8_on, are_from_8_on;

    __device__ CodeBytes(uint32 codes) : codes(codes) {
        from_8_on = codes ^ 0x8888u;
        are_from_8_on = select_bytes(codes, codes << 4, 0x9d8cu);
    }

    __device__ uint32 look_up(uint4 bytes) const {
        const uint32 below_8 = select_bytes(bytes.x, bytes.y, codes);
        return (are_from_8_on & select_bytes(bytes.z, bytes.w, from_8_on)) | (~are_from_8_on & below_8);
    }
};

// A warp that multiplies, and its lane.
struct Worker {
    const ManyArguments& args;
    const Work& work;
    Ring ring;
    int warp, lane;
    int group, member;     // of warps; in a quad of lanes
    int own_row;           // the first of the lane's two rows, in the tile
    uint32 own_bytes;      // of two words: where those of the lane are
    uint32 other_turn, whole_second;  // a barrier; for `select_bytes`
    uint32 phase = 0;      // of the ring
    float sums[TOKEN_TILES][4];
    uint32 pairs[2][4][4];  // of the block that is multiplied and of the next: [16 columns][fragment's registers]
    uint32 results_phase = 0;
    bool is_there;          // the next block, for certain
    float row_bias[2], row_scale[2];  // of the lane's rows

    __device__ Worker(const ManyArguments& args, const Work& work, Ring ring, int warp, int lane)
        : args(args), work(work), ring(ring), warp(warp), lane(lane) {
        group = warp / GROUP_WARPS;
        member = lane % 4;
        own_row = warp * FRAGMENT_ROWS + lane / 4 * 2;
        own_bytes = member | (4 + member) << 4;
        other_turn = FIRST_TURN + 1 - group;
        asm volatile("mov.b32 %0, 0x7654;" : "=r"(whole_second));  // the compiler is not to know
    }

    // The lane's values of block `b`, as pairs. `pass` is called when it is time for the other group's products, with
    // a value that is made by then; of INT8 it has been time before.
    template <class Pass>
    __device__ void make_pairs(int b, Pass pass) {
        const int stage = ring.stage(b);
        if (!is_there) sleep_for_phase(ring.full(stage), phase);
        const uint32 line = shared_address(ring.packed(stage)) + own_row * LINE_BYTES;
        if constexpr (IS_4BIT) {
            look_up_codes(line, ring.values(stage, own_row), pairs[b % 2], pass);
        } else {
            widen_codes(line, pairs[b % 2]);
        }
    }

    template <class Pass>
    __device__ void look_up_codes(uint32 line, uint32 values, uint32 (&into)[4][4], Pass pass) const {
        look_up_row<0>(line, values, into);
        pass(into[3][2]);
        look_up_row<1>(line, values, into);
    }

    // The copy engine swaps both halves of a line in every other four lines.
    template <int ROW>
    __device__ void look_up_row(uint32 line, uint32 values, uint32 (&into)[4][4]) const {
        line += own_row / 4 % 2 * 16;
        constexpr int AT = ROW * (PLANE_BYTES / 2);
        const uint4 lower = load_words<AT>(values), upper = load_words<AT + PLANE_BYTES>(values);
        const uint4 halves[2] = {load_words<ROW * LINE_BYTES>(line), load_words<ROW * LINE_BYTES>(line ^ 16)};
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const uint4 words = halves[k / 2];
            const CodeBytes codes(k % 2 ? select_bytes(words.z, words.w, own_bytes)
                                        : select_bytes(words.x, words.y, own_bytes));
            const uint32 low = codes.look_up(lower), high = codes.look_up(upper);
            into[k][ROW] = select_bytes(low, high, 0x4051u);  // a byte's upper code is that of the first column
            into[k][2 + ROW] = select_bytes(low, high, 0x6273u);
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

    // Groups begin in turns, of which the first has the first: named barriers, behind those of `meet`.
    static constexpr int FIRST_TURN = 2;

    // When `value` is there, of which the barrier's number seems to be made: the compiler might put what is made of
    // registers behind the barrier, where tensor cores wait for it.
    __device__ void await_turn_after(uint32 value) const {
        const uint32 turn = select_bytes(value, 2 * FIRST_TURN + 1 - other_turn, whole_second);
        asm volatile("bar.sync %0, %1;" ::"r"(turn), "n"(WORKERS) : "memory");
    }

    // The same: it would put the barrier behind all that is made of registers.
    __device__ void pass_turn_after(uint32 value) const {
        const uint32 turn = select_bytes(value, other_turn, whole_second);
        asm volatile("bar.arrive %0, %1;" ::"r"(turn), "n"(WORKERS) : "memory");
    }

    __device__ void await_turn() const { await_turn_after(0); }
    __device__ void pass_turn() const { pass_turn_after(0); }

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
        look_ahead(0);
        make_pairs(0, [](uint32) {});
#pragma unroll 1
        for (int chunk = tile.first_chunk; chunk < tile.end_chunk; chunk++) {
#pragma unroll
            for (int b = 0; b < BLOCKS; b++) {
                const int stage_before = ring.stage_before(b);
                const bool is_first = b == 0 && chunk == tile.first_chunk;
                const bool is_last = b == BLOCKS - 1 && chunk + 1 == tile.end_chunk;
                await_turn_after(pairs[b % 2][3][3]);
                begin_block(b, !is_first, [&] {
                    if (b == BLOCKS - 1 && ring.advance()) phase ^= 1;
                    look_ahead((b + 1) % BLOCKS);
                });
                if (!IS_4BIT) pass_turn();
                wait_products<1>();
                end_block_before(b, stage_before, !is_first);
                if (!is_last) {
                    make_pairs((b + 1) % BLOCKS, [&](uint32 value) { pass_turn_after(value); });
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

    // -- sums of a shared tile, of which each block keeps those of half of the tokens: [warp][sums][lane]

    __device__ uint32 place_of_sums() const {
        return shared_address(ring.shared) + X_AT + (warp * PART * WARP + lane) * uint32(sizeof(float4));
    }

    template <int KEEPER>
    __device__ void give() const {
        const uint32 there = address_in_block(place_of_sums(), KEEPER);
#pragma unroll
        for (int i = 0; i < PART; i++) store_there(there + i * (WARP * sizeof(float4)), sums[KEEPER * PART + i]);
    }

    template <int KEEPER>
    __device__ void take() {
#pragma unroll
        for (int i = 0; i < PART; i++) {
            const uint4 words = load_words<0>(place_of_sums() + i * (WARP * sizeof(float4)));
            float(&own)[4] = sums[KEEPER * PART + i];
            own[0] += __uint_as_float(words.x);
            own[1] += __uint_as_float(words.y);
            own[2] += __uint_as_float(words.z);
            own[3] += __uint_as_float(words.w);
        }
    }

    __device__ void merge() {
        meet_cluster();  // both have multiplied, so that rings are free
        if (work.rank == 0) {
            give<1>();
            meet_cluster();
            take<0>();
        } else {
            give<0>();
            meet_cluster();
            take<1>();
        }
        publish_to_tensor_cores();
        __syncthreads();  // the ring is free again, for the copy engine
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

    // Of part `KEEPER` of the tokens.
    template <bool HAS_RESIDUAL, bool IN_PAIRS, int KEEPER>
    __device__ void store_results(const Tile& tile) const {
        const Weight& weight = args.layers.weights[tile.which];
        const int row = tile.row + own_row, first_token = tile.token + KEEPER * (PART * 8) + 2 * member;
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
                const uint32 both = make_result<HAS_RESIDUAL>(KEEPER * PART * 2 + i, residuals[j]);
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

    template <bool HAS_RESIDUAL, bool IN_PAIRS>
    __device__ void store_parts(const Tile& tile) const {
        if (!tile.is_shared || work.rank == 0) store_results<HAS_RESIDUAL, IN_PAIRS, 0>(tile);
        if constexpr (SPLIT > 1) {
            if (!tile.is_shared || work.rank == 1) store_results<HAS_RESIDUAL, IN_PAIRS, 1>(tile);
        }
    }

    template <bool HAS_RESIDUAL>
    __device__ void store(const Tile& tile, bool hands_over) {
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
            store_parts<HAS_RESIDUAL, true>(tile);
        } else {
            store_parts<HAS_RESIDUAL, false>(tile);
        }
    }

    __device__ void finish_tile(const Tile& tile, bool hands_over) {
        if constexpr (SPLIT > 1) {
            if (tile.is_shared) merge();
        }
        if (args.layers.residual != nullptr) {
            store<true>(tile, hands_over);
        } else {
            store<false>(tile, hands_over);
        }
        __syncwarp();  // for what warps do together
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1) __attribute__((cluster_dims(SPLIT, 1, 1)))
linear_many(const __grid_constant__ ManyArguments args) {
    extern __shared__ __align__(1024) uint8 shared[];
    const int lane = threadIdx.x % WARP, warp = __shfl_sync(FULL_WARP, threadIdx.x / WARP, 0);
    const Work work{args, SPLIT == 1 ? 0 : rank_in_cluster()};
    Ring ring{shared};

    // -- before the launch before has ended: all that does not depend on it
    start_dependents();
    if (threadIdx.x == WORKERS) {
        for (int i = 0; i < STAGES; i++) {
            init_barrier(ring.full(i), 1 + (IS_4BIT ? SERVERS / WARP : 0));
            init_barrier(ring.empty(i), WARPS);
        }
        for (int i = 0; i < GROUPS; i++) {
            init_barrier(ring.handed(i), GROUP_WARPS);
            init_barrier(ring.fetched(i), 1);
        }
        publish_barriers();
    }
    if (IS_4BIT) fill_maps(args, ring);
    __syncthreads();

    if (warp >= WARPS) {
        release_registers<SERVER_REGISTERS>();
        if (HANDS_OVER && !HANDS_IN_RING && threadIdx.x == WORKERS + SERVERS - 1) Storer{work, ring}.store_tiles();
        Server(work, ring, warp - WARPS, lane).serve_tiles();
    } else {
        take_registers<WORKER_REGISTERS>();
        wait_for_prerequisites();
        Worker worker(args, work, ring, warp, lane);
        if (warp >= GROUP_WARPS) worker.pass_turn();
        for (int i = work.first(); work.is_there(i); i = work.next(i)) {
            const Tile tile = work.at(i);
            worker.multiply_tile(tile);
            worker.finish_tile(tile, work.hands_over(i));
        }
        if (warp < GROUP_WARPS) worker.await_turn();
    }
}

// Products of few tokens with linear layers, straight on the layout of the files: y = x W^T.
//
// Defines: ACTIVATION (Bf16, F16), FORMAT (NF4, FP4, INT8, PLAIN: weights of the activations' dtype),
// NESTED (0, 1), UNIT (64; 32 for 4-bit blocks of 32), TOKENS (1, 2, 4, 8: the most that a launch takes), NORM
// (0; 1: RMS norm before; 2: its weight plus one), EPILOGUE (0: bias; 1: and residual; 2: gate and up), GATE
// (of EPILOGUE 2: SILU, GELU_TANH, GELU), COLUMNS, NUM_WEIGHTS (1 to 3), WARPS, STAGES (of a warp's ring), FRAGMENTS (1, 2: of
// 16 rows in a tile), SLICE (columns of x that are held at a time, a multiple of a chunk; with several slices
// at least WARPS chunks), PASS (tiles between two sums over the warps), MIN_BLOCKS (thread blocks per
// multiprocessor), HELD_X (0; 1: a warp has the same chunks of every tile, and their activations in registers;
// the chunks of each slice are a multiple of WARPS), ADAPTED (0; 1: adapters add to the layers).
//
// A warp takes a tile of rows through chunks of 128 bytes, which come by asynchronous copies into a ring of
// its own, so that warps never wait for each other while weights stream. A byte's two codes become two
// values by one look at a table in shared memory; the pairs are fragments of mma.m16n8k16 as they
// are, since the order of columns within a block is free as long as weights and activations agree. Sums of a
// block are scaled in float32: absmax never touches a 16-bit value, and INT8's codes are exact in 16 bit.
//
// Bytes read per weight: 1/2 + 4/blocksize, or 1/2 + 1/blocksize when nested; 1; 2.
#include "source_dtypes.cuh"
#include "code_tables.cuh"
#include "products.cuh"

constexpr int LINE = 128;  // bytes of a row that a warp takes at a time
#include "packed_lines.cuh"
#include "linear_layers.cuh"

#ifndef ADAPTED
#define ADAPTED 0
#endif
#if ADAPTED
#include "adapter_layers.cuh"
#endif

constexpr int THREADS = WARPS * WARP;
constexpr int TILE = FRAGMENT_ROWS * FRAGMENTS;  // rows that a warp takes at a time
// Rows of gate come first in a fragment, then as many of up, so that each output's two sums are in one warp.
constexpr int HALF_ROWS = FRAGMENT_ROWS / 2;
constexpr int64 ROW_BYTES = int64(COLUMNS) * BITS / 8;
constexpr int PARTIAL = TILE * TOKENS;           // sums of a tile
constexpr int STAGE_BYTES = TILE * LINE;
constexpr int COPY_ROWS = WARP / PARTS;          // rows that a warp copies at once
constexpr bool WHOLE_CHUNKS = COLUMNS % CHUNK == 0;

constexpr int NUM_SLICES = (COLUMNS + SLICE - 1) / SLICE;
__device__ constexpr int chunks_of(int slice) {
    return slice + 1 < NUM_SLICES ? SLICE / CHUNK : (COLUMNS - (NUM_SLICES - 1) * SLICE + CHUNK - 1) / CHUNK;
}

// Whether activations pass through shared memory: held ones that have no norm before come from memory.
constexpr bool SHARED_X = !HELD_X || NORM != 0;
constexpr int WARP_CHUNKS = HELD_X ? chunks_of(0) / WARPS : 1;  // of a tile, that are taken in one go
static_assert(!HELD_X || chunks_of(0) % WARPS == 0, "warps would have other chunks of the next tile");
static_assert(!HELD_X || chunks_of(NUM_SLICES - 1) == chunks_of(0), "slices differ");

// -- shared memory: lines, activations of several tokens, rings, sums for which lines have no room, scratch.
// 4 bit: lines are the gaps of the table; they hold the dynamic map of nested absmax, sums, and the activations of
// a single token. Other formats have lines without a table between.
constexpr int LINE_STRIDE = IS_4BIT ? ENTRY_STRIDE : LINE;
constexpr int FIRST_LINE = IS_4BIT ? GAP : 0;
constexpr int LINES_BYTES = 256 * LINE_STRIDE;
constexpr int FIRST_PARTIAL = NESTED ? NUM_WEIGHTS * 256 : 0;  // in floats of the lines
constexpr int MOST_LINE_TILES = (256 * 32 - FIRST_PARTIAL) / (WARPS * PARTIAL);
constexpr int LINE_TILES = PASS < MOST_LINE_TILES ? PASS : MOST_LINE_TILES;  // of a pass, with sums in the lines
constexpr int FIRST_X_LINE = (FIRST_PARTIAL + WARPS * LINE_TILES * PARTIAL) / 32;
constexpr int X_BLOCK_BYTES = TOKENS == 1 ? LINE_STRIDE : TOKENS * LINE;  // from block to block
constexpr int X_BYTES = TOKENS == 1 || !SHARED_X ? 0 : SLICE / BLOCK * X_BLOCK_BYTES;
static_assert(FIRST_X_LINE + (TOKENS == 1 && SHARED_X ? SLICE / BLOCK : 0) <= 256, "more than the lines hold");
constexpr int RINGS = LINES_BYTES + X_BYTES;
constexpr int MORE_SUMS = RINGS + WARPS * STAGES * STAGE_BYTES;
constexpr int SCRATCH = MORE_SUMS + WARPS * (PASS - LINE_TILES) * PARTIAL * 4;

__device__ inline float& line_float(uint8* shared, uint32 index) {
    return *reinterpret_cast<float*>(shared + index / 32 * LINE_STRIDE + FIRST_LINE + index % 32 * 4);
}

// What a warp has of tile `tile` of the pass. Two tokens share a line, and sums that a warp writes or reads
// together are in different banks.
__device__ inline float& warp_sum(uint8* shared, int warp, int tile, int token, int row) {
    const int pair = token / 2, in_pair = (token ^ pair) % 2 * TILE + (row ^ (pair / 2 * 8));
    if constexpr (TOKENS == 1 || FRAGMENTS > 1) {
        static_assert(PASS == LINE_TILES || (TOKENS > 1 && FRAGMENTS == 1), "all sums are in the lines");
        const int in_tile = pair * (2 * TILE) + in_pair;
        return line_float(shared, FIRST_PARTIAL + (warp * LINE_TILES + tile) * PARTIAL + in_tile);
    }
    const int line = FIRST_PARTIAL / 32 + (warp * LINE_TILES + tile) * (TOKENS / 2) + pair;
    uint8* at = shared + line * LINE_STRIDE + FIRST_LINE;
    if (PASS > LINE_TILES && tile >= LINE_TILES) {
        const int more = (warp * (PASS - LINE_TILES) + tile - LINE_TILES) * (TOKENS / 2) + pair;
        at = shared + MORE_SUMS + more * LINE;
    }
    return reinterpret_cast<float*>(at)[in_pair];
}

#include "linear_cursor.cuh"

// absmax of the blocks of a lane quad's rows, loaded one chunk ahead; lane `member` has those of block `member`.
struct Scales {
    static constexpr int ROW_UNITS = COLUMNS / UNIT;
    float values[FRAGMENTS][2][UNITS];  // absmax, or the nested absmax of it
    uint32 codes[FRAGMENTS][2][UNITS];

    __device__ void load(const Arguments& args, const Cursor& at, int group, int member) {
        const int units_log2 = args.blocksize_log2 - (UNIT == 64 ? 6 : 5);
        int unit = (at.slice * SLICE + at.chunk * CHUNK) / UNIT + member % BLOCKS * UNITS;
        // columns that are not there have any scale: their activations are zero
        if (!WHOLE_CHUNKS && unit >= ROW_UNITS) unit = 0;
#pragma unroll
        for (int i = 0; i < FRAGMENTS * 2; i++) {
            const Weight& weight = args.weights[GATES == 2 ? i % 2 : at.which];
            uint32 row = min(at.row + group + i / GATES * HALF_ROWS, weight.rows - 1);
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                uint32 block = (row * ROW_UNITS + unit + u) >> units_log2;
#if NESTED
                codes[i / 2][i % 2][u] = __ldg(weight.absmax_codes + block);
                values[i / 2][i % 2][u] = __ldg(weight.nested_absmax + block / NESTED_BLOCKSIZE);
#else
                values[i / 2][i % 2][u] = __ldg(weight.absmax + block);
#endif
            }
        }
    }

    // The dynamic map of weight number `which` lies in the lines of `shared`; gate and up have 0 and 1.
    __device__ void decode(uint8* shared, int which, const float (&offsets)[NUM_WEIGHTS]) {
#if NESTED
        float offset = offsets[0];
#pragma unroll
        for (int i = 1; i < NUM_WEIGHTS; i++) offset = which == i ? offsets[i] : offset;
#pragma unroll
        for (int i = 0; i < FRAGMENTS * 2; i++)
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                const int of = GATES == 2 ? i % 2 : which;
                float& value = values[i / 2][i % 2][u];
                float entry = line_float(shared, of * 256 + codes[i / 2][i % 2][u]);
                value = flushed_product(entry, value) + (GATES == 2 ? offsets[i % GATES] : offset);
            }
#endif
    }
};

// Activations of the chunks that are this warp's, if each of its tiles gives it the same ones.
template <class Place, class Meanwhile>
__device__ inline void load_own_chunks(const Bits* x, Place place, Meanwhile meanwhile) {
    constexpr int CHUNK_OCTETS = CHUNK / OCTET, COUNT = chunks_of(0) / WARPS * CHUNK_OCTETS;
    constexpr int LANE_COUNT = (COUNT + WARP - 1) / WARP;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    auto octet_of = [&](int i) {
        int own = i * WARP + lane;
        return (own / CHUNK_OCTETS * WARPS + warp) * CHUNK_OCTETS + own % CHUNK_OCTETS;
    };
    uint4 held[LANE_COUNT];
#pragma unroll
    for (int i = 0; i < LANE_COUNT; i++)
        if (i * WARP + lane < COUNT) held[i] = __ldcg(reinterpret_cast<const uint4*>(x) + octet_of(i));
    meanwhile();
#pragma unroll
    for (int i = 0; i < LANE_COUNT; i++)
        if (i * WARP + lane < COUNT) *place(octet_of(i), 0) = held[i];
    __syncwarp();
}

// Activations of the chunks that are this warp's in every tile, as its lanes multiply them. Shared memory is what
// the products wait for, so that they are read from there once or not at all.
struct HeldChunks {
    // A single token's column 2b is block b of a chunk, and column 2b + 1 block b of the next: a lane needs one
    // block of two chunks.
    static constexpr bool PAIRED = TOKENS == 1 && IS_4BIT;
    static constexpr int ENTRIES = PAIRED ? (WARP_CHUNKS + 1) / 2 : WARP_CHUNKS * BLOCKS;
    uint4 x[ENTRIES][2];  // half

    __device__ static int group() { return threadIdx.x % WARP / 4; }
    __device__ static int member() { return threadIdx.x % 4; }
    __device__ static int token() { return PAIRED ? 0 : group(); }

    __device__ static constexpr int entry_of(int j, int b) { return PAIRED ? j / 2 : j * BLOCKS + b; }

    // Of which of the warp's chunks and which block in it an entry is.
    __device__ static int chunk_of(int entry) { return PAIRED ? entry * 2 + group() % 2 : entry / BLOCKS; }
    __device__ static int block_of(int entry) {
        const int chunk = chunk_of(entry) * WARPS + threadIdx.x / WARP;
        return chunk * BLOCKS + (PAIRED ? group() / 2 : entry % BLOCKS);
    }

    // From memory, before `settle`. Columns and tokens that are not there are zero.
    __device__ void load(const Arguments& args, int slice) {
        const uint4* row = reinterpret_cast<const uint4*>(args.x + token() * args.x_stride);
#pragma unroll
        for (int i = 0; i < ENTRIES; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                // Two lanes have a sector of 32 bytes, which is asked for once.
                int in_block = ONE_PIECE ? member() / 2 * 4 + h * 2 + member() % 2 : octet_of(member(), h);
                int octet = (slice * (SLICE / BLOCK) + block_of(i)) * (BLOCK / OCTET) + in_block;
                x[i][h] = make_uint4(0, 0, 0, 0);
                if (token() < args.num_tokens && chunk_of(i) < WARP_CHUNKS &&
                    (WHOLE_CHUNKS || octet < COLUMNS / OCTET))
                    x[i][h] = __ldcg(row + octet);
            }
    }

    // Each of two lanes gets the half of its own sector that the other has loaded.
    __device__ void settle() {
        if constexpr (ONE_PIECE) {
            const bool is_odd = threadIdx.x % 2;
            auto exchange = [&](uint32& first, uint32& second) {
                uint32 got = __shfl_xor_sync(FULL_WARP, is_odd ? first : second, 1);
                first = is_odd ? got : first;
                second = is_odd ? second : got;
            };
#pragma unroll
            for (int i = 0; i < ENTRIES; i++) {
                exchange(x[i][0].x, x[i][1].x);
                exchange(x[i][0].y, x[i][1].y);
                exchange(x[i][0].z, x[i][1].z);
                exchange(x[i][0].w, x[i][1].w);
            }
        }
    }

    // From shared memory, [block][half][token][member][8 columns], blocks `stride` bytes apart.
    __device__ void read(const uint8* shared_x, int stride) {
#pragma unroll
        for (int i = 0; i < ENTRIES; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const uint8* at = shared_x + block_of(i) * stride + (h * TOKENS + token()) * 64 + member() * 16;
                x[i][h] = make_uint4(0, 0, 0, 0);
                if (token() < TOKENS && chunk_of(i) < WARP_CHUNKS) x[i][h] = *reinterpret_cast<const uint4*>(at);
            }
    }
};

#if ADAPTED
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) linear_few(
    const __grid_constant__ AdaptedArguments adapted) {
    const Arguments& args = adapted.layers;
#else
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) linear_few(
    const __grid_constant__ Arguments args) {
#endif
    extern __shared__ __align__(16) uint8 shared[];
    if (uint32(__cvta_generic_to_shared(shared)) != DYNAMIC_SHARED_ADDRESS) __trap();
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int group = lane / 4, member = lane % 4;
    const uint32 lane_offset = lane * 4;
    const Tiles<TILE> tiles(args);

    uint8* x_shared = shared + (TOKENS == 1 ? FIRST_X_LINE * LINE_STRIDE + FIRST_LINE : LINES_BYTES);
    uint8* ring = shared + RINGS + warp * (STAGES * STAGE_BYTES);
    float* scratch = reinterpret_cast<float*>(shared + SCRATCH);

    // -- copies into the ring
    const int copy_row = lane / PARTS, copy_part = lane % PARTS;
    const int copy_target = copy_row * LINE + part_position(copy_row, copy_part) * 16;
    // The weight and row of a fragment that line `i` of a tile is.
    auto row_of_line = [&](const Cursor& at, int i, const uint8*& base, int& row, int& rows) {
        const Weight& weight = args.weights[GATES == 2 ? i / HALF_ROWS % 2 : at.which];
        base = weight.packed;
        rows = weight.rows;
        row = at.row + (GATES == 2 ? i / FRAGMENT_ROWS * HALF_ROWS + i % HALF_ROWS : i);
    };
    Cursor ahead = Cursor::first(tiles);
    auto copy_next = [&](int stage) {
        if (!ahead.done(tiles)) {
            const int in_row = (ahead.slice * SLICE + ahead.chunk * CHUNK) * BITS / 8 + copy_part * 16;
            uint8* target = ring + stage * STAGE_BYTES + copy_target;
            const bool whole =
                WHOLE_CHUNKS && ahead.row + Tiles<TILE>::OUTPUT_ROWS <= args.weights[ahead.which].rows;
            if (whole) {
#pragma unroll
                for (int i = 0; i < TILE; i += COPY_ROWS) {
                    const uint8* base;
                    int row, rows;
                    row_of_line(ahead, i, base, row, rows);
                    copy_async(target + i * LINE, base + (row + copy_row) * ROW_BYTES + in_row);
                }
            } else {
#pragma unroll
                for (int i = 0; i < TILE; i += COPY_ROWS) {
                    const uint8* base;
                    int row, rows;
                    row_of_line(ahead, i, base, row, rows);
                    bool inside = in_row < ROW_BYTES && row + copy_row < rows;
                    const uint8* source = base + (row + copy_row) * ROW_BYTES + in_row;
                    copy_async_or_zero(target + i * LINE, inside ? source : base, inside);
                }
            }
            ahead.advance(tiles);
        }
        commit_copies();
    };

    // -- before the launch before has ended: all that does not depend on it
    start_dependents();
    static_assert(NORM == 0 || NUM_SLICES == 1, "a norm needs all columns at once");
    Activations<ACTIVATION, TOKENS, WARPS, NORM, COLUMNS, SLICE> activations;
    activations.prepare(args.norm_weight);
    copy_next(0);
    constexpr int MAP_ENTRIES = NESTED ? (NUM_WEIGHTS * 256 + THREADS - 1) / THREADS : 0;  // of a thread
    auto map_entry = [&](int i) { return min(i * THREADS + int(threadIdx.x), NUM_WEIGHTS * 256 - 1); };
    float map[MAP_ENTRIES + 1], offsets[NUM_WEIGHTS];  // of nested absmax
#pragma unroll
    for (int i = 0; i < MAP_ENTRIES; i++)
        map[i] = __ldg(args.weights[map_entry(i) / 256].nested_code + map_entry(i) % 256);
#pragma unroll
    for (int i = 0; i < NUM_WEIGHTS; i++) offsets[i] = NESTED ? __ldg(args.weights[i].nested_offset) : 0.0f;
    Cursor now = Cursor::first(tiles);
    Scales scales;
    if (IS_4BIT && !now.done(tiles)) scales.load(args, now, group, member);
    if (IS_4BIT) fill_table<WARPS>(shared);
    // Loads of activations wait behind all copies before them: the last stage is copied as these are on their way.
    // Where no thread block has a second tile, all but the first.
    const bool is_short = TOKENS == 1 && HELD_X && args.num_tiles <= int(gridDim.x);
    const int early = STAGES > 2 && !is_short ? STAGES - 1 : 1;
#pragma unroll 1
    for (int i = 1; i < early; i++) copy_next(i);
#pragma unroll
    for (int i = 0; i < MAP_ENTRIES; i++) line_float(shared, map_entry(i)) = map[i];
    // Where a warp has the same chunks of all tiles, it loads their activations itself, and no warp waits
    // for another between the launch before and its first products.
    constexpr bool OWN_X =
        !HELD_X && TOKENS == 1 && NORM == 0 && NUM_SLICES == 1 && WHOLE_CHUNKS && chunks_of(0) % WARPS == 0;
    if (OWN_X || !SHARED_X) __syncthreads();  // the table is filled
#if ADAPTED
    constexpr int BLOCK_ROWS = Tiles<TILE>::OUTPUT_ROWS * GATES;
    for (int i = threadIdx.x; i < tiles.count * BLOCK_ROWS; i += THREADS) {
        int which, row;
        tiles.find(i / BLOCK_ROWS, which, row);
        which += i % GATES;
        row += i % BLOCK_ROWS / GATES;
        if (row < args.weights[which].rows) fetch_ahead(adapted.adapters[which], row);
    }
    wait_for_activations(adapted.x_is_there);
#else
    wait_for_prerequisites();
#endif

    // Fragments read [block of 64][half][token][member][8 columns].
    auto place = [&](int octet, int token) {
        int place_member = UNIT == 64 ? octet % 8 / 2 : octet % 4;
        int half = UNIT == 64 ? octet % 2 : octet / 4 % 2;
        return reinterpret_cast<uint4*>(x_shared + octet / 8 * X_BLOCK_BYTES +
                                        (half * TOKENS + token) * 64 + place_member * 16);
    };
    auto copy_others = [&] {
#pragma unroll 1
        for (int i = early; i < STAGES; i++) copy_next(i);
    };
    uint4 x[2] = {};  // outside: columns that nobody reads may hold what was there before
    int stage = 0;
    auto share_slice = [&](int slice, bool is_first) {
        activations.load(args.x, args.x_stride, args.num_tokens, slice * SLICE, args.norm_weight, args.epsilon,
                         scratch, place, [&] {
                             if (is_first) copy_others();
                         });
        __syncthreads();
    };
    HeldChunks held, held_next;  // of a slice; the next one's are on their way
    if constexpr (!SHARED_X) {
        held.load(args, 0);
        copy_others();
        held.settle();
        if constexpr (NUM_SLICES > 1) held_next.load(args, 1);
    } else if constexpr (OWN_X) {
        load_own_chunks(args.x, place, copy_others);
    } else if constexpr (NUM_SLICES == 1) {
        share_slice(0, true);
        if constexpr (HELD_X) held.read(x_shared, X_BLOCK_BYTES);
    }
    for (int pass = 0; pass * PASS < tiles.count; pass++) {
        const int pass_end = min((pass + 1) * PASS, tiles.count);
        for (int slice = 0; slice < NUM_SLICES; slice++) {
            if constexpr (NUM_SLICES > 1 && HELD_X) {
                if (slice + pass > 0) {
                    held = held_next;
                    held.settle();
                    if (slice + 1 < NUM_SLICES || pass_end < tiles.count)
                        held_next.load(args, slice + 1 < NUM_SLICES ? slice + 1 : 0);
                }
            } else if constexpr (NUM_SLICES > 1) {
                if (slice + pass > 0) __syncthreads();
                share_slice(slice, slice + pass == 0);
            }
            int open_tile = -1;
            float total[FRAGMENTS][4] = {};
            auto close_tile = [&] {
#pragma unroll
                for (int i = 0; i < FRAGMENTS * 4; i++) {
                    float sum = total[i / 4][i % 4];
                    total[i / 4][i % 4] = 0.0f;
                    int row = group + i / 2 * 8, token = 2 * member + i % 2;
                    if constexpr (TOKENS == 1) {
                        if (i % 2) continue;  // nothing in odd columns
                        sum += __shfl_xor_sync(FULL_WARP, sum, 1);
                        sum += __shfl_xor_sync(FULL_WARP, sum, 2);
                    }
                    if (token < TOKENS) {
                        float& slot = warp_sum(shared, warp, open_tile - pass * PASS, token, row);
                        slot = slice == 0 ? sum : slot + sum;
                    }
                }
            };
            while (now.tile < pass_end && (NUM_SLICES == 1 || now.slice == slice)) {
#pragma unroll
                for (int j = 0; j < WARP_CHUNKS; j++) {
                    if (j == 0 && open_tile != now.tile) {
                        if (open_tile >= 0) close_tile();
                        open_tile = now.tile;
                    }
                    Scales own;
                    if constexpr (IS_4BIT) {
                        own = scales;
                        own.decode(shared, now.which, offsets);
                    }
                    const uint8* x_chunk = x_shared + now.chunk * (BLOCKS * X_BLOCK_BYTES) + member * 16;
                    now.advance(tiles);
                    if (IS_4BIT && !now.done(tiles)) scales.load(args, now, group, member);

                    wait_copies<STAGES - 1>();
                    __syncwarp();
                    const uint8* lines = ring + stage * STAGE_BYTES + group * LINE;
#pragma unroll
                    for (int b = 0; b < BLOCKS; b++) {
                        // Of a single token block b is summed in column 2b alone, which lanes `member` b hold;
                        // they are the ones that have its scale.
                        if constexpr (HELD_X) {
#pragma unroll
                            for (int h = 0; h < 2; h++) x[h] = held.x[HeldChunks::entry_of(j, b)][h];
                        } else if (TOKENS == 1 ? group == (IS_4BIT ? 2 * b : 0) : group < TOKENS) {
                            const uint8* x_block = x_chunk + b * X_BLOCK_BYTES + (TOKENS == 1 ? 0 : group * 64);
#pragma unroll
                            for (int h = 0; h < 2; h++)
                                x[h] = *reinterpret_cast<const uint4*>(x_block + h * (TOKENS * 64));
                        }
#pragma unroll
                        for (int f = 0; f < FRAGMENTS; f++) {
                            uint32 upper[8], lower[8];
                            read_pairs(lines + f * (16 * LINE), group, b, member, lane_offset, upper);
                            read_pairs(lines + f * (16 * LINE) + 8 * LINE, group, b, member, lane_offset, lower);
                            float sums[2][4] = {};
#pragma unroll
                            for (int h = 0; h < 2; h++) {
                                multiply<ACTIVATION>(sums[h], upper[4 * h], lower[4 * h], upper[4 * h + 1],
                                                     lower[4 * h + 1], x[h].x, x[h].y);
                                multiply<ACTIVATION>(sums[h], upper[4 * h + 2], lower[4 * h + 2],
                                                     upper[4 * h + 3], lower[4 * h + 3], x[h].z, x[h].w);
                            }
#pragma unroll
                            for (int i = 0; i < 4; i++) {
                                float& sum = total[f][i];
                                if constexpr (!IS_4BIT) {
                                    sum += sums[0][i] + sums[1][i];
                                } else if constexpr (TOKENS == 1) {
                                    if (i % 2) continue;
                                    const int column = i + (HELD_X ? j % 2 : 0);
                                    if (UNITS == 1) sums[0][column] += sums[1][column];
                                    float with_block = sum;
#pragma unroll
                                    for (int u = 0; u < UNITS; u++)
                                        with_block =
                                            __fmaf_rn(sums[u][column], own.values[f][i / 2][u], with_block);
                                    sum = member == b ? with_block : sum;  // a choice, not a branch
                                } else {
                                    if (UNITS == 1) sums[0][i] += sums[1][i];
#pragma unroll
                                    for (int u = 0; u < UNITS; u++) {
                                        float scale =
                                            __shfl_sync(FULL_WARP, own.values[f][i / 2][u], group * 4 + b);
                                        sum = __fmaf_rn(sums[u][i], scale, sum);
                                    }
                                }
                            }
                        }
                    }
                    __syncwarp();
                    copy_next(stage);
                    stage = stage + 1 == STAGES ? 0 : stage + 1;
                }
            }
            if (open_tile >= 0) close_tile();
        }
        __syncthreads();

        // -- sums over the warps, and what is done with them
#if ADAPTED
        wait_for_prerequisites();  // inner values, and that what is written here is read no more
#endif
        constexpr int OUTPUT_ROWS = Tiles<TILE>::OUTPUT_ROWS;
        for (int i = threadIdx.x; i < (pass_end - pass * PASS) * OUTPUT_ROWS * TOKENS; i += THREADS) {
            const int tile = pass * PASS + i / (OUTPUT_ROWS * TOKENS);
            const int token = i / OUTPUT_ROWS % TOKENS, output = i % OUTPUT_ROWS;
            int which, row;
            tiles.find(tile, which, row);
            row += output;
            if (row >= args.weights[which].rows || token >= args.num_tokens) continue;
            const int in_tile = GATES == 1 ? output : output / HALF_ROWS * FRAGMENT_ROWS + output % HALF_ROWS;
            float sums[GATES];
#pragma unroll
            for (int gate = 0; gate < GATES; gate++) {
                sums[gate] = sum_over_warps(shared, tile, token, in_tile + gate * HALF_ROWS);
                if (FORMAT == INT8) sums[gate] *= args.weights[which + gate].absmax[row] * INVERSE_127;
            }
#if ADAPTED
#pragma unroll 1
            for (int gate = 0; gate < GATES; gate++) {  // one after the other: both want many registers
                const float* inner = adapted.inner + token * adapted.inner_stride;
                float more = adapter_sum(adapted.adapters[which + gate], row, inner);
                if (gate == 0) sums[0] += more;
                else sums[GATES - 1] += more;
            }
#endif
            finish(args, which, row, token, sums[0], sums[GATES - 1]);
        }
        if (pass_end < tiles.count) __syncthreads();
    }
}

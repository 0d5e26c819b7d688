// Products of some tokens (up to 64) with a linear layer, straight on the layout of the files: y = x W^T.
//
// Defines: ACTIVATION (Bf16, F16), FORMAT, UNIT, LINE (see packed_lines.cuh), NESTED (0, 1), TOKENS (the most that
// a launch takes, a multiple of 8), COLUMNS, EPILOGUE (0), NUM_WEIGHTS (1), ROW_WARPS and COLUMN_WARPS (whose
// product are the warps of a thread block), FRAGMENTS (of 16 rows in a warp's tile), STAGES (of a warp's
// ring), X_COLUMNS (of a chunk that are multiplied between two meetings of the warps; 64 to a chunk),
// UNROLL (blocks of those that are interleaved).
//
// Warps have rows of their own and walk through the same columns side by side, so that the activations of these
// columns lie in shared memory once. A warp looks up its weights once and multiplies them with all tokens;
// each activation that it reads from shared memory serves FRAGMENTS * 16 rows. With COLUMN_WARPS warps
// share rows, of whose chunks they take turns.
//
// Work is cut into units, a group of COLUMN_WARPS chunks of the rows of a thread block, tile by tile. Thread blocks
// have equal numbers of them, wherever that cuts a tile. Warps that have a part of a tile alone leave
// their sums in memory, and the last of them to arrive adds them up in the order of the columns, so that
// results are the same every time.
//
// Bytes read per weight: 1/2 + 4/blocksize, or 1/2 + 1/blocksize when nested; 1; 2. Activations are read once
// by every tile, from L2.
#include "source_dtypes.cuh"
#include "code_tables.cuh"
#include "products.cuh"
#include "barriers.cuh"
#include "packed_lines.cuh"
#include "linear_layers.cuh"
#include "linear_tiles.cuh"

constexpr int WARPS = ROW_WARPS * COLUMN_WARPS;
constexpr int THREADS = WARPS * WARP;
constexpr int TILE = FRAGMENT_ROWS * FRAGMENTS;  // rows of a warp
constexpr int TOKEN_TILES = TOKENS / 8;
constexpr int64 ROW_BYTES = int64(COLUMNS) * BITS / 8;
constexpr int CHUNKS = (COLUMNS + CHUNK - 1) / CHUNK;
constexpr int GROUPS = (CHUNKS + COLUMN_WARPS - 1) / COLUMN_WARPS;  // units of a tile
constexpr bool WHOLE_CHUNKS = COLUMNS % CHUNK == 0;
constexpr bool WHOLE_GROUPS = CHUNKS % COLUMN_WARPS == 0;
constexpr int STAGE_BYTES = TILE * LINE;
constexpr int COPY_ROWS = WARP / PARTS;  // lines that a warp copies at once

constexpr int STEPS = CHUNK / X_COLUMNS;  // of a unit
constexpr int STEP_BLOCKS = X_COLUMNS / BLOCK;
static_assert(STEPS * STEP_BLOCKS * BLOCK == CHUNK, "a chunk is whole steps of whole blocks");

// -- activations of a step: [column warp][block of 64][half][token][member][8 columns], in lines of 128 bytes, two
// tokens in each. While one is read the next is written, and a slow warp may still read the one before.
constexpr int X_BUFFERS = 3;
constexpr int X_LINES = COLUMN_WARPS * STEP_BLOCKS * TOKENS;
constexpr int X_OCTETS = X_LINES * (GAP / 16);
constexpr int X_HELD = (X_OCTETS + THREADS - 1) / THREADS;  // octets of a thread

// -- shared memory: the table; lines with activations, dynamic map and barrier, in the gaps of the table if they
// have room there; rings; sums of all column warps but the first
constexpr int MAP_LINE = X_BUFFERS * X_LINES;
constexpr int BARRIER_LINE = MAP_LINE + NESTED * (1024 / GAP);
constexpr int LINES = BARRIER_LINE + 1;
constexpr bool IN_GAPS = IS_4BIT && LINES <= 256;
constexpr int LINES_AT = IN_GAPS ? GAP : TABLE_BYTES;
constexpr int STRIDE = IN_GAPS ? ENTRY_STRIDE : GAP;  // from line to line
constexpr int RINGS_AT = TABLE_BYTES + (IN_GAPS ? 0 : LINES * GAP);
constexpr int SUMS_AT = RINGS_AT + WARPS * STAGES * STAGE_BYTES;
constexpr int SUMS = FRAGMENTS * TOKEN_TILES;  // of a lane, four at a time

__device__ inline uint8* line_at(uint8* shared, int line) { return shared + LINES_AT + line * STRIDE; }

struct SomeArguments {
    Arguments layers;      // one
    float4* partials;      // (blocks, 2, ROW_WARPS, SUMS, 32): of a block's first tile and of its last
    uint32* arrived;       // (blocks, ROW_WARPS), zero before and after
    int units, longer;     // of each block; the first `longer` blocks have one more
};

// A unit on the way through a thread block's units.
struct Place {
    int unit, tile, group;

    __device__ explicit Place(int unit) : unit(unit), tile(unit / GROUPS), group(unit % GROUPS) {}

    __device__ void advance() {
        unit++;
        if (++group == GROUPS) {
            group = 0;
            tile++;
        }
    }
};

// Of the dynamic map in lines.
__device__ inline float entry_of(const uint8* map, uint32 code) {
    return *reinterpret_cast<const float*>(map + code / 32 * STRIDE + code % 32 * 4);
}

// absmax of the blocks of a lane quad's rows, loaded one chunk ahead; lane `member` has those of block `member`.
struct Scales {
    static constexpr int ROW_UNITS = COLUMNS / UNIT;
    float values[FRAGMENTS][2][UNITS];  // absmax, or the nested absmax of it
    uint32 codes[FRAGMENTS][2][UNITS];

    // first_row: of the lane's warp.
    __device__ void load(const Arguments& args, int first_row, int chunk, int group, int member) {
        const Weight& weight = args.weights[0];
        const int units_log2 = args.blocksize_log2 - (UNIT == 64 ? 6 : 5);
        int unit = chunk * (CHUNK / UNIT) + member % BLOCKS * UNITS;
        // columns that are not there have any scale: their activations are zero
        if (!(WHOLE_CHUNKS && WHOLE_GROUPS) && unit >= ROW_UNITS) unit = 0;
#pragma unroll
        for (int i = 0; i < FRAGMENTS * 2; i++) {
            uint32 row = min(first_row + i / 2 * FRAGMENT_ROWS + 2 * group + i % 2, weight.rows - 1);
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

    __device__ void decode(const uint8* map, float offset) {
#if NESTED
#pragma unroll
        for (int i = 0; i < FRAGMENTS * 2; i++)
#pragma unroll
            for (int u = 0; u < UNITS; u++) {
                float& value = values[i / 2][i % 2][u];
                value = flushed_product(entry_of(map, codes[i / 2][i % 2][u]), value) + offset;
            }
#endif
    }
};

// A thread's part of the activations of a step, on its way to shared memory. Nothing is asked of what a load brings
// before it is stored, a step later.
struct Window {
    const Bits* rows[X_HELD];  // of the octets' tokens
    int columns[X_HELD];       // in the first step of a group
    int targets[X_HELD];       // in a buffer
    uint4 octets[X_HELD];
    uint32 outside;            // bits of those that lie behind the last column

    // Tokens that are not there repeat the last one: nobody stores their results.
    __device__ explicit Window(const Arguments& args) : outside(0) {
#pragma unroll
        for (int i = 0; i < X_HELD; i++) {
            // Eight lanes that store together have a line; threads beyond the last octet do as its own does.
            const int at = min(int(threadIdx.x) + i * THREADS, X_OCTETS - WARP + int(threadIdx.x) % WARP);
            const int lane = at % WARP, block = at / WARP / (TOKENS / 4), member = lane % 4;
            const int half = lane / 8 % 2;
            const int token = at / WARP % (TOKENS / 4) * 4 + lane / 16 * 2 + lane / 4 % 2;
            const int line = block * TOKENS + (half * TOKENS + token) / 2;
            targets[i] = line * STRIDE + token % 2 * 64 + member * 16;
            rows[i] = args.x + min(token, args.num_tokens - 1) * args.x_stride;
            columns[i] = block / STEP_BLOCKS * CHUNK + block % STEP_BLOCKS * BLOCK + octet_of(member, half) * OCTET;
        }
    }

    __device__ void load(int group, int step) {
        const int first = group * (COLUMN_WARPS * CHUNK) + step * X_COLUMNS;
        outside = 0;
#pragma unroll
        for (int i = 0; i < X_HELD; i++) {
            int column = first + columns[i];
            if (!(WHOLE_CHUNKS && WHOLE_GROUPS) && column >= COLUMNS) {
                outside |= 1u << i;
                column = 0;
            }
            octets[i] = __ldcg(reinterpret_cast<const uint4*>(rows[i] + column));
        }
    }

    __device__ void store(uint8* buffer) const {
#pragma unroll
        for (int i = 0; i < X_HELD; i++) {
            const bool inside = (WHOLE_CHUNKS && WHOLE_GROUPS) || !(outside >> i & 1);
            const uint4 octet = inside ? octets[i] : make_uint4(0, 0, 0, 0);
            *reinterpret_cast<uint4*>(buffer + targets[i]) = octet;
        }
    }
};

// The sums of a lane: rows 2 * group and the next of each fragment, tokens 2 * member and the next of each tile.
struct Totals {
    float values[FRAGMENTS][TOKEN_TILES][4];

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < SUMS * 4; i++) values[i / 4 / TOKEN_TILES][i / 4 % TOKEN_TILES][i % 4] = 0.0f;
    }

    __device__ void add(int i, float4 other) {
        float(&own)[4] = values[i / TOKEN_TILES][i % TOKEN_TILES];
        own[0] += other.x;
        own[1] += other.y;
        own[2] += other.z;
        own[3] += other.w;
    }

    __device__ float4 get(int i) const {
        const float(&own)[4] = values[i / TOKEN_TILES][i % TOKEN_TILES];
        return make_float4(own[0], own[1], own[2], own[3]);
    }

    // All that the column warps of these rows have, in the first of them.
    __device__ void merge_columns(float4* shared_sums, int row_warp, int column_warp, int lane) {
        if constexpr (COLUMN_WARPS == 1) return;
        float4* own = shared_sums + row_warp * (SUMS * WARP) + lane;
        constexpr int NEXT = ROW_WARPS * SUMS * WARP;
        if (column_warp > 0) {
#pragma unroll
            for (int i = 0; i < SUMS; i++) own[(column_warp - 1) * NEXT + i * WARP] = get(i);
        }
        __syncthreads();
        if (column_warp == 0) {
#pragma unroll 1
            for (int other = 0; other < COLUMN_WARPS - 1; other++)
#pragma unroll
                for (int i = 0; i < SUMS; i++) add(i, own[other * NEXT + i * WARP]);
        }
        __syncthreads();  // before the next tile's
    }

    // Adds up what all thread blocks have of a tile. False: others are not there yet, the last one will do it.
    __device__ bool merge_blocks(const SomeArguments& args, const Share& share, int tile, int row_warp, int lane) {
        constexpr int PART = SUMS * WARP, SLOT = ROW_WARPS * PART;
        const int first = share.owner(tile * GROUPS), last = share.owner(tile * GROUPS + GROUPS - 1);
        if (first == last) return true;
        auto slot_of = [&](int block) {
            const int slot = share.begin(block) / GROUPS == tile ? 0 : 1;
            return args.partials + (int64(block) * 2 + slot) * SLOT + row_warp * PART + lane;
        };
        float4* own = slot_of(blockIdx.x);
#pragma unroll
        for (int i = 0; i < SUMS; i++) __stcg(own + i * WARP, get(i));
        __threadfence();
        __syncwarp();
        uint32* arrived = args.arrived + first * ROW_WARPS + row_warp;
        uint32 before = 0;
        if (lane == 0) before = atomicAdd(arrived, 1u);
        if (__shfl_sync(FULL_WARP, before, 0) != uint32(last - first)) return false;
        __threadfence();
        if (lane == 0) *arrived = 0;  // for the next launch
        clear();
        constexpr int AT_ONCE = SUMS >= 16 ? 1 : 16 / SUMS;  // blocks whose sums are loaded at once
#pragma unroll 1
        for (int block = first; block <= last; block += AT_ONCE) {
            float4 others[AT_ONCE][SUMS];
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
                for (int i = 0; i < SUMS; i++)
                    others[j][i] = block + j <= last ? __ldcg(slot_of(block + j) + i * WARP)
                                                     : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
            for (int j = 0; j < AT_ONCE; j++)
#pragma unroll
                for (int i = 0; i < SUMS; i++) add(i, others[j][i]);
        }
        return true;
    }

    __device__ void store(const Arguments& args, int first_row, int group, int member) const {
        const Weight& weight = args.weights[0];
        const bool pairs =
            ((weight.rows | int(weight.out_stride)) & 1) == 0 && (reinterpret_cast<uint64>(weight.out) & 3) == 0;
#pragma unroll
        for (int f = 0; f < FRAGMENTS; f++) {
            const int row = first_row + f * FRAGMENT_ROWS + 2 * group;
            if (row >= weight.rows) continue;
            float scales[2] = {1.0f, 1.0f};
            if constexpr (FORMAT == INT8) {
                scales[0] = weight.absmax[row] * INVERSE_127;
                scales[1] = weight.absmax[min(row + 1, weight.rows - 1)] * INVERSE_127;
            }
#pragma unroll
            for (int i = 0; i < TOKEN_TILES * 2; i++) {
                const int token = i / 2 * 8 + 2 * member + i % 2;
                const float(&sums)[4] = values[f][i / 2];
                if (token < args.num_tokens)
                    store_rows(weight, pairs, row, token, sums[i % 2] * scales[0], sums[2 + i % 2] * scales[1]);
            }
        }
    }
};

// Adds the products of a block of 64 columns to a warp's totals.
__device__ inline void multiply_block(const uint8* lines, const uint8* x_block, int block, const Scales& scales,
                                      int group, int member, uint32 lane_offset, Totals& totals) {
    uint32 pairs[FRAGMENTS][2][8];
    float scale[FRAGMENTS][2][UNITS];
#pragma unroll
    for (int i = 0; i < FRAGMENTS * 2; i++) {
        read_pairs(lines + i * (HALF_ROWS * LINE), group, block, member, lane_offset, pairs[i / 2][i % 2]);
        if constexpr (IS_4BIT) {
#pragma unroll
            for (int u = 0; u < UNITS; u++)
                scale[i / 2][i % 2][u] =
                    __shfl_sync(FULL_WARP, scales.values[i / 2][i % 2][u], group * 4 + block);
        }
    }
    // Products that wait for each other are far apart: those of a pair of token tiles take turns.
    constexpr int AT_ONCE = TOKEN_TILES == 1 ? 1 : 2;
    constexpr bool APART = UNITS == 2 || SUMS < 4;  // the halves of a block, for the same reason
    static_assert(TOKEN_TILES % AT_ONCE == 0, "token tiles come in pairs");
#pragma unroll
    for (int first = 0; first < TOKEN_TILES; first += AT_ONCE) {
        float sums[AT_ONCE][FRAGMENTS][2][4] = {};
#pragma unroll
        for (int h = 0; h < 2; h++) {
            uint4 x[AT_ONCE];
#pragma unroll
            for (int n = 0; n < AT_ONCE; n++)
                x[n] = *reinterpret_cast<const uint4*>(x_block + (h * (TOKENS / 2) + (first + n) * 4) * STRIDE);
#pragma unroll
            for (int i = 0; i < 2 * AT_ONCE * FRAGMENTS; i++) {
                const int n = i / FRAGMENTS % AT_ONCE, f = i % FRAGMENTS;
                const int at = 4 * h + i / (AT_ONCE * FRAGMENTS) * 2;
                float(&into)[4] = IS_4BIT ? sums[n][f][APART ? h : 0] : totals.values[f][first + n];
                multiply<ACTIVATION>(into, pairs[f][0][at], pairs[f][1][at], pairs[f][0][at + 1],
                                     pairs[f][1][at + 1], at % 4 ? x[n].z : x[n].x, at % 4 ? x[n].w : x[n].y);
            }
        }
        if constexpr (IS_4BIT) {
#pragma unroll
            for (int i = 0; i < AT_ONCE * FRAGMENTS * 4; i++) {
                const int n = i / 4 / FRAGMENTS, f = i / 4 % FRAGMENTS, j = i % 4;
                float(&own)[2][4] = sums[n][f];
                float& total = totals.values[f][first + n][j];
                if (APART && UNITS == 1) own[0][j] += own[1][j];
#pragma unroll
                for (int u = 0; u < UNITS; u++) total = __fmaf_rn(own[u][j], scale[f][j / 2][u], total);
            }
        }
    }
}

// Adds the products of a step's columns to a warp's totals.
__device__ inline void multiply_step(const uint8* lines, const uint8* x, int first_block, const Scales& scales,
                                     int group, int member, uint32 lane_offset, Totals& totals) {
    x += group / 2 * STRIDE + group % 2 * 64 + member * 16;
#pragma unroll UNROLL
    for (int b = 0; b < STEP_BLOCKS; b++)
        multiply_block(lines, x + b * (TOKENS * STRIDE), first_block + b, scales, group, member, lane_offset,
                       totals);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) linear_some(
    const __grid_constant__ SomeArguments args) {
    extern __shared__ __align__(16) uint8 shared[];
    if (uint32(__cvta_generic_to_shared(shared)) != DYNAMIC_SHARED_ADDRESS) __trap();
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int row_warp = warp % ROW_WARPS, column_warp = warp / ROW_WARPS;
    const int group = lane / 4, member = lane % 4;
    const uint32 lane_offset = lane * 4;
    const Weight& weight = args.layers.weights[0];
    uint8* ring = shared + RINGS_AT + warp * (STAGES * STAGE_BYTES);
    uint8* map = line_at(shared, MAP_LINE);
    uint64* x_ready = reinterpret_cast<uint64*>(line_at(shared, BARRIER_LINE));

    const Share share{args.units, args.longer};
    const int end = share.begin(blockIdx.x + 1);
    Place now(share.begin(blockIdx.x));
    auto row_of = [&](int tile) { return (tile * ROW_WARPS + row_warp) * TILE; };
    auto chunk_of = [&](int unit_group) { return unit_group * COLUMN_WARPS + column_warp; };

    // -- copies into the ring
    const int copy_row = lane / PARTS, copy_part = lane % PARTS;
    const int copy_target = copy_row * LINE + part_position(copy_row, copy_part) * 16;
    const int copy_target_4 = copy_row * LINE + part_position(copy_row + 4, copy_part) * 16;  // four lines below
    Place ahead = now;
    auto copy_next = [&](int stage) {
        if (ahead.unit < end) {
            const int64 in_row = int64(chunk_of(ahead.group)) * LINE + copy_part * 16;
            const int first = row_of(ahead.tile) + 2 * copy_row;
            uint8* stage_at = ring + stage * STAGE_BYTES;
            const bool whole = WHOLE_CHUNKS && WHOLE_GROUPS && row_of(ahead.tile) + TILE <= weight.rows;
#pragma unroll
            for (int i = 0; i < TILE; i += COPY_ROWS) {
                uint8* target = stage_at + i * LINE + (i % 8 == 0 ? copy_target : copy_target_4);
                const int row = first + row_of_line(i);
                const uint8* source = weight.packed + row * ROW_BYTES + in_row;
                if (whole) {
                    copy_async(target, source);
                } else {
                    const bool inside = in_row < ROW_BYTES && row < weight.rows;
                    copy_async_or_zero(target, inside ? source : weight.packed, inside);
                }
            }
            ahead.advance();
        }
        commit_copies();
    };

    // -- before the launch before has ended: all that does not depend on it
    start_dependents();
#pragma unroll 1
    for (int i = 0; i < STAGES; i++) copy_next(i);
    Scales scales;
    if (IS_4BIT) scales.load(args.layers, row_of(now.tile), chunk_of(now.group), group, member);
    if (IS_4BIT) fill_table<WARPS>(shared);
#if NESTED
    for (int i = threadIdx.x; i < 256; i += THREADS)
        *reinterpret_cast<float*>(map + i / 32 * STRIDE + i % 32 * 4) = __ldg(weight.nested_code + i);
#endif
    const float offset = NESTED ? __ldg(weight.nested_offset) : 0.0f;
    if (threadIdx.x == 0) init_barrier(x_ready, WARPS);
    wait_for_prerequisites();

    // -- activations of the first step into shared memory, of the second into registers
    Window window(args.layers);
    Place x_place = now;
    int x_step = 0;
    auto load_next = [&](Window& into) {
        if (x_place.unit < end) into.load(x_place.group, x_step);
        if (++x_step == STEPS) {
            x_step = 0;
            x_place.advance();
        }
    };
    {
        Window first = window;
        load_next(first);
        load_next(window);
        first.store(line_at(shared, 0));
    }
    __syncthreads();

    Totals totals;
    totals.clear();
    int stage = 0, buffer = 0;
    uint32 phase = 0;
    while (now.unit < end) {
        Scales own;
        if constexpr (IS_4BIT) {
            own = scales;
            own.decode(map, offset);
        }
        const bool has_chunk = WHOLE_GROUPS || chunk_of(now.group) < CHUNKS;
        const uint8* lines = ring + stage * STAGE_BYTES + group * LINE;
        const int tile = now.tile;
        now.advance();
        if (IS_4BIT && now.unit < end)
            scales.load(args.layers, row_of(now.tile), chunk_of(now.group), group, member);
#pragma unroll 1
        for (int step = 0; step < STEPS; step++) {
            const uint8* x = line_at(shared, buffer * X_LINES + column_warp * (STEP_BLOCKS * TOKENS));
            buffer = buffer + 1 == X_BUFFERS ? 0 : buffer + 1;
            window.store(line_at(shared, buffer * X_LINES));
            arrive(x_ready);
            load_next(window);
            if (step == 0) {
                wait_copies<STAGES - 1>();
                __syncwarp();
            }
            if (has_chunk)
                multiply_step(lines, x, step * STEP_BLOCKS, own, group, member, lane_offset, totals);
            if (step + 1 == STEPS) {
                __syncwarp();
                copy_next(stage);
                stage = stage + 1 == STAGES ? 0 : stage + 1;
                if (now.tile != tile || now.unit == end) {
                    totals.merge_columns(reinterpret_cast<float4*>(shared + SUMS_AT), row_warp, column_warp, lane);
                    if (column_warp == 0 && totals.merge_blocks(args, share, tile, row_warp, lane))
                        totals.store(args.layers, row_of(tile), group, member);
                    totals.clear();
                }
            }
            wait_for_phase(x_ready, phase);
            phase ^= 1;
        }
    }
}

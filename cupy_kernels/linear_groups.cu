// Products of some tokens (up to 64) with a linear layer of 4-bit weights, by groups of four warps (Hopper alone):
// y = x W^T, straight on the layout of the files.
//
// Defines: ACTIVATION (Bf16, F16), FORMAT (NF4, FP4), UNIT (64), LINE (128), NESTED (0, 1), TOKENS (the most that
// a launch takes: 8, 16, 32, 64), COLUMNS, EPILOGUE (0), NUM_WEIGHTS (1), WARPGROUPS (1), ROW_WARPS (a multiple of
// four) and COLUMN_WARPS (whose product are the warps of a thread block that multiply), FRAGMENTS (1, 2, of 16 rows
// in a warp's tile), STAGES (of a warp's ring), X_STAGES (of the activations' ring, a multiple of four), SPLIT
// (thread blocks of a cluster that share a tile; 1: no cluster).
//
// The tensor cores multiply one of a warp's fragments, reading the tokens from shared memory themselves, while the
// warp scales and adds the sums of the other and looks up its next weights; with one fragment it looks up the next
// block's meanwhile, and scales and adds afterwards.
//
// Four more warps fill the dynamic map and give up their registers; one of their threads has the copy engine bring
// tokens, so that warps meet only where a place in the ring is used again. With COLUMN_WARPS warps share rows, of
// whose chunks they take turns.
//
// Work is cut into units, a group of COLUMN_WARPS chunks of the rows of a thread block, tile by tile. Thread blocks
// have equal numbers of them, wherever that cuts a tile; of such tiles each leaves its sums in memory, and
// the last one to arrive adds them up in the order of the columns, so that results are the same every time.
// With SPLIT a cluster has one tile, each of its blocks a part of the columns: over shared memory warps give others
// the sums that these keep, add up in a fixed order and store. Where there are fewer than warps, some only give.
//
// Bytes read per weight: 1/2 + 4/blocksize, or 1/2 + 1/blocksize when nested. Activations are read once by every
// tile, from L2.
#include "source_dtypes.cuh"
#include "code_tables.cuh"
#include "products.cuh"
#include "barriers.cuh"
#include "packed_lines.cuh"
#include "linear_layers.cuh"
#include "linear_tiles.cuh"
#include "warpgroups.cuh"
#include "token_copies.cuh"
#include "clusters.cuh"

constexpr int WARPS = ROW_WARPS * COLUMN_WARPS;
constexpr int WORKERS = WARPS * WARP;  // threads that multiply; those behind them see to the activations
constexpr int THREADS = WORKERS + 4 * WARP;
// Registers of a thread where those that the others release are needed: at first all have as many, 168, 128 or 96.
// To shift them takes time.
constexpr bool SHIFTS_REGISTERS = WARPS > 4 && !(WARPS == 16 && TOKENS <= 16);
constexpr int COPIER_REGISTERS = WARPS > 8 ? 32 : 40;
constexpr int WORKER_REGISTERS = WARPS == 8 ? 232 : WARPS == 12 ? 160 : 112;
constexpr bool HOLDS_OFFSET = WARPS < 16;  // of nested absmax, in a register
constexpr int TILE = FRAGMENT_ROWS * FRAGMENTS;  // rows of a warp
constexpr int TOKEN_TILES = TOKENS / 8;
constexpr int64 ROW_BYTES = int64(COLUMNS) * BITS / 8;
constexpr int CHUNKS = (COLUMNS + CHUNK - 1) / CHUNK;
constexpr int GROUPS = (CHUNKS + COLUMN_WARPS - 1) / COLUMN_WARPS;  // units of a tile
constexpr bool WHOLE = COLUMNS % (CHUNK * COLUMN_WARPS) == 0;
constexpr int STAGE_BYTES = TILE * LINE;
constexpr int COPY_ROWS = WARP / PARTS;  // lines that a warp copies at once
static_assert(IS_4BIT && UNIT == 64 && LINE == 128 && WARPGROUPS, "what the copies and lookups are written for");
static_assert(ROW_WARPS % 4 == 0, "groups of four warps");

// -- activations: a stage has a block of 64 columns for each column warp, in lines of 128 bytes as the copy engine
// swizzles them, a token in each
constexpr int X_BYTES = TOKENS * 128;
constexpr int X_STAGE_BYTES = COLUMN_WARPS * X_BYTES;
constexpr int X_ROUNDS = X_STAGES / BLOCKS;  // units whose activations are in the ring
constexpr bool WHOLE_CHUNKS = COLUMNS % CHUNK == 0;  // so that one copy brings the blocks of all column warps
static_assert(X_STAGES % BLOCKS == 0, "a block of a unit always has the same places");

// -- shared memory: the table, in its gaps the dynamic map, barriers and sums that column warps or, with SPLIT,
// thread blocks give to each other; activations; rings; sums for which gaps are too small
constexpr int X_AT = TABLE_BYTES;
constexpr int RINGS_AT = X_AT + X_STAGES * X_STAGE_BYTES;
constexpr int RING_BYTES = WARPS * STAGES * STAGE_BYTES;
constexpr int SUMS_AT = RINGS_AT + RING_BYTES;
constexpr int OFFSET_LINE = 8, FULL_LINE = 9, EMPTY_LINE = 10, RECEIVED_LINE = 11, MAP_FILLED_LINE = 12, SUMS_LINE = 13;
constexpr int GAPS_BYTES = (256 - SUMS_LINE) * GAP;  // for sums
static_assert(X_STAGES * 8 <= GAP && WARPS * 8 <= GAP, "barriers fit into a gap");
static_assert(GROUPS >= SPLIT, "each thread block has columns");

// -- sums of a lane, four at a time: first of its warp, then what it keeps once those of column warps are merged
constexpr int SUMS = FRAGMENTS * TOKEN_TILES, SUM_BYTES = WARP * 16;  // of a warp
constexpr int COLUMN_KEEPERS = SUMS < COLUMN_WARPS ? SUMS : COLUMN_WARPS;
constexpr int PART = SUMS / COLUMN_KEEPERS;
constexpr int KEEPING_WARPS = ROW_WARPS * COLUMN_KEEPERS;
static_assert(PART * COLUMN_KEEPERS == SUMS, "column warps share sums evenly");
constexpr int MERGED_BYTES = (COLUMN_WARPS - 1) * ROW_WARPS * SUMS * SUM_BYTES;
constexpr bool MERGES_IN_GAPS = SPLIT == 1 && MERGED_BYTES <= GAPS_BYTES;
static_assert(SPLIT == 1 || MERGED_BYTES <= RING_BYTES, "column warps of one tile give sums in the rings");

// What thread blocks of a cluster keep of them in the end; at once where gaps have room for it.
__device__ constexpr int kept_of(int sums, int givers) { return sums < givers ? 1 : sums / givers; }
__device__ constexpr int given_bytes(int sums, int givers) {
    const int kept = kept_of(sums, givers), keepers = sums / kept;
    const int column_warps = givers == SPLIT ? COLUMN_KEEPERS : (keepers + SPLIT - 1) / SPLIT;  // that keep
    return (givers - 1) * column_warps * ROW_WARPS * kept * SUM_BYTES;
}
constexpr bool AT_ONCE = COLUMN_WARPS == 1 || given_bytes(SUMS, SPLIT * COLUMN_WARPS) <= GAPS_BYTES;
constexpr int GIVERS = AT_ONCE ? SPLIT * COLUMN_WARPS : SPLIT;
constexpr int GIVEN = AT_ONCE ? SUMS : PART;
constexpr int OWN = kept_of(GIVEN, GIVERS), KEEPERS = GIVEN / OWN;
constexpr bool GIVES_IN_GAPS = given_bytes(GIVEN, GIVERS) <= GAPS_BYTES;
static_assert(OWN * KEEPERS == GIVEN && KEEPERS <= GIVERS, "thread blocks of a cluster share sums evenly");

// A lane's place among the `i`-th sums of a warp, in gaps or from `at` on.
template <bool IN_GAPS>
__device__ inline uint8* place_of_sums(uint8* shared, int at, int i, int lane) {
    if constexpr (IN_GAPS)
        return shared + GAP + (SUMS_LINE + i * 4 + lane / 8) * ENTRY_STRIDE + lane % 8 * 16;
    else
        return shared + at + i * SUM_BYTES + lane * 16;
}

struct GroupArguments {
    TokenMap tokens;
    Arguments layers;    // one
    float4* partials;    // (blocks, 2, KEEPING_WARPS, PART, 32): of a block's first tile and of its last
    uint32* arrived;     // (blocks, KEEPING_WARPS), zero before and after
    int units, longer;   // of each block; the first `longer` blocks have one more
};

__device__ constexpr int tile_of(int unit) { return unit / GROUPS; }
__device__ constexpr int group_of(int unit) { return unit % GROUPS; }
__device__ constexpr int row_of(int unit, int row_warp) { return (tile_of(unit) * ROW_WARPS + row_warp) * TILE; }
__device__ constexpr int chunk_of(int unit, int column_warp) { return group_of(unit) * COLUMN_WARPS + column_warp; }

// The units of this thread block.
__device__ inline int begin_of_block(const Share& share, int rank) {
    if constexpr (SPLIT == 1) return share.begin(blockIdx.x);
    return blockIdx.x / SPLIT * GROUPS + rank * GROUPS / SPLIT;
}

__device__ inline int end_of_block(const Share& share, int rank) {
    if constexpr (SPLIT == 1) return share.begin(blockIdx.x + 1);
    return blockIdx.x / SPLIT * GROUPS + (rank + 1) * GROUPS / SPLIT;
}

__device__ inline uint8* gap_at(uint8* shared, int line) { return shared + GAP + line * ENTRY_STRIDE; }

// Of the dynamic map in gaps.
__device__ inline float entry_of(const uint8* map, uint32 code) {
    return *reinterpret_cast<const float*>(map + code / 32 * ENTRY_STRIDE + code % 32 * 4);
}

// A thread's part of the dynamic map, which is filled by the warps that have nothing to copy; one more entry is the
// offset.
struct MapPart {
    static constexpr int FILLERS = THREADS - WORKERS - WARP, COUNT = (257 + FILLERS - 1) / FILLERS;
    float entries[COUNT];

    __device__ static int code(int i) { return min(i * FILLERS + int(threadIdx.x) - WORKERS - WARP, 256); }

    __device__ void load(const Weight& weight) {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            entries[i] = __ldg(code(i) < 256 ? weight.nested_code + code(i) : weight.nested_offset);
    }

    __device__ void store(uint8* map) const {
#pragma unroll
        for (int i = 0; i < COUNT; i++)
            *reinterpret_cast<float*>(map + code(i) / 32 * ENTRY_STRIDE + code(i) % 32 * 4) = entries[i];
    }
};

// Until a fragment of the first unit in the ring is there; each is a group of copies, and the ring full of them.
template <int FRAGMENT>
__device__ inline void await_fragment() {
    wait_copies<STAGES * FRAGMENTS - 1 - FRAGMENT>();
    __syncwarp();
}

// So that the first copy need not wait for it.
__device__ inline void prefetch_map(const TokenMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// absmax of the blocks of a lane quad's rows, loaded one chunk ahead; lane `member` has those of block `member`.
struct Scales {
    static constexpr int ROW_UNITS = COLUMNS / UNIT;
    float values[FRAGMENTS][2];  // absmax, or the nested absmax of it
    uint32 codes[FRAGMENTS][2];

    // first_row: of the lane's warp.
    __device__ void load(const Arguments& args, int first_row, int chunk, int group, int member) {
        const Weight& weight = args.weights[0];
        int unit = chunk * BLOCKS + member;
        if (!WHOLE && unit >= ROW_UNITS) unit = 0;  // any scale: the activations are zero
#pragma unroll
        for (int i = 0; i < FRAGMENTS * 2; i++) {
            const uint32 row = min(first_row + i / 2 * FRAGMENT_ROWS + 2 * group + i % 2, weight.rows - 1);
            const uint32 block = (row * ROW_UNITS + unit) >> (args.blocksize_log2 - 6);
#if NESTED
            codes[i / 2][i % 2] = __ldg(weight.absmax_codes + block);
            values[i / 2][i % 2] = __ldg(weight.nested_absmax + block / NESTED_BLOCKSIZE);
#else
            values[i / 2][i % 2] = __ldg(weight.absmax + block);
#endif
        }
    }

    __device__ void decode(const uint8* map, float held_offset) {
#if NESTED
        const float offset = HOLDS_OFFSET ? held_offset : entry_of(map, OFFSET_LINE * 32);
#pragma unroll
        for (int i = 0; i < FRAGMENTS * 2; i++) {
            float& value = values[i / 2][i % 2];
            value = flushed_product(entry_of(map, codes[i / 2][i % 2]), value) + offset;
        }
#endif
    }
};

// The values of a block that a lane has of its two rows, in the order of the products: of each 16 columns, two and
// then two that are eight further, in both rows.
struct Pairs {
    uint32 of[4][4];

    // line: of the first row, at part `group`; the second row is eight lines further.
    __device__ void read(uint32 line, int block, uint32 own_byte, uint32 lane_offset) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32 at = line ^ (2 * block + half) * 16;
            const uint4 first = load_words<0>(at), second = load_words<HALF_ROWS * LINE>(at);
            const uint32 words[2][4] = {{first.x, first.y, first.z, first.w},
                                        {second.x, second.y, second.z, second.w}};
#pragma unroll
            for (int i = 0; i < 8; i++)
                of[2 * half + i / 4][i % 4] = look_up_byte(words[i % 2][i / 2], own_byte, lane_offset);
        }
    }

    __device__ void settle_all() {
#pragma unroll
        for (int i = 0; i < 16; i++) settle(of[i / 4][i % 4]);
    }
};

// A lane's sums of some token tiles of its fragments, from the `first`-th on: rows 2 * group and the next of a
// fragment, tokens 2 * member and the next of a tile.
template <int COUNT>
struct Sums {
    float values[COUNT][4];

    __device__ void clear() {
#pragma unroll
        for (int i = 0; i < COUNT * 4; i++) values[i / 4][i % 4] = 0.0f;
    }

    __device__ float4 get(int i) const {
        return make_float4(values[i][0], values[i][1], values[i][2], values[i][3]);
    }

    __device__ void set(int i, float4 other) {
        values[i][0] = other.x;
        values[i][1] = other.y;
        values[i][2] = other.z;
        values[i][3] = other.w;
    }

    __device__ void add(int i, float4 other) {
        values[i][0] += other.x;
        values[i][1] += other.y;
        values[i][2] += other.z;
        values[i][3] += other.w;
    }

    __device__ void store(const Arguments& args, int first_row, int first, int group, int member) const {
        const Weight& weight = args.weights[0];
        const bool pairs =
            ((weight.rows | int(weight.out_stride)) & 1) == 0 && (reinterpret_cast<uint64>(weight.out) & 3) == 0;
#pragma unroll
        for (int i = 0; i < COUNT * 2; i++) {
            const int at = first + i / 2;
            const int row = first_row + at / TOKEN_TILES * FRAGMENT_ROWS + 2 * group;
            const int token = at % TOKEN_TILES * 8 + 2 * member + i % 2;
            if (row >= weight.rows || token >= args.num_tokens) continue;
            store_rows(weight, pairs, row, token, values[i / 2][i % 2], values[i / 2][2 + i % 2]);
        }
    }
};

// Of a warp's totals the part that it keeps, if any, with what the other column warps have of it. They lie in shared
// memory as [keeper][giver][row warp][sums][lane].
__device__ inline Sums<PART> merge_columns(const Sums<SUMS>& totals, uint8* shared, int row_warp, int column_warp,
                                           int lane) {
    Sums<PART> kept;
    constexpr int GIVEN_SUMS = ROW_WARPS * PART, APART = MERGES_IN_GAPS ? 4 * ENTRY_STRIDE : SUM_BYTES;
    uint8* own = place_of_sums<MERGES_IN_GAPS>(shared, SPLIT == 1 ? SUMS_AT : RINGS_AT, row_warp * PART, lane);
    auto place = [&](int keeper, int giver, int i) {
        const int sums = (keeper * (COLUMN_WARPS - 1) + giver) * GIVEN_SUMS + i;
        return reinterpret_cast<float4*>(own + sums * APART);
    };
    kept.clear();
#pragma unroll
    for (int keeper = 0; keeper < COLUMN_KEEPERS; keeper++) {
        const int giver = column_warp - (column_warp > keeper);
#pragma unroll
        for (int i = 0; i < PART; i++) {
            const float4 value = totals.get(keeper * PART + i);
            if (COLUMN_WARPS == 1 || keeper == column_warp) {
                kept.set(i, value);
            } else {
                *place(keeper, giver, i) = value;
            }
        }
    }
    if constexpr (COLUMN_WARPS > 1) {
        meet<WORKERS>();
        const bool keeps = COLUMN_KEEPERS == COLUMN_WARPS || column_warp < COLUMN_KEEPERS;
#pragma unroll
        for (int i = 0; i < (COLUMN_WARPS - 1) * PART; i++)
            if (keeps) kept.add(i % PART, *place(column_warp, i / PART, i % PART));
        if constexpr (SPLIT == 1) meet<WORKERS>();  // before the next tile's
    }
    return kept;
}

// In a cluster: those of a warp, or of all column warps, once nobody reads the rings.
template <bool OF_WARP>
__device__ inline auto sums_to_give(const Sums<SUMS>& totals, uint8* shared, int row_warp, int column_warp,
                                    int lane) {
    if constexpr (OF_WARP) {
        return totals;
    } else {
        meet<WORKERS>();
        return merge_columns(totals, shared, row_warp, column_warp, lane);
    }
}

// Tiles that thread blocks share: each block leaves a warp's part of its first tile in slot 0, of another last tile
// in slot 1.
struct Exchange {
    const GroupArguments& args;
    Share share;
    int warp, lane;

    __device__ bool is_shared(int tile) const {
        return share.owner(tile * GROUPS) != share.owner(tile * GROUPS + GROUPS - 1);
    }

    __device__ float4* part_of(int block, int tile) const {
        const int slot = share.begin(block) / GROUPS == tile ? 0 : 1;
        return args.partials + ((int64(block) * 2 + slot) * KEEPING_WARPS + warp) * (PART * WARP) + lane;
    }

    __device__ void leave(int tile, const Sums<PART>& sums) const {
        float4* own = part_of(blockIdx.x, tile);
#pragma unroll
        for (int i = 0; i < PART; i++) __stcg(own + i * WARP, sums.get(i));
    }

    // Says of the block's first tile (bit 0) and its last (bit 1) that what it left is there. Bits of the tiles that
    // are complete by that: this warp has to add them up.
    __device__ uint32 arrive(int first_tile, int last_tile) const {
        __threadfence();
        __syncwarp();
        bool complete = false;
        const int tile = lane == 0 ? first_tile : last_tile;
        if (lane == 0 || (lane == 1 && last_tile != first_tile)) {
            const int first = share.owner(tile * GROUPS), others = share.owner(tile * GROUPS + GROUPS - 1) - first;
            uint32* arrived = args.arrived + first * KEEPING_WARPS + warp;
            if (others > 0 && atomicAdd(arrived, 1u) == uint32(others)) {
                complete = true;
                *arrived = 0;  // for the next launch
            }
        }
        __threadfence();
        return __ballot_sync(FULL_WARP, complete);
    }

    __device__ Sums<PART> collect(int tile) const {
        const int first = share.owner(tile * GROUPS), last = share.owner(tile * GROUPS + GROUPS - 1);
        Sums<PART> sums;
        sums.clear();
        constexpr int LOADS = PART >= 16 ? 1 : PART < 4 ? 4 : 16 / PART;  // blocks whose sums are loaded together
#pragma unroll 1
        for (int block = first; block <= last; block += LOADS) {
            float4 others[LOADS][PART];
#pragma unroll
            for (int i = 0; i < LOADS * PART; i++)
                others[i / PART][i % PART] = block + i / PART <= last
                                                 ? __ldcg(part_of(block + i / PART, tile) + i % PART * WARP)
                                                 : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
            for (int i = 0; i < LOADS * PART; i++) sums.add(i % PART, others[i / PART][i % PART]);
        }
        return sums;
    }
};

// Four values into the shared memory of another thread block, whose barrier counts the bytes.
__device__ inline void send(uint32 address, const float (&values)[4], uint32 barrier) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                     address),
                 "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3]), "r"(barrier)
                 : "memory");
}

// A tile that the thread blocks of a cluster share, of whose sums each giver, a warp with the same rows, keeps a part
// as long as there are any. What others give lies in the keeper's shared memory as [warp][giver][sums][lane]; each
// of its warps has a barrier for it. (A barrier of the cluster would have a fence for the whole GPU.)
struct ClusterExchange {
    static constexpr int BYTES = (GIVERS - 1) * OWN * SUM_BYTES;  // that a warp is given
    static constexpr int APART = GIVES_IN_GAPS ? 4 * ENTRY_STRIDE : SUM_BYTES;
    uint8* shared;
    uint64* barriers;
    int number, row_warp, column_warp, lane;  // of the giver; its warp

    // Of a keeper in its own shared memory.
    __device__ int warp_of(int keeper) const {
        return (AT_ONCE ? keeper / SPLIT : column_warp) * ROW_WARPS + row_warp;
    }

    // What a warp is given by the `i`-th of the others.
    __device__ uint8* place_of(int warp, int i) const {
        return place_of_sums<GIVES_IN_GAPS>(shared, SUMS_AT, (warp * (GIVERS - 1) + i) * OWN, lane);
    }

    // Each begins with another keeper.
    __device__ void give(const Sums<GIVEN>& sums) const {
#pragma unroll
        for (int giver = 0; giver < GIVERS; giver++) {
            if (giver != number) continue;
#pragma unroll
            for (int step = 1; step <= GIVERS; step++) {
                const int keeper = (giver + step) % GIVERS;
                if (keeper >= KEEPERS || keeper == giver) continue;
                const int block = keeper % SPLIT;
                const int warp = warp_of(keeper);
                const uint8* place = place_of(warp, giver - (giver > keeper));
                const uint32 there = address_in_block(shared_address(place), block);
                const uint32 barrier = address_in_block(shared_address(barriers + warp), block);
#pragma unroll
                for (int i = 0; i < OWN; i++)
                    send(there + i * uint32(APART), sums.values[keeper * OWN + i], barrier);
            }
        }
    }

    // By a keeper.
    __device__ Sums<OWN> take(const Sums<GIVEN>& sums) const {
        Sums<OWN> own;
        own.clear();
#pragma unroll
        for (int keeper = 0; keeper < KEEPERS; keeper++) {
            if (keeper != number) continue;
#pragma unroll
            for (int i = 0; i < OWN; i++) own.set(i, sums.get(keeper * OWN + i));
        }
        const int warp = column_warp * ROW_WARPS + row_warp;
        wait_for_phase(barriers + warp, 0);
        const uint8* first = place_of(warp, 0);
#pragma unroll
        for (int i = 0; i < (GIVERS - 1) * OWN; i++)  // of the others, in their order
            own.add(i % OWN, *reinterpret_cast<const float4*>(first + i * APART));
        return own;
    }
};

// The threads of a block meet as the table and barriers are there. Who copies needs no table and no more barriers
// than its own at first: it waits for the others' later.
__device__ inline void begin_together() { asm volatile("bar.sync 2, %0;" ::"n"(THREADS) : "memory"); }

__device__ inline void begin_without_waiting() {
    __syncwarp();
    asm volatile("bar.arrive 2, %0;" ::"n"(THREADS) : "memory");
}

__device__ inline void announce_barriers() {
    __syncwarp();
    asm volatile("bar.arrive 3, %0;" ::"n"(THREADS - WORKERS) : "memory");
}

__device__ inline void await_barriers() {
    __syncwarp();
    asm volatile("bar.sync 3, %0;" ::"n"(THREADS - WORKERS) : "memory");
}

// The meeting of a cluster says that all blocks have begun and their barriers are there: nobody waits for it but
// who gives.
__device__ inline void arrive_in_cluster() {
    if constexpr (SPLIT > 1) {
        __syncwarp();
        asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    }
}

__device__ inline void await_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

#if SPLIT > 1
#define IN_CLUSTERS __attribute__((cluster_dims(SPLIT, 1, 1)))
#else
#define IN_CLUSTERS
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1) IN_CLUSTERS linear_groups(
    const __grid_constant__ GroupArguments args) {
    extern __shared__ __align__(1024) uint8 shared[];
    if ((shared_address(shared) & 0xffffff) != DYNAMIC_SHARED_ADDRESS) __trap();
    const int lane = threadIdx.x % WARP, warp = __shfl_sync(FULL_WARP, threadIdx.x / WARP, 0);  // uniform
    const bool is_worker = warp < WARPS;
    const int row_warp = warp % ROW_WARPS, column_warp = warp / ROW_WARPS;
    const int group = lane / 4, member = lane % 4;
    // An address in shared memory has the block's rank in the cluster in its uppermost byte.
    const uint32 lane_offset = lane * 4 | (SPLIT > 1 ? shared_address(shared) >> 24 << 16 : 0);
    const uint32 own_byte = SPLIT > 1 ? 0x6504u | member << 4 : select_byte(member);
    const Weight& weight = args.layers.weights[0];
    uint8* ring = shared + RINGS_AT + warp * (STAGES * STAGE_BYTES);
    uint8* map = gap_at(shared, 0);
    uint64* x_full = reinterpret_cast<uint64*>(gap_at(shared, FULL_LINE));
    uint64* x_empty = reinterpret_cast<uint64*>(gap_at(shared, EMPTY_LINE));
    uint64* received = reinterpret_cast<uint64*>(gap_at(shared, RECEIVED_LINE));  // of each warp
    uint64* map_filled = reinterpret_cast<uint64*>(gap_at(shared, MAP_FILLED_LINE));

    const Share share{args.units, args.longer};
    const int rank = SPLIT > 1 ? rank_in_cluster() : 0;
    int begin = begin_of_block(share, rank), end = end_of_block(share, rank);
    asm volatile("" : "+r"(begin), "+r"(end));  // kept: what they are made of would be spilled

    // -- copies into the ring, of each fragment apart
    const int copy_row = lane / PARTS, copy_part = lane % PARTS;
    const int copy_target = copy_row * LINE + part_position(copy_row, copy_part) * 16;
    const int copy_target_4 = copy_row * LINE + part_position(copy_row + 4, copy_part) * 16;  // four lines below
    auto copy_unit = [&](int unit, int stage) {
        if (unit < end) {
            const int64 in_row = int64(chunk_of(unit, column_warp)) * LINE + copy_part * 16;
            const int first_row = row_of(unit, row_warp), row = first_row + 2 * copy_row;
            uint8* stage_at = ring + stage * STAGE_BYTES;
            const bool whole = WHOLE && first_row + TILE <= weight.rows;
#pragma unroll
            for (int i = 0; i < TILE; i += COPY_ROWS) {
                if (i == FRAGMENT_ROWS) commit_copies();
                uint8* target = stage_at + i * LINE + (i % 8 == 0 ? copy_target : copy_target_4);
                const uint8* source = weight.packed + (row + row_of_line(i)) * ROW_BYTES + in_row;
                if (whole) {
                    copy_async(target, source);
                } else {
                    const bool inside = in_row < ROW_BYTES && row + row_of_line(i) < weight.rows;
                    copy_async_or_zero(target, inside ? source : weight.packed, inside);
                }
            }
        } else if (FRAGMENTS == 2) {
            commit_copies();
        }
        commit_copies();
    };

    // -- activations of block `b` of a unit, by one thread; what is not there becomes zero
    auto copy_tokens = [&](int unit, int b) {
        const int local = unit - begin, stage = local % X_ROUNDS * BLOCKS + b, round = local / X_ROUNDS;
        if (round > 0) wait_for_phase(x_empty + stage, (round - 1) % 2);
        expect_bytes(x_full + stage, X_STAGE_BYTES);
        uint8* target = shared + X_AT + stage * X_STAGE_BYTES;
        const int chunk = group_of(unit) * COLUMN_WARPS;
        if constexpr (WHOLE_CHUNKS) {
            copy_box_of_chunks(target, &args.tokens, chunk, b, x_full + stage);
        } else {
#pragma unroll
            for (int i = 0; i < COLUMN_WARPS; i++)
                copy_box(target + i * X_BYTES, &args.tokens, (chunk + i) * CHUNK + b * BLOCK, 0, x_full + stage);
        }
    };

    // -- before the launch before has ended: all that does not depend on it. Loads that copies would delay come
    // first, and the copies of all warps' first unit before those of their next.
    start_dependents();
    if (!is_worker) {
        // Before loads, which would have to be there first.
        if constexpr (SHIFTS_REGISTERS) release_registers<COPIER_REGISTERS>();
        if (warp == WARPS) {
            if (lane == 0) {
                prefetch_map(&args.tokens);
                for (int b = 0; b < BLOCKS; b++) init_barrier(x_full + b, 1);
                publish_barriers();
            }
            arrive_in_cluster();
            begin_without_waiting();
            auto copy_tokens_of = [&](int unit) {
#pragma unroll
                for (int b = 0; b < BLOCKS; b++) copy_tokens(unit, b);
            };
            if (lane == 0) {
                wait_for_prerequisites();
                copy_tokens_of(begin);
            }
            await_barriers();
            if (lane == 0) {
#pragma unroll 1
                for (int unit = begin + 1; unit < end; unit++) copy_tokens_of(unit);
            }
        } else {
            MapPart part;
            if (NESTED) part.load(weight);
            if (lane == 0) {  // one after the other, all barriers would take as long as the table
                if (warp == WARPS + 1) {
                    for (int i = BLOCKS; i < X_STAGES; i++) init_barrier(x_full + i, 1);
                    init_barrier(map_filled, MapPart::FILLERS / WARP);
                } else if (warp == WARPS + 2) {
                    for (int i = 0; i < X_STAGES; i++) init_barrier(x_empty + i, WARPS);
                } else {
                    for (int i = 0; SPLIT > 1 && i < WARPS; i++) {
                        init_barrier(received + i, 1);
                        expect_bytes(received + i, ClusterExchange::BYTES);
                    }
                }
                publish_barriers();
            }
            arrive_in_cluster();
            announce_barriers();
            begin_together();
            if (NESTED) {
                part.store(map);
                arrive(map_filled);
            }
        }
        if constexpr (SPLIT > 1) {
            __syncwarp();
            await_cluster();
        }
        return;
    }
    arrive_in_cluster();
    Scales scales;
    scales.load(args.layers, row_of(begin, row_warp), chunk_of(begin, column_warp), group, member);
    copy_unit(begin, 0);
    fill_table<WARPS>(shared);
#pragma unroll 1
    for (int i = 1; i < STAGES; i++) copy_unit(begin + i, i);
    begin_together();
    if constexpr (SHIFTS_REGISTERS) take_registers<WORKER_REGISTERS>();

    [[maybe_unused]] const Exchange exchange{args, share, warp, lane};
    [[maybe_unused]] const bool keeps = COLUMN_KEEPERS == COLUMN_WARPS || column_warp < COLUMN_KEEPERS;
    [[maybe_unused]] auto store = [&](const Sums<PART>& sums, int unit) {
        sums.store(args.layers, row_of(unit, row_warp), column_warp * PART, group, member);
    };
    const uint32 lines = shared_address(ring) + group * (LINE + 16);
    const uint32 x_first = describe_swizzled_tokens(shared + X_AT + column_warp * X_BYTES);
    Sums<SUMS> totals;
    totals.clear();
    // Of one fragment, whose next block is looked up while this one is multiplied, or of two that take turns.
    Pairs pairs[2];
    Sums<TOKEN_TILES> sums[FRAGMENTS];
    float scale[FRAGMENTS][2];
    auto look_up_block = [&](int f, int into, int stage, int b) {
        pairs[into].read(lines + stage * STAGE_BYTES + f * (FRAGMENT_ROWS * LINE), b, own_byte, lane_offset);
    };
    auto begin_block = [&](int f, int from, uint32 x) {
        const Pairs& own = pairs[from];
        begin_products();
#pragma unroll
        for (int k = 0; k < 4; k++)
            multiply_group<ACTIVATION>(sums[f].values, own.of[k][0], own.of[k][1], own.of[k][2], own.of[k][3],
                                       swizzled_tokens(x + k * 2), k);
        commit_products();
    };
    auto add_block = [&](int f, int from) {
        pairs[from].settle_all();
#pragma unroll
        for (int i = 0; i < TOKEN_TILES * 4; i++) {
            settle(sums[f].values[i / 4][i % 4]);
            float& total = totals.values[f * TOKEN_TILES + i / 4][i % 4];
            total = __fmaf_rn(sums[f].values[i / 4][i % 4], scale[f][i % 4 / 2], total);
        }
    };
    auto find_scale = [&](const Scales& own, int f, int b) {
#pragma unroll
        for (int i = 0; i < 2; i++) scale[f][i] = __shfl_sync(FULL_WARP, own.values[f][i], group * 4 + b);
    };
    int stage = 0;
    auto next_stage = [&](int unit) {
        __syncwarp();
        copy_unit(unit + STAGES, stage);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        await_fragment<0>();
    };

    await_fragment<0>();
    look_up_block(0, 0, stage, 0);
    wait_for_prerequisites();
    if constexpr (NESTED) wait_for_phase(map_filled, 0);
    const float offset = NESTED && HOLDS_OFFSET ? entry_of(map, OFFSET_LINE * 32) : 0.0f;
#pragma unroll 1
    for (int unit = begin; unit < end; unit++) {
        Scales own = scales;
        own.decode(map, offset);
        if (unit + 1 < end)
            scales.load(args.layers, row_of(unit + 1, row_warp), chunk_of(unit + 1, column_warp), group, member);
        const int x_round = (unit - begin) % X_ROUNDS * BLOCKS;
        const uint32 x_phase = (unit - begin) / X_ROUNDS % 2;
#pragma unroll
        for (int b = 0; b < BLOCKS; b++) {
            const uint32 x = x_first + (x_round + b) * (X_STAGE_BYTES / 16);
            wait_for_phase(x_full + x_round + b, x_phase);
            if constexpr (FRAGMENTS == 1) {
                begin_block(0, b % 2, x);
                __syncwarp();  // what is looked up is behind it
                if (b + 1 == BLOCKS) next_stage(unit);
                look_up_block(0, 1 - b % 2, stage, (b + 1) % BLOCKS);
                find_scale(own, 0, b);
                wait_products();
                arrive(x_empty + x_round + b);
                add_block(0, b % 2);
            } else {
                begin_block(0, 0, x);
                if (b > 0) {
                    wait_products<1>();
                    arrive(x_empty + x_round + b - 1);
                    add_block(1, 1);
                }
                if (b == 0) await_fragment<1>();
                look_up_block(1, 1, stage, b);
                find_scale(own, 1, b);
                find_scale(own, 0, b);
                begin_block(1, 1, x);
                if (b + 1 == BLOCKS) next_stage(unit);
                wait_products<1>();
                add_block(0, 0);
                look_up_block(0, 0, stage, (b + 1) % BLOCKS);
            }
        }
        if constexpr (FRAGMENTS == 2) {
            wait_products();
            arrive(x_empty + x_round + BLOCKS - 1);
            add_block(1, 1);
        }
        if (SPLIT == 1 && (tile_of(unit + 1) != tile_of(unit) || unit + 1 == end)) {
            const Sums<PART> kept = merge_columns(totals, shared, row_warp, column_warp, lane);
            if (keeps && exchange.is_shared(tile_of(unit))) {
                exchange.leave(tile_of(unit), kept);
            } else if (keeps) {
                store(kept, unit);
            }
            totals.clear();
        }
    }

    if constexpr (SPLIT > 1) {
        const int number = AT_ONCE ? column_warp * SPLIT + rank : rank;
        const ClusterExchange sums_of_all{shared, received, number, row_warp, column_warp, lane};
        const Sums<GIVEN> given = sums_to_give<AT_ONCE>(totals, shared, row_warp, column_warp, lane);
        await_cluster();
        if (!AT_ONCE && !keeps) return;
        sums_of_all.give(given);
        if (KEEPERS < GIVERS && number >= KEEPERS) return;
        const int first = (AT_ONCE ? 0 : column_warp * PART) + number * OWN;
        sums_of_all.take(given).store(args.layers, row_of(begin, row_warp), first, group, member);
    } else if (keeps) {
        const int first_tile = tile_of(begin), last_tile = tile_of(end - 1);
        if (!exchange.is_shared(first_tile) && !exchange.is_shared(last_tile)) return;
        const uint32 complete = exchange.arrive(first_tile, last_tile);
        if (complete & 1) store(exchange.collect(first_tile), begin);
        if (complete & 2) store(exchange.collect(last_tile), end - 1);
    }
}

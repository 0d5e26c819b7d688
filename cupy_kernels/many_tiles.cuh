// How products of many tokens are cut into tiles (see linear_many.cu): where everything lies in shared memory, which
// tiles a thread block has, and the ring of blocks that the copy engine fills.
#pragma once

constexpr int WARPS = 8;                        // that multiply
constexpr int WORKERS = WARPS * WARP;
constexpr int GROUPS = 2, GROUP_WARPS = WARPS / GROUPS;
constexpr int SERVERS = 4 * WARP;               // threads that do all else
constexpr int THREADS = WORKERS + SERVERS;
constexpr int WORKER_REGISTERS = 224, SERVER_REGISTERS = 56;
constexpr int ROWS = WARPS * FRAGMENT_ROWS;     // of a tile
constexpr int GROUP_ROWS = ROWS / GROUPS;
constexpr int TOKEN_TILES = TOKENS / 8;
constexpr int DEPTH = TOKENS > 128 ? 1 : 2;     // chunks that the ring holds
constexpr int STAGES = DEPTH * BLOCKS;
constexpr bool HANDS_OVER = TOKENS == 256;     // results to the copy engine, if it can store them
constexpr bool HANDS_IN_RING = HANDS_OVER && IS_4BIT;  // where tokens were; INT8 has room besides
static_assert(!HANDS_IN_RING || DEPTH == 1, "a tile's last blocks are in the ring's last places");
constexpr int X_BYTES = TOKENS * BLOCK * 2;     // of a stage
static_assert(GROUP_ROWS == BLOCK, "a group's results have the room of a stage's tokens");
constexpr int LINE_BYTES = BLOCK * BITS / 8;    // of a row's block
constexpr int PACKED_BYTES = ROWS * LINE_BYTES;
constexpr int PART = TOKEN_TILES / SPLIT;       // of a block's sums, once they are merged
static_assert((IS_4BIT || FORMAT == INT8) && UNIT == 64 && BLOCKS == 4, "what copies and lookups are written for");

// -- shared memory: the ring, of tokens, packed weights and values of codes; maps of absmax; results; barriers. The
// ring is also where sums are merged.
constexpr int PLANE_BYTES = ROWS * 16;          // lower or upper bytes of 16 values
constexpr int VALUES_BYTES = IS_4BIT ? 2 * PLANE_BYTES : 0;  // of a stage
constexpr int MAP_BYTES = IS_4BIT ? 256 * sizeof(float) : 0;
constexpr int X_AT = 0;
constexpr int PACKED_AT = X_AT + STAGES * X_BYTES;
constexpr int VALUES_AT = PACKED_AT + STAGES * PACKED_BYTES;
constexpr int MAPS_AT = VALUES_AT + STAGES * VALUES_BYTES;
constexpr int RESULTS_AT = MAPS_AT + NUM_WEIGHTS * MAP_BYTES;
constexpr int BARRIERS_AT = RESULTS_AT + (HANDS_OVER && !HANDS_IN_RING ? GROUPS * X_BYTES : 0);
static_assert(SPLIT == 1 || PART * WARPS * WARP * sizeof(float4) <= STAGES * X_BYTES, "room for the other's sums");

struct ManyArguments {
    TokenMap tokens;                 // boxes of TOKENS
    TokenMap packed[NUM_WEIGHTS];    // (rows, bytes of a row), in boxes of ROWS times LINE_BYTES
    TokenMap outs[NUM_WEIGHTS];      // if `has_outs`: (tokens, rows), in boxes of TOKENS times GROUP_ROWS
    Arguments layers;                // tiles: of rows; the first_tile of a layer that is not there is behind all
    int row_tiles;
    int band, band_tiles;            // tiles of rows that a band has, and all its tiles
    int chunks;                      // of a row: columns / 256
    int has_outs;                    // the copy engine can store all outputs
    int shared_from;                 // if SPLIT is 2: the first tile that blocks share; of two chunks, at least
};

// A tile: which weight it belongs to, its first row and its first token; chunks of the thread block. Tiles come in
// bands of so many tiles of rows, and in a band those of the same tokens one after the other.
struct Tile {
    int which, row, token;
    bool is_shared;
    int first_chunk, end_chunk;

    __device__ Tile(const ManyArguments& args, int tile, int rank) : which(0) {
        const int first = tile / args.band_tiles * args.band, in_band = tile % args.band_tiles;
        const int width = min(args.band, args.row_tiles - first), row_tile = first + in_band % width;
        while (which + 1 < NUM_WEIGHTS && row_tile >= args.layers.weights[which + 1].first_tile) which++;
        row = (row_tile - args.layers.weights[which].first_tile) * ROWS;
        token = in_band / width * TOKENS;
        is_shared = SPLIT > 1 && tile >= args.shared_from;
        first_chunk = is_shared ? rank * args.chunks / SPLIT : 0;
        end_chunk = is_shared ? (rank + 1) * args.chunks / SPLIT : args.chunks;
    }
};

// What a thread block does; `rank` is its place in the cluster.
struct Work {
    const ManyArguments& args;
    int rank;

    __device__ int first() const { return next(int(blockIdx.x) - int(gridDim.x)); }
    __device__ int next(int tile) const {
        if (SPLIT == 1) return tile + gridDim.x;
        if (tile >= args.shared_from) return tile + gridDim.x / SPLIT;
        tile += gridDim.x;
        return tile < args.shared_from ? tile : args.shared_from + blockIdx.x / SPLIT;
    }
    __device__ bool is_there(int tile) const { return tile < args.layers.num_tiles; }
    __device__ Tile at(int tile) const { return Tile(args, tile, rank); }
    // Results of a tile, unless it is the last: then there is nothing to do meanwhile.
    __device__ bool hands_over(int tile) const {
        return HANDS_OVER && args.has_outs && !at(tile).is_shared && is_there(next(tile));
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
    // The lower bytes of a row's 16 values; PLANE_BYTES further the upper ones. Odd rows are behind all even ones, so
    // that a warp that reads every other row has all banks.
    __device__ uint32 values(int stage, int row) const {
        return shared_address(shared) + VALUES_AT + stage * VALUES_BYTES + row / 2 * 16 + row % 2 * (PLANE_BYTES / 2);
    }
    __device__ uint32 map(int which) const { return shared_address(shared) + MAPS_AT + which * MAP_BYTES; }
    // Of a group's results: they are there; they have been read.
    __device__ uint64* handed(int group) const { return empty(STAGES + group); }
    __device__ uint64* fetched(int group) const { return handed(GROUPS + group); }
    __device__ static int stage_of_results(int group) { return STAGES - GROUPS + group; }
    __device__ uint8* results(int group) const {
        return HANDS_IN_RING ? tokens(stage_of_results(group)) : shared + RESULTS_AT + group * X_BYTES;
    }
    __device__ uint8* tokens(int stage) const { return shared + X_AT + stage * X_BYTES; }
    __device__ uint8* packed(int stage) const { return shared + PACKED_AT + stage * PACKED_BYTES; }
};

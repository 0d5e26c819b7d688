// A warp's way through the chunks of its thread block.
//
// Part of linear_few.cu, whose constants it uses.
#pragma once

// A warp's place among the thread block's chunks, of which it takes every WARPS-th: tile by tile, and with
// several slices pass by pass and slice by slice before.
struct Cursor {
    int tile, chunk, slice;
    int which, row;  // of the tile

    __device__ bool done(const Tiles<TILE>& tiles) const { return tile >= tiles.count; }

    __device__ void advance(const Tiles<TILE>& tiles) {
        if constexpr (HELD_X) {
            chunk += WARP_CHUNKS > 1 ? WARPS : 0;
            if (WARP_CHUNKS > 1 && chunk < chunks_of(0)) return;
            next_tile(tiles);
        } else {
            chunk += WARPS;
            if (chunk >= chunks_of(slice)) settle(tiles);
        }
    }

    // Where a warp has the same chunks of every tile.
    __device__ void next_tile(const Tiles<TILE>& tiles) {
        if (WARP_CHUNKS > 1) chunk = threadIdx.x / WARP;
        tile++;
        if (NUM_SLICES > 1 && (tile % PASS == 0 || done(tiles))) {
            // the slice is through for this pass
            if (slice + 1 < NUM_SLICES) tile = (tile - 1) / PASS * PASS;
            slice = slice + 1 < NUM_SLICES ? slice + 1 : 0;
        }
        if (!done(tiles)) tiles.find(tile, which, row);
    }

    __device__ void settle(const Tiles<TILE>& tiles) {
        if constexpr (NUM_SLICES == 1) {
            tile += chunk / chunks_of(0);
            chunk %= chunks_of(0);
        } else {
            while (chunk >= chunks_of(slice)) {
                chunk -= chunks_of(slice);
                tile++;
                if (tile % PASS != 0 && tile < tiles.count) continue;
                // the slice is through for this pass
                chunk = threadIdx.x / WARP;
                if (slice + 1 < NUM_SLICES) {
                    slice++;
                    tile = (tile - 1) / PASS * PASS;
                } else {
                    slice = 0;
                    if (tile >= tiles.count) break;
                }
            }
        }
        if (!done(tiles)) tiles.find(tile, which, row);
    }

    __device__ static Cursor first(const Tiles<TILE>& tiles) {
        Cursor at{0, int(threadIdx.x) / WARP, 0, 0, 0};
        at.settle(tiles);
        return at;
    }
};

// The sum of what the warps have of a tile.
__device__ inline float sum_over_warps(uint8* shared, int tile, int token, int row) {
    // Chunk j of this tile was warp (tile * chunks + j) % WARPS's; others left nothing.
    constexpr int USED = chunks_of(0) < WARPS ? chunks_of(0) : WARPS;
    const int since = NUM_SLICES == 1 ? tile : tile % PASS;
    int from = USED == WARPS ? 0 : since * chunks_of(0) % WARPS;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < USED; j++) {
        sum += warp_sum(shared, from, tile % PASS, token, row);
        from = from + 1 == WARPS ? 0 : from + 1;
    }
    return sum;
}

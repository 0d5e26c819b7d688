// Packed weights in shared memory, and how they become fragments of mma.m16n8k16.
//
// Part of linear_few.cu, linear_some.cu, linear_groups.cu and linear_many.cu, whose ACTIVATION, FORMAT, UNIT and
// LINE (bytes of a row that lie together: 128) it uses.
//
// The order of columns within a block of 64 is free as long as weights and activations agree: lane `member` of a
// quad has 16 of them, which are one piece of a row, or with UNIT 32 or WARPGROUPS one piece of each half.
#pragma once

#ifndef WARPGROUPS
#define WARPGROUPS 0
#endif

#define NF4 0
#define FP4 1
#define INT8 2
#define PLAIN 3

constexpr bool IS_4BIT = FORMAT == NF4 || FORMAT == FP4;
constexpr int BITS = IS_4BIT ? 4 : FORMAT == INT8 ? 8 : 16;
constexpr int FRAGMENT_ROWS = 16;
constexpr int CHUNK = LINE * 8 / BITS;  // columns of a line
constexpr int BLOCK = 64;               // columns that the fragments of a lane quad cover
constexpr int BLOCKS = CHUNK / BLOCK;
constexpr int UNITS = BLOCK / UNIT;     // scales of a row in a block
constexpr bool ONE_PIECE = UNIT == 64 && !WARPGROUPS;
constexpr int PARTS = LINE / 16;        // 16-byte copies of a line
static_assert(CHUNK >= BLOCK, "a line has a block at least");

// -- the table of 4-bit pairs: 256 entries, of which each lane has a copy in its own bank. They are 256 bytes
// apart, of which they take the first 128, so that a byte of codes is the second byte of an entry's address and
// the lane the first: one instruction makes an address. The gaps between them are free for other things.
constexpr int GAP = 128;
constexpr int ENTRY_STRIDE = 2 * GAP;
constexpr int TABLE_BYTES = IS_4BIT ? 256 * ENTRY_STRIDE : 0;

// Both values of byte `i` of `word`, the first in the lower half. With the table's address written into
// the instruction there is nothing to add.
__device__ inline uint32 look_up(uint32 word, int i, uint32 lane_offset) {
    uint32 pair;
    asm("ld.shared.b32 %0, [%1+%2];"
        : "=r"(pair)
        : "r"(__byte_perm(word, lane_offset, 0x5504 | i << 4)), "n"(DYNAMIC_SHARED_ADDRESS));
    return pair;
}

__device__ inline float value_of(int code) { return FORMAT == FP4 ? fp4_value(code) : nf4_value(code); }

// By the first NUM_WARPS warps of the block.
template <int NUM_WARPS>
__device__ inline void fill_table(uint8* shared) {
    constexpr int FILLS = 256 / 4;  // of a warp at once: eight lanes fill an entry
    const int lane = threadIdx.x % WARP;
    const float own = value_of(lane % 16);
#pragma unroll
    for (int i = 0; i < FILLS; i += NUM_WARPS) {
        const int byte = min(i + int(threadIdx.x) / WARP, FILLS - 1) * 4 + lane / 8;
        const float first = __shfl_sync(FULL_WARP, own, byte >> 4);
        const uint32 pair = ACTIVATION::narrow_pair(first, __shfl_sync(FULL_WARP, own, byte & 15));
        *reinterpret_cast<uint4*>(shared + byte * ENTRY_STRIDE + lane % 8 * 16) =
            make_uint4(pair, pair, pair, pair);
    }
}

// -- lines

// Where 16 bytes of row `row` of a fragment lie in its line, so that lines that are read together are in different
// banks.
__device__ inline int part_position(int row, int part) {
    if (WARPGROUPS) return part ^ (row & 7);
    if (IS_4BIT) return (part / 2 ^ (row & 3)) * 2 + part % 2;
    if (FORMAT == INT8) return (part / 4 ^ (row & 1)) * 4 + part % 4;
    return part ^ (row & 1);
}

// The 16 values of a block that lane `member` of a quad has of the row at `line`, as eight pairs.
__device__ inline void read_pairs(const uint8* line, int row, int block, int member, uint32 lane_offset,
                                  uint32 (&pairs)[8]) {
    auto at = [&](int part) { return line + part_position(row, part) * 16; };
    if constexpr (IS_4BIT) {
        uint32 words[2];
        if constexpr (ONE_PIECE) {
            uint2 both = *reinterpret_cast<const uint2*>(at(block * 2 + member / 2) + member % 2 * 8);
            words[0] = both.x;
            words[1] = both.y;
        } else {
            words[0] = *reinterpret_cast<const uint32*>(at(block * 2) + member * 4);
            words[1] = *reinterpret_cast<const uint32*>(at(block * 2 + 1) + member * 4);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) pairs[i] = look_up(words[i / 4], i % 4, lane_offset);
    } else if constexpr (FORMAT == INT8) {
        uint4 words = *reinterpret_cast<const uint4*>(at(block * 4 + member));
        widen_int8<ACTIVATION>(words.x, pairs[0], pairs[1]);
        widen_int8<ACTIVATION>(words.y, pairs[2], pairs[3]);
        widen_int8<ACTIVATION>(words.z, pairs[4], pairs[5]);
        widen_int8<ACTIVATION>(words.w, pairs[6], pairs[7]);
    } else {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            uint4 words = *reinterpret_cast<const uint4*>(at(member * 2 + i));
            pairs[4 * i] = words.x;
            pairs[4 * i + 1] = words.y;
            pairs[4 * i + 2] = words.z;
            pairs[4 * i + 3] = words.w;
        }
    }
}

// Which eight columns of a block half `half` of a member's values is.
__device__ constexpr int octet_of(int member, int half) {
    return ONE_PIECE ? 2 * member + half : 4 * half + member;
}

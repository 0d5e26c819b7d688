// Blocks of tokens that the copy engine brings to shared memory (sm_90 and later), as wgmma reads them, and how
// lanes read weights that are multiplied with them.
//
// A block is 64 columns of the tokens, a token's in 128 bytes, whose 16-byte parts are swizzled by the token.
#pragma once

// As cuTensorMapEncodeTiled makes it: (tokens, columns) of 16-bit values, in boxes of so many tokens times 64; or as
// (blocks of a chunk, chunks, tokens, 64), in boxes of so many chunks and tokens; or bytes of packed weights.
struct __align__(64) TokenMap {
    uint64 words[16];
};

__device__ inline uint32 shared_address(const void* at) { return uint32(__cvta_generic_to_shared(at)); }

// Barriers that were initialised are there for the copy engine. Before the block synchronizes.
__device__ inline void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// The phase ends once so many bytes have been copied, too; one arrival.
__device__ inline void expect_bytes(uint64* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// A box of the map, whose first column and row are given; zeros for what is outside. The bytes are counted by
// `barrier`.
__device__ inline void copy_box(void* target, const TokenMap* map, int column, int row, uint64* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %3}], [%4];" ::"r"(shared_address(target)),
        "l"(map), "r"(column), "r"(row), "r"(shared_address(barrier))
        : "memory");
}

// The same block of as many neighbouring chunks as the map says, one behind the other.
__device__ inline void copy_box_of_chunks(void* target, const TokenMap* map, int chunk, int block, uint64* barrier) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%2, %2, %3, %4}], [%5];" ::"r"(shared_address(target)),
        "l"(map), "r"(0), "r"(chunk), "r"(block), "r"(shared_address(barrier))
        : "memory");
}

// The other way: a box that lies as those of tokens do; what is outside is not written.
__device__ inline void store_box(const TokenMap* map, const void* source, int column, int row) {
    asm volatile(
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n"
        "cp.async.bulk.commit_group;" ::"l"(map),
        "r"(column), "r"(row), "r"(shared_address(source))
        : "memory");
}

// Until all that the thread has stored so has been read, or written.
__device__ inline void wait_until_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ inline void wait_until_written() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// Where a block begins, for wgmma, which wants no rank in a cluster; 32 bytes further (2) are the next 16 columns.
__device__ inline uint32 describe_swizzled_tokens(const void* block) {
    return (shared_address(block) & 0x3ffff) >> 4 | 1u << 16;
}

__device__ inline uint64 swizzled_tokens(uint32 described) {
    constexpr uint64 EIGHT_TOKENS = 8 * 128, SWIZZLE_128 = 1;
    return described | (EIGHT_TOKENS >> 4) << 32 | SWIZZLE_128 << 62;
}

// -- weights, by loads that are volatile: the compiler leaves them behind products that have begun

template <int OFFSET>
__device__ inline uint4 load_words(uint32 at) {
    uint4 words;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4+%5];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "r"(at), "n"(OFFSET));
    return words;
}

__device__ inline void store_word(uint32 at, uint32 word) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(word) : "memory");
}

__device__ inline uint32 load_word(uint32 at) {
    uint32 word;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(at));
    return word;
}

// Which makes an address in the table of byte `i` of a word (see packed_lines.cuh).
__device__ inline uint32 select_byte(int i) { return 0x5504u | i << 4; }

__device__ inline uint32 look_up_byte(uint32 word, uint32 selected, uint32 lane_offset) {
    uint32 pair;
    asm volatile("ld.shared.b32 %0, [%1+%2];"
                 : "=r"(pair)
                 : "r"(__byte_perm(word, lane_offset, selected)), "n"(DYNAMIC_SHARED_ADDRESS));
    return pair;
}

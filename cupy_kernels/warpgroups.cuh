// Products of a group of four warps (wgmma, of sm_90a alone): 64 rows of weights in registers, 16 of each warp,
// times tokens in shared memory, which the tensor cores read there themselves while the warps go on.
#pragma once

// What was written to shared memory is what the tensor cores read. Before the barrier that says so to other warps.
__device__ inline void publish_to_tensor_cores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Registers that warps wrote are ready for products.
__device__ inline void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ inline void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until no more than so many of the last that were committed are in flight.
template <int PENDING = 0>
__device__ inline void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// A register that products in flight use: neither read nor used again before this place.
__device__ inline void settle(float& value) { asm volatile("" : "+f"(value)::"memory"); }
__device__ inline void settle(uint32& value) { asm volatile("" : "+r"(value)::"memory"); }
__device__ inline void settle(uint64& value) { asm volatile("" : "+l"(value)::"memory"); }

// Registers of each thread from here on: what some groups release others take.
template <int COUNT>
__device__ inline void release_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

template <int COUNT>
__device__ inline void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

#define SUMS_1(i) "+f"(sums[i][0]), "+f"(sums[i][1]), "+f"(sums[i][2]), "+f"(sums[i][3])
#define SUMS_2(i) SUMS_1(i), SUMS_1(i + 1)
#define SUMS_4(i) SUMS_2(i), SUMS_2(i + 2)
#define SUMS_8(i) SUMS_4(i), SUMS_4(i + 4)
#define SUMS_16(i) SUMS_8(i), SUMS_8(i + 8)
#define TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define PRODUCT(SIZE, TYPE, SUMS, A, TOKENS_AT, ADDS, ...)                                                     \
    asm volatile("{\n.reg .pred adds;\nsetp.ne.b32 adds, " ADDS ", 0;\n"                                      \
                 "wgmma.mma_async.sync.aligned.m64n" SIZE "k16.f32." TYPE "." TYPE " {" SUMS "}, {" A "}, "    \
                 TOKENS_AT ", adds, 1, 1, 0;\n}"                                                              \
                 : __VA_ARGS__                                                                                 \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(tokens), "r"(adds))
#define EITHER_PRODUCT(...)                       \
    if constexpr (T::IS_FLOAT16)                  \
        PRODUCT_OF("f16", __VA_ARGS__);           \
    else                                          \
        PRODUCT_OF("bf16", __VA_ARGS__)
#define PRODUCT_OF(TYPE, SIZE, ...) PRODUCT(SIZE, TYPE, __VA_ARGS__)

// sums (64 rows, 8 * TILES tokens) = a (64 rows, 16 columns) * tokens, added if `adds`; `tokens` as
// token_copies.cuh describes them. A lane's sums of eight tokens are those of mma.m16n8k16.
template <class T, int TILES>
__device__ inline void multiply_group(float (&sums)[TILES][4], uint32 a0, uint32 a1, uint32 a2, uint32 a3,
                                      uint64 tokens, int adds) {
    if constexpr (TILES == 1) {
        EITHER_PRODUCT("8", "%0, %1, %2, %3",
                       "%4, %5, %6, %7", "%8", "%9", SUMS_1(0));
    } else if constexpr (TILES == 2) {
        EITHER_PRODUCT("16", "%0, %1, %2, %3, %4, %5, %6, %7",
                       "%8, %9, %10, %11", "%12", "%13", SUMS_2(0));
    } else if constexpr (TILES == 4) {
        EITHER_PRODUCT("32", "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15",
                       "%16, %17, %18, %19", "%20", "%21", SUMS_4(0));
    } else if constexpr (TILES == 8) {
        EITHER_PRODUCT("64", "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
                       "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31",
                       "%32, %33, %34, %35", "%36", "%37", SUMS_8(0));
    } else if constexpr (TILES == 16) {
        EITHER_PRODUCT("128", TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) "%60, %61, %62, %63",
                       "%64, %65, %66, %67", "%68", "%69", SUMS_16(0));
    } else if constexpr (TILES == 24) {
        EITHER_PRODUCT("192",
                       TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) "%90, %91, %92, %93, %94, %95",
                       "%96, %97, %98, %99", "%100", "%101", SUMS_16(0), SUMS_8(16));
    } else {
        static_assert(TILES == 32, "8, 16, 32, 64, 128, 192 or 256 tokens");
        EITHER_PRODUCT("256",
                       TEN() TEN(1) TEN(2) TEN(3) TEN(4) TEN(5) TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11)
                       "%120, %121, %122, %123, %124, %125, %126, %127",
                       "%128, %129, %130, %131", "%132", "%133", SUMS_16(0), SUMS_16(16));
    }
}

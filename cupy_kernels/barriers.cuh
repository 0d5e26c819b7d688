// A barrier of warps on which to arrive and to wait are two things (mbarrier, from Ampere on).
#pragma once

// One arrival of each of `count` warps ends a phase. By one thread, before the block synchronizes.
__device__ inline void init_barrier(uint64* barrier, int count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(uint32(__cvta_generic_to_shared(barrier))), "r"(count)
                 : "memory");
}

// What the warp wrote before is visible to who waits for the phase.
__device__ inline void arrive(uint64* barrier) {
    __syncwarp();
    if (threadIdx.x % WARP == 0) {
        asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(uint32(__cvta_generic_to_shared(barrier)))
                     : "memory");
    }
}

// The same of one thread.
__device__ inline void arrive_alone(uint64* barrier) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(uint32(__cvta_generic_to_shared(barrier))) : "memory");
}

// The same if `arrives`, without a branch.
__device__ inline void arrive_if(uint64* barrier, bool arrives) {
    __syncwarp();
    asm volatile(
        "{\n"
        ".reg .pred arrives;\n"
        "setp.ne.b32 arrives, %1, 0;\n"
        "@arrives mbarrier.arrive.shared.b64 _, [%0];\n"
        "}" ::"r"(uint32(__cvta_generic_to_shared(barrier))),
        "r"(int(arrives && threadIdx.x % WARP == 0))
        : "memory");
}

// Whether it has, as of now; phases alternate between 0 and 1.
__device__ inline bool has_phase_ended(uint64* barrier, uint32 phase) {
    uint32 has_ended;
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.test_wait.parity.shared.b64 ended, [%1], %2;\n"
        "selp.u32 %0, 1, 0, ended;\n"
        "}"
        : "=r"(has_ended)
        : "r"(uint32(__cvta_generic_to_shared(barrier))), "r"(phase)
        : "memory");
    return has_ended;
}

// Until the phase has ended; phases alternate between 0 and 1.
__device__ inline void wait_for_phase(uint64* barrier, uint32 phase) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "again:\n"
        "mbarrier.test_wait.parity.shared.b64 ended, [%0], %1;\n"
        "@!ended bra again;\n"
        "}" ::"r"(uint32(__cvta_generic_to_shared(barrier))),
        "r"(phase)
        : "memory");
}

// The same, asleep meanwhile (sm_90 and later): other warps have the scheduler.
__device__ inline void sleep_for_phase(uint64* barrier, uint32 phase) {
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared.b64 ended, [%0], %1;\n"
        "@!ended bra again;\n"
        "}" ::"r"(uint32(__cvta_generic_to_shared(barrier))),
        "r"(phase)
        : "memory");
}

// A barrier of the first THREADS threads.
template <int THREADS>
__device__ inline void meet() {
    asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
}

// Has others that meet there go on without waiting for them. By whole warps.
template <int THREADS>
__device__ inline void announce() {
    __syncwarp();
    asm volatile("bar.arrive 1, %0;" ::"n"(THREADS) : "memory");
}

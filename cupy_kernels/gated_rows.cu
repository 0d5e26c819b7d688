// act(gate) * up of many tokens, rounded where transformers rounds.
//
// Defines: ACTIVATION (Bf16, F16), GATE (SILU, GELU_TANH, GELU).
//
// Bytes moved per value: 4 read, 2 written.
#include "source_dtypes.cuh"
#include "products.cuh"

using Bits = ACTIVATION::Bits;

struct Arguments {
    const Bits* gate;  // (count,)
    const Bits* up;    // (count,)
    Bits* out;         // (count,), may be `gate`
    int64 count;       // a multiple of 8
};

extern "C" __global__ void __launch_bounds__(256) gated_rows(const __grid_constant__ Arguments args) {
    start_dependents();
    wait_for_prerequisites();
    const int64 stride = int64(gridDim.x) * blockDim.x;
    for (int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x; i < args.count / OCTET; i += stride) {
        Octet<ACTIVATION> gate, up;
        gate.words[0] = __ldcg(reinterpret_cast<const uint4*>(args.gate) + i);
        up.words[0] = __ldcg(reinterpret_cast<const uint4*>(args.up) + i);
        float gates[OCTET], ups[OCTET];
        gate.widen(gates);
        up.widen(ups);
#pragma unroll
        for (int j = 0; j < OCTET; j++)
            gates[j] = ACTIVATION::widen(ACTIVATION::narrow(activate(gates[j]))) * ups[j];
        gate.narrow(gates);
        reinterpret_cast<uint4*>(args.out)[i] = gate.words[0];
    }
}

// Linear layers over packed weights: what a launch is given, and which rows a thread block has.
//
// Defines: ACTIVATION, COLUMNS, NUM_WEIGHTS (1 to 3), EPILOGUE (0: bias; 1: and residual; 2: gate and up).
#pragma once

using Bits = ACTIVATION::Bits;

constexpr int GATES = EPILOGUE == 2 ? 2 : 1;

// One linear layer. Statistics that a format lacks are null.
struct Weight {
    const uint8* packed;         // 4 bit: (rows * columns / 2,); INT8: (rows, columns)
    const float* absmax;         // float32 (m,), unless nested; INT8: SCB (rows,)
    const uint8* absmax_codes;   // (m,)
    const float* nested_absmax;  // (ceil(m/256),)
    const float* nested_code;    // (256,)
    const float* nested_offset;  // ()
    const Bits* bias;            // (rows,) or null
    Bits* out;                   // (tokens, rows), `out_stride` apart
    int64 out_stride;
    int rows;
    int first_tile;              // of all tiles of the launch
};

struct Arguments {
    Weight weights[NUM_WEIGHTS];
    const Bits* x;               // (tokens, columns)
    int64 x_stride;
    const Bits* norm_weight;     // (columns,)
    const Bits* residual;        // (tokens, rows)
    int64 residual_stride;
    int num_tiles, num_tokens;
    int blocksize_log2;          // of a block of absmax
    float epsilon;
};

// The tiles of one thread block: every gridDim.x-th. A tile of gate and up has half of its rows from each.
template <int TILE_ROWS>
struct Tiles {
    static constexpr int OUTPUT_ROWS = TILE_ROWS / GATES;
    const Arguments& args;
    int count;

    __device__ Tiles(const Arguments& args) : args(args) {
        count = (args.num_tiles - int(blockIdx.x) + int(gridDim.x) - 1) / int(gridDim.x);
    }

    // Which weight the block's tile `tile` belongs to (gate: 0), and its first row.
    __device__ void find(int tile, int& which, int& row) const {
        int global = int(blockIdx.x) + tile * int(gridDim.x);
        which = 0;
        if constexpr (GATES == 1) {
            while (which + 1 < NUM_WEIGHTS && global >= args.weights[which + 1].first_tile) which++;
            global -= NUM_WEIGHTS == 1 ? 0 : args.weights[which].first_tile;
        }
        row = global * OUTPUT_ROWS;
    }
};

// Makes an output of a sum (of gate and up: two sums) and stores it.
__device__ inline void finish(const Arguments& args, int which, int row, int token, float sum, float up_sum) {
    const Weight& weight = args.weights[which];
    if (weight.bias != nullptr) sum += ACTIVATION::widen(weight.bias[row]);
#if EPILOGUE == 1
    sum = ACTIVATION::widen(ACTIVATION::narrow(sum)) +
          ACTIVATION::widen(__ldcg(args.residual + token * args.residual_stride + row));
#elif EPILOGUE == 2
    const Weight& up = args.weights[1];
    if (up.bias != nullptr) up_sum += ACTIVATION::widen(up.bias[row]);
    float gate = activate(ACTIVATION::widen(ACTIVATION::narrow(sum)));
    sum = ACTIVATION::widen(ACTIVATION::narrow(gate)) * ACTIVATION::widen(ACTIVATION::narrow(up_sum));
#endif
    weight.out[token * weight.out_stride + row] = ACTIVATION::narrow(sum);
}

// The table of the tensors that an optimizer's launches work on: a record each, in device memory.
#pragma once

#include "source_dtypes.cuh"

#define ADAM 0
#define LION 1
#define MOMENTUM 2

// What an update of a tensor depends on beside its values; see optimizer_scalars.cu.
struct alignas(16) Scalars {
    float step_size;  // negative
    float epsilon;    // MOMENTUM: weight decay that is added to the gradient
    float decay;      // what values are multiplied by
    float beta1;
    float keep1;  // 1 - beta1
    float beta2;
    float keep2;  // 1 - beta2
    float unused;
};

// Addresses and sizes are words of 8 bytes, which the host and store_words.cu write.
struct alignas(16) Record {
    int64 count;      // values
    uint64 values;    // of SOURCE (count,)
    uint64 gradient;  // of SOURCE (count,); 0: there is none, and the tensor is left alone
    uint64 state1;    // uint8 or float32 (count,)
    uint64 state2;    // the same; 0 with one state
    uint64 absmax1;   // float32 (ceil(count/256),); 0 for float32 states
    uint64 absmax2;
    int64* step;  // how many updates there were
    int64 group;  // of hyperparameters
    int64 unused[3];
    Scalars scalars;  // written by optimizer_scalars.cu
};

static_assert(sizeof(Record) == 128);

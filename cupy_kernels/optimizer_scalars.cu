// What the next update of each tensor depends on: counts the step, on the device, so that a CUDA graph
// of a training step can be replayed.
//
// Defines: ALGORITHM (ADAM, LION, MOMENTUM), MAX_GROUPS.
//
// qtool/optim/scalars.py computes the same on the host; all is float64, rounded once at the end.
#include "optimizer_records.cuh"

struct Group {
    double learning_rate;
    double beta1;
    double beta2;
    double epsilon;
    double weight_decay;
    const float* learning_rate_at;  // if it is on the device
};

struct Arguments {
    Record* records;
    int num_records;
    int first_group;  // records of other groups are left alone
    int num_groups;
    Group groups[MAX_GROUPS];
};

// base^exponent by squaring: the host multiplies in the same order, so it has the same bits.
__device__ double power(double base, int64 exponent) {
    double result = 1.0;
    for (; exponent; exponent >>= 1) {
        if (exponent & 1) result *= base;
        base *= base;
    }
    return result;
}

extern "C" __global__ void __launch_bounds__(128) optimizer_scalars(const __grid_constant__ Arguments args) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= args.num_records) return;
    Record& record = args.records[i];
    int64 index = record.group - args.first_group;
    if (record.gradient == 0 || index < 0 || index >= args.num_groups) return;
    const Group& group = args.groups[index];
    double rate = group.learning_rate_at ? double(*group.learning_rate_at) : group.learning_rate;
    int64 step = ++*record.step;

    Scalars scalars = {};
    scalars.beta1 = float(group.beta1);
    scalars.keep1 = float(1.0 - group.beta1);
    scalars.beta2 = float(group.beta2);
    scalars.keep2 = float(1.0 - group.beta2);
    if constexpr (ALGORITHM == ADAM) {
        double correction1 = 1.0 - power(group.beta1, step);
        double correction2 = sqrt(1.0 - power(group.beta2, step));
        scalars.step_size = float(-rate * correction2 / correction1);
        scalars.epsilon = float(group.epsilon * correction2);
    } else {
        scalars.step_size = float(-rate);
    }
    if constexpr (ALGORITHM == MOMENTUM) {
        scalars.epsilon = float(group.weight_decay);
        scalars.decay = 1.0f;
    } else {
        scalars.decay = float(1.0 - rate * group.weight_decay);
    }
    record.scalars = scalars;
}

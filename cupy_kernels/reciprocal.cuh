// 1/x as in qtool/formats/reciprocal.py: correctly rounded, but for significands of 11 bits, for which
// it is what fast math gives on the hardware that wrote most files that are out there.
#pragma once

#include "source_dtypes.cuh"
#include "code_tables.cuh"

__device__ inline float reciprocal(float x) {
    float rounded = __frcp_rn(x);
    uint32 bits = __float_as_uint(x);
    bool is_short = (bits & (1u << CORRECTION_SHIFT) - 1) == 0;
    if (is_short && rounded != 0.0f && fabsf(rounded) <= LARGEST_FLOAT)
        rounded = __uint_as_float(__float_as_uint(rounded) +
                                  reciprocal_corrections[bits >> CORRECTION_SHIFT & NUM_CORRECTIONS - 1]);
    return rounded;
}

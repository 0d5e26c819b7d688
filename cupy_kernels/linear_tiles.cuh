// Tiles of rows that thread blocks share, and how their outputs are stored: of linear_some.cu and linear_groups.cu.
#pragma once

constexpr int HALF_ROWS = FRAGMENT_ROWS / 2;

// The units of all thread blocks, in order.
struct Share {
    int units, longer;

    __device__ int begin(int block) const { return block * units + min(block, longer); }

    __device__ int owner(int unit) const {
        const int in_longer = longer * (units + 1);
        return unit < in_longer ? unit / (units + 1) : longer + (unit - in_longer) / units;
    }
};

// The row of a fragment that is line `line` of it: a lane's two rows are neighbours, which are stored together.
__device__ constexpr int row_of_line(int line) {
    return line % HALF_ROWS * 2 + line / HALF_ROWS % 2 + line / FRAGMENT_ROWS * FRAGMENT_ROWS;
}

// Stores outputs of two neighbouring rows, of which the first is even.
__device__ inline void store_rows(const Weight& weight, bool pairs, int row, int token, float first, float second) {
    const bool has_second = row + 1 < weight.rows;
    if (weight.bias != nullptr) {
        first += ACTIVATION::widen(weight.bias[row]);
        if (has_second) second += ACTIVATION::widen(weight.bias[row + 1]);
    }
    Bits* target = weight.out + token * weight.out_stride + row;
    if (pairs) {
        *reinterpret_cast<uint32*>(target) = ACTIVATION::narrow_pair(first, second);
    } else {
        target[0] = ACTIVATION::narrow(first);
        if (has_second) target[1] = ACTIVATION::narrow(second);
    }
}

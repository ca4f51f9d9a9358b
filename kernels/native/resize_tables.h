// What the resize kernel reads besides the frame, for one size of frame: kernels/resize_tables.py in C++.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace omniad {

constexpr int64_t kMAX_TAPS = 512;  // rows or columns of the frame for one pixel; the stride of the weights

// The plan's buffers for them.
constexpr std::string_view kGEOMETRY = "geometry", kROW_START = "row_start", kROW_WEIGHT = "row_weight";
constexpr std::string_view kCOLUMN_START = "column_start", kCOLUMN_WEIGHT = "column_weight";
constexpr std::string_view kTABLES[] = {kGEOMETRY, kROW_START, kROW_WEIGHT, kCOLUMN_START, kCOLUMN_WEIGHT};

struct Tables {
    std::vector<int32_t> geometry, rowStart, columnStart;
    std::vector<float> rowWeight, columnWeight;  // (height or width, kMAX_TAPS)
};

// For frames of (rows, columns) and images of (height, width). Throws an input error beyond the limits.
Tables resampleTables(int64_t rows, int64_t columns, int64_t height, int64_t width);

}  // namespace omniad

// Reads the arrays of our own weights.onnx, as omniad_edge/onnx_weights.py does: a ModelProto of initializers.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace omniad {

// fp16 or fp32, a view of the file, in which it may begin anywhere.
struct Tensor {
    std::vector<int64_t> shape;
    bool half = false;
    std::string_view data;

    int64_t size() const;  // elements
    double operator[](int64_t i) const;
};

using Tensors = std::map<std::string, Tensor, std::less<>>;

Tensors readWeights(std::string_view file);

}  // namespace omniad

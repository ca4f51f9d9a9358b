// The folded network's arrays in the order in which the kernels read them, as kernels/pack.py packs them.
#pragma once

#include <string>

#include "onnx_weights.h"
#include "plan.h"

namespace omniad {

// The content of a weight buffer, bit for bit what NumPy makes of the same arrays.
std::string packed(const Buffer &buffer, const Tensors &tensors);

}  // namespace omniad

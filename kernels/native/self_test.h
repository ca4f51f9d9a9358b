// A few images in a bundle with the trained network's maps, compared as omniad_edge/self_test.py does.
#pragma once

#include <string_view>

#include "fused.h"

namespace omniad {

constexpr const char *kSELF_TEST = "fused/self_test.onnx";

// Computes the images of that part with each batch size. Throws an engine error if maps or scores are not the trained
// network's, a bundle error if the part is not as omniad-export writes it.
void checkSelfTest(FusedRuntime &fused, std::string_view part);

}  // namespace omniad

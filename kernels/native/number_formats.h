// fp16, which C++17 does not have.
#pragma once

#include <cstdint>

namespace omniad {

double fromHalf(uint16_t half);
// Rounded once, to the nearest and among two to the even one, as NumPy does.
uint16_t toHalf(double value);

}  // namespace omniad

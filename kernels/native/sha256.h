#pragma once

#include <string>
#include <string_view>

namespace omniad {

// 64 lower-case hexadecimal digits. Source: FIPS 180-4.
std::string sha256(std::string_view data);

}  // namespace omniad

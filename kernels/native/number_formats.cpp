#include "number_formats.h"

#include <cmath>
#include <cstring>

namespace omniad {

double fromHalf(uint16_t half) {
    int exponent = half >> 10 & 31, fraction = half & 1023;
    double size = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25);
    if (exponent == 31) {
        size = fraction != 0 ? NAN : INFINITY;
    }
    return std::copysign(size, half & 0x8000 ? -1.0 : 1.0);
}

uint16_t toHalf(double value) {
    constexpr uint64_t kONE = uint64_t{1} << 52;
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    auto sign = static_cast<uint16_t>(bits >> 48 & 0x8000);
    int exponent = static_cast<int>(bits >> 52 & 2047) - 1023;
    uint64_t fraction = bits & (kONE - 1);
    if (std::isnan(value)) {
        return sign | 0x7E00;
    }
    if (exponent > 15) {
        return sign | 0x7C00;
    }
    if (exponent < -26) {
        return sign;
    }
    // Below 2^-14 halves are multiples of 2^-24; a carry out of the fraction is the next exponent.
    bool normal = exponent >= -14;
    int shift = normal ? 42 : 28 - exponent;
    uint64_t whole = normal ? (static_cast<uint64_t>(exponent + 15) << 52) + fraction : kONE + fraction;
    uint64_t made = whole >> shift, rest = whole - (made << shift), middle = uint64_t{1} << (shift - 1);
    made += rest > middle || (rest == middle && (made & 1));
    return static_cast<uint16_t>(sign | made);
}

}  // namespace omniad

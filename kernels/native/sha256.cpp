#include "sha256.h"

#include <array>
#include <cstdint>
#include <cstring>

namespace omniad {
namespace {

constexpr size_t kBLOCK = 64;

using Words = std::array<uint32_t, 64>;

// The first 32 bits behind the point of a root of a prime, FIPS 180-4, 4.2.2 and 5.3.3, by whole numbers alone.
constexpr uint32_t rootFraction(uint64_t prime, int power) {
    unsigned __int128 target = static_cast<unsigned __int128>(prime) << (power == 2 ? 64 : 96);
    uint64_t root = 0;
    for (int bit = 36; bit >= 0; --bit) {
        unsigned __int128 tried = root | uint64_t{1} << bit;
        unsigned __int128 raised = power == 2 ? tried * tried : tried * tried * tried;
        root = raised <= target ? static_cast<uint64_t>(tried) : root;
    }
    return static_cast<uint32_t>(root);
}

constexpr Words rootFractions(int power) {
    Words made{};
    uint64_t prime = 2;
    for (uint32_t &word : made) {
        word = rootFraction(prime, power);
        bool divided = true;
        while (divided) {
            prime += 1;
            divided = false;
            for (uint64_t divisor = 2; divisor * divisor <= prime; ++divisor) {
                divided = divided || prime % divisor == 0;
            }
        }
    }
    return made;
}

constexpr Words kCUBE_ROOTS = rootFractions(3);
constexpr Words kSQUARE_ROOTS = rootFractions(2);
static_assert(kCUBE_ROOTS[0] == 0x428a2f98 && kCUBE_ROOTS[63] == 0xc67178f2);
static_assert(kSQUARE_ROOTS[0] == 0x6a09e667 && kSQUARE_ROOTS[7] == 0x5be0cd19);

constexpr uint32_t rotated(uint32_t x, int n) {
    return x >> n | x << (32 - n);
}

void addBlock(std::array<uint32_t, 8> &hash, const unsigned char *block) {
    Words w;
    for (int t = 0; t < 16; ++t) {
        const unsigned char *b = block + 4 * t;
        w[t] = uint32_t{b[0]} << 24 | uint32_t{b[1]} << 16 | uint32_t{b[2]} << 8 | b[3];
    }
    for (int t = 16; t < 64; ++t) {
        uint32_t s0 = rotated(w[t - 15], 7) ^ rotated(w[t - 15], 18) ^ w[t - 15] >> 3;
        uint32_t s1 = rotated(w[t - 2], 17) ^ rotated(w[t - 2], 19) ^ w[t - 2] >> 10;
        w[t] = w[t - 16] + s0 + w[t - 7] + s1;
    }
    auto [a, b, c, d, e, f, g, h] = hash;
    for (int t = 0; t < 64; ++t) {
        uint32_t sum1 = rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25);
        uint32_t t1 = h + sum1 + ((e & f) ^ (~e & g)) + kCUBE_ROOTS[t] + w[t];
        uint32_t sum0 = rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22);
        uint32_t t2 = sum0 + ((a & b) ^ (a & c) ^ (b & c));
        h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
    }
    const uint32_t added[] = {a, b, c, d, e, f, g, h};
    for (int i = 0; i < 8; ++i) {
        hash[i] += added[i];
    }
}

}  // namespace

std::string sha256(std::string_view data) {
    std::array<uint32_t, 8> hash;
    std::memcpy(hash.data(), kSQUARE_ROOTS.data(), sizeof(hash));
    auto bytes = reinterpret_cast<const unsigned char *>(data.data());
    size_t whole = data.size() / kBLOCK * kBLOCK, rest = data.size() - whole;
    for (size_t at = 0; at < whole; at += kBLOCK) {
        addBlock(hash, bytes + at);
    }
    unsigned char last[2 * kBLOCK] = {};
    if (rest != 0) {
        std::memcpy(last, bytes + whole, rest);
    }
    last[rest] = 0x80;
    size_t end = rest + 9 <= kBLOCK ? kBLOCK : 2 * kBLOCK;
    for (int i = 0; i < 8; ++i) {
        last[end - 1 - i] = static_cast<unsigned char>(uint64_t{data.size()} * 8 >> (8 * i));
    }
    for (size_t at = 0; at < end; at += kBLOCK) {
        addBlock(hash, last + at);
    }
    std::string made;
    for (uint32_t word : hash) {
        for (int shift = 28; shift >= 0; shift -= 4) {
            made += "0123456789abcdef"[word >> shift & 15];
        }
    }
    return made;
}

}  // namespace omniad

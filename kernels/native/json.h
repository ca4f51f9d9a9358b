// JSON as RFC 8259 has it, for files that may be crafted: bounded depth and count, no key twice, valid UTF-8.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

namespace omniad {

// A value. Reading it as what it is not throws a bundle error.
class Json {
public:
    enum class Kind { kNULL, kBOOL, kNUMBER, kSTRING, kLIST, kOBJECT };

    Kind kind = Kind::kNULL;
    std::string text;               // of a string its content; of a number or bool what stands in the file
    std::vector<Json> items;        // of a list or an object, in the file's order
    std::vector<std::string> keys;  // of an object, one for each item

    bool isNull() const { return kind == Kind::kNULL; }
    const std::string &string() const;
    int64_t integer(int64_t least, int64_t most) const;
    const std::vector<Json> &list() const;
    const std::vector<Json> &object() const;
    // nullptr if this is an object without that key.
    const Json *find(std::string_view key) const;
    const Json &at(std::string_view key) const;
    // Refuses an object that has not exactly these keys.
    void expectKeys(std::initializer_list<std::string_view> expected) const;
};

Json parseJson(std::string_view file);

}  // namespace omniad

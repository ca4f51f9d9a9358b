#include "json.h"

#include <algorithm>
#include <charconv>

#include "error.h"

namespace omniad {
namespace {

constexpr int kMAX_DEPTH = 32;             // a plan has 7 levels
constexpr size_t kMAX_VALUES = 1'000'000;  // the largest plan has 20,000

class Reader {
public:
    explicit Reader(std::string_view file) : mFile(file) {}

    Json whole() {
        Json value = this->value(0);
        space();
        if (mAt != mFile.size()) {
            fail("nothing more");
        }
        return value;
    }

private:
    [[noreturn]] void fail(const char *expected) const {
        throw bundleError("not valid JSON: expected ", expected, " at byte ", mAt);
    }

    char peek() const { return mAt < mFile.size() ? mFile[mAt] : '\0'; }

    bool take(char c) {
        bool here = mAt < mFile.size() && mFile[mAt] == c;
        mAt += here;
        return here;
    }

    void space() {
        size_t next = mFile.find_first_not_of(" \n\r\t", mAt);
        mAt = next == mFile.npos ? mFile.size() : next;
    }

    Json value(int depth) {
        mValues += 1;
        if (depth > kMAX_DEPTH || mValues > kMAX_VALUES) {
            fail("less: it is nested too deeply or has too many values");
        }
        space();
        Json made;
        char c = peek();
        if (c == '{') {
            object(made, depth);
        } else if (c == '[') {
            list(made, depth);
        } else if (c == '"') {
            made.kind = Json::Kind::kSTRING;
            made.text = string();
        } else if (c == '-' || (c >= '0' && c <= '9')) {
            made.kind = Json::Kind::kNUMBER;
            made.text = number();
        } else {
            word(made);
        }
        return made;
    }

    void word(Json &made) {
        for (std::string_view word : {"null", "true", "false"}) {
            if (mFile.substr(mAt, word.size()) == word) {
                mAt += word.size();
                made.kind = word == "null" ? Json::Kind::kNULL : Json::Kind::kBOOL;
                made.text = word;
                return;
            }
        }
        fail("a value");
    }

    void list(Json &made, int depth) {
        made.kind = Json::Kind::kLIST;
        take('[');
        space();
        if (take(']')) {
            return;
        }
        do {
            made.items.push_back(value(depth + 1));
            space();
        } while (take(','));
        if (!take(']')) {
            fail("',' or ']'");
        }
    }

    void object(Json &made, int depth) {
        made.kind = Json::Kind::kOBJECT;
        take('{');
        space();
        if (take('}')) {
            return;
        }
        do {
            space();
            made.keys.push_back(string());
            space();
            if (!take(':')) {
                fail("':'");
            }
            made.items.push_back(value(depth + 1));
            space();
        } while (take(','));
        if (!take('}')) {
            fail("',' or '}'");
        }
        std::vector<std::string_view> sorted(made.keys.begin(), made.keys.end());
        std::sort(sorted.begin(), sorted.end());
        if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) {
            fail("each key once in an object that ends");
        }
    }

    void digits() {
        size_t start = mAt;
        while (peek() >= '0' && peek() <= '9') {
            mAt += 1;
        }
        if (mAt == start) {
            fail("a digit");
        }
    }

    std::string number() {
        size_t start = mAt;
        take('-');
        if (!take('0')) {
            digits();
        }
        if (take('.')) {
            digits();
        }
        if (take('e') || take('E')) {
            take('+') || take('-');
            digits();
        }
        return std::string(mFile.substr(start, mAt - start));
    }

    std::string string() {
        if (!take('"')) {
            fail("'\"'");
        }
        std::string made;
        while (!take('"')) {
            auto c = static_cast<unsigned char>(peek());
            if (mAt == mFile.size() || c < 0x20) {
                fail("the end of a string");
            }
            if (take('\\')) {
                escape(made);
            } else {
                character(made, c);
            }
        }
        return made;
    }

    // One character of UTF-8: not overlong, no surrogate, at most U+10FFFF.
    void character(std::string &made, unsigned char first) {
        int more = first < 0x80 ? 0 : first < 0xE0 ? 1 : first < 0xF0 ? 2 : 3;
        uint32_t code = more ? first & (0x3Fu >> more) : first;
        bool valid = first < 0x80 || (first >= 0xC2 && first <= 0xF4);
        for (int i = 1; i <= more && valid; ++i) {
            valid = mAt + i < mFile.size() && (mFile[mAt + i] & 0xC0) == 0x80;
            code = valid ? code << 6 | (mFile[mAt + i] & 0x3F) : 0;
        }
        constexpr uint32_t kLEAST[] = {0, 0x80, 0x800, 0x10000};
        if (!valid || code < kLEAST[more] || code > 0x10FFFF || (code >= 0xD800 && code < 0xE000)) {
            fail("UTF-8");
        }
        made.append(mFile, mAt, more + 1);
        mAt += more + 1;
    }

    void escape(std::string &made) {
        constexpr std::string_view kFROM = "\"\\/bfnrt", kTO = "\"\\/\b\f\n\r\t";
        if (take('u')) {
            uint32_t code = hex();
            if (code >= 0xD800 && code < 0xDC00 && take('\\') && take('u')) {
                uint32_t low = hex();
                code = low >= 0xDC00 && low < 0xE000 ? 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00) : 0xD800;
            }
            if (code >= 0xD800 && code < 0xE000) {
                fail("two halves of a surrogate pair");
            }
            append(made, code);
            return;
        }
        size_t which = mAt < mFile.size() ? kFROM.find(peek()) : kFROM.npos;
        if (which == kFROM.npos) {
            fail("a known escape");
        }
        made += kTO[which];
        mAt += 1;
    }

    uint32_t hex() {
        uint32_t code = 0;
        std::string_view four = mFile.substr(mAt, 4);
        auto [end, error] = std::from_chars(four.data(), four.data() + four.size(), code, 16);
        if (four.size() != 4 || error != std::errc() || end != four.data() + 4) {
            fail("four hexadecimal digits");
        }
        mAt += 4;
        return code;
    }

    static void append(std::string &made, uint32_t code) {
        if (code < 0x80) {
            made += static_cast<char>(code);
            return;
        }
        int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
        made += static_cast<char>((0xF0 << (3 - more) & 0xFF) | code >> (6 * more));
        for (int i = more - 1; i >= 0; --i) {
            made += static_cast<char>(0x80 | (code >> (6 * i) & 0x3F));
        }
    }

    std::string_view mFile;
    size_t mAt = 0;
    size_t mValues = 0;
};

}  // namespace

const std::string &Json::string() const {
    if (kind != Kind::kSTRING) {
        throw bundleError("expected a string, got ", shown(text));
    }
    return text;
}

int64_t Json::integer(int64_t least, int64_t most) const {
    int64_t value = 0;
    auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    bool whole = kind == Kind::kNUMBER && error == std::errc() && end == text.data() + text.size();
    if (!whole || value < least || value > most) {
        throw bundleError("expected a whole number from ", least, " to ", most, ", got ", shown(text));
    }
    return value;
}

const std::vector<Json> &Json::list() const {
    if (kind != Kind::kLIST) {
        throw bundleError("expected a list, got ", shown(text));
    }
    return items;
}

const std::vector<Json> &Json::object() const {
    if (kind != Kind::kOBJECT) {
        throw bundleError("expected an object, got ", shown(text));
    }
    return items;
}

const Json *Json::find(std::string_view key) const {
    object();
    auto found = std::find(keys.begin(), keys.end(), key);
    return found == keys.end() ? nullptr : &items[found - keys.begin()];
}

const Json &Json::at(std::string_view key) const {
    const Json *found = find(key);
    if (found == nullptr) {
        throw bundleError("expected an object with ", shown(key), ", got one without");
    }
    return *found;
}

void Json::expectKeys(std::initializer_list<std::string_view> expected) const {
    for (std::string_view key : expected) {
        at(key);
    }
    if (keys.size() != expected.size()) {
        throw bundleError("expected an object of ", expected.size(), " keys, got one of ", keys.size());
    }
}

Json parseJson(std::string_view file) {
    return Reader(file).whole();
}

}  // namespace omniad

#include "bundle.h"

#include <sys/stat.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "error.h"
#include "sha256.h"

namespace omniad {
namespace {

constexpr int64_t kSCHEMA = 2;
constexpr size_t kSEAL_BYTES = 7 + 64;  // "sha256:" and the digest
constexpr size_t kMAX_FILE_BYTES = (size_t{1} << 31) - 1;
constexpr size_t kMAX_MANIFEST_BYTES = size_t{16} << 20;
constexpr size_t kMAX_DIRECTORY_BYTES = size_t{1} << 20;
constexpr unsigned kUTF8_NAME = 0x800;  // the only flag that a member may have
// Bytes of ZIP's records before their names, APPNOTE 4.3.7, 4.3.12 and 4.3.16.
constexpr size_t kLOCAL_BYTES = 30, kENTRY_BYTES = 46, kEND_BYTES = 22;
constexpr const char *kMANIFEST = "manifest.json";

// A number of a ZIP record, little-endian.
size_t number(std::string_view record, size_t at, size_t bytes) {
    size_t value = 0;
    for (size_t i = bytes; i-- > 0;) {
        value = value << 8 | static_cast<unsigned char>(record[at + i]);
    }
    return value;
}

std::string readFile(const std::string &path) {
    struct stat facts;
    if (stat(path.c_str(), &facts) != 0) {
        throw bundleError("could not be read: ", std::strerror(errno),
                          "; expected a bundle made by omniad-export");
    }
    if (!S_ISREG(facts.st_mode)) {  // before opening: a named pipe would block
        throw bundleError("is not a file; expected a bundle made by omniad-export");
    }
    if (static_cast<size_t>(facts.st_size) > kMAX_FILE_BYTES) {
        throw bundleError("is not a bundle: ", facts.st_size, " bytes, a bundle has at most ", kMAX_FILE_BYTES);
    }
    std::unique_ptr<std::FILE, int (*)(std::FILE *)> file(std::fopen(path.c_str(), "rb"), std::fclose);
    if (!file) {
        throw bundleError("could not be read: ", std::strerror(errno), "; look at its permissions");
    }
    std::string data(facts.st_size, '\0');
    data.resize(std::fread(data.data(), 1, data.size(), file.get()));
    if (std::ferror(file.get())) {
        throw bundleError("could not be read to its end: ", std::strerror(errno));
    }
    return data;
}

// Relative and plain: no component is empty, begins with a dot or has anything but letters, digits, "_", "-", ".".
bool isPartName(std::string_view name) {
    bool atStart = true;
    for (char c : name) {
        bool letter =
            (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '-';
        if (!(letter || (!atStart && (c == '.' || c == '/')))) {
            return false;
        }
        atStart = c == '/';
    }
    return !atStart && name != kMANIFEST;
}

bool isDigest(std::string_view digest) {
    return digest.size() == 64 && digest.find_first_not_of("0123456789abcdef") == digest.npos;
}

}  // namespace

Bundle::Bundle(const std::string &path) : mPath(path) {
    try {
        mData = readFile(path);
        checkSeal();
        readDirectory();
    } catch (const Error &error) {
        throw Error(error.status(), path + ": " + error.what());
    }
}

void Bundle::checkSeal() const {
    std::string_view data = mData;
    if (data.empty()) {
        throw bundleError("is empty (0 bytes); copy it again");
    }
    if (data.substr(0, 4) != "PK\3\4") {
        throw bundleError("is not a bundle: it starts with ", shown(data.substr(0, 4)),
                          "; expected a file of omniad-export");
    }
    bool sealed = data.size() >= kEND_BYTES + kSEAL_BYTES;
    sealed = sealed && data.substr(data.size() - kSEAL_BYTES, 7) == "sha256:";
    if (!sealed) {
        throw bundleError("has no checksum at its end: truncated, altered or not a bundle; copy it again");
    }
    if (data.substr(data.size() - 64) != sha256(data.substr(0, data.size() - kSEAL_BYTES))) {
        throw bundleError("does not match its checksum: damaged or altered; copy it again from its source");
    }
}

// The digest is right, so the file is whole; but a crafted one has a right digest too.
void Bundle::readDirectory() {
    std::string_view data = mData;
    size_t end = data.size() - kSEAL_BYTES - kEND_BYTES;
    std::string_view record = data.substr(end, kEND_BYTES);
    size_t count = number(record, 10, 2), size = number(record, 12, 4), start = number(record, 16, 4);
    bool ours = record.substr(0, 4) == "PK\5\6" && number(record, 4, 4) == 0 && number(record, 8, 2) == count;
    if (!ours || number(record, 20, 2) != kSEAL_BYTES) {
        throw bundleError("is not a bundle: its ZIP directory does not end as ours");
    }
    if (start + size != end || size > kMAX_DIRECTORY_BYTES) {
        throw bundleError("is crafted: a ZIP directory of ", size, " bytes at ", start, ", expected to end at ",
                          end);
    }
    size_t at = start;
    for (size_t i = 0; i < count; ++i) {
        at += readEntry(data.substr(at, end - at), start);
    }
    if (at != end) {
        throw bundleError("is crafted: its ZIP directory has more than its ", count, " entries");
    }
    auto manifest = mParts.find(kMANIFEST);
    if (manifest == mParts.end()) {
        throw bundleError("is not a bundle: it has no ", kMANIFEST);
    }
    std::string_view file = manifest->second;
    mParts.erase(manifest);
    readManifest(file);
}

// One entry at the start of the rest of the directory; its size. end: of what members may take.
size_t Bundle::readEntry(std::string_view entry, size_t end) {
    bool whole = entry.size() >= kENTRY_BYTES && entry.substr(0, 4) == "PK\1\2";
    size_t nameBytes = whole ? number(entry, 28, 2) : 0;
    size_t others = whole ? number(entry, 30, 2) + number(entry, 32, 2) : 0;
    if (!whole || others != 0 || entry.size() < kENTRY_BYTES + nameBytes) {
        throw bundleError("is crafted: an entry of its ZIP directory is not as ours");
    }
    std::string name(entry.substr(kENTRY_BYTES, nameBytes));
    size_t stored = number(entry, 20, 4);
    if (number(entry, 10, 2) != 0 || (number(entry, 8, 2) & ~kUTF8_NAME) != 0 || number(entry, 24, 4) != stored) {
        throw bundleError("is crafted: ", shown(name), " is compressed or encrypted");
    }
    if (!mParts.emplace(name, member(number(entry, 42, 4), name, stored, end)).second) {
        throw bundleError("is crafted: two members are named ", shown(name));
    }
    return kENTRY_BYTES + nameBytes;
}

// The content behind the local header at `start`; end: of what members may take.
std::string_view Bundle::member(size_t start, std::string_view name, size_t size, size_t end) const {
    std::string_view rest = std::string_view(mData).substr(0, end);
    rest = rest.substr(std::min(start, end));
    bool ours = rest.size() >= kLOCAL_BYTES + name.size() && rest.substr(0, 4) == "PK\3\4";
    ours = ours && number(rest, 26, 2) == name.size() && rest.substr(kLOCAL_BYTES, name.size()) == name;
    size_t before = ours ? kLOCAL_BYTES + name.size() + number(rest, 28, 2) : 0;
    if (!ours || before > rest.size() || size > rest.size() - before) {
        throw bundleError("is crafted: ", shown(name), " is not where its ZIP directory says");
    }
    return rest.substr(before, size);
}

void Bundle::readManifest(std::string_view file) {
    if (file.size() > kMAX_MANIFEST_BYTES) {
        throw bundleError("its manifest is larger than ", kMAX_MANIFEST_BYTES, " bytes");
    }
    try {
        Json manifest = parseJson(file);
        if (manifest.at("format").string() != "omniad-bundle") {
            throw bundleError("format: expected 'omniad-bundle', got ", shown(manifest.at("format").text));
        }
        if (int64_t schema = manifest.at("schema").integer(1, INT64_MAX); schema > kSCHEMA) {
            throw bundleError("was written by a newer version (schema ", schema, ", this one reads up to ",
                              kSCHEMA, "): upgrade omniad-edge");
        }
        checkInput(manifest.at("input"));
        const Json &listed = manifest.at("parts");
        for (size_t i = 0; i < listed.object().size(); ++i) {
            checkPart(listed.keys[i], listed.items[i]);
        }
        for (const auto &[name, content] : mParts) {
            if (mDigests.count(name) == 0) {
                throw bundleError("part ", shown(name), " is in the file but not in its manifest");
            }
        }
    } catch (const Error &error) {
        throw Error(error.status(), std::string(kMANIFEST) + ": " + error.what());
    }
}

void Bundle::checkInput(const Json &input) {
    for (auto [key, size] : {std::pair("height", &mHeight), std::pair("width", &mWidth)}) {
        *size = static_cast<int>(input.at(key).integer(32, 4096));
        if (*size % 32 != 0) {
            throw bundleError("input ", key, ": expected a multiple of 32, got ", *size);
        }
    }
    if (input.find("tiles") != nullptr) {
        throw bundleError("input tiles: its images are cut into tiles, which this runtime does not do; use "
                          "Detector in Python, or train without --tiles");
    }
    constexpr const char *kFIXED[][2] = {
        {"layout", "NHWC"}, {"dtype", "uint8"}, {"colour", "RGB"}, {"resize", "area-halved pillow-bilinear"}};
    for (auto [key, value] : kFIXED) {
        if (input.at(key).string() != value) {
            throw bundleError("input ", key, ": expected ", value, ", got ", shown(input.at(key).text));
        }
    }
}

void Bundle::checkPart(const std::string &name, const Json &entry) {
    if (!isPartName(name)) {
        throw bundleError("a part's name must be relative and plain, got ", shown(name));
    }
    auto found = mParts.find(name);
    if (found == mParts.end()) {
        throw bundleError("part ", shown(name), " is in its manifest but not in the file");
    }
    auto size = static_cast<size_t>(entry.at("bytes").integer(0, INT64_MAX));
    if (found->second.size() != size) {
        throw bundleError("part ", name, " has ", found->second.size(), " bytes, its manifest says ", size);
    }
    if (!isDigest(entry.at("sha256").string())) {
        throw bundleError("part ", name, ": expected a sha256 of 64 hex digits, got ",
                          shown(entry.at("sha256").text));
    }
    mDigests.emplace(name, entry.at("sha256").text);
}

std::string_view Bundle::part(std::string_view name) const {
    auto found = mParts.find(name);
    if (found == mParts.end()) {
        throw bundleError(mPath, ": has no part ", name, "; export it again");
    }
    auto digest = mDigests.find(name);
    if (digest != mDigests.end() && sha256(found->second) != digest->second) {
        throw bundleError(mPath, ": part ", name,
                          " does not match its digest in the manifest: damaged or altered");
    }
    return found->second;
}

}  // namespace omniad

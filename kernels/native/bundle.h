// Reads a bundle as omniad_edge/bundle.py writes it: a ZIP of stored members, a manifest with their digests, and
// the digest of the whole file at its end.
#pragma once

#include <map>
#include <string>
#include <string_view>
#include <utility>

#include "json.h"

namespace omniad {

using Parts = std::map<std::string, std::string_view, std::less<>>;  // name -> content

class Bundle {
public:
    // Checks the whole file's digest, the ZIP's directory and the manifest as far as this library uses it: not the
    // products' thresholds. Throws a bundle error with the path.
    explicit Bundle(const std::string &path);
    // Of parts that the caller has read and checked; they must outlive it. Its size is not known: 0 x 0.
    explicit Bundle(Parts parts) : mPath("bundle"), mParts(std::move(parts)) {}
    Bundle(const Bundle &) = delete;
    Bundle &operator=(const Bundle &) = delete;

    int height() const { return mHeight; }
    int width() const { return mWidth; }
    bool has(std::string_view part) const { return mParts.count(part) != 0; }
    const Parts &parts() const { return mParts; }
    // The content of a part, whose digest is checked now if the bundle has one; valid as long as the bundle.
    std::string_view part(std::string_view name) const;
    const std::string &path() const { return mPath; }

private:
    void checkSeal() const;
    void readDirectory();
    size_t readEntry(std::string_view entry, size_t end);
    std::string_view member(size_t start, std::string_view name, size_t size, size_t end) const;
    void readManifest(std::string_view file);
    void checkInput(const Json &input);
    void checkPart(const std::string &name, const Json &entry);

    std::string mPath, mData;
    Parts mParts;
    std::map<std::string, std::string, std::less<>> mDigests;
    int mHeight = 0, mWidth = 0;
};

}  // namespace omniad

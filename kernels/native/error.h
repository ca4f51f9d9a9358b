// What goes wrong, inside the library: one exception, which the C interface turns into a status and words.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace omniad {

enum class Status { kOK, kINPUT, kBUNDLE, kENGINE, kMEMORY, kINTERNAL, kLOST };  // as omniad_status

class Error : public std::runtime_error {
public:
    Error(Status status, const std::string &words) : std::runtime_error(words), mStatus(status) {}
    Status status() const { return mStatus; }

private:
    Status mStatus;
};

template <typename... Parts>
std::string text(const Parts &...parts) {
    std::ostringstream out;
    (out << ... << parts);
    return out.str();
}

template <typename... Parts>
Error bundleError(const Parts &...parts) {
    return Error(Status::kBUNDLE, text(parts...));
}

template <typename... Parts>
Error inputError(const Parts &...parts) {
    return Error(Status::kINPUT, text(parts...));
}

template <typename... Parts>
Error engineError(const Parts &...parts) {
    return Error(Status::kENGINE, text(parts...));
}

// Of a file that may be crafted: cut, and harmless on a terminal.
inline std::string shown(std::string_view value) {
    std::string made = "'";
    for (char c : value.substr(0, 60)) {
        made += c >= ' ' && c <= '~' ? c : '?';
    }
    return made + (value.size() > 60 ? "...'" : "'");
}

}  // namespace omniad

// A line in C++: opens a bundle once, tests itself, then a score for each raw frame in a file.
//
//     omniad_example line.omniad frames.bgr 1080 1920
//
// frames.bgr: frames of uint8 BGR (rows, columns, 3), one behind the other.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "omniad.h"

namespace {

struct Close {
    void operator()(omniad_runtime *runtime) const { omniad_close(runtime); }
};

bool succeeded(omniad_status status) {
    if (status != OMNIAD_OK) {
        std::fprintf(stderr, "omniad_example: %s\n", omniad_last_error());
    }
    return status == OMNIAD_OK;
}

// A whole number from 1, or 0 if the text is anything else.
long long side(const char *text) {
    char *end = nullptr;
    long long value = std::strtoll(text, &end, 10);
    return *end == '\0' && value > 0 && value < 1 << 20 ? value : 0;
}

}  // namespace

int main(int count, char **arguments) {
    long long rows = count == 5 ? side(arguments[3]) : 0, columns = count == 5 ? side(arguments[4]) : 0;
    if (rows == 0 || columns == 0) {
        std::fprintf(stderr, "usage: omniad_example BUNDLE FRAMES ROWS COLUMNS\n");
        return 2;
    }
    omniad_runtime *opened = nullptr;
    const int batch = 1;
    if (!succeeded(omniad_open(arguments[1], 0, &batch, 1, &opened))) {
        return 1;
    }
    std::unique_ptr<omniad_runtime, Close> runtime(opened);
    if (!succeeded(omniad_self_test(opened))) {
        return 1;
    }
    omniad_info info;
    if (!succeeded(omniad_get_info(opened, &info))) {
        return 1;
    }
    std::vector<uint8_t> frame(static_cast<size_t>(rows) * columns * 3);
    std::vector<float> anomaly_map(static_cast<size_t>(info.height) * info.width);
    std::unique_ptr<std::FILE, int (*)(std::FILE *)> file(std::fopen(arguments[2], "rb"), std::fclose);
    if (!file) {
        std::perror(arguments[2]);
        return 1;
    }
    size_t read = 0;
    while ((read = std::fread(frame.data(), 1, frame.size(), file.get())) == frame.size()) {
        omniad_frame given = {frame.data(), rows, columns, 3 * columns, OMNIAD_HOST, nullptr};
        float score = 0;
        if (!succeeded(omniad_run_frames(opened, &given, 1, anomaly_map.data(), &score, nullptr, nullptr))) {
            return 1;
        }
        std::printf("%.9g\n", score);
    }
    if (read != 0) {
        std::fprintf(stderr, "omniad_example: the last frame has %zu bytes, expected %zu\n", read, frame.size());
        return 1;
    }
    return 0;
}

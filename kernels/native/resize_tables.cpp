#include "resize_tables.h"

#include <algorithm>
#include <cmath>

#include "error.h"

namespace omniad {
namespace {

// Output i is the sum over t below `count` of weight[i * count + t] * input[start[i] + t]; start + count <=
// inputs.
struct Taps {
    int64_t count = 0;
    std::vector<int64_t> start;
    std::vector<double> weight;
};

// As many taps for all, that hold [first, last) and stay within the inputs. Empty if there would be too many.
Taps rectangle(const std::vector<int64_t> &first, const std::vector<int64_t> &last, int64_t inputs) {
    Taps made;
    for (size_t i = 0; i < first.size(); ++i) {
        made.count = std::max(made.count, last[i] - first[i]);
    }
    if (made.count > kMAX_TAPS) {  // halvings only add to them
        return {};
    }
    for (int64_t start : first) {
        made.start.push_back(std::min(start, inputs - made.count));
    }
    made.weight.resize(first.size() * made.count);
    return made;
}

// A triangle as wide as two outputs, or two inputs where these are wider; cut at the border, sum 1.
Taps triangle(int64_t inputs, int64_t outputs) {
    double scale = static_cast<double>(inputs) / static_cast<double>(outputs), support = std::max(scale, 1.0);
    std::vector<int64_t> first, last;
    std::vector<double> center;
    for (int64_t i = 0; i < outputs; ++i) {
        center.push_back((static_cast<double>(i) + 0.5) * scale);
        first.push_back(static_cast<int64_t>(std::max(std::floor(center[i] - support + 0.5), 0.0)));
        double end = std::min(std::floor(center[i] + support + 0.5), static_cast<double>(inputs));
        last.push_back(static_cast<int64_t>(end));
    }
    Taps made = rectangle(first, last, inputs);
    for (int64_t i = 0; i < outputs && made.count > 0; ++i) {
        double sum = 0, *weight = &made.weight[i * made.count];
        for (int64_t t = 0; t < made.count; ++t) {
            int64_t index = made.start[i] + t;
            bool inside = index >= first[i] && index < last[i];
            double height = 1 - std::abs(static_cast<double>(index) + 0.5 - center[i]) / support;
            weight[t] = inside ? std::max(height, 0.0) : 0.0;
            sum += weight[t];
        }
        std::for_each(weight, weight + made.count, [sum](double &value) { value /= sum; });
    }
    return made;
}

// The same outputs from `fine` pixels, of which the `coarse` ones are averages by area.
Taps beforeHalving(const Taps &taps, int64_t fine, int64_t coarse) {
    std::vector<int64_t> first, last;
    for (int64_t start : taps.start) {
        first.push_back(start * fine / coarse);
        last.push_back(((start + taps.count) * fine + coarse - 1) / coarse);
    }
    Taps made = rectangle(first, last, fine);
    for (size_t i = 0; i < made.start.size(); ++i) {
        for (int64_t t = 0; t < made.count; ++t) {
            // In units of 1 / fine of a coarse pixel, fine pixel i is [i coarse, (i + 1) coarse): parts of two.
            int64_t index = made.start[i] + t, j = index * coarse / fine;
            int64_t part = std::min((j + 1) * fine, (index + 1) * coarse) - index * coarse;
            int64_t tap = j - taps.start[i];
            auto value = [&](int64_t from, int64_t share) {
                bool inside = from >= 0 && from < taps.count;
                double weight = inside ? taps.weight[i * taps.count + from] : 0.0;
                return weight * static_cast<double>(share) / static_cast<double>(fine);
            };
            made.weight[i * made.count + t] = value(tap, part) + value(tap + 1, coarse - part);
        }
    }
    return made;
}

Taps tapsOf(int64_t inputs, int64_t outputs, int halvings) {
    Taps made = triangle(inputs >> halvings, outputs);
    for (int level = halvings; level > 0 && made.count > 0; --level) {
        made = beforeHalving(made, inputs >> (level - 1), inputs >> level);
    }
    return made;
}

void store(const Taps &taps, std::vector<int32_t> &start, std::vector<float> &weight) {
    start.assign(taps.start.begin(), taps.start.end());
    weight.assign(taps.start.size() * kMAX_TAPS, 0.0f);
    for (size_t i = 0; i < taps.weight.size(); ++i) {
        weight[i / taps.count * kMAX_TAPS + i % taps.count] = static_cast<float>(taps.weight[i]);
    }
}

}  // namespace

Tables resampleTables(int64_t rows, int64_t columns, int64_t height, int64_t width) {
    constexpr int64_t kMAX_PIXELS = (int64_t{1} << 31) / 3;
    if (rows < 1 || columns < 1) {
        throw inputError("frame: expected at least 1 x 1 pixels, got ", columns, " x ", rows);
    }
    if (columns > kMAX_PIXELS / rows) {
        throw inputError("frame: expected less than 2 GiB, got ", columns, " x ", rows,
                         " pixels; send a part of it");
    }
    int halvings = 0;
    while (rows >> halvings >= 4 * height && columns >> halvings >= 4 * width) {
        halvings += 1;
    }
    Taps byRow = tapsOf(rows, height, halvings), byColumn = tapsOf(columns, width, halvings);
    if (byRow.count == 0 || byColumn.count == 0) {
        throw inputError("frame: ", columns, " x ", rows, " pixels are too many for ", width, " x ", height,
                         " on the GPU: ", kMAX_TAPS, " a side are the limit for a pixel; resize the frame before");
    }
    Tables made;
    for (int64_t value : {rows, columns, byRow.count, byColumn.count}) {
        made.geometry.push_back(static_cast<int32_t>(value));
    }
    store(byRow, made.rowStart, made.rowWeight);
    store(byColumn, made.columnStart, made.columnWeight);
    return made;
}

}  // namespace omniad

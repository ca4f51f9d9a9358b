#include "pack.h"

#include <algorithm>
#include <cstring>

#include "error.h"
#include "number_formats.h"

namespace omniad {
namespace {

constexpr int64_t kKERNEL_ROW = 32;  // entries of a row of the first convolution: 7 columns of 4 channels, padded

// Every fp16 and fp32 number is a double too, so a value is rounded once, when it is stored.
using Values = std::vector<double>;
using Sources = std::vector<const Tensor *>;  // nullptr for one that the network does not have

[[noreturn]] void refuse(const char *expected) {
    throw bundleError("expected ", expected, ", got arrays of other shapes");
}

const Tensor &source(const Sources &sources, size_t index, size_t axes = 0) {
    if (index >= sources.size() || sources[index] == nullptr) {
        throw bundleError("expected an array as source ", index + 1, ", got none");
    }
    const Tensor &tensor = *sources[index];
    if (axes != 0 && tensor.shape.size() != axes) {
        throw bundleError("expected an array of ", axes, " axes as source ", index + 1, ", got ",
                          tensor.shape.size());
    }
    return tensor;
}

bool given(const Sources &sources, size_t index) {
    return index < sources.size() && sources[index] != nullptr;
}

Values valuesOf(const Tensor &tensor) {
    Values made(tensor.size());
    for (size_t i = 0; i < made.size(); ++i) {
        made[i] = tensor[i];
    }
    return made;
}

// (C_out, C_in, k, k) -> (k k, C_in, C_out)
Values convolution(const Sources &sources) {
    const Tensor &weight = source(sources, 0, 4);
    int64_t out = weight.shape[0], in = weight.shape[1], places = weight.shape[2] * weight.shape[3];
    Values made(weight.size());
    for (int64_t o = 0; o < out; ++o) {
        for (int64_t i = 0; i < in; ++i) {
            for (int64_t p = 0; p < places; ++p) {
                made[(p * in + i) * out + o] = weight[(o * in + i) * places + p];
            }
        }
    }
    return made;
}

// (C_out, 3, 7, 7) -> (7 kKERNEL_ROW, C_out): each row 7 columns of 4 channels, what is missing is 0.
Values firstConvolution(const Sources &sources) {
    const Tensor &weight = source(sources, 0, 4);
    int64_t out = weight.shape[0], k = weight.shape[2];
    if (weight.shape[1] != 3 || weight.shape[3] != k || k > kKERNEL_ROW / 4) {
        refuse("a first convolution of 3 channels and up to 8 x 8 pixels");
    }
    Values made(k * kKERNEL_ROW * out);
    for (int64_t o = 0; o < out; ++o) {
        for (int64_t c = 0; c < 3; ++c) {
            for (int64_t p = 0; p < k * k; ++p) {
                made[(p / k * kKERNEL_ROW + p % k * 4 + c) * out + o] = weight[(o * 3 + c) * k * k + p];
            }
        }
    }
    return made;
}

Values pixelMean(const Sources &sources) {
    Values made = valuesOf(source(sources, 0));
    made.push_back(0);
    return made;
}

// (C, 1, k, k) -> (k k, C)
Values depthwise(const Sources &sources) {
    const Tensor &weight = source(sources, 0, 4);
    int64_t channels = weight.shape[0], places = channels == 0 ? 0 : weight.size() / channels;
    Values made(weight.size());
    for (int64_t c = 0; c < channels; ++c) {
        for (int64_t p = 0; p < places; ++p) {
            made[p * channels + c] = weight[c * places + p];
        }
    }
    return made;
}

// Matrices of the same input, below each other.
Values stack(const Sources &sources) {
    Values made;
    for (size_t index = 0; index < sources.size(); ++index) {
        const Tensor &matrix = source(sources, index);
        const std::vector<int64_t> &shape = matrix.shape, &first = source(sources, 0).shape;
        if (shape.empty() || shape.size() != first.size() ||
            !std::equal(shape.begin() + 1, shape.end(), first.begin() + 1)) {
            refuse("matrices of the same input");
        }
        Values more = valuesOf(matrix);
        made.insert(made.end(), more.begin(), more.end());
    }
    return made;
}

Values added(const Sources &sources) {
    Values made = valuesOf(source(sources, 0));
    for (size_t index = 1; index < sources.size(); ++index) {
        const Tensor &more = source(sources, index);
        if (more.shape != sources[0]->shape) {
            refuse("biases of the same shape");
        }
        for (size_t i = 0; i < made.size(); ++i) {
            made[i] += more[i];
        }
    }
    return made;
}

// Writes tokens matrix^T into columns `from` and on; tokens: (n, inner) of the constant (heads, n, d).
void project(Values &made, int64_t stride, int64_t from, const Tensor &constant, const Values &matrix,
             int64_t rows) {
    int64_t heads = constant.shape[0], tokens = constant.shape[1], d = constant.shape[2], inner = heads * d;
    Values token(inner);
    for (int64_t t = 0; t < tokens; ++t) {
        for (int64_t i = 0; i < inner; ++i) {
            token[i] = constant[(i / d * tokens + t) * d + i % d];
        }
        for (int64_t r = 0; r < rows; ++r) {
            double sum = 0;
            for (int64_t i = 0; i < inner; ++i) {
                sum += token[i] * matrix[r * inner + i];
            }
            made[t * stride + from + r] = sum;
        }
    }
}

// constant (heads, T, d), what attention adds to each token, behind the projections: (T, C or 2C). Sources: the
// constant, the projection, its bias or none, the matrix of mix or none.
Values tokenBias(const Sources &sources) {
    const Tensor &constant = source(sources, 0, 3), &projection = source(sources, 1, 2);
    const Tensor *bias = given(sources, 2) ? sources[2] : nullptr, *mix = given(sources, 3) ? sources[3] : nullptr;
    int64_t inner = constant.shape[0] * constant.shape[2], columns = projection.shape[0];
    bool fits = projection.shape[1] == inner && (bias == nullptr || bias->shape == std::vector<int64_t>{columns});
    if (!fits || (mix != nullptr && (mix->shape.size() != 2 || mix->shape[1] != inner))) {
        refuse("matrices that take what attention gives");
    }
    int64_t stride = columns + (mix == nullptr ? 0 : mix->shape[0]), tokens = constant.shape[1];
    Values made(tokens * stride);
    project(made, stride, 0, constant, valuesOf(projection), columns);
    for (int64_t i = 0; bias != nullptr && i < tokens * columns; ++i) {
        made[i / columns * stride + i % columns] += (*bias)[i % columns];
    }
    if (mix != nullptr) {
        project(made, stride, columns, constant, valuesOf(*mix), mix->shape[0]);
    }
    return made;
}

// A bias for the upper half of the outputs; the lower half has none.
Values halfBias(const Sources &sources) {
    Values made = valuesOf(source(sources, 0));
    made.resize(2 * made.size());
    return made;
}

Values same(const Sources &sources) {
    return valuesOf(source(sources, 0));
}

struct Recipe {
    std::string_view name;
    Values (*make)(const Sources &);
    size_t least, most;  // sources
};

constexpr Recipe kRECIPES[] = {
    {"same", same, 1, 1},
    {"convolution", convolution, 1, 1},
    {"first_convolution", firstConvolution, 1, 1},
    {"pixel_mean", pixelMean, 1, 1},
    {"depthwise", depthwise, 1, 1},
    {"stack", stack, 1, 16},
    {"added", added, 1, 16},
    {"token_bias", tokenBias, 3, 4},
    {"half_bias", halfBias, 1, 1},
};

std::string stored(const Values &values, std::string_view dtype) {
    bool half = dtype == "float16";
    if (!half && dtype != "float32") {
        throw bundleError("expected weights of float16 or float32, got ", shown(dtype));
    }
    std::string made(values.size() * (half ? 2 : 4), '\0');
    for (size_t i = 0; i < values.size(); ++i) {
        if (half) {
            uint16_t value = toHalf(values[i]);
            std::memcpy(made.data() + 2 * i, &value, sizeof(value));
        } else {
            auto value = static_cast<float>(values[i]);
            std::memcpy(made.data() + 4 * i, &value, sizeof(value));
        }
    }
    return made;
}

Sources sourcesOf(const Buffer &buffer, const Tensors &tensors) {
    Sources made;
    for (size_t i = 1; i < buffer.recipe.size(); ++i) {
        auto found = tensors.find(buffer.recipe[i]);
        if (!buffer.recipe[i].empty() && found == tensors.end()) {
            throw bundleError("expected an array ", shown(buffer.recipe[i]), " in weights.onnx, got none");
        }
        made.push_back(buffer.recipe[i].empty() ? nullptr : &found->second);
    }
    return made;
}

}  // namespace

std::string packed(const Buffer &buffer, const Tensors &tensors) {
    try {
        Sources sources = sourcesOf(buffer, tensors);
        for (const Recipe &recipe : kRECIPES) {
            if (buffer.recipe.empty() || buffer.recipe[0] != recipe.name) {
                continue;
            }
            if (sources.size() < recipe.least || sources.size() > recipe.most) {
                throw bundleError("expected ", recipe.least, " to ", recipe.most, " arrays, got ", sources.size());
            }
            Values values = recipe.make(sources);
            if (values.size() != buffer.elements()) {
                throw bundleError("expected ", buffer.elements(), " values, got ", values.size());
            }
            return stored(values, buffer.dtype);
        }
        throw bundleError("expected a known recipe, got ", shown(buffer.recipe.empty() ? "" : buffer.recipe[0]));
    } catch (const Error &error) {
        throw Error(error.status(), text("weight ", shown(buffer.name), ": ", error.what()));
    }
}

}  // namespace omniad

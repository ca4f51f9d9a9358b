#include "self_test.h"

#include <algorithm>
#include <cmath>

#include "error.h"
#include "onnx_weights.h"

namespace omniad {
namespace {

// Of omniad_edge/self_test.py, which says why.
constexpr double kMAX_MAP_ERROR = 3e-4, kMAX_SCORE_ERROR = 0.02, kMAX_EMBEDDING_ERROR = 0.01;

const Tensor &arrayOf(const Tensors &tensors, const char *name, const std::vector<int64_t> &shape) {
    auto found = tensors.find(name);
    if (found == tensors.end() || found->second.shape != shape) {
        throw bundleError(kSELF_TEST, ": expected an array ", name, " of ", shape.size(),
                          " axes for the network's size; export again");
    }
    return found->second;
}

void expectNear(const char *what, double error, double limit) {
    if (!(error <= limit)) {  // nor if it is no number
        throw engineError("its ", what, " of a self-test image is ", error, " off, ", limit,
                          " is allowed; update the driver, or export again");
    }
}

// Frames of the network's own size: resizing them is a copy.
std::vector<uint8_t> framesOf(const Tensor &pixels) {
    std::vector<uint8_t> bgr(pixels.size());
    for (int64_t i = 0; i < pixels.size(); ++i) {
        double value = pixels[i - i % 3 + 2 - i % 3];
        if (!(value >= 0 && value <= 255)) {
            throw bundleError(kSELF_TEST, ": expected pixels from 0 to 255, got ", value, "; export again");
        }
        bgr[i] = static_cast<uint8_t>(value);
    }
    return bgr;
}

void compare(const Tensor &maps, int64_t image, const float *map, int64_t size, float score, double deviation) {
    double highest = maps[image * size];
    for (int64_t i = 0; i < size; ++i) {
        double truth = maps[image * size + i];
        expectNear("anomaly map", std::abs(map[i] - truth), kMAX_MAP_ERROR);
        highest = std::max(highest, truth);
    }
    if (deviation != 0) {
        expectNear("score in standard deviations", std::abs(score - highest) / deviation, kMAX_SCORE_ERROR);
    }
}

void compareEmbedding(const Tensor &embeddings, int64_t image, const float *embedding, int64_t channels) {
    double largest = 0, error = 0;
    for (int64_t i = 0; i < channels; ++i) {
        double truth = embeddings[image * channels + i], off = std::abs(embedding[i] - truth);
        largest = std::max(largest, std::abs(truth));
        error = std::isnan(error) || off <= error ? error : off;  // what is no number stays
    }
    expectNear("embedding", error / largest, kMAX_EMBEDDING_ERROR);
}

}  // namespace

void checkSelfTest(FusedRuntime &fused, std::string_view part) {
    const int64_t height = fused.plan().height, width = fused.plan().width, size = height * width;
    Tensors tensors = readWeights(part);
    auto given = tensors.find("pixels");
    int64_t images = given == tensors.end() || given->second.shape.empty() ? 0 : given->second.shape[0];
    const Tensor &pixels = arrayOf(tensors, "pixels", {std::max<int64_t>(images, 1), height, width, 3});
    const Tensor &maps = arrayOf(tensors, "anomaly_map", {images, height, width});
    const int64_t channels = fused.plan().buffer("embedding").shape[1];
    const Tensor &embeddings = arrayOf(tensors, "embedding", {images, channels});
    double deviation = arrayOf(tensors, "score_deviation", {})[0];
    std::vector<uint8_t> bgr = framesOf(pixels);
    for (int batch : fused.batches()) {
        std::vector<float> map(batch * size), score(batch), embedding(batch * channels);
        for (int64_t first = 0; first < images; first += batch) {
            std::vector<Frame> frames;
            for (int i = 0; i < batch; ++i) {
                const uint8_t *frame = &bgr[(first + i) % images * size * 3];
                frames.push_back({frame, height, width, 3 * width, Place::kHOST, nullptr});
            }
            fused.runFrames(frames, {map.data(), score.data(), embedding.data()}, nullptr);
            for (int i = 0; i < batch; ++i) {
                int64_t image = (first + i) % images;
                compare(maps, image, &map[i * size], size, score[i], deviation);
                compareEmbedding(embeddings, image, &embedding[i * channels], channels);
            }
        }
    }
}

}  // namespace omniad

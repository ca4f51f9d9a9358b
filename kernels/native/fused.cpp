#include "fused.h"

#include <algorithm>

#include "error.h"
#include "pack.h"
#include "schedule.h"

namespace omniad {
namespace {

constexpr const char *kPLAN = "fused/plan.json", *kWEIGHTS = "weights.onnx";
constexpr size_t kMAX_INDEX_BYTES = size_t{4} << 20;

// What `read` makes of a part; errors in it name the part.
template <typename Read>
auto readPart(const Bundle &bundle, const std::string &part, Read read) {
    std::string_view content = bundle.part(part);
    try {
        return read(content);
    } catch (const Error &error) {
        throw Error(error.status(), text(bundle.path(), ": ", part, ": ", error.what(), "; export again"));
    }
}

void expectKernels(const Bundle &bundle, int architecture) {
    std::string wanted = text("sm_", architecture), has;
    if (!bundle.has(kPLAN)) {
        throw engineError("the bundle has no GPU kernels; export it with --targets ", wanted);
    }
    if (bundle.has("fused/" + wanted + ".bin") && bundle.has("fused/" + wanted + ".json")) {
        return;
    }
    for (const auto &[name, content] : bundle.parts()) {
        bool code = name.rfind("fused/", 0) == 0 && name.size() > 10 && name.substr(name.size() - 4) == ".bin";
        has += code ? (has.empty() ? "" : ", ") + name.substr(6, name.size() - 10) : "";
    }
    throw engineError("the bundle has kernels for ", has, "; export it with --targets ", wanted, " too");
}

std::vector<Kernel> readKernels(const Bundle &bundle, int architecture, const Plan &plan) {
    std::string_view code = bundle.part(text("fused/sm_", architecture, ".bin"));
    return readPart(bundle, text("fused/sm_", architecture, ".json"), [&](std::string_view file) {
        if (file.size() > kMAX_INDEX_BYTES) {
            throw bundleError("expected at most ", kMAX_INDEX_BYTES, " bytes, got ", file.size());
        }
        return parseKernels(plan, parseJson(file).at("kernels"), code);
    });
}

std::vector<std::string> packWeights(const Plan &plan, const Tensors &tensors) {
    std::vector<std::string> made;
    for (const Buffer &buffer : plan.buffers) {
        made.push_back(buffer.kind == BufferKind::kWEIGHT ? packed(buffer, tensors) : "");
    }
    return made;
}

}  // namespace

Content readContent(const Bundle &bundle, int architecture, const std::vector<int> &batches) {
    expectKernels(bundle, architecture);
    Content made;
    made.batches = batches;
    Plan written = readPart(bundle, kPLAN, [&](std::string_view file) {
        Plan plan = parsePlan(file);
        bool known = bundle.height() != 0;
        if (known && (plan.height != bundle.height() || plan.width != bundle.width())) {
            throw bundleError("expected the manifest's ", bundle.height(), " x ", bundle.width(), ", got ",
                              plan.height, " x ", plan.width);
        }
        made.plan = forBatch(plan, *std::max_element(batches.begin(), batches.end()));
        return plan;
    });
    made.kernels = readKernels(bundle, architecture, written);
    made.weights = readPart(bundle, kWEIGHTS,
                            [&](std::string_view file) { return packWeights(made.plan, readWeights(file)); });
    made.pdl = architecture >= kPDL_FROM;
    return made;
}

FusedRuntime::FusedRuntime(const Bundle &bundle, int device, const std::vector<int> &batches)
    : mContext(mDriver, device) {
    if (batches.empty()) {
        throw inputError("batches: expected at least one, got none");
    }
    for (int batch : batches) {
        if (batch < 1 || batch > kMAX_BATCH) {
            throw inputError("batches: expected numbers from 1 to ", kMAX_BATCH, ", got ", batch);
        }
    }
    int architecture = architectureOf(mDriver, mContext.device());
    mGraph = std::make_unique<GraphPlan>(mContext, readContent(bundle, architecture, batches));
}

void FusedRuntime::run(int images, const uint8_t *pixels, const Results &results) {
    std::lock_guard turn(mTurn);
    mGraph->run(images, pixels, results);
}

void FusedRuntime::runFrames(const std::vector<Frame> &frames, const Results &results, double *prepareMs) {
    std::lock_guard turn(mTurn);
    mGraph->runFrames(frames, results, prepareMs);
}

void FusedRuntime::enqueue(CudaStream stream, int images, CudaAddress pixels, CudaAddress anomalyMap,
                           CudaAddress peaks) {
    std::lock_guard turn(mTurn);
    mGraph->enqueue(stream, images, pixels, anomalyMap, peaks);
}

}  // namespace omniad

#include "fused.h"

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

Content readContent(const Bundle &bundle, int architecture, int batch) {
    expectKernels(bundle, architecture);
    Content made;
    Plan written = readPart(bundle, kPLAN, [&](std::string_view file) {
        Plan plan = parsePlan(file);
        if (plan.height != bundle.height() || plan.width != bundle.width()) {
            throw bundleError("expected the manifest's ", bundle.height(), " x ", bundle.width(), ", got ",
                              plan.height, " x ", plan.width);
        }
        made.plan = forBatch(plan, batch);
        return plan;
    });
    made.kernels = readKernels(bundle, architecture, written);
    made.weights = readPart(bundle, kWEIGHTS,
                            [&](std::string_view file) { return packWeights(made.plan, readWeights(file)); });
    made.pdl = architecture >= kPDL_FROM;
    return made;
}

FusedRuntime::FusedRuntime(const std::string &path, int device, int batch) : mContext(mDriver, device) {
    if (batch < 1 || batch > kMAX_BATCH) {
        throw inputError("batch: expected 1 to ", kMAX_BATCH, ", got ", batch);
    }
    Bundle bundle(path);
    mGraph = std::make_unique<GraphPlan>(mContext, readContent(bundle, mContext.architecture(), batch));
}

void FusedRuntime::run(const uint8_t *pixels, float *anomalyMap, float *predScore) {
    std::lock_guard turn(mTurn);
    mGraph->run(pixels, anomalyMap, predScore);
}

void FusedRuntime::runFrames(const std::vector<Frame> &frames, float *anomalyMap, float *predScore) {
    std::lock_guard turn(mTurn);
    mGraph->runFrames(frames, anomalyMap, predScore);
}

void FusedRuntime::enqueue(CudaStream stream, CudaAddress pixels, CudaAddress anomalyMap, CudaAddress peaks) {
    std::lock_guard turn(mTurn);
    mGraph->enqueue(stream, pixels, anomalyMap, peaks);
}

}  // namespace omniad

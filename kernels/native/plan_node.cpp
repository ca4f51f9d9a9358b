#include "plan_node.h"

#include <algorithm>

#include "error.h"
#include "schedule.h"
#include "sha256.h"

namespace omniad {
namespace {

constexpr CudaAddress kALIGN_BYTES = 16;  // what export/cubins.py tells the compiler of every buffer

// Errors in it name the field.
template <typename Read>
auto readField(const char *name, Read read) {
    try {
        return read();
    } catch (const Error &error) {
        throw Error(error.status(), text(name, ": ", error.what()));
    }
}

std::vector<int> indicesOf(const Plan &plan, BufferKind kind) {
    std::vector<int> made;
    for (size_t i = 0; i < plan.buffers.size(); ++i) {
        if (plan.buffers[i].kind == kind) {
            made.push_back(static_cast<int>(i));
        }
    }
    return made;
}

int expectImages(int64_t images) {
    if (images < 1 || images > kMAX_BATCH) {
        throw inputError("batch: expected 1 to ", kMAX_BATCH, ", got ", images);
    }
    return static_cast<int>(images);
}

// Where scratch memory begins in an arena: behind all that is the caller's here.
uint64_t scratchStart(const Plan &plan) {
    uint64_t start = plan.arenaBytes();
    for (int index : indicesOf(plan, BufferKind::kSCRATCH)) {
        start = std::min(start, plan.buffers[index].offset);
    }
    return start;
}

CudaAddress addressOf(const void *pointer) {
    return reinterpret_cast<CudaAddress>(pointer);
}

}  // namespace

PlanNode::PlanNode(NodeFields given) : fields(std::move(given)) {
    readField("plan", [&] {
        plan = forBatch(parseSubPlan(fields.plan), 1);
        return 0;
    });
    inputs = indicesOf(plan, BufferKind::kINPUT);
    std::vector<int> weights = indicesOf(plan, BufferKind::kWEIGHT);
    inputs.insert(inputs.end(), weights.begin(), weights.end());
    outputs = indicesOf(plan, BufferKind::kOUTPUT);
    if (!fields.arch.empty() || !fields.kernelIndex.empty() || !fields.kernels.empty()) {
        loadable();  // refuses now what could not be loaded
    }
    std::string all;
    for (const std::string &field : {fields.plan, fields.arch, fields.kernelIndex, fields.kernels}) {
        all += text(field.size(), ":") + field;
    }
    digest = sha256(all);
}

std::vector<Kernel> PlanNode::loadable() const {
    if (fields.kernels.empty()) {
        throw engineError("kernels: the node has none; build the engine from a bundle exported with --targets");
    }
    if (fields.arch.rfind("sm_", 0) != 0) {
        throw bundleError("arch: expected like sm_87, got ", shown(fields.arch));
    }
    return readField("kernel_index",
                     [&] { return parseKernels(plan, parseJson(fields.kernelIndex), fields.kernels); });
}

// Of all numbers of images: fewer of them are packed anew, perhaps not as well.
uint64_t PlanNode::scratchBytes(int64_t mostImages) const {
    uint64_t most = 0;
    for (int images = expectImages(mostImages); images > 0; --images) {
        Plan arranged = forBatch(plan, images);
        most = std::max(most, arranged.arenaBytes() - scratchStart(arranged));
    }
    return most;
}

NodeRunner::NodeRunner(std::shared_ptr<const PlanNode> node)
    : mNode(std::move(node)), mContext(mDriver, kCALLERS_DEVICE) {
    mKernels = mNode->loadable();
    int architecture = architectureOf(mDriver, mContext.device());
    std::string arch = text("sm_", architecture);
    if (mNode->fields.arch != arch) {
        throw engineError("arch: the engine was built for ", shown(mNode->fields.arch), ", this GPU is ", arch,
                          "; build it on this GPU");
    }
    mEarly = architecture >= kPDL_FROM;
    Entered entered(mContext);
    try {
        load();
    } catch (...) {
        mOwned.close();  // while the context is current
        throw;
    }
    mAddresses.resize(mNode->plan.buffers.size());
}

void NodeRunner::load() {
    Kernels loaded(mContext, mOwned);
    for (Kernel &kernel : mKernels) {
        mFunctions.push_back(loaded.load(kernel));
        kernel.cubin.clear();
    }
}

NodeRunner::~NodeRunner() {
    // Unchecked: of a context that is gone already the modules are too.
    bool entered = mDriver.api.cuCtxPushCurrent_v2.pointer(mContext.handle()) == 0;
    mOwned.close();
    if (entered) {
        CudaContext popped;
        mDriver.free(mDriver.api.cuCtxPopCurrent_v2, &popped);
    }
}

void NodeRunner::arrange(int64_t images) {
    if (images == mImages) {
        return;
    }
    mImages = 0;  // until all is in its place
    mLaunches.clear();
    mScratch.clear();
    Plan plan = forBatch(mNode->plan, expectImages(images));
    uint64_t start = scratchStart(plan);
    for (int index : indicesOf(plan, BufferKind::kSCRATCH)) {
        mScratch.emplace_back(index, plan.buffers[index].offset - start);
    }
    for (size_t i = 0; i < plan.launches.size(); ++i) {
        mLaunches.emplace_back(plan.launches[i], mKernels[i], mFunctions[i], mAddresses);
    }
    mImages = plan.batch;
}

void NodeRunner::launch(const void *const *inputs, void *const *outputs, void *scratch, CudaStream stream) {
    setAddresses(inputs, outputs, scratch);
    for (LoadedLaunch &launch : mLaunches) {
        launch.setAddresses(mAddresses);
        launch.start(mDriver, stream, mEarly);
    }
}

void NodeRunner::setAddresses(const void *const *inputs, void *const *outputs, void *scratch) {
    for (size_t i = 0; i < mNode->inputs.size(); ++i) {
        mAddresses[mNode->inputs[i]] = addressOf(inputs[i]);
    }
    for (size_t i = 0; i < mNode->outputs.size(); ++i) {
        mAddresses[mNode->outputs[i]] = addressOf(outputs[i]);
    }
    for (auto [index, offset] : mScratch) {
        mAddresses[index] = addressOf(scratch) + offset;
    }
    if (!mScratch.empty() && scratch == nullptr) {
        throw inputError("workspace: expected memory, got none");
    }
    for (size_t i = 0; i < mAddresses.size(); ++i) {
        if (mAddresses[i] == 0 || mAddresses[i] % kALIGN_BYTES != 0) {
            throw inputError("buffer ", shown(mNode->plan.buffers[i].name), ": expected memory aligned to ",
                             kALIGN_BYTES, " bytes, got address ", mAddresses[i]);
        }
    }
}

}  // namespace omniad

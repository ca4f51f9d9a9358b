// A node of somebody else's engine that runs a plan: what it carries, and its launches in his context. Nothing of
// TensorRT is needed here.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "cuda_driver.h"
#include "cuda_kernel.h"
#include "plan.h"

namespace omniad {

// What a node says. All but the plan are empty until an engine is built for one GPU.
struct NodeFields {
    std::string plan;         // JSON, for one image
    std::string arch;         // like "sm_87"
    std::string kernelIndex;  // JSON: by key of a launch, where its kernel is in `kernels`
    std::string kernels;      // machine code
};

struct PlanNode {
    // Throws a bundle error that names the field.
    explicit PlanNode(NodeFields given);

    // One for each launch of the plan. Throws an engine error if the node has none.
    std::vector<Kernel> loadable() const;
    // Enough for any number of images up to this one. Throws an input error for one that the plan cannot have.
    uint64_t scratchBytes(int64_t mostImages) const;

    NodeFields fields;
    Plan plan;                         // for one image
    std::vector<int> inputs, outputs;  // indices of the plan's buffers: x, then the weights; the outputs
    std::string digest;                // of all fields
};

// A node in a context of the GPU; one run at a time.
class NodeRunner {
public:
    // Loads the kernels into this thread's context; as the CUDA runtime API, without one into the first GPU's.
    // Throws an engine error if they are not for it.
    explicit NodeRunner(std::shared_ptr<const PlanNode> node);
    NodeRunner(const NodeRunner &) = delete;
    NodeRunner &operator=(const NodeRunner &) = delete;
    ~NodeRunner();

    // Before the first run, and again for another number of images.
    void arrange(int64_t images);
    int images() const { return mImages; }
    // Launches and nothing else, so that a stream that captures may be given. All are addresses on the GPU, in the
    // order of the node's inputs and outputs; scratch: of `scratchBytes`.
    void launch(const void *const *inputs, void *const *outputs, void *scratch, CudaStream stream);

private:
    void load();
    void setAddresses(const void *const *inputs, void *const *outputs, void *scratch);

    std::shared_ptr<const PlanNode> mNode;
    Driver mDriver;
    Context mContext;
    bool mEarly = false;  // programmatic dependent launch
    Owned mOwned;
    std::vector<Kernel> mKernels;  // of the plan's launches, without their machine code
    std::vector<CudaFunction> mFunctions;
    int mImages = 0;
    std::vector<LoadedLaunch> mLaunches;
    std::vector<std::pair<int, uint64_t>> mScratch;  // buffer, bytes from the scratch memory's start
    std::vector<CudaAddress> mAddresses;             // of the plan's buffers
};

}  // namespace omniad

// The fused engine: a bundle's own kernels on an NVIDIA GPU. What a C++ program, a plugin or a binding builds on.
#pragma once

#include <memory>
#include <mutex>
#include <string>

#include "bundle.h"
#include "cuda_graph.h"

namespace omniad {

// The plan, kernels and weights for a GPU like 90 for sm_90, to be run on one of these numbers of images. Throws
// an engine error if the bundle has none for it.
Content readContent(const Bundle &bundle, int architecture, const std::vector<int> &batches);

// Safe to call from several threads: they take turns.
class FusedRuntime {
public:
    // The bundle may go afterwards. device: an ordinal, or kCALLERS_DEVICE
    FusedRuntime(const Bundle &bundle, int device, const std::vector<int> &batches);

    const Plan &plan() const { return mGraph->plan(); }
    const std::vector<int> &batches() const { return mGraph->batches(); }
    CudaDevice device() const { return mContext.device(); }
    CudaStream stream() const { return mGraph->stream(); }
    void run(int images, const uint8_t *pixels, const Results &results);
    void runFrames(const std::vector<Frame> &frames, const Results &results, double *prepareMs);
    void enqueue(CudaStream stream, int images, CudaAddress pixels, CudaAddress anomalyMap, CudaAddress peaks);

private:
    std::mutex mTurn;
    Driver mDriver;
    Context mContext;
    std::unique_ptr<GraphPlan> mGraph;
};

}  // namespace omniad

// The fused engine: a bundle's own kernels on an NVIDIA GPU. What a C++ program, a plugin or a binding builds on.
#pragma once

#include <memory>
#include <mutex>
#include <string>

#include "bundle.h"
#include "cuda_graph.h"

namespace omniad {

// The plan, kernels and weights for a GPU like 90 for sm_90. Throws an engine error if the bundle has none for it.
Content readContent(const Bundle &bundle, int architecture, int batch);

// Safe to call from several threads: they take turns.
class FusedRuntime {
public:
    FusedRuntime(const std::string &path, int device, int batch);

    const Plan &plan() const { return mGraph->plan(); }
    void run(const uint8_t *pixels, float *anomalyMap, float *predScore);
    void runFrames(const std::vector<Frame> &frames, float *anomalyMap, float *predScore);
    void enqueue(CudaStream stream, CudaAddress pixels, CudaAddress anomalyMap, CudaAddress peaks);

private:
    std::mutex mTurn;
    Driver mDriver;
    PrimaryContext mContext;
    std::unique_ptr<GraphPlan> mGraph;
};

}  // namespace omniad

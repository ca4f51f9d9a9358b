// A plan's compiled kernels on an NVIDIA GPU: one arena, one CUDA graph.
#pragma once

#include <memory>

#include "cuda_resize.h"

namespace omniad {

// Everything of a bundle that one GPU architecture needs for one batch size.
struct Content {
    Plan plan;
    std::vector<Kernel> kernels;       // one for each launch of `plan.allLaunches()`; the same one may repeat
    std::vector<std::string> weights;  // the bytes of each weight buffer, by index; of others empty
    bool pdl = false;                  // programmatic dependent launch
};

// The owner takes turns. Every function enters the context itself, and leaves it.
class GraphPlan {
public:
    GraphPlan(const PrimaryContext &context, Content content);
    GraphPlan(const GraphPlan &) = delete;
    GraphPlan &operator=(const GraphPlan &) = delete;
    ~GraphPlan();

    const Plan &plan() const { return mContent.plan; }
    // All on the host: pixels (batch, height, width, 3) RGB -> (batch, height, width) and (batch).
    void run(const uint8_t *pixels, float *anomalyMap, float *predScore);
    void runFrames(const std::vector<Frame> &frames, float *anomalyMap, float *predScore);
    // All on the GPU, and only queued; peaks: (batch, tiles), whose largest are the scores.
    void enqueue(CudaStream stream, CudaAddress pixels, CudaAddress anomalyMap, CudaAddress peaks);

private:
    void prepare();
    void pin();
    void load();
    void setUp();
    void copyWeights();
    void launch(CudaStream stream);
    void capture();
    void waitForQueued(CudaStream stream);
    void queue(CudaStream stream, bool capturing, CudaAddress pixels, CudaAddress anomalyMap, CudaAddress peaks);
    void replay(float *anomalyMap, float *predScore);
    void copyScores(float *predScore) const;

    const PrimaryContext &mContext;
    Driver &mDriver;
    Content mContent;
    int mPixels, mAnomalyMap, mPeaks;  // indices of the plan's buffers
    CudaStream mStream = nullptr;
    CudaEvent mQueued = nullptr;  // the end of the last run on somebody else's stream
    bool mHasQueued = false;
    CudaGraphExec mGraph = nullptr;
    std::vector<CudaAddress> mAddresses;  // of the plan's buffers
    std::vector<uint8_t *> mPinned;       // host memory of inputs, outputs and tables; of others nullptr
    std::vector<CudaFunction> mFunctions;
    std::vector<LoadedLaunch> mLaunches;
    Owned mOwned;
    std::unique_ptr<CudaResize> mResize;
};

}  // namespace omniad

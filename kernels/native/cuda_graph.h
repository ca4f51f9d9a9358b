// A plan's compiled kernels on an NVIDIA GPU: one arena, a CUDA graph for each batch size.
#pragma once

#include <memory>

#include "cuda_resize.h"

namespace omniad {

// Everything of a bundle that one GPU architecture needs.
struct Content {
    Plan plan;                         // for the largest of
    std::vector<int> batches;          // how many images a run may have
    std::vector<Kernel> kernels;       // one for each launch of `plan.allLaunches()`; the same one may repeat
    std::vector<std::string> weights;  // the bytes of each weight buffer, by index; of others empty
    bool pdl = false;                  // programmatic dependent launch
};

// Where a run's results go, on the host: (images, height, width), (images) and (images, channels); embedding may be
// nullptr.
struct Results {
    float *anomalyMap;
    float *predScore;
    float *embedding;
};

// The owner takes turns. Every function enters the context itself, and leaves it.
//
// All batch sizes share one arena, laid out for the largest: only the number of programs of a launch differs. A
// smaller one uses the front of each buffer, and its scratch buffers share memory as those of the largest do.
class GraphPlan {
public:
    GraphPlan(const Context &context, Content content);
    GraphPlan(const GraphPlan &) = delete;
    GraphPlan &operator=(const GraphPlan &) = delete;
    ~GraphPlan();

    const Plan &plan() const { return mContent.plan; }
    const std::vector<int> &batches() const { return mContent.batches; }
    CudaStream stream() const { return mStream; }
    // pixels: (images, height, width, 3) RGB on the host
    void run(int images, const uint8_t *pixels, const Results &results);
    // prepareMs: (frames), until each was on its way; or nullptr
    void runFrames(const std::vector<Frame> &frames, const Results &results, double *prepareMs);
    // All on the GPU, and only queued; peaks: (images, tiles), whose largest are the scores.
    void enqueue(CudaStream stream, int images, CudaAddress pixels, CudaAddress anomalyMap, CudaAddress peaks);

private:
    struct Graph {
        int images;
        std::vector<LoadedLaunch> launches;
        CudaGraphExec executable = nullptr;
    };

    Graph &graphOf(const char *name, int images);
    size_t bytes(int buffer, int images) const { return plan().buffers[buffer].bytes() / plan().batch * images; }
    void prepare();
    void pin();
    void load();
    void setUp();
    void copyWeights();
    void launch(Graph &graph, CudaStream stream);
    void capture(Graph &graph);
    void waitForQueued(CudaStream stream);
    void queue(Graph &graph, CudaStream stream, bool capturing, CudaAddress pixels, CudaAddress anomalyMap,
               CudaAddress peaks);
    void replay(const Graph &graph, const Results &results);
    void copyScores(int images, float *predScore) const;

    const Context &mContext;
    Driver &mDriver;
    Content mContent;
    int mPixels, mAnomalyMap, mPeaks, mEmbedding;  // indices of the plan's buffers
    CudaStream mStream = nullptr;
    CudaEvent mQueued = nullptr;  // the end of the last run on somebody else's stream
    bool mHasQueued = false;
    std::vector<CudaAddress> mAddresses;  // of the plan's buffers
    std::vector<uint8_t *> mPinned;       // host memory of inputs, outputs and tables; of others nullptr
    std::vector<CudaFunction> mFunctions;
    std::vector<Graph> mGraphs;
    Owned mOwned;
    std::unique_ptr<CudaResize> mResize;
};

}  // namespace omniad

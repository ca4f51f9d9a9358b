#include "cuda_graph.h"

#include <chrono>
#include <cmath>
#include <cstring>

#include "error.h"
#include "schedule.h"

namespace omniad {

GraphPlan::GraphPlan(const Context &context, Content content)
    : mContext(context),
      mDriver(context.driver()),
      mContent(std::move(content)),
      mPixels(plan().find("pixels")),
      mAnomalyMap(plan().find("anomaly_map")),
      mPeaks(plan().find("peaks")),
      mEmbedding(plan().find("embedding")) {
    Entered entered(mContext);
    try {
        prepare();
    } catch (...) {
        mOwned.close();  // while the context is current
        throw;
    }
}

GraphPlan::~GraphPlan() {
    const CudaApi &api = mDriver.api;
    bool entered =
        api.cuCtxPushCurrent_v2.pointer(mContext.handle()) == 0;  // unchecked: a lost context is freed too
    if (mHasQueued) {
        mDriver.free(api.cuEventSynchronize, mQueued);
    }
    mOwned.close();
    if (entered) {
        CudaContext popped;
        mDriver.free(api.cuCtxPopCurrent_v2, &popped);
    }
}

void GraphPlan::prepare() {
    load();
    CudaAddress arena = 0;
    mDriver.call(mDriver.api.cuMemAlloc_v2, &arena, static_cast<size_t>(plan().arenaBytes()));
    mOwned.add([this, arena] { mDriver.free(mDriver.api.cuMemFree_v2, arena); });
    for (const Buffer &buffer : plan().buffers) {
        mAddresses.push_back(arena + buffer.offset);
    }
    mDriver.call(mDriver.api.cuStreamCreate, &mStream, kSTREAM_NON_BLOCKING);
    mOwned.add([this] { mDriver.free(mDriver.api.cuStreamDestroy_v2, mStream); });
    mDriver.call(mDriver.api.cuEventCreate, &mQueued, kEVENT_DISABLE_TIMING);
    mOwned.add([this] { mDriver.free(mDriver.api.cuEventDestroy_v2, mQueued); });
    pin();
    setUp();
    mOwned.add([this] { mDriver.free(mDriver.api.cuStreamSynchronize, mStream); });  // nothing is freed while used
    mDriver.call(mDriver.api.cuMemsetD8Async, arena, static_cast<unsigned char>(0),
                 static_cast<size_t>(plan().arenaBytes()), mStream);
    copyWeights();
    launch(mGraphs.front(), mStream);  // loads what the driver loads late, which it may not do in a capture
    mDriver.call(mDriver.api.cuStreamSynchronize, mStream);
    mContent.weights.clear();
    mContent.kernels.clear();
    for (Graph &graph : mGraphs) {
        capture(graph);
        mOwned.add([this, made = graph.executable] { mDriver.free(mDriver.api.cuGraphExecDestroy, made); });
        mDriver.call(mDriver.api.cuGraphUpload, graph.executable, mStream);
    }
    mDriver.call(mDriver.api.cuStreamSynchronize, mStream);
}

void GraphPlan::load() {
    Kernels kernels(mContext, mOwned);
    for (const Kernel &kernel : mContent.kernels) {
        mFunctions.push_back(kernels.load(kernel));
    }
}

// Pinned host memory: copies to and from it do not block.
void GraphPlan::pin() {
    mPinned.resize(plan().buffers.size());
    size_t bytes = 0;
    auto each = [this](auto use) {
        for (size_t i = 0; i < plan().buffers.size(); ++i) {
            BufferKind kind = plan().buffers[i].kind;
            if (kind == BufferKind::kINPUT || kind == BufferKind::kOUTPUT || kind == BufferKind::kTABLE) {
                use(i, aligned(plan().buffers[i].bytes()));
            }
        }
    };
    each([&](size_t, uint64_t size) { bytes += size; });
    void *host = nullptr;
    mDriver.call(mDriver.api.cuMemHostAlloc, &host, bytes, 0u);
    mOwned.add([this, host] { mDriver.free(mDriver.api.cuMemFreeHost, host); });
    auto next = static_cast<uint8_t *>(host);
    each([&](size_t index, uint64_t size) {
        mPinned[index] = next;
        next += size;
    });
}

// Launches with their parameters, which are the same at every run.
void GraphPlan::setUp() {
    if (plan().front) {
        mResize = std::make_unique<CudaResize>(mDriver, mStream, plan(), mContent.kernels[0], mFunctions[0],
                                               mAddresses, mPinned);
        mOwned.add([this] { mResize.reset(); });
    }
    for (int images : mContent.batches) {
        Graph &graph = mGraphs.emplace_back(Graph{images, {}});
        size_t index = plan().front ? 1 : 0;
        for (const Launch &launch : forBatch(plan(), images).launches) {
            graph.launches.emplace_back(launch, mContent.kernels[index], mFunctions[index], mAddresses);
            index += 1;
        }
    }
}

GraphPlan::Graph &GraphPlan::graphOf(const char *name, int images) {
    std::string expected;
    for (Graph &graph : mGraphs) {
        if (graph.images == images) {
            return graph;
        }
        expected += (expected.empty() ? "" : " or ") + std::to_string(graph.images);
    }
    throw inputError(name, ": expected ", expected, "; got ", images);
}

void GraphPlan::copyWeights() {
    for (size_t i = 0; i < plan().buffers.size(); ++i) {
        const std::string &weight = mContent.weights[i];
        if (!weight.empty()) {
            mDriver.call(mDriver.api.cuMemcpyHtoDAsync_v2, mAddresses[i], static_cast<const void *>(weight.data()),
                         weight.size(), mStream);
        }
    }
}

void GraphPlan::launch(Graph &graph, CudaStream stream) {
    for (LoadedLaunch &launch : graph.launches) {
        launch.start(mDriver, stream, mContent.pdl);
    }
}

// All launches as one executable graph.
void GraphPlan::capture(Graph &graph) {
    const CudaApi &api = mDriver.api;
    CudaGraph captured = nullptr;
    mDriver.call(api.cuStreamBeginCapture_v2, mStream, kCAPTURE_MODE_THREAD_LOCAL);
    try {
        launch(graph, mStream);
    } catch (...) {
        mDriver.free(api.cuStreamEndCapture, mStream, &captured);
        if (captured != nullptr) {
            mDriver.free(api.cuGraphDestroy, captured);
        }
        throw;
    }
    mDriver.call(api.cuStreamEndCapture, mStream, &captured);
    Owned owned;
    owned.add([this, captured] { mDriver.free(mDriver.api.cuGraphDestroy, captured); });
    mDriver.call(api.cuGraphInstantiateWithFlags, &graph.executable, captured, 0ull);
}

void GraphPlan::run(int images, const uint8_t *pixels, const Results &results) {
    const Graph &graph = graphOf("images", images);
    Entered entered(mContext);
    waitForQueued(mStream);
    size_t size = bytes(mPixels, images);
    std::memcpy(mPinned[mPixels], pixels, size);
    try {
        mDriver.call(mDriver.api.cuMemcpyHtoDAsync_v2, mAddresses[mPixels],
                     static_cast<const void *>(mPinned[mPixels]), size, mStream);
        replay(graph, results);
    } catch (...) {
        mDriver.free(mDriver.api.cuStreamSynchronize, mStream);  // pinned memory is being read
        throw;
    }
}

void GraphPlan::runFrames(const std::vector<Frame> &frames, const Results &results, double *prepareMs) {
    using Clock = std::chrono::steady_clock;
    if (!mResize) {
        throw inputError("frames: expected none, the plan has no front; got ", frames.size());
    }
    const Graph &graph = graphOf("frames", static_cast<int>(frames.size()));
    Entered entered(mContext);
    waitForQueued(mStream);
    try {
        for (size_t i = 0; i < frames.size(); ++i) {
            Clock::time_point start = Clock::now();
            mResize->put(static_cast<int>(i), frames[i]);
            if (prepareMs != nullptr) {
                prepareMs[i] = std::chrono::duration<double, std::milli>(Clock::now() - start).count();
            }
        }
        replay(graph, results);
    } catch (...) {
        mDriver.free(mDriver.api.cuStreamSynchronize, mStream);
        throw;
    }
}

// The graph on the input that is on the GPU or on its way.
void GraphPlan::replay(const Graph &graph, const Results &results) {
    mDriver.call(mDriver.api.cuGraphLaunch, graph.executable, mStream);
    for (int index : {mEmbedding, mAnomalyMap, mPeaks}) {
        mDriver.call(mDriver.api.cuMemcpyDtoHAsync_v2, static_cast<void *>(mPinned[index]), mAddresses[index],
                     bytes(index, graph.images), mStream);
    }
    mDriver.call(mDriver.api.cuStreamSynchronize, mStream);
    mHasQueued = false;  // and waited for
    std::memcpy(results.anomalyMap, mPinned[mAnomalyMap], bytes(mAnomalyMap, graph.images));
    copyScores(graph.images, results.predScore);
    if (results.embedding != nullptr) {
        std::memcpy(results.embedding, mPinned[mEmbedding], bytes(mEmbedding, graph.images));
    }
}

// The largest of each image's peaks; of those with a NaN it is NaN.
void GraphPlan::copyScores(int images, float *predScore) const {
    auto peaks = reinterpret_cast<const float *>(mPinned[mPeaks]);
    int64_t tiles = plan().buffers[mPeaks].shape[1];
    for (int image = 0; image < images; ++image, peaks += tiles) {
        float most = peaks[0];
        for (int64_t i = 1; i < tiles; ++i) {
            most = std::isnan(peaks[i]) || peaks[i] > most ? peaks[i] : most;
        }
        predScore[image] = most;
    }
}

void GraphPlan::waitForQueued(CudaStream stream) {
    if (mHasQueued) {
        mDriver.call(mDriver.api.cuStreamWaitEvent, stream, mQueued, 0u);
    }
}

void GraphPlan::enqueue(CudaStream stream, int images, CudaAddress pixels, CudaAddress anomalyMap,
                        CudaAddress peaks) {
    Graph &graph = graphOf("images", images);
    Entered entered(mContext);
    int status = kCAPTURE_STATUS_NONE;
    mDriver.call(mDriver.api.cuStreamIsCapturing, stream, &status);
    if (status != kCAPTURE_STATUS_NONE) {  // an event of outside would end the capture
        queue(graph, stream, true, pixels, anomalyMap, peaks);
        return;
    }
    waitForQueued(stream);
    mHasQueued = true;
    try {
        queue(graph, stream, false, pixels, anomalyMap, peaks);
    } catch (...) {
        mDriver.free(mDriver.api.cuEventRecord, mQueued, stream);  // part of it may be on its way
        throw;
    }
    mDriver.call(mDriver.api.cuEventRecord, mQueued, stream);
}

void GraphPlan::queue(Graph &graph, CudaStream stream, bool capturing, CudaAddress pixels,
                      CudaAddress anomalyMap, CudaAddress peaks) {
    auto copy = [&](CudaAddress target, CudaAddress source, int index) {
        mDriver.call(mDriver.api.cuMemcpyDtoDAsync_v2, target, source, bytes(index, graph.images), stream);
    };
    copy(mAddresses[mPixels], pixels, mPixels);
    if (capturing) {
        launch(graph, stream);
    } else {
        mDriver.call(mDriver.api.cuGraphLaunch, graph.executable, stream);
    }
    copy(anomalyMap, mAddresses[mAnomalyMap], mAnomalyMap);
    copy(peaks, mAddresses[mPeaks], mPeaks);
}

}  // namespace omniad

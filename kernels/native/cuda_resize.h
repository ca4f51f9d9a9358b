// Frames of any size to the network's pixels on the GPU: a plan's front, launched for each frame.
#pragma once

#include <memory>

#include "cuda_kernel.h"

namespace omniad {

enum class Place { kHOST, kGPU, kGPU_AFTER_STREAM, kGPU_AFTER_ALL };  // as omniad_place

// uint8 BGR (rows, columns, 3), as omniad_frame; rowBytes from a row's start to the next one's.
struct Frame {
    const uint8_t *bgr;
    int64_t rows, columns, rowBytes;
    Place place = Place::kHOST;
    CudaStream stream = nullptr;
};

// Each frame is one launch on the stream, ahead of the network's graph, so the graph is the same for any size. A
// frame on the host goes through pinned memory, which grows to the largest so far; one on the GPU is read where it
// lies. The tables are written again only where the size changes. The owner takes turns and has its context
// current.
class CudaResize {
public:
    // pinned: host memory of each of the plan's tables, by the index of its buffer
    CudaResize(Driver &driver, CudaStream stream, const Plan &plan, const Kernel &kernel, CudaFunction function,
               const std::vector<CudaAddress> &addresses, const std::vector<uint8_t *> &pinned);
    CudaResize(const CudaResize &) = delete;
    CudaResize &operator=(const CudaResize &) = delete;

    // Starts what makes image `index` of the frame, which on the GPU must stay until the stream is through. Throws
    // an input error for a frame that the kernel cannot take.
    void put(int index, const Frame &frame);

private:
    void waitFor(const Frame &frame);
    void writeTables(int64_t rows, int64_t columns);
    CudaAddress stage(const Frame &frame);
    void grow(size_t bytes);
    void copy(CudaAddress target, const void *pinned, size_t bytes);

    Driver &mDriver;
    CudaStream mStream;
    const Plan &mPlan;
    const std::vector<CudaAddress> &mAddresses;
    const std::vector<uint8_t *> &mPinned;
    LoadedLaunch mLaunch;
    size_t mFrameParameter = 0, mPixelsParameter = 0;
    int64_t mTableRows = 0, mTableColumns = 0;  // of the frames that the tables on the GPU are for
    CudaEvent mCopied = nullptr;                // when pinned memory may be written again
    CudaEvent mWritten = nullptr;               // when a frame on the GPU may be read
    uint8_t *mStaging = nullptr;                // pinned, and
    CudaAddress mStagingAddress = 0;            // on the GPU
    size_t mStagingBytes = 0;
    Owned mEvents, mStagingMemory;  // the memory goes first
};

}  // namespace omniad

#include "cuda_resize.h"

#include <cstring>

#include "error.h"
#include "resize_tables.h"

namespace omniad {
namespace {

size_t parameterOf(const Plan &plan, std::string_view name) {
    const std::vector<int> &buffers = plan.front->calls[0].buffers;
    for (size_t i = 0; i < buffers.size(); ++i) {
        if (plan.buffers[buffers[i]].name == name) {
            return i;
        }
    }
    throw bundleError("plan: expected a front that uses the buffer ", name, ", got one without; export again");
}

void checkFrame(const Frame &frame) {
    bool fits = frame.bgr != nullptr && frame.rows >= 1 && frame.columns >= 1 && frame.columns <= INT64_MAX / 3;
    if (!fits || frame.rowBytes < 3 * frame.columns) {
        throw inputError("frame: expected BGR rows of 3 bytes a pixel, got ", frame.rows, " rows of ",
                         frame.columns, " pixels, ", frame.rowBytes, " bytes apart",
                         frame.bgr == nullptr ? ", at no address" : "");
    }
    if (frame.place != Place::kHOST && frame.rowBytes != 3 * frame.columns) {
        throw inputError("frame: expected rows that follow each other on the GPU, got rows of ", frame.columns,
                         " pixels, ", frame.rowBytes, " bytes apart; copy it to that, or pass it from the host");
    }
}

}  // namespace

CudaResize::CudaResize(Driver &driver, CudaStream stream, const Plan &plan, const Kernel &kernel,
                       CudaFunction function, const std::vector<CudaAddress> &addresses,
                       const std::vector<uint8_t *> &pinned)
    : mDriver(driver),
      mStream(stream),
      mPlan(plan),
      mAddresses(addresses),
      mPinned(pinned),
      mLaunch(*plan.front, kernel, function, addresses),
      mFrameParameter(parameterOf(plan, "frame")),
      mPixelsParameter(parameterOf(plan, "pixels")) {
    for (CudaEvent *event : {&mCopied, &mWritten}) {
        driver.call(driver.api.cuEventCreate, event, kEVENT_DISABLE_TIMING);
        mEvents.add([&driver, made = *event] { driver.free(driver.api.cuEventDestroy_v2, made); });
    }
}

void CudaResize::put(int index, const Frame &frame) {
    checkFrame(frame);
    waitFor(frame);
    if (frame.rows != mTableRows || frame.columns != mTableColumns) {
        writeTables(frame.rows, frame.columns);
    }
    CudaAddress source = frame.place == Place::kHOST ? stage(frame) : reinterpret_cast<CudaAddress>(frame.bgr);
    auto imageBytes = static_cast<CudaAddress>(mPlan.height) * mPlan.width * 3;
    mLaunch.move(mFrameParameter, source);
    mLaunch.move(mPixelsParameter, mAddresses[mPlan.find("pixels")] + index * imageBytes);
    mLaunch.start(mDriver, mStream, false);
}

void CudaResize::waitFor(const Frame &frame) {
    if (frame.place == Place::kGPU_AFTER_STREAM) {
        mDriver.call(mDriver.api.cuEventRecord, mWritten, frame.stream);
        mDriver.call(mDriver.api.cuStreamWaitEvent, mStream, mWritten, 0u);
    } else if (frame.place == Place::kGPU_AFTER_ALL) {
        mDriver.call(mDriver.api.cuCtxSynchronize);
    }
}

void CudaResize::writeTables(int64_t rows, int64_t columns) {
    Tables tables = resampleTables(rows, columns, mPlan.height, mPlan.width);
    mTableRows = mTableColumns = 0;
    mDriver.call(mDriver.api.cuEventSynchronize, mCopied);
    const std::pair<std::string_view, const void *> written[] = {
        {kGEOMETRY, tables.geometry.data()},          {kROW_START, tables.rowStart.data()},
        {kROW_WEIGHT, tables.rowWeight.data()},       {kCOLUMN_START, tables.columnStart.data()},
        {kCOLUMN_WEIGHT, tables.columnWeight.data()},
    };
    for (auto [name, table] : written) {
        int index = mPlan.find(name);
        std::memcpy(mPinned[index], table, mPlan.buffers[index].bytes());
        copy(mAddresses[index], mPinned[index], mPlan.buffers[index].bytes());
    }
    mTableRows = rows, mTableColumns = columns;
}

// Its address on the GPU, to which it is on the way.
CudaAddress CudaResize::stage(const Frame &frame) {
    size_t row = 3 * static_cast<size_t>(frame.columns), bytes = row * static_cast<size_t>(frame.rows);
    mDriver.call(mDriver.api.cuEventSynchronize, mCopied);
    if (bytes > mStagingBytes) {
        grow(bytes);
    }
    for (int64_t y = 0; y < frame.rows; ++y) {
        std::memcpy(mStaging + y * row, frame.bgr + y * frame.rowBytes, row);
    }
    copy(mStagingAddress, mStaging, bytes);
    return mStagingAddress;
}

void CudaResize::grow(size_t bytes) {
    Driver &driver = mDriver;
    driver.call(driver.api.cuStreamSynchronize, mStream);  // the frame before may still be read
    mStagingBytes = 0;
    mStagingMemory.close();
    void *host = nullptr;
    driver.call(driver.api.cuMemHostAlloc, &host, bytes, 0u);
    mStagingMemory.add([&driver, host] { driver.free(driver.api.cuMemFreeHost, host); });
    CudaAddress device = 0;
    driver.call(driver.api.cuMemAlloc_v2, &device, bytes);
    mStagingMemory.add([&driver, device] { driver.free(driver.api.cuMemFree_v2, device); });
    mStaging = static_cast<uint8_t *>(host), mStagingAddress = device, mStagingBytes = bytes;
}

void CudaResize::copy(CudaAddress target, const void *pinned, size_t bytes) {
    mDriver.call(mDriver.api.cuMemcpyHtoDAsync_v2, target, pinned, bytes, mStream);
    mDriver.call(mDriver.api.cuEventRecord, mCopied, mStream);
}

}  // namespace omniad

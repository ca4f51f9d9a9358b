// Compiled kernels in the CUDA driver: loaded once each, given their parameters, launched.
#pragma once

#include <map>
#include <string>
#include <tuple>

#include "cuda_driver.h"
#include "json.h"
#include "plan.h"

namespace omniad {

constexpr int kPDL_FROM = 90;  // the first architecture with programmatic dependent launch

// Compiled for one architecture: entry point, machine code, what a launch of it needs.
struct Kernel {
    std::string name, cubin;
    int sharedBytes = 0, numWarps = 1;

    bool operator<(const Kernel &other) const {
        return std::tie(name, sharedBytes, numWarps, cubin) <
               std::tie(other.name, other.sharedBytes, other.numWarps, other.cubin);
    }
};

// One for each launch of `plan.allLaunches()`; the same one may repeat. index: their places in `code`, as the
// exporter writes them, by key.
std::vector<Kernel> parseKernels(const Plan &plan, const Json &index, std::string_view code);

// A launch with everything that the driver asks for, so that starting it takes no memory.
class LoadedLaunch {
public:
    // addresses: of the plan's buffers on the GPU, by index. `launch` is copied from.
    LoadedLaunch(const Launch &launch, const Kernel &kernel, CudaFunction function,
                 const std::vector<CudaAddress> &addresses);
    LoadedLaunch(LoadedLaunch &&) = default;  // a copy's places would be those of the other's values

    // pdl: perhaps before the kernel ahead of it ends, on which it then waits.
    void start(Driver &driver, CudaStream stream, bool pdl);
    // Other places for all buffers, by index.
    void setAddresses(const std::vector<CudaAddress> &addresses);
    // Another place for a buffer of its first call, by its place among those that the call has.
    void move(size_t parameter, CudaAddress address) { mValues[parameter] = address; }

private:
    CudaFunction mFunction;
    unsigned int mPrograms, mThreads, mSharedBytes;
    std::vector<int> mBuffers;         // the plan's index of each parameter, or kNO_BUFFER of a number
    std::vector<CudaAddress> mValues;  // 8 bytes for each parameter; of a number the first 4 count
    std::vector<void *> mPlaces;       // of the values
};

// Functions of kernels, of equal machine code from one module; `owned` unloads them.
class Kernels {
public:
    Kernels(const Context &context, Owned &owned) : mContext(context), mOwned(owned) {}

    // Throws an engine error if the GPU has too little shared memory for it.
    CudaFunction load(const Kernel &kernel);

private:
    CudaModule module(const std::string &cubin);

    const Context &mContext;
    Owned &mOwned;
    int mMostShared = -1;
    std::map<Kernel, CudaFunction> mFunctions;
    std::map<std::string, CudaModule> mModules;
};

}  // namespace omniad

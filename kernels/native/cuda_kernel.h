// Compiled kernels in the CUDA driver: loaded once each, given their parameters, launched.
#pragma once

#include <map>
#include <string>
#include <tuple>

#include "cuda_driver.h"
#include "plan.h"

namespace omniad {

// Compiled for one architecture: entry point, machine code, what a launch of it needs.
struct Kernel {
    std::string name, cubin;
    int sharedBytes = 0, numWarps = 1;

    bool operator<(const Kernel &other) const {
        return std::tie(name, sharedBytes, numWarps, cubin) <
               std::tie(other.name, other.sharedBytes, other.numWarps, other.cubin);
    }
};

// A launch with everything that the driver asks for, so that starting it takes no memory.
class LoadedLaunch {
public:
    // addresses: of the plan's buffers on the GPU, by index. `launch` is copied from.
    LoadedLaunch(const Launch &launch, const Kernel &kernel, CudaFunction function,
                 const std::vector<CudaAddress> &addresses);
    LoadedLaunch(LoadedLaunch &&) = default;  // a copy's places would be those of the other's values

    // pdl: perhaps before the kernel ahead of it ends, on which it then waits.
    void start(Driver &driver, CudaStream stream, bool pdl);
    // Another place for a buffer of its first call, by its place among those that the call has.
    void move(size_t parameter, CudaAddress address) { mValues[parameter] = address; }

private:
    CudaFunction mFunction;
    unsigned int mPrograms, mThreads, mSharedBytes;
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

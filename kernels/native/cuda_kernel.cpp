#include "cuda_kernel.h"

#include "error.h"

namespace omniad {
namespace {

constexpr int kSHARED_BYTES_UNASKED = 48 * 1024;  // a kernel gets more only if it asks
constexpr int kWARP = 32;

Kernel parseKernel(const Json &entry, std::string_view code) {
    entry.expectKeys({"name", "offset", "bytes", "shared_bytes", "num_warps"});
    Kernel made;
    made.name = entry.at("name").string();
    auto size = static_cast<int64_t>(code.size());
    int64_t offset = entry.at("offset").integer(0, size), bytes = entry.at("bytes").integer(1, size - offset);
    made.cubin = code.substr(offset, bytes);
    made.sharedBytes = static_cast<int>(entry.at("shared_bytes").integer(0, INT32_MAX));
    made.numWarps = static_cast<int>(entry.at("num_warps").integer(1, 32));
    return made;
}

}  // namespace

std::vector<Kernel> parseKernels(const Plan &plan, const Json &index, std::string_view code) {
    std::vector<Kernel> made;
    for (const Launch *launch : plan.allLaunches()) {
        made.push_back(parseKernel(index.at(plan.kernelKey(*launch)), code));
    }
    return made;
}

// As kernels/jit.py's `step` is compiled to take them: of one call its buffers; of two, those of the first, how
// many programs it has, those of the second. Behind them Triton appends two pointers to memory that no kernel here
// has.
LoadedLaunch::LoadedLaunch(const Launch &launch, const Kernel &kernel, CudaFunction function,
                           const std::vector<CudaAddress> &addresses)
    : mFunction(function),
      mPrograms(static_cast<unsigned int>(launch.programs())),
      mThreads(static_cast<unsigned int>(kWARP * kernel.numWarps)),
      mSharedBytes(static_cast<unsigned int>(kernel.sharedBytes)) {
    for (const Call &call : launch.calls) {
        if (&call != &launch.calls.front()) {
            mBuffers.push_back(kNO_BUFFER);
            mValues.resize(mBuffers.size(), static_cast<CudaAddress>(launch.calls.front().programs));
        }
        for (int index : call.buffers) {
            if (index != kNO_BUFFER) {
                mBuffers.push_back(index);
            }
        }
        mValues.resize(mBuffers.size());
    }
    setAddresses(addresses);
    mValues.resize(mValues.size() + 2);
    for (CudaAddress &value : mValues) {
        mPlaces.push_back(&value);
    }
}

void LoadedLaunch::setAddresses(const std::vector<CudaAddress> &addresses) {
    for (size_t i = 0; i < mBuffers.size(); ++i) {
        if (mBuffers[i] != kNO_BUFFER) {
            mValues[i] = addresses[mBuffers[i]];
        }
    }
}

void LoadedLaunch::start(Driver &driver, CudaStream stream, bool pdl) {
    LaunchAttribute early{};
    early.id = kPROGRAMMATIC_STREAM_SERIALIZATION;
    early.value.programmaticStreamSerializationAllowed = 1;
    LaunchConfig config{mPrograms,    1, 1, mThreads, 1, 1, mSharedBytes, stream, pdl ? &early : nullptr,
                        pdl ? 1u : 0u};
    driver.call(driver.api.cuLaunchKernelEx, &config, mFunction, mPlaces.data(), nullptr);
}

CudaFunction Kernels::load(const Kernel &kernel) {
    if (auto found = mFunctions.find(kernel); found != mFunctions.end()) {
        return found->second;
    }
    Driver &driver = mContext.driver();
    if (mMostShared < 0) {
        mMostShared = driver.attribute(kMAX_SHARED_MEMORY_PER_BLOCK_OPTIN, mContext.device());
    }
    if (kernel.sharedBytes > mMostShared) {
        throw engineError("kernel ", shown(kernel.name), ": needs ", kernel.sharedBytes,
                          " bytes of shared memory, this GPU has ", mMostShared,
                          "; export the bundle with this GPU's architecture in --targets");
    }
    CudaFunction function = nullptr;
    driver.call(driver.api.cuModuleGetFunction, &function, module(kernel.cubin), kernel.name.c_str());
    if (kernel.sharedBytes > kSHARED_BYTES_UNASKED) {
        driver.call(driver.api.cuFuncSetAttribute, function, kMAX_DYNAMIC_SHARED_SIZE_BYTES, kernel.sharedBytes);
    }
    return mFunctions[kernel] = function;
}

CudaModule Kernels::module(const std::string &cubin) {
    auto [place, isNew] = mModules.try_emplace(cubin, nullptr);
    if (isNew) {
        Driver &driver = mContext.driver();
        CudaModule loaded = nullptr;
        driver.call(driver.api.cuModuleLoadData, &loaded, static_cast<const void *>(cubin.c_str()));
        mOwned.add([&driver, loaded] { driver.free(driver.api.cuModuleUnload, loaded); });
        place->second = loaded;
    }
    return place->second;
}

}  // namespace omniad

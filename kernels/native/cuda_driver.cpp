#include "cuda_driver.h"

#include <dlfcn.h>

#include "error.h"

namespace omniad {
namespace {

enum class Meaning {
    kSTICKY,
    kOTHER_GPU,
    kNO_GPU,
    kOLD_DRIVER,
    kUNAVAILABLE,
    kOUT_OF_MEMORY,
    kSTUB,
    kMISMATCH,
    kREFUSED,
};

const char *words(Meaning meaning) {
    switch (meaning) {
    case Meaning::kSTICKY:
        return "the GPU failed or a kernel went wrong, and the engine cannot go on; start the process anew, and "
               "if it "
               "happens again look for Xid in the kernel log (dmesg)";
    case Meaning::kOTHER_GPU:
        return "the kernels are not for this GPU or are damaged; export the bundle again with its --targets";
    case Meaning::kNO_GPU:
        return "no usable GPU; look at nvidia-smi, CUDA_VISIBLE_DEVICES and the container's GPU access";
    case Meaning::kOLD_DRIVER:
        return "the NVIDIA driver is too old; update it";
    case Meaning::kUNAVAILABLE:
        return "another process has the GPU for itself (exclusive mode); end that process";
    case Meaning::kOUT_OF_MEMORY:
        return "the GPU or the host has too little free memory; end what else uses it";
    case Meaning::kSTUB:
        return "libcuda is the toolkit's stub; install the NVIDIA driver";
    case Meaning::kMISMATCH:
        return "the driver was updated while loaded; restart the machine";
    case Meaning::kREFUSED:
        break;
    }
    return "the driver refused the call; update the driver, or report this error";
}

Meaning meaningOf(int status) {
    switch (status) {
#define OMNIAD_CASE(name, number, meaning) \
    case number:                           \
        return Meaning::meaning;
        OMNIAD_CUDA_ERRORS(OMNIAD_CASE)
#undef OMNIAD_CASE
    default:
        return Meaning::kREFUSED;
    }
}

std::string nameOf(const CudaApi &api, int status) {
    const char *name = nullptr;
    if (api.cuGetErrorName.pointer(status, &name) == 0 && name != nullptr) {
        return name;
    }
    return text("error ", status);
}

// Without the version that some symbols of libcuda end in.
std::string documented(std::string name) {
    size_t size = name.size();
    return size > 3 && name.compare(size - 3, 3, "_v2") == 0 ? name.substr(0, size - 3) : name;
}

template <typename... Parameters>
void find(void *library, CudaCall<Parameters...> &call, const char *name) {
    call.name = name;
    call.pointer = reinterpret_cast<int (*)(Parameters...)>(dlsym(library, name));
    if (call.pointer == nullptr) {
        throw engineError(name,
                          ": libcuda.so.1 has no such function; update the NVIDIA driver to one of CUDA 11.8 "
                          "or newer");
    }
}

CudaApi openLibrary() {
    void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        const char *reason = dlerror();
        throw engineError("the NVIDIA driver was not found: ", reason == nullptr ? "libcuda.so.1" : reason,
                          "; install it, or give the container access to the GPU");
    }
    CudaApi api;
    try {
#define OMNIAD_FIND(symbol, ...) find(library, api.symbol, #symbol);
        OMNIAD_CUDA_FUNCTIONS(OMNIAD_FIND)
#undef OMNIAD_FIND
    } catch (...) {
        dlclose(library);
        throw;
    }
    return api;
}

}  // namespace

const CudaApi &cudaApi() {
    static const CudaApi api = openLibrary();  // tried again after it threw
    return api;
}

int Driver::attribute(int key, CudaDevice device) {
    int value = 0;
    call(api.cuDeviceGetAttribute, &value, key, device);
    return value;
}

void Driver::checkNotLost() const {
    if (!mLost.empty()) {
        throw Error(Status::kENGINE, mLost);
    }
}

void Driver::fail(const char *function, int status) {
    Meaning meaning = meaningOf(status);
    std::string said = text(documented(function), ": ", nameOf(api, status), ": ", words(meaning));
    if (meaning == Meaning::kSTICKY) {
        mLost = said;
    }
    throw Error(Status::kENGINE, said);
}

Context Context::current(Driver &driver) {
    Context made(driver);
    driver.call(driver.api.cuInit, 0u);
    driver.call(driver.api.cuCtxGetCurrent, &made.mHandle);
    if (made.mHandle == nullptr) {
        throw engineError("this thread has no CUDA context; call cudaSetDevice in it first");
    }
    driver.call(driver.api.cuCtxGetDevice, &made.mDevice);
    return made;
}

PrimaryContext::PrimaryContext(Driver &driver, int ordinal) : Context(driver) {
    driver.call(driver.api.cuInit, 0u);
    driver.call(driver.api.cuDeviceGet, &mDevice, ordinal);
    driver.call(driver.api.cuDevicePrimaryCtxRetain, &mHandle, mDevice);
}

int Context::architecture() const {
    int major = mDriver.attribute(kCOMPUTE_CAPABILITY_MAJOR, mDevice);
    return 10 * major + mDriver.attribute(kCOMPUTE_CAPABILITY_MINOR, mDevice);
}

}  // namespace omniad

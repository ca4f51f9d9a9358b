// The CUDA driver: checked calls, a context for any thread, and what gives things back.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "cuda_api.h"

namespace omniad {

// Every call of the driver goes through here, and every error of it ends here, as an engine error.
class Driver {
public:
    const CudaApi &api = cudaApi();

    // At once refused if the GPU was lost before.
    template <typename... Parameters, typename... Arguments>
    void call(const CudaCall<Parameters...> &function, Arguments... arguments) {
        checkNotLost();
        if (int status = function.pointer(arguments...)) {
            fail(function.name, status);
        }
    }

    // A call that gives something back: tried in a lost context too, where it may fail.
    template <typename... Parameters, typename... Arguments>
    void free(const CudaCall<Parameters...> &function, Arguments... arguments) const noexcept {
        function.pointer(arguments...);
    }

    int attribute(int key, CudaDevice device);

private:
    void checkNotLost() const;
    [[noreturn]] void fail(const char *function, int status);

    std::string mLost;  // after a sticky error, what happened
};

// What to give back, in reverse.
class Owned {
public:
    Owned() = default;
    Owned(const Owned &) = delete;
    Owned &operator=(const Owned &) = delete;
    ~Owned() { close(); }

    template <typename Free>
    void add(Free free) {
        try {
            mFrees.emplace_back(free);
        } catch (...) {
            free();
            throw;
        }
    }

    void close() noexcept {
        for (; !mFrees.empty(); mFrees.pop_back()) {
            mFrees.back()();
        }
    }

private:
    std::vector<std::function<void()>> mFrees;
};

// A context of a GPU, whoever keeps it alive.
class Context {
public:
    // That of this thread. Throws an engine error if it has none.
    static Context current(Driver &driver);

    Driver &driver() const { return mDriver; }
    CudaDevice device() const { return mDevice; }
    CudaContext handle() const { return mHandle; }
    // Like 90 for sm_90.
    int architecture() const;

protected:
    explicit Context(Driver &driver) : mDriver(driver) {}

    Driver &mDriver;
    CudaDevice mDevice = 0;
    CudaContext mHandle = nullptr;
};

// The primary context of a device, which the CUDA runtime API uses too.
class PrimaryContext : public Context {
public:
    PrimaryContext(Driver &driver, int ordinal);
    PrimaryContext(const PrimaryContext &) = delete;
    PrimaryContext &operator=(const PrimaryContext &) = delete;
    ~PrimaryContext() { mDriver.free(mDriver.api.cuDevicePrimaryCtxRelease_v2, mDevice); }
};

// The context is current while this lives; afterwards the thread has again what it had before.
class Entered {
public:
    explicit Entered(const Context &context) : mDriver(context.driver()) {
        mDriver.call(mDriver.api.cuCtxPushCurrent_v2, context.handle());
    }
    Entered(const Entered &) = delete;
    Entered &operator=(const Entered &) = delete;
    ~Entered() {
        CudaContext popped;
        mDriver.free(mDriver.api.cuCtxPopCurrent_v2, &popped);
    }

private:
    Driver &mDriver;
};

}  // namespace omniad

// A stand-in for libcuda.so.1: the functions of the driver that the native runtime calls.
#include "recording_cuda.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

// A function that gives something back does so even if it shall fail.
#define GIVES_BACK(symbol, name, Type, ...)         \
    EXPORT int symbol(Type handle) {                \
        int late = 0;                               \
        ENTER(name, true, false, &late)             \
        note(", \"handle\": %llu", number(handle)); \
        __VA_ARGS__;                                \
        return late;                                \
    }

// For the test program.

EXPORT void stand_in_fail(int at, int status) {
    state().failAt = at, state().failWith = status, state().calls = 0;
    state().names.clear();
    contexts.clear();
    state().queues.clear();
}

EXPORT const char *stand_in_name(int call) {
    return call >= 1 && call <= static_cast<int>(state().names.size()) ? state().names[call - 1].c_str() : "";
}

// Memory of the test program's that counts as the GPU's.
EXPORT void stand_in_lend(void *memory, size_t bytes) {
    state().device[number(memory)] = bytes;
}

EXPORT int stand_in_alive() {
    return static_cast<int>(state().alive.size() + contexts.size()) + state().references +
           (state().capturing != 0);
}

// Device and context

EXPORT int cuInit(unsigned int) {
    ENTER("cuInit", false)
    return 0;
}

EXPORT int cuGetErrorName(int status, const char **name) {
    static const std::map<int, const char *> names = {{kOUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
                                                      {kINVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"},
                                                      {kINVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"},
                                                      {700, "CUDA_ERROR_ILLEGAL_ADDRESS"}};
    auto found = names.find(status);
    *name = found == names.end() ? nullptr : found->second;
    return found == names.end() ? 1 : 0;
}

EXPORT int cuDeviceGet(CudaDevice *device, int ordinal) {
    ENTER("cuDeviceGet", false)
    *device = ordinal;
    return ordinal == 0 ? 0 : kINVALID_DEVICE;
}

EXPORT int cuDeviceGetAttribute(int *value, int key, CudaDevice) {
    ENTER("cuDeviceGetAttribute", false)
    const char *given = std::getenv("OMNIAD_ARCH");
    int arch = given == nullptr ? 90 : std::atoi(given);
    *value = key == kCOMPUTE_CAPABILITY_MAJOR   ? arch / 10
             : key == kCOMPUTE_CAPABILITY_MINOR ? arch % 10
                                                : 227 * 1024;
    return 0;
}

EXPORT int cuDevicePrimaryCtxRetain(CudaContext *context, CudaDevice) {
    ENTER("cuDevicePrimaryCtxRetain", false)
    state().references += 1;
    *context = reinterpret_cast<CudaContext>(kPRIMARY);
    return 0;
}

EXPORT int cuDevicePrimaryCtxRelease_v2(CudaDevice) {
    int late = 0;
    ENTER("cuDevicePrimaryCtxRelease", false, true, &late)
    state().references -= 1;
    return late;
}

EXPORT int cuCtxGetCurrent(CudaContext *context) {
    ENTER("cuCtxGetCurrent", false)
    *context = reinterpret_cast<CudaContext>(contexts.empty() ? 0 : contexts.back());
    return 0;
}

EXPORT int cuCtxGetDevice(CudaDevice *device) {
    ENTER("cuCtxGetDevice")
    *device = 0;
    return 0;
}

EXPORT int cuCtxPushCurrent_v2(CudaContext context) {
    ENTER("cuCtxPushCurrent", false, true)
    contexts.push_back(number(context));
    return 0;
}

EXPORT int cuCtxPopCurrent_v2(CudaContext *context) {
    int late = 0;
    ENTER("cuCtxPopCurrent", true, true, &late)
    *context = reinterpret_cast<CudaContext>(contexts.back());
    contexts.pop_back();
    return late;
}

// Memory

EXPORT int cuMemAlloc_v2(CudaAddress *address, size_t bytes) {
    ENTER("cuMemAlloc")
    *address = allocate(bytes, "device memory");
    state().device[*address] = bytes;
    note(", \"bytes\": %zu, \"address\": %llu", bytes, *address);
    return 0;
}

EXPORT int cuMemFree_v2(CudaAddress address) {
    int late = 0;
    ENTER("cuMemFree", true, false, &late)
    note(", \"address\": %llu", address);
    drop(address, "device memory");
    state().device.erase(address);
    std::free(reinterpret_cast<void *>(address));
    return late;
}

EXPORT int cuMemHostAlloc(void **host, size_t bytes, unsigned int) {
    ENTER("cuMemHostAlloc")
    *host = reinterpret_cast<void *>(allocate(bytes, "pinned memory"));
    note(", \"bytes\": %zu, \"address\": %llu", bytes, number(*host));
    return 0;
}

GIVES_BACK(cuMemFreeHost, "cuMemFreeHost", void *, drop(number(handle), "pinned memory"); std::free(handle))

EXPORT int cuMemsetD8Async(CudaAddress target, unsigned char value, size_t bytes, CudaStream stream) {
    ENTER("cuMemsetD8Async")
    note(", \"target\": %llu, \"bytes\": %zu", target, bytes);
    queue(stream, [=] { std::memset(inside(target, bytes), value, bytes); });
    return 0;
}

EXPORT int cuMemcpyHtoDAsync_v2(CudaAddress target, const void *source, size_t bytes, CudaStream stream) {
    ENTER("cuMemcpyHtoDAsync")
    note(", \"target\": %llu, \"bytes\": %zu", target, bytes);
    queue(stream, [=] { std::memcpy(inside(target, bytes), source, bytes); });
    return 0;
}

EXPORT int cuMemcpyDtoHAsync_v2(void *target, CudaAddress source, size_t bytes, CudaStream stream) {
    ENTER("cuMemcpyDtoHAsync")
    note(", \"source\": %llu, \"bytes\": %zu", source, bytes);
    queue(stream, [=] { std::memcpy(target, inside(source, bytes), bytes); });
    return 0;
}

EXPORT int cuMemcpyDtoDAsync_v2(CudaAddress target, CudaAddress source, size_t bytes, CudaStream stream) {
    ENTER("cuMemcpyDtoDAsync", true, true)
    note(", \"target\": %llu, \"source\": %llu, \"bytes\": %zu", target, source, bytes);
    queue(stream, [=] { std::memcpy(inside(target, bytes), inside(source, bytes), bytes); });
    return 0;
}

// Kernels

EXPORT int cuModuleLoadData(CudaModule *module, const void *image) {
    ENTER("cuModuleLoadData")
    note(", \"image\": %s", static_cast<const char *>(image));
    make(module, "module");
    auto code = static_cast<const char *>(image);
    state().functions[number(*module)] = {field(code, "parameters"), field(code, "native")};
    return 0;
}

GIVES_BACK(cuModuleUnload, "cuModuleUnload", CudaModule, drop(number(handle), "module"))

EXPORT int cuModuleGetFunction(CudaFunction *function, CudaModule module, const char *name) {
    ENTER("cuModuleGetFunction")
    note(", \"module\": %llu, \"name\": \"%s\"", number(module), name);
    *function = reinterpret_cast<CudaFunction>(module);
    return 0;
}

EXPORT int cuFuncSetAttribute(CudaFunction function, int key, int value) {
    ENTER("cuFuncSetAttribute")
    note(", \"function\": %llu, \"key\": %d, \"value\": %d", number(function), key, value);
    return 0;
}

EXPORT int cuLaunchKernelEx(const LaunchConfig *config, CudaFunction function, void **parameters, void **extra) {
    ENTER("cuLaunchKernelEx", true, true)
    const Function &code = state().functions.at(number(function));
    std::vector<uint64_t> values;
    std::string shown, attributes;
    for (size_t i = 0; i < code.parameters.size(); ++i) {
        uint64_t value = 0;
        std::memcpy(&value, parameters[i], code.parameters[i] == 'p' ? 8 : 4);
        values.push_back(value);
        shown += (i ? ", " : "") + std::to_string(value);
    }
    for (unsigned int i = 0; i < config->numAttrs; ++i) {
        const LaunchAttribute &given = config->attrs[i];
        attributes += (i ? ", [" : "[") + std::to_string(given.id) + ", " +
                      std::to_string(given.value.programmaticStreamSerializationAllowed) + "]";
    }
    note(
        ", \"function\": %llu, \"grid\": [%u, %u, %u], \"block\": [%u, %u, %u], "
        "\"shared\": %u, \"attributes\": [%s], \"values\": [%s], \"capturing\": %s",
        number(function), config->gridDimX, config->gridDimY, config->gridDimZ, config->blockDimX,
        config->blockDimY, config->blockDimZ, config->sharedMemBytes, attributes.c_str(), shown.c_str(),
        state().capturing != 0 ? "true" : "false");
    if (extra != nullptr) {
        refuse("a launch with extra parameters");
    }
    queue(config->hStream,
          [native = code.native, values, programs = config->gridDimX] { execute(native, values, programs); });
    return 0;
}

// Streams, events and graphs

EXPORT int cuStreamCreate(CudaStream *stream, unsigned int flags) {
    ENTER("cuStreamCreate")
    make(stream, "stream");
    note(", \"flags\": %u", flags);
    return 0;
}

GIVES_BACK(cuStreamDestroy_v2, "cuStreamDestroy", CudaStream, drop(number(handle), "stream"))
GIVES_BACK(cuStreamSynchronize, "cuStreamSynchronize", CudaStream, drain(number(handle)))

EXPORT int cuStreamWaitEvent(CudaStream stream, CudaEvent event, unsigned int) {
    ENTER("cuStreamWaitEvent")
    if (auto recorded = state().events.find(number(event)); recorded != state().events.end()) {
        queue(stream, recorded->second);
    }
    return 0;
}

EXPORT int cuStreamIsCapturing(CudaStream stream, int *status) {
    ENTER("cuStreamIsCapturing", true, true)
    *status = state().capturing != 0 && state().capturing == number(stream);
    return 0;
}

EXPORT int cuStreamBeginCapture_v2(CudaStream stream, int mode) {
    ENTER("cuStreamBeginCapture")
    note(", \"mode\": %d", mode);
    state().capturing = number(stream);
    return 0;
}

EXPORT int cuStreamEndCapture(CudaStream, CudaGraph *graph) {
    *graph = nullptr;
    ENTER("cuStreamEndCapture", true, true)
    make(graph, "graph");
    state().graphs[number(*graph)] = std::move(state().captured);
    state().captured.clear();
    state().capturing = 0;
    return 0;
}

EXPORT int cuEventCreate(CudaEvent *event, unsigned int flags) {
    ENTER("cuEventCreate")
    make(event, "event");
    note(", \"flags\": %u", flags);
    return 0;
}

GIVES_BACK(cuEventDestroy_v2, "cuEventDestroy", CudaEvent, drop(number(handle), "event");
           state().events.erase(number(handle)))

EXPORT int cuEventRecord(CudaEvent event, CudaStream stream) {
    ENTER("cuEventRecord")
    state().events[number(event)] = [stream] { drain(number(stream)); };
    return 0;
}

GIVES_BACK(cuEventSynchronize, "cuEventSynchronize", CudaEvent, await(number(handle)))

EXPORT int cuGraphInstantiateWithFlags(CudaGraphExec *made, CudaGraph graph, unsigned long long) {
    ENTER("cuGraphInstantiate")
    note(", \"nodes\": %zu", state().graphs.at(number(graph)).size());
    make(made, "executable graph");
    state().graphs[number(*made)] = state().graphs.at(number(graph));
    return 0;
}

GIVES_BACK(cuGraphDestroy, "cuGraphDestroy", CudaGraph, drop(number(handle), "graph"))
GIVES_BACK(cuGraphExecDestroy, "cuGraphExecDestroy", CudaGraphExec, drop(number(handle), "executable graph"))

EXPORT int cuGraphUpload(CudaGraphExec, CudaStream) {
    ENTER("cuGraphUpload")
    if (const char *path = std::getenv("OMNIAD_DUMP")) {
        auto [address, bytes] = *state().device.begin();
        std::unique_ptr<std::FILE, int (*)(std::FILE *)> file(std::fopen(path, "wb"), std::fclose);
        std::fwrite(reinterpret_cast<const void *>(address), 1, bytes, file.get());
    }
    return 0;
}

EXPORT int cuGraphLaunch(CudaGraphExec graph, CudaStream stream) {
    ENTER("cuGraphLaunch")
    std::vector<Work> &nodes = state().graphs.at(number(graph));
    queue(stream, [&nodes] {
        for (Work &node : nodes) {
            node();
        }
    });
    return 0;
}

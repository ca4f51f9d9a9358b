// The part of the CUDA driver API that is used, declared anew so that no CUDA toolkit is needed. What is declared
// is compared with cuda.h by tests/cuda_header_check.cpp.
#pragma once

#include <cstddef>

struct CUctx_st;
struct CUmod_st;
struct CUfunc_st;
struct CUstream_st;
struct CUevent_st;
struct CUgraph_st;
struct CUgraphExec_st;

namespace omniad {

using CudaDevice = int;
using CudaAddress = unsigned long long;
using CudaContext = CUctx_st *;
using CudaModule = CUmod_st *;
using CudaFunction = CUfunc_st *;
using CudaStream = CUstream_st *;
using CudaEvent = CUevent_st *;
using CudaGraph = CUgraph_st *;
using CudaGraphExec = CUgraphExec_st *;

struct LaunchAttribute {
    int id;
    char padding[8 - sizeof(int)];
    union {
        char size[64];
        int programmaticStreamSerializationAllowed;
    } value;
};

struct LaunchConfig {
    unsigned int gridDimX, gridDimY, gridDimZ, blockDimX, blockDimY, blockDimZ, sharedMemBytes;
    CudaStream hStream;
    LaunchAttribute *attrs;
    unsigned int numAttrs;
};

constexpr int kCOMPUTE_CAPABILITY_MAJOR = 75, kCOMPUTE_CAPABILITY_MINOR = 76;
constexpr int kMAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97;
constexpr int kMAX_DYNAMIC_SHARED_SIZE_BYTES = 8;  // of a function
constexpr int kPROGRAMMATIC_STREAM_SERIALIZATION = 6;
constexpr int kCAPTURE_MODE_THREAD_LOCAL = 1;
constexpr int kCAPTURE_STATUS_NONE = 0;
constexpr unsigned int kSTREAM_NON_BLOCKING = 1, kEVENT_DISABLE_TIMING = 2;

// X(symbol of libcuda, its parameters); all of them return a CUresult.
#define OMNIAD_CUDA_FUNCTIONS(X)                                                   \
    X(cuInit, unsigned int)                                                        \
    X(cuGetErrorName, int, const char **)                                          \
    X(cuDeviceGet, CudaDevice *, int)                                              \
    X(cuDeviceGetAttribute, int *, int, CudaDevice)                                \
    X(cuDevicePrimaryCtxRetain, CudaContext *, CudaDevice)                         \
    X(cuDevicePrimaryCtxRelease_v2, CudaDevice)                                    \
    X(cuCtxGetCurrent, CudaContext *)                                              \
    X(cuCtxGetDevice, CudaDevice *)                                                \
    X(cuCtxPushCurrent_v2, CudaContext)                                            \
    X(cuCtxPopCurrent_v2, CudaContext *)                                           \
    X(cuMemAlloc_v2, CudaAddress *, size_t)                                        \
    X(cuMemFree_v2, CudaAddress)                                                   \
    X(cuMemHostAlloc, void **, size_t, unsigned int)                               \
    X(cuMemFreeHost, void *)                                                       \
    X(cuMemsetD8Async, CudaAddress, unsigned char, size_t, CudaStream)             \
    X(cuMemcpyHtoDAsync_v2, CudaAddress, const void *, size_t, CudaStream)         \
    X(cuMemcpyDtoHAsync_v2, void *, CudaAddress, size_t, CudaStream)               \
    X(cuMemcpyDtoDAsync_v2, CudaAddress, CudaAddress, size_t, CudaStream)          \
    X(cuModuleLoadData, CudaModule *, const void *)                                \
    X(cuModuleUnload, CudaModule)                                                  \
    X(cuModuleGetFunction, CudaFunction *, CudaModule, const char *)               \
    X(cuFuncSetAttribute, CudaFunction, int, int)                                  \
    X(cuStreamCreate, CudaStream *, unsigned int)                                  \
    X(cuStreamDestroy_v2, CudaStream)                                              \
    X(cuStreamSynchronize, CudaStream)                                             \
    X(cuStreamWaitEvent, CudaStream, CudaEvent, unsigned int)                      \
    X(cuStreamIsCapturing, CudaStream, int *)                                      \
    X(cuStreamBeginCapture_v2, CudaStream, int)                                    \
    X(cuStreamEndCapture, CudaStream, CudaGraph *)                                 \
    X(cuEventCreate, CudaEvent *, unsigned int)                                    \
    X(cuEventDestroy_v2, CudaEvent)                                                \
    X(cuEventRecord, CudaEvent, CudaStream)                                        \
    X(cuEventSynchronize, CudaEvent)                                               \
    X(cuLaunchKernelEx, const LaunchConfig *, CudaFunction, void **, void **)      \
    X(cuGraphInstantiateWithFlags, CudaGraphExec *, CudaGraph, unsigned long long) \
    X(cuGraphDestroy, CudaGraph)                                                   \
    X(cuGraphExecDestroy, CudaGraphExec)                                           \
    X(cuGraphUpload, CudaGraphExec, CudaStream)                                    \
    X(cuGraphLaunch, CudaGraphExec, CudaStream)

// Statuses that are more than a refused call. After a sticky one nothing in the context works any more.
// X(name, number, what it means)
#define OMNIAD_CUDA_ERRORS(X)                                      \
    X(CUDA_ERROR_OUT_OF_MEMORY, 2, kOUT_OF_MEMORY)                 \
    X(CUDA_ERROR_DEINITIALIZED, 4, kSTICKY)                        \
    X(CUDA_ERROR_STUB_LIBRARY, 34, kSTUB)                          \
    X(CUDA_ERROR_CALL_REQUIRES_NEWER_DRIVER, 36, kOLD_DRIVER)      \
    X(CUDA_ERROR_DEVICE_UNAVAILABLE, 46, kUNAVAILABLE)             \
    X(CUDA_ERROR_NO_DEVICE, 100, kNO_GPU)                          \
    X(CUDA_ERROR_INVALID_DEVICE, 101, kNO_GPU)                     \
    X(CUDA_ERROR_INVALID_IMAGE, 200, kOTHER_GPU)                   \
    X(CUDA_ERROR_NO_BINARY_FOR_GPU, 209, kOTHER_GPU)               \
    X(CUDA_ERROR_ECC_UNCORRECTABLE, 214, kSTICKY)                  \
    X(CUDA_ERROR_NVLINK_UNCORRECTABLE, 220, kSTICKY)               \
    X(CUDA_ERROR_CONTAINED, 226, kSTICKY)                          \
    X(CUDA_ERROR_NOT_FOUND, 500, kOTHER_GPU)                       \
    X(CUDA_ERROR_ILLEGAL_ADDRESS, 700, kSTICKY)                    \
    X(CUDA_ERROR_LAUNCH_TIMEOUT, 702, kSTICKY)                     \
    X(CUDA_ERROR_CONTEXT_IS_DESTROYED, 709, kSTICKY)               \
    X(CUDA_ERROR_ASSERT, 710, kSTICKY)                             \
    X(CUDA_ERROR_HARDWARE_STACK_ERROR, 714, kSTICKY)               \
    X(CUDA_ERROR_ILLEGAL_INSTRUCTION, 715, kSTICKY)                \
    X(CUDA_ERROR_MISALIGNED_ADDRESS, 716, kSTICKY)                 \
    X(CUDA_ERROR_INVALID_ADDRESS_SPACE, 717, kSTICKY)              \
    X(CUDA_ERROR_INVALID_PC, 718, kSTICKY)                         \
    X(CUDA_ERROR_LAUNCH_FAILED, 719, kSTICKY)                      \
    X(CUDA_ERROR_TENSOR_MEMORY_LEAK, 721, kSTICKY)                 \
    X(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, 803, kMISMATCH)           \
    X(CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE, 804, kOLD_DRIVER) \
    X(CUDA_ERROR_MPS_CLIENT_TERMINATED, 810, kSTICKY)              \
    X(CUDA_ERROR_EXTERNAL_DEVICE, 911, kSTICKY)                    \
    X(CUDA_ERROR_UNKNOWN, 999, kSTICKY)

template <typename... Parameters>
struct CudaCall {
    const char *name;
    int (*pointer)(Parameters...);
};

struct CudaApi {
#define OMNIAD_MEMBER(symbol, ...) CudaCall<__VA_ARGS__> symbol;
    OMNIAD_CUDA_FUNCTIONS(OMNIAD_MEMBER)
#undef OMNIAD_MEMBER
};

// libcuda.so.1, opened at the first call that finds it and never closed. Throws an engine error without it.
const CudaApi &cudaApi();

}  // namespace omniad

// Compiles if kernels/native/cuda_api.h declares what the toolkit's cuda.h does.
#include <cuda.h>

#include <cstddef>
#include <type_traits>

#include "cuda_api.h"

namespace {

using namespace omniad;

template <typename Ours, typename Theirs>
constexpr bool alike() {
    if constexpr (std::is_same_v<Ours, Theirs>) {
        return true;
    } else if constexpr (std::is_pointer_v<Ours> && std::is_pointer_v<Theirs>) {
        using Our = std::remove_pointer_t<Ours>;
        using Their = std::remove_pointer_t<Theirs>;
        return std::is_const_v<Our> == std::is_const_v<Their> && alike<Our, Their>();
    } else if constexpr (std::is_class_v<Ours> && std::is_class_v<Theirs>) {
        return sizeof(Ours) == sizeof(Theirs);  // their members are compared below
    } else {
        constexpr bool ours = std::is_integral_v<Ours> || std::is_enum_v<Ours>;
        constexpr bool theirs = std::is_integral_v<Theirs> || std::is_enum_v<Theirs>;
        return ours && theirs && sizeof(Ours) == sizeof(Theirs);
    }
}

template <typename... Ours, typename... Theirs>
constexpr bool matches(omniad::CudaCall<Ours...> *, CUresult (*)(Theirs...)) {
    if constexpr (sizeof...(Ours) == sizeof...(Theirs)) {
        return (alike<Ours, Theirs>() && ...);
    } else {
        return false;
    }
}

#define CHECK_FUNCTION(symbol, ...) \
    static_assert(matches(static_cast<omniad::CudaCall<__VA_ARGS__> *>(nullptr), &::symbol), #symbol);
OMNIAD_CUDA_FUNCTIONS(CHECK_FUNCTION)

#define CHECK_ERROR(name, number, ...) static_assert(name == number);
OMNIAD_CUDA_ERRORS(CHECK_ERROR)

#define CHECK_MEMBER(ours, theirs, member) static_assert(offsetof(ours, member) == offsetof(theirs, member))
CHECK_MEMBER(LaunchConfig, CUlaunchConfig, gridDimX);
CHECK_MEMBER(LaunchConfig, CUlaunchConfig, gridDimY);
CHECK_MEMBER(LaunchConfig, CUlaunchConfig, gridDimZ);
CHECK_MEMBER(LaunchConfig, CUlaunchConfig, blockDimX);
CHECK_MEMBER(LaunchConfig, CUlaunchConfig, blockDimY);
CHECK_MEMBER(LaunchConfig, CUlaunchConfig, blockDimZ);
CHECK_MEMBER(LaunchConfig, CUlaunchConfig, sharedMemBytes);
CHECK_MEMBER(LaunchConfig, CUlaunchConfig, hStream);
CHECK_MEMBER(LaunchConfig, CUlaunchConfig, attrs);
CHECK_MEMBER(LaunchConfig, CUlaunchConfig, numAttrs);
CHECK_MEMBER(LaunchAttribute, CUlaunchAttribute, id);
CHECK_MEMBER(LaunchAttribute, CUlaunchAttribute, value);
CHECK_MEMBER(LaunchAttribute, CUlaunchAttribute, value.programmaticStreamSerializationAllowed);
static_assert(sizeof(LaunchAttribute) == sizeof(CUlaunchAttribute) &&
              sizeof(LaunchConfig) == sizeof(CUlaunchConfig));

static_assert(kCOMPUTE_CAPABILITY_MAJOR == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
static_assert(kCOMPUTE_CAPABILITY_MINOR == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR);
static_assert(kMAX_SHARED_MEMORY_PER_BLOCK_OPTIN == CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN);
static_assert(kMAX_DYNAMIC_SHARED_SIZE_BYTES == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES);
static_assert(kPROGRAMMATIC_STREAM_SERIALIZATION == CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION);
static_assert(kCAPTURE_MODE_THREAD_LOCAL == CU_STREAM_CAPTURE_MODE_THREAD_LOCAL);
static_assert(kCAPTURE_STATUS_NONE == CU_STREAM_CAPTURE_STATUS_NONE);
static_assert(kSTREAM_NON_BLOCKING == CU_STREAM_NON_BLOCKING && kEVENT_DISABLE_TIMING == CU_EVENT_DISABLE_TIMING);

}  // namespace

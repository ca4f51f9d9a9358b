// The C interface: no exception leaves it, and every failure has words.
#include "omniad.h"

#include <cstdio>
#include <new>

#include "error.h"
#include "fused.h"

struct omniad_runtime {
    omniad::FusedRuntime fused;
};

namespace {

using omniad::inputError;

thread_local char lastError[1024] = "";  // of a fixed size: saying what went wrong must not fail

omniad_status failed(omniad_status status, const char *words) noexcept {
    std::snprintf(lastError, sizeof(lastError), "%s", words);
    return status;
}

template <typename Work>
omniad_status guarded(Work work) noexcept {
    try {
        work();
        return OMNIAD_OK;
    } catch (const omniad::Error &error) {
        return failed(static_cast<omniad_status>(error.status()), error.what());
    } catch (const std::bad_alloc &) {
        return failed(OMNIAD_MEMORY_ERROR, "the host has too little memory; end what else uses it");
    } catch (const std::exception &error) {
        return failed(OMNIAD_INTERNAL_ERROR, error.what());
    } catch (...) {
        return failed(OMNIAD_INTERNAL_ERROR, "an unknown exception; report this error");
    }
}

template <typename Pointer>
void expectGiven(const char *name, Pointer *pointer) {
    if (pointer == nullptr) {
        throw inputError(name, ": expected a pointer, got NULL");
    }
}

}  // namespace

const char *omniad_version(void) {
    return OMNIAD_VERSION;
}

const char *omniad_last_error(void) {
    return lastError;
}

omniad_status omniad_open(const char *path, int device, int batch, omniad_runtime **runtime) {
    return guarded([&] {
        expectGiven("runtime", runtime);
        *runtime = nullptr;
        expectGiven("path", path);
        *runtime = new omniad_runtime{{path, device, batch}};
    });
}

omniad_status omniad_close(omniad_runtime *runtime) {
    return guarded([&] { delete runtime; });
}

omniad_status omniad_get_sizes(const omniad_runtime *runtime, omniad_sizes *sizes) {
    return guarded([&] {
        expectGiven("runtime", runtime);
        expectGiven("sizes", sizes);
        const omniad::Plan &plan = runtime->fused.plan();
        const omniad::Buffer &peaks = plan.buffer("peaks");
        *sizes = {plan.batch,
                  plan.height,
                  plan.width,
                  static_cast<int32_t>(peaks.shape[1]),
                  plan.buffer("pixels").bytes(),
                  plan.buffer("anomaly_map").bytes(),
                  peaks.bytes()};
    });
}

omniad_status omniad_run(omniad_runtime *runtime, const uint8_t *pixels, float *anomaly_map, float *pred_score) {
    return guarded([&] {
        expectGiven("runtime", runtime);
        expectGiven("pixels", pixels);
        expectGiven("anomaly_map", anomaly_map);
        expectGiven("pred_score", pred_score);
        runtime->fused.run(pixels, anomaly_map, pred_score);
    });
}

omniad_status omniad_run_frames(omniad_runtime *runtime, const omniad_frame *frames, int count, float *anomaly_map,
                                float *pred_score) {
    return guarded([&] {
        expectGiven("runtime", runtime);
        expectGiven("frames", frames);
        expectGiven("anomaly_map", anomaly_map);
        expectGiven("pred_score", pred_score);
        std::vector<omniad::Frame> given;
        for (int i = 0; i < count; ++i) {
            given.push_back({frames[i].bgr, frames[i].rows, frames[i].columns, frames[i].row_bytes});
        }
        runtime->fused.runFrames(given, anomaly_map, pred_score);
    });
}

omniad_status omniad_enqueue(omniad_runtime *runtime, void *stream, uint64_t pixels, uint64_t anomaly_map,
                             uint64_t peaks) {
    return guarded([&] {
        expectGiven("runtime", runtime);
        if (pixels == 0 || anomaly_map == 0 || peaks == 0) {
            throw inputError("pixels, anomaly_map, peaks: expected addresses on the GPU, got 0");
        }
        runtime->fused.enqueue(static_cast<CUstream_st *>(stream), pixels, anomaly_map, peaks);
    });
}

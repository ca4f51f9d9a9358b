// The C interface: no exception leaves it, and every failure has words.
#include "omniad.h"

#include <algorithm>
#include <cstdio>
#include <new>

#include "error.h"
#include "fused.h"
#include "self_test.h"

struct omniad_runtime {
    omniad_runtime(const omniad::Bundle &bundle, int device, const std::vector<int> &batches)
        : fused(bundle, device, batches),
          selfTest(bundle.has(omniad::kSELF_TEST) ? bundle.part(omniad::kSELF_TEST) : "") {}

    omniad::FusedRuntime fused;
    std::string selfTest;
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

template <typename Item>
std::vector<Item> listed(const char *name, const Item *items, int count) {
    expectGiven(name, items);
    return {items, items + std::max(count, 0)};
}

}  // namespace

const char *omniad_version(void) {
    return OMNIAD_VERSION;
}

int omniad_abi(void) {
    return OMNIAD_ABI;
}

const char *omniad_last_error(void) {
    return lastError;
}

omniad_status omniad_get_architecture(int device, int *architecture) {
    return guarded([&] {
        expectGiven("architecture", architecture);
        omniad::Driver driver;
        *architecture = omniad::architectureOf(driver, omniad::chooseDevice(driver, device));
    });
}

omniad_status omniad_open(const char *path, int device, const int *batches, int count, omniad_runtime **runtime) {
    return guarded([&] {
        expectGiven("runtime", runtime);
        *runtime = nullptr;
        expectGiven("path", path);
        *runtime = new omniad_runtime(omniad::Bundle(path), device, listed("batches", batches, count));
    });
}

omniad_status omniad_open_parts(const omniad_part *parts, int part_count, int device, const int *batches,
                                int count, omniad_runtime **runtime) {
    return guarded([&] {
        expectGiven("runtime", runtime);
        *runtime = nullptr;
        omniad::Parts given;
        for (const omniad_part &part : listed("parts", parts, part_count)) {
            expectGiven("name of a part", part.name);
            expectGiven("content of a part", part.content);
            given[part.name] = {static_cast<const char *>(part.content), part.bytes};
        }
        *runtime = new omniad_runtime(omniad::Bundle(given), device, listed("batches", batches, count));
    });
}

omniad_status omniad_close(omniad_runtime *runtime) {
    return guarded([&] { delete runtime; });
}

omniad_status omniad_self_test(omniad_runtime *runtime) {
    return guarded([&] {
        expectGiven("runtime", runtime);
        if (runtime->selfTest.empty()) {
            throw omniad::bundleError("the bundle has no ", omniad::kSELF_TEST, "; export it again");
        }
        omniad::checkSelfTest(runtime->fused, runtime->selfTest);
    });
}

omniad_status omniad_get_info(const omniad_runtime *runtime, omniad_info *info) {
    return guarded([&] {
        expectGiven("runtime", runtime);
        expectGiven("info", info);
        const omniad::FusedRuntime &fused = runtime->fused;
        const omniad::Plan &plan = fused.plan();
        auto imageBytes = [&](const char *name) { return plan.buffer(name).bytes() / plan.batch; };
        *info = {fused.device(),
                 plan.height,
                 plan.width,
                 static_cast<int32_t>(plan.buffer("peaks").shape[1]),
                 static_cast<int32_t>(plan.buffer("embedding").shape[1]),
                 imageBytes("pixels"),
                 imageBytes("anomaly_map"),
                 imageBytes("peaks"),
                 fused.stream()};
    });
}

omniad_status omniad_run(omniad_runtime *runtime, int images, const uint8_t *pixels, float *anomaly_map,
                         float *pred_score, float *embedding) {
    return guarded([&] {
        expectGiven("runtime", runtime);
        expectGiven("pixels", pixels);
        expectGiven("anomaly_map", anomaly_map);
        expectGiven("pred_score", pred_score);
        runtime->fused.run(images, pixels, {anomaly_map, pred_score, embedding});
    });
}

omniad_status omniad_run_frames(omniad_runtime *runtime, const omniad_frame *frames, int count, float *anomaly_map,
                                float *pred_score, float *embedding, double *prepare_ms) {
    return guarded([&] {
        expectGiven("runtime", runtime);
        expectGiven("anomaly_map", anomaly_map);
        expectGiven("pred_score", pred_score);
        std::vector<omniad::Frame> given;
        for (const omniad_frame &frame : listed("frames", frames, count)) {
            if (frame.place < OMNIAD_HOST || frame.place > OMNIAD_GPU_AFTER_ALL) {
                throw inputError("frame: expected a place of omniad_place, got ", static_cast<int>(frame.place));
            }
            given.push_back({frame.bgr, frame.rows, frame.columns, frame.row_bytes,
                             static_cast<omniad::Place>(frame.place), static_cast<CUstream_st *>(frame.stream)});
        }
        runtime->fused.runFrames(given, {anomaly_map, pred_score, embedding}, prepare_ms);
    });
}

omniad_status omniad_enqueue(omniad_runtime *runtime, void *stream, int images, uint64_t pixels,
                             uint64_t anomaly_map, uint64_t peaks) {
    return guarded([&] {
        expectGiven("runtime", runtime);
        if (pixels == 0 || anomaly_map == 0 || peaks == 0) {
            throw inputError("pixels, anomaly_map, peaks: expected addresses on the GPU, got 0");
        }
        runtime->fused.enqueue(static_cast<CUstream_st *>(stream), images, pixels, anomaly_map, peaks);
    });
}

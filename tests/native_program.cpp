// What tests/test_native_runtime.py runs: the C interface, a word of the command line at a time.
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "omniad.h"

namespace {

using Bytes = std::vector<char>;

Bytes read(const char *path) {
    std::ifstream file(path, std::ios::binary);
    return Bytes(std::istreambuf_iterator<char>(file), {});
}

template <typename Function>
Function standIn(const char *name) {
    static void *library = dlopen("libcuda.so.1", RTLD_NOW);
    return reinterpret_cast<Function>(library == nullptr ? nullptr : dlsym(library, name));
}

// The status, and the words if there are some.
int say(omniad_status status) {
    std::printf("%d %s\n", status, status == OMNIAD_OK ? "" : omniad_last_error());
    return status;
}

struct Outputs {
    Outputs(omniad_runtime *runtime, int images) {
        omniad_get_info(runtime, &info);
        map.resize(images * info.anomaly_map_bytes / sizeof(float));
        score.resize(images);
        embedding.resize(images * info.embedding);
    }
    void append(const char *path) const {
        std::ofstream file(path, std::ios::binary | std::ios::app);
        file.write(reinterpret_cast<const char *>(map.data()), map.size() * sizeof(float));
        file.write(reinterpret_cast<const char *>(score.data()), score.size() * sizeof(float));
        file.write(reinterpret_cast<const char *>(embedding.data()), embedding.size() * sizeof(float));
    }
    omniad_info info;
    std::vector<float> map, score, embedding;
};

// run BUNDLE BATCH PIXELS OUT
int run(char **words) {
    omniad_runtime *runtime;
    int batch = std::atoi(words[1]);
    if (say(omniad_open(words[0], 0, &batch, 1, &runtime))) {
        return 1;
    }
    Outputs outputs(runtime, batch);
    Bytes pixels = read(words[2]);
    auto given = reinterpret_cast<const uint8_t *>(pixels.data());
    say(omniad_run(runtime, batch, given, outputs.map.data(), outputs.score.data(), outputs.embedding.data()));
    outputs.append(words[3]);
    return say(omniad_close(runtime));
}

// selftest BUNDLE BATCH...
int selfTest(int count, char **words) {
    omniad_runtime *runtime;
    std::vector<int> batches;
    for (int i = 1; i < count; ++i) {
        batches.push_back(std::atoi(words[i]));
    }
    if (say(omniad_open(words[0], 0, batches.data(), count - 1, &runtime))) {
        return 1;
    }
    say(omniad_self_test(runtime));
    return say(omniad_close(runtime));
}

// frames BUNDLE BATCH OUT FILE PADDING (ROWS COLUMNS)...: frames with PADDING bytes behind each row
int frames(int count, char **words) {
    omniad_runtime *runtime;
    int batch = std::atoi(words[1]);
    if (say(omniad_open(words[0], 0, &batch, 1, &runtime))) {
        return 1;
    }
    Outputs outputs(runtime, batch);
    Bytes file = read(words[3]);
    auto next = reinterpret_cast<const uint8_t *>(file.data());
    std::vector<omniad_frame> given;
    for (int i = 5; i + 1 < count; i += 2) {
        int64_t rows = std::atoll(words[i]), columns = std::atoll(words[i + 1]);
        int64_t row_bytes = 3 * columns + std::atoll(words[4]);
        given.push_back({next, rows, columns, row_bytes, OMNIAD_HOST, nullptr});
        next += rows * row_bytes;
        if (static_cast<int>(given.size()) == batch) {
            float *map = outputs.map.data(), *score = outputs.score.data(), *embedding = outputs.embedding.data();
            say(omniad_run_frames(runtime, given.data(), batch, map, score, embedding, nullptr));
            outputs.append(words[2]);
            given.clear();
        }
    }
    return say(omniad_close(runtime));
}

// Memory and streams of the driver's, as a caller of `omniad_enqueue` has them.
class Caller {
public:
    Caller(const omniad_info &info, int images) : images(images) {
        standIn<int (*)(void *)>("cuCtxPushCurrent_v2")(reinterpret_cast<void *>(77));
        for (size_t bytes : {info.pixels_bytes, info.anomaly_map_bytes, info.peaks_bytes}) {
            standIn<int (*)(uint64_t *, size_t)>("cuMemAlloc_v2")(&memory[made++], images * bytes);
        }
        for (void *&stream : streams) {
            standIn<int (*)(void **, unsigned)>("cuStreamCreate")(&stream, 1);
        }
    }
    Caller(const Caller &) = delete;
    Caller &operator=(const Caller &) = delete;
    ~Caller() {
        for (void *stream : streams) {
            standIn<int (*)(void *)>("cuStreamDestroy_v2")(stream);
        }
        for (uint64_t address : memory) {
            standIn<int (*)(uint64_t)>("cuMemFree_v2")(address);
        }
        void *popped;
        standIn<int (*)(void **)>("cuCtxPopCurrent_v2")(&popped);
    }
    void synchronize(int stream) { standIn<int (*)(void *)>("cuStreamSynchronize")(streams[stream]); }
    omniad_status enqueue(omniad_runtime *runtime, int stream) {
        return omniad_enqueue(runtime, streams[stream], images, memory[0], memory[1], memory[2]);
    }

    uint64_t memory[3] = {};
    void *streams[2] = {};

private:
    int images, made = 0;
};

// enqueue BUNDLE BATCH PIXELS OUT: on one stream, then on another, then captured, then from the host
int enqueue(char **words) {
    omniad_runtime *runtime;
    int batch = std::atoi(words[1]);
    if (say(omniad_open(words[0], 0, &batch, 1, &runtime))) {
        return 1;
    }
    Outputs outputs(runtime, batch);
    Bytes pixels = read(words[2]);
    {
        Caller caller(outputs.info, batch);
        std::memcpy(reinterpret_cast<void *>(caller.memory[0]), pixels.data(), pixels.size());
        say(caller.enqueue(runtime, 0));
        say(caller.enqueue(runtime, 1));
        caller.synchronize(1);
        std::memcpy(outputs.map.data(), reinterpret_cast<void *>(caller.memory[1]),
                    batch * outputs.info.anomaly_map_bytes);
        outputs.append(words[3]);
        standIn<int (*)(void *, int)>("cuStreamBeginCapture_v2")(caller.streams[0], 1);
        say(caller.enqueue(runtime, 0));
        void *graph = nullptr;
        standIn<int (*)(void *, void **)>("cuStreamEndCapture")(caller.streams[0], &graph);
        standIn<int (*)(void *)>("cuGraphDestroy")(graph);
        auto given = reinterpret_cast<const uint8_t *>(pixels.data());
        say(omniad_run(runtime, batch, given, outputs.map.data(), outputs.score.data(), outputs.embedding.data()));
    }
    return say(omniad_close(runtime));
}

// A life of a runtime, as far as it goes; the first failure's status.
omniad_status life(const char *bundle) {
    static uint8_t lent[1 << 16];
    standIn<void (*)(void *, size_t)>("stand_in_lend")(lent, sizeof(lent));
    omniad_runtime *runtime;
    constexpr int batches[] = {2, 1};
    omniad_status status = omniad_open(bundle, OMNIAD_CALLERS_DEVICE, batches, 2, &runtime);
    if (status != OMNIAD_OK) {
        return status;
    }
    Outputs outputs(runtime, 2);
    float *map = outputs.map.data(), *score = outputs.score.data();
    std::vector<uint8_t> pixels(2 * outputs.info.pixels_bytes, 1), picture(60 * 50 * 3, 2);
    omniad_frame frames[2] = {{picture.data(), 40, 50, 150, OMNIAD_HOST, nullptr},
                              {picture.data(), 60, 50, 150, OMNIAD_HOST, nullptr}};
    double prepare_ms[2];
    status = omniad_run(runtime, 2, pixels.data(), map, score, nullptr);
    if (status == OMNIAD_OK) {
        status = omniad_run_frames(runtime, frames, 2, map, score, nullptr, prepare_ms);
    }
    for (omniad_place place : {OMNIAD_GPU_AFTER_STREAM, OMNIAD_GPU_AFTER_ALL}) {
        omniad_frame frame = {lent, 60, 50, 150, place, nullptr};
        if (status == OMNIAD_OK) {
            status = omniad_run_frames(runtime, &frame, 1, map, score, nullptr, nullptr);
        }
    }
    auto device = reinterpret_cast<uint64_t>(lent);
    for (int i = 0; i < 2 && status == OMNIAD_OK; ++i) {
        status = omniad_enqueue(runtime, nullptr, 2, device, device, device);
    }
    omniad_close(runtime);
    return status;
}

// faults BUNDLE STATUS [once]: the driver fails at each call in turn, or at the first of each function
int faults(int count, char **words) {
    auto fail = standIn<void (*)(int, int)>("stand_in_fail");
    auto name = standIn<const char *(*)(int)>("stand_in_name");
    auto alive = standIn<int (*)()>("stand_in_alive");
    std::string seen;
    for (int at = 1; at < 100000; ++at) {
        fail(0, 0);
        if (count > 2) {
            life(words[0]);
            while (*name(at) != '\0' && seen.find(name(at)) != seen.npos) {
                at += 1;
            }
            seen += name(at);
        }
        fail(at, std::atoi(words[1]));
        int before = alive();
        omniad_status status = life(words[0]);
        if (*name(at) == '\0') {
            return 0;
        }
        const char *said = status == OMNIAD_OK ? "" : omniad_last_error();
        std::printf("%d %s %d %s\n", alive() - before, name(at), status, said);
    }
    return 1;
}

// misuse BUNDLE: what the header does not allow
int misuse(char **words) {
    omniad_runtime *runtime = nullptr;
    omniad_info info;
    constexpr int batches[] = {1, 3, 0, 65};
    say(omniad_open(nullptr, 0, batches, 1, &runtime));
    say(omniad_open(words[0], 0, batches, 1, nullptr));
    say(omniad_open(words[0], 0, nullptr, 1, &runtime));
    say(omniad_open(words[0], 0, batches, 0, &runtime));
    say(omniad_open(words[0], 0, batches, 3, &runtime));
    say(omniad_open(words[0], 0, batches + 3, 1, &runtime));
    say(omniad_open(words[0], 7, batches, 1, &runtime));
    say(omniad_open(words[0], -2, batches, 1, &runtime));
    omniad_part part = {"weights.onnx", nullptr, 0};
    say(omniad_open_parts(&part, 1, 0, batches, 1, &runtime));
    part.content = "";
    say(omniad_open_parts(&part, 1, 0, batches, 1, &runtime));
    say(omniad_get_architecture(7, nullptr));
    say(omniad_close(nullptr));
    say(omniad_get_info(nullptr, &info));
    say(omniad_self_test(nullptr));
    say(omniad_open(words[0], 0, batches, 2, &runtime));
    Outputs outputs(runtime, 1);
    uint8_t pixel[3] = {};
    float *map = outputs.map.data(), *score = outputs.score.data();
    say(omniad_run(runtime, 1, nullptr, map, score, nullptr));
    say(omniad_run(runtime, 1, pixel, map, nullptr, nullptr));
    say(omniad_run(runtime, 2, pixel, map, score, nullptr));
    say(omniad_enqueue(runtime, nullptr, 1, 0, 1, 1));
    say(omniad_enqueue(runtime, nullptr, -1, 1, 1, 1));
    auto run = [&](const uint8_t *bgr, int64_t rows, int64_t columns, int64_t row_bytes, int place) {
        omniad_frame frame = {bgr, rows, columns, row_bytes, static_cast<omniad_place>(place), nullptr};
        say(omniad_run_frames(runtime, &frame, 1, map, score, nullptr, nullptr));
    };
    run(nullptr, 1, 1, 3, OMNIAD_HOST);
    run(pixel, 0, 1, 3, OMNIAD_HOST);
    run(pixel, 1, 1, 2, OMNIAD_HOST);
    run(pixel, 1 << 20, 1 << 20, 3 << 20, OMNIAD_HOST);
    run(pixel, 1, 1 << 24, 3 << 24, OMNIAD_HOST);
    run(pixel, 1, INT64_MAX, 3, OMNIAD_HOST);
    run(pixel, 1, 1, 4, OMNIAD_GPU);
    run(pixel, 1, 1, 3, 4);
    omniad_frame frame = {pixel, 1, 1, 3, OMNIAD_HOST, nullptr};
    say(omniad_run_frames(runtime, &frame, 0, map, score, nullptr, nullptr));
    say(omniad_run_frames(runtime, &frame, 1, map, score, nullptr, nullptr));
    return say(omniad_close(runtime));
}

}  // namespace

int main(int count, char **words) {
    std::string verb = count > 1 ? words[1] : "";
    words += 2, count -= 2;
    if (verb == "version") {
        std::puts(omniad_version());
    } else if (verb == "layout") {
        std::printf("%zu %zu %zu\n", sizeof(omniad_part), sizeof(omniad_info), sizeof(omniad_frame));
    } else if (verb == "open") {
        for (int i = 0; i < count; ++i) {
            omniad_runtime *runtime;
            int batch = 1;
            say(omniad_open(words[i], 0, &batch, 1, &runtime));
            omniad_close(runtime);
        }
    } else if (verb == "run") {
        return run(words);
    } else if (verb == "selftest") {
        return selfTest(count, words);
    } else if (verb == "frames") {
        return frames(count, words);
    } else if (verb == "enqueue") {
        return enqueue(words);
    } else if (verb == "faults") {
        return faults(count, words);
    } else if (verb == "misuse") {
        return misuse(words);
    } else {
        return 2;
    }
    return 0;
}

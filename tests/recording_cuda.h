// The state behind tests/recording_cuda.cpp, a stand-in for libcuda.so.1: it records every call, with host memory
// behind the addresses and failures on demand.
//
// OMNIAD_TRACE: file that gets a JSON object for each call; OMNIAD_DUMP: file that gets the first allocation's
// bytes when a graph is uploaded; OMNIAD_ARCH: like 90. Streams are as lazy as the real ones may be: what is
// queued happens when somebody synchronises. "Machine code" is a flat JSON object: "parameters" with p for a
// pointer and i for an int32; "native", what the kernel does: see `execute`.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "cuda_api.h"

using namespace omniad;

namespace {

constexpr int kOUT_OF_MEMORY = 2, kINVALID_DEVICE = 101, kINVALID_CONTEXT = 201, kCAPTURE_UNSUPPORTED = 900;
constexpr uint64_t kPRIMARY = 77;

struct Function {
    std::string parameters, native;
};

using Work = std::function<void()>;

struct State {
    std::FILE *trace = nullptr;
    int calls = 0, failAt = 0, failWith = 0, delayMs = 0;
    int references = 0;  // of the primary context
    uint64_t next = 0x1000;
    std::vector<std::string> names;
    std::map<uint64_t, std::string> alive;
    std::map<uint64_t, size_t> device;  // address -> bytes
    std::map<uint64_t, Function> functions;
    std::map<uint64_t, std::vector<Work>> queues, graphs;
    std::map<uint64_t, std::function<void()>> events;
    uint64_t capturing = 0;
    std::vector<Work> captured;
    std::string taken;
};

State &state() {
    static State made;
    return made;
}

thread_local std::vector<uint64_t> contexts;

[[noreturn]] void refuse(const char *why) {
    std::fprintf(stderr, "stand-in for libcuda: %s\n", why);
    std::abort();
}

// Adds to the line of the call; its "}" is left to the reader.
void note(const char *format, ...) {
    if (std::FILE *trace = state().trace) {
        va_list arguments;
        va_start(arguments, format);
        std::vfprintf(trace, format, arguments);
        va_end(arguments);
        std::fflush(trace);
    }
}

// 0, or the status that the call is to return at once; `late` gets that of a call that gives back all the same.
int entered(const char *name, bool context = true, bool capturable = false, int *late = nullptr) {
    State &s = state();
    s.calls += 1;
    s.names.push_back(name);
    if (const char *path = std::getenv("OMNIAD_TRACE"); path != nullptr && s.trace == nullptr) {
        s.trace = std::fopen(path, "w");
    }
    note("\n{\"call\": \"%s\"", name);
    if (s.calls == s.failAt) {
        if (std::string(name) == "cuStreamEndCapture") {
            s.capturing = 0;
            s.captured.clear();
        }
        if (late == nullptr) {
            return s.failWith;
        }
        *late = s.failWith;
    }
    if (context && contexts.empty()) {
        return kINVALID_CONTEXT;
    }
    return s.capturing != 0 && !capturable ? kCAPTURE_UNSUPPORTED : 0;
}

#define ENTER(...)                           \
    if (int status = entered(__VA_ARGS__)) { \
        return status;                       \
    }

uint64_t number(const void *handle) {
    return reinterpret_cast<uint64_t>(handle);
}

template <typename Handle>
void make(Handle *handle, const char *kind) {
    uint64_t made = state().next++;
    state().alive[made] = kind;
    *handle = reinterpret_cast<Handle>(made);
}

void drop(uint64_t handle, const char *kind) {
    auto found = state().alive.find(handle);
    if (found == state().alive.end() || found->second != kind) {
        refuse("freed twice, or what is something else");
    }
    state().alive.erase(found);
}

uint64_t allocate(size_t bytes, const char *kind) {
    size_t rounded = (bytes + 255) / 256 * 256;
    void *memory = std::aligned_alloc(256, rounded);
    std::memset(memory, 0xFF, rounded);  // NaN: nobody may count on zeros
    state().alive[number(memory)] = kind;
    return number(memory);
}

uint8_t *inside(uint64_t address, size_t bytes) {
    for (auto [start, size] : state().device) {
        if (start <= address && address + bytes <= start + size) {
            return reinterpret_cast<uint8_t *>(address);
        }
    }
    refuse("an address outside of what was allocated");
}

void queue(CudaStream stream, Work work) {
    State &s = state();
    if (s.capturing != 0 && s.capturing == number(stream)) {
        s.captured.push_back(std::move(work));
    } else {
        s.queues[number(stream)].push_back(std::move(work));
    }
}

void drain(uint64_t stream) {
    std::vector<Work> works = std::move(state().queues[stream]);
    state().queues[stream].clear();
    for (Work &work : works) {
        work();
    }
}

void await(uint64_t event) {
    if (auto recorded = state().events.find(event); recorded != state().events.end()) {
        recorded->second();
    }
}

std::string field(const char *object, const char *key) {
    std::string quoted = std::string("\"") + key + "\": \"";
    const char *found = std::strstr(object, quoted.c_str());
    if (found == nullptr) {
        return "";
    }
    found += quoted.size();
    return std::string(found, std::strchr(found, '"'));
}

// take:P:N  keeps N bytes of what parameter P points to    give:P:N  writes N of them, again from the first if
// needed floats:P:N  writes N of them as fp32                     dump:P:N  shows N bytes in the trace of N =
// frame: as many as the frame has, by the four numbers that parameter 1 points to; of N/G: N for every G programs
// of the launch
void execute(const std::string &native, const std::vector<uint64_t> &values, unsigned int programs) {
    State &s = state();
    for (size_t at = 0; at < native.size();) {
        size_t end = std::min(native.find(';', at), native.size());
        std::string action = native.substr(at, end - at);
        at = end + 1;
        size_t colon = action.find(':'), second = action.find(':', colon + 1);
        uint64_t place = values.at(std::stoul(action.substr(colon + 1)));
        std::string verb = action.substr(0, colon), size = action.substr(second + 1);
        auto geometry = reinterpret_cast<const int32_t *>(size == "frame" ? inside(values.at(1), 16) : nullptr);
        size_t count = geometry != nullptr ? size_t{3} * geometry[0] * geometry[1] : std::stoul(size);
        if (size_t slash = size.find('/'); slash != size.npos) {
            count = count * programs / std::stoul(size.substr(slash + 1));
        }
        uint8_t *memory = inside(place, verb == "floats" ? 4 * count : count);
        if (verb == "take") {
            s.taken.assign(memory, memory + count);
        } else if (verb == "dump") {
            std::string hex;
            for (size_t i = 0; i < count; ++i) {
                hex += "0123456789abcdef"[memory[i] >> 4];
                hex += "0123456789abcdef"[memory[i] & 15];
            }
            note("\n{\"call\": \"dump\", \"parameter\": %s, \"hex\": \"%s\"",
                 action.substr(colon + 1, second - colon - 1).c_str(), hex.c_str());
        } else {
            for (size_t i = 0; i < count && !s.taken.empty(); ++i) {
                auto byte = static_cast<uint8_t>(s.taken[i % s.taken.size()]);
                float value = byte;
                verb == "floats" ? std::memcpy(memory + 4 * i, &value, 4) : std::memcpy(memory + i, &byte, 1);
            }
        }
    }
}

}  // namespace

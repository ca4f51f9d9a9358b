// What runs on the GPU, as kernels/plan.py has it: launches in order over one memory arena.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace omniad {

enum class BufferKind { kWEIGHT, kINPUT, kOUTPUT, kSCRATCH, kTABLE, kFRAME };

struct Buffer {
    std::string name;
    std::vector<int64_t> shape;
    std::string dtype;  // of NumPy
    BufferKind kind;
    std::vector<std::string> recipe;
    uint64_t offset = 0;  // bytes from the arena's start

    uint64_t elements() const;
    uint64_t bytes() const;
};

constexpr int kNO_BUFFER = -1;

struct Call {
    std::string op;
    std::vector<int> buffers;            // indices of the plan's, or kNO_BUFFER
    std::vector<std::string> constants;  // as the plan's file writes them
    int64_t programs;
    int numWarps;
};

struct Launch {
    std::vector<Call> calls;  // one or two

    int64_t programs() const;
    int numWarps() const;
};

struct Plan {
    int batch = 1, height = 0, width = 0;
    std::vector<Buffer> buffers;
    std::vector<Launch> launches;
    std::optional<Launch> front;  // a frame of any size to one image of "pixels"

    uint64_t arenaBytes() const;
    // Throws a bundle error if there is none of that name.
    int find(std::string_view name) const;
    const Buffer &buffer(std::string_view name) const { return buffers[find(name)]; }
    // The front, if there is one, and those of the network.
    std::vector<const Launch *> allLaunches() const;
    // Under which its kernel is stored.
    std::string kernelKey(const Launch &launch) const;
};

constexpr int kMAX_BATCH = 64;

// Every name, number and size in it is checked. Where buffers lie is not taken from the file: see `forBatch`.
Plan parsePlan(std::string_view file);
// The same of some of a network's layers, for one image: one input (1, height width, channels), any outputs.
Plan parseSubPlan(std::string_view file);

uint64_t aligned(uint64_t bytes);

}  // namespace omniad

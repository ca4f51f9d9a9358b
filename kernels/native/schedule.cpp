#include "schedule.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "error.h"

namespace omniad {
namespace {

// The launches at which a buffer is needed.
struct Span {
    size_t first = std::numeric_limits<size_t>::max(), last = 0;

    bool meets(const Span &other) const { return first <= other.last && other.first <= last; }
};

std::vector<Span> spans(const Plan &plan) {
    std::vector<Span> made(plan.buffers.size());
    for (size_t i = 0; i < plan.launches.size(); ++i) {
        for (const Call &call : plan.launches[i].calls) {
            for (int index : call.buffers) {
                if (index != kNO_BUFFER) {
                    made[index] = {std::min(made[index].first, i), i};
                }
            }
        }
    }
    return made;
}

// Scratch buffers share memory where they are not needed at the same launch; nothing else does.
void place(Plan &plan) {
    uint64_t end = 0;
    std::vector<int> scratch, placed;
    for (size_t i = 0; i < plan.buffers.size(); ++i) {
        if (plan.buffers[i].kind == BufferKind::kSCRATCH) {
            scratch.push_back(static_cast<int>(i));
        } else {
            plan.buffers[i].offset = end;
            end += aligned(plan.buffers[i].bytes());
        }
    }
    std::vector<Span> needed = spans(plan);
    std::stable_sort(scratch.begin(), scratch.end(), [&](int a, int b) {
        return plan.buffers[a].bytes() > plan.buffers[b].bytes();  // large ones first leaves smaller gaps
    });
    for (int index : scratch) {
        Buffer &buffer = plan.buffers[index];
        if (needed[index].first > needed[index].last) {
            throw bundleError("buffer ", shown(buffer.name), ": expected a launch that uses it, got none");
        }
        uint64_t size = aligned(buffer.bytes()), offset = end;
        for (int other : placed) {  // in the order of their offsets
            if (!needed[other].meets(needed[index])) {
                continue;
            }
            const Buffer &there = plan.buffers[other];
            if (offset + size <= there.offset) {
                break;
            }
            offset = std::max(offset, there.offset + aligned(there.bytes()));
        }
        buffer.offset = offset;
        auto behind = std::upper_bound(placed.begin(), placed.end(), offset,
                                       [&](uint64_t at, int other) { return at < plan.buffers[other].offset; });
        placed.insert(behind, index);
    }
}

}  // namespace

Plan forBatch(Plan plan, int batch) {
    for (Buffer &buffer : plan.buffers) {
        bool perImage = buffer.kind == BufferKind::kINPUT || buffer.kind == BufferKind::kOUTPUT;
        if (perImage || buffer.kind == BufferKind::kSCRATCH) {
            buffer.shape[0] = batch;
            if (buffer.elements() > INT32_MAX) {  // kernels count them in 32 bits
                throw inputError("images: expected fewer than ", batch, ", so that each buffer has fewer than 2^31 ",
                                 "elements; ", buffer.name, " would have ", buffer.elements());
            }
        }
    }
    for (Launch &launch : plan.launches) {
        for (Call &call : launch.calls) {
            call.programs = call.programs / plan.batch * batch;
        }
        if (launch.programs() < 1 || launch.programs() > INT32_MAX) {
            throw bundleError("expected 1 to 2^31 - 1 programs a launch, got ", launch.programs());
        }
    }
    plan.batch = batch;
    place(plan);
    return plan;
}

}  // namespace omniad

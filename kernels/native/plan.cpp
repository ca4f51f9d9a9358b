#include "plan.h"

#include <algorithm>
#include <unordered_map>

#include "error.h"
#include "json.h"
#include "resize_tables.h"
#include "sha256.h"

namespace omniad {
namespace {

constexpr uint64_t kALIGN_BYTES = 256;  // as in kernels/plan.py: Triton may then use its widest loads
constexpr int64_t kMAX_AXIS = INT32_MAX, kMAX_PROGRAMS = INT32_MAX;
constexpr uint64_t kMAX_ELEMENTS = uint64_t{1} << 36;
constexpr size_t kMAX_PLAN_BYTES = size_t{16} << 20, kMAX_AXES = 8, kMAX_BUFFERS_OF_A_CALL = 64;

using Names = std::unordered_map<std::string_view, int>;

uint64_t itemBytes(std::string_view dtype) {
    constexpr std::pair<std::string_view, uint64_t> kSIZES[] = {
        {"float16", 2}, {"float32", 4}, {"uint8", 1}, {"int32", 4}};
    for (auto [name, size] : kSIZES) {
        if (name == dtype) {
            return size;
        }
    }
    throw bundleError("expected a dtype of float16, float32, uint8, int32, got ", shown(dtype));
}

BufferKind kindOf(std::string_view kind) {
    constexpr std::string_view kKINDS[] = {"weight", "input", "output", "scratch", "table", "frame"};
    auto found = std::find(std::begin(kKINDS), std::end(kKINDS), kind);
    if (found == std::end(kKINDS)) {
        throw bundleError("expected a known kind of buffer, got ", shown(kind));
    }
    return static_cast<BufferKind>(found - std::begin(kKINDS));
}

Buffer parseBuffer(const std::string &name, const Json &entry) {
    entry.expectKeys({"shape", "dtype", "kind", "offset_bytes", "recipe"});
    Buffer made{name, {}, entry.at("dtype").string(), kindOf(entry.at("kind").string()), {}};
    for (const Json &axis : entry.at("shape").list()) {
        made.shape.push_back(axis.integer(0, kMAX_AXIS));
    }
    for (const Json &word : entry.at("recipe").list()) {
        made.recipe.push_back(word.string());
    }
    if (made.shape.empty() || made.shape.size() > kMAX_AXES) {
        throw bundleError("expected a shape of 1 to ", kMAX_AXES, " axes, got ", made.shape.size());
    }
    bool empty = made.bytes() == 0;  // refuses what is too large
    if (empty != (made.kind == BufferKind::kFRAME)) {
        throw bundleError(
            "expected bytes in every buffer but the frame's, of which only the launch knows the size");
    }
    return made;
}

Call parseCall(const Json &entry, const Names &names) {
    entry.expectKeys({"op", "buffers", "constants", "programs", "num_warps"});
    Call made{entry.at("op").string(), {}, {}, entry.at("programs").integer(1, kMAX_PROGRAMS), 0};
    made.numWarps = static_cast<int>(entry.at("num_warps").integer(1, 32));
    if (made.op.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_.") != std::string::npos) {
        throw bundleError("expected an op like 'file.function', got ", shown(made.op));
    }
    for (const Json &buffer : entry.at("buffers").list()) {
        auto found = buffer.isNull() ? names.end() : names.find(buffer.string());
        if (!buffer.isNull() && found == names.end()) {
            throw bundleError("call of ", made.op, ": expected a buffer of the plan, got ", shown(buffer.text));
        }
        made.buffers.push_back(buffer.isNull() ? kNO_BUFFER : found->second);
    }
    if (made.buffers.size() > kMAX_BUFFERS_OF_A_CALL) {
        throw bundleError("call of ", made.op, ": expected at most ", kMAX_BUFFERS_OF_A_CALL, " buffers");
    }
    for (const Json &constant : entry.at("constants").list()) {
        if (constant.kind != Json::Kind::kNUMBER && constant.kind != Json::Kind::kBOOL) {
            throw bundleError("call of ", made.op, ": expected numbers as constants, got ", shown(constant.text));
        }
        made.constants.push_back(constant.text);
    }
    return made;
}

Launch parseLaunch(const Json &entry, const Names &names) {
    entry.expectKeys({"calls"});
    Launch made;
    for (const Json &call : entry.at("calls").list()) {
        made.calls.push_back(parseCall(call, names));
    }
    if (made.calls.empty() || made.calls.size() > 2 || made.programs() > kMAX_PROGRAMS) {
        throw bundleError("expected launches of one or two calls, got one of ", made.calls.size());
    }
    return made;
}

bool uses(const Plan &plan, const Launch &launch, BufferKind kind) {
    for (const Call &call : launch.calls) {
        for (int index : call.buffers) {
            if (index != kNO_BUFFER && plan.buffers[index].kind == kind) {
                return true;
            }
        }
    }
    return false;
}

std::string sides(const std::vector<int64_t> &shape) {
    std::string made = "(";
    for (int64_t axis : shape) {
        made += (made.size() > 1 ? ", " : "") + std::to_string(axis);
    }
    return made + ")";
}

void expectArray(const Plan &plan, std::string_view name, std::string_view dtype,
                 const std::vector<int64_t> &shape) {
    const Buffer &buffer = plan.buffer(name);
    if (buffer.dtype != dtype || buffer.shape != shape) {
        throw bundleError("buffer ", name, ": expected ", dtype, " ", sides(shape), ", got ", buffer.dtype, " ",
                          sides(buffer.shape));
    }
}

// What the executor writes and reads itself is what it takes it for.
void checkPlan(const Plan &plan) {
    expectArray(plan, "pixels", "uint8", {plan.batch, plan.height, plan.width, 3});
    expectArray(plan, "anomaly_map", "float32", {plan.batch, plan.height, plan.width});
    for (const char *name : {"peaks", "embedding"}) {
        const Buffer &buffer = plan.buffer(name);
        if (buffer.dtype != "float32" || buffer.shape.size() != 2 || buffer.shape[0] != plan.batch) {
            throw bundleError("buffer ", name, ": expected float32 (batch, values), got ", buffer.dtype, " ",
                              sides(buffer.shape));
        }
    }
    for (auto [name, kind] :
         {std::pair("pixels", BufferKind::kINPUT), std::pair("anomaly_map", BufferKind::kOUTPUT),
          std::pair("peaks", BufferKind::kOUTPUT), std::pair("embedding", BufferKind::kOUTPUT)}) {
        if (plan.buffer(name).kind != kind) {
            throw bundleError("buffer ", name, ": expected ",
                              kind == BufferKind::kINPUT ? "an input" : "an output", ", got one of another kind");
        }
    }
    for (const Buffer &buffer : plan.buffers) {
        bool known = buffer.name == "pixels" || buffer.name == "anomaly_map" || buffer.name == "peaks" ||
                     buffer.name == "embedding";
        if ((buffer.kind == BufferKind::kINPUT || buffer.kind == BufferKind::kOUTPUT) && !known) {
            throw bundleError("buffer ", shown(buffer.name),
                              ": expected pixels, anomaly_map, peaks and embedding as the only input and outputs");
        }
    }
    for (const Launch &launch : plan.launches) {
        if (uses(plan, launch, BufferKind::kFRAME) || uses(plan, launch, BufferKind::kTABLE)) {
            throw bundleError("expected frames and tables in the front alone, got them in the network");
        }
    }
}

void checkFront(const Plan &plan) {
    int64_t height = plan.height, width = plan.width;
    expectArray(plan, kGEOMETRY, "int32", {4});
    expectArray(plan, kROW_START, "int32", {height});
    expectArray(plan, kROW_WEIGHT, "float32", {height, kMAX_TAPS});
    expectArray(plan, kCOLUMN_START, "int32", {width});
    expectArray(plan, kCOLUMN_WEIGHT, "float32", {width, kMAX_TAPS});
    for (const Buffer &buffer : plan.buffers) {
        bool named = std::find(std::begin(kTABLES), std::end(kTABLES), buffer.name) != std::end(kTABLES);
        if (named != (buffer.kind == BufferKind::kTABLE)) {
            throw bundleError("buffer ", shown(buffer.name),
                              ": expected the resize kernel's tables and no others");
        }
    }
    if (plan.buffer("frame").kind != BufferKind::kFRAME || plan.front->calls.size() != 1) {
        throw bundleError("expected a front of one call that reads a frame");
    }
    for (int index : plan.front->calls[0].buffers) {
        bool known = index != kNO_BUFFER && plan.buffers[index].kind != BufferKind::kSCRATCH;
        if (!known) {
            throw bundleError("expected a front that reads a frame and tables and writes pixels");
        }
    }
}

// Whose inputs and outputs are tensors of somebody else's.
void checkSubPlan(const Plan &plan) {
    int inputs = 0, outputs = 0;
    for (const Buffer &buffer : plan.buffers) {
        inputs += buffer.kind == BufferKind::kINPUT;
        outputs += buffer.kind == BufferKind::kOUTPUT;
        if (buffer.kind == BufferKind::kTABLE || buffer.kind == BufferKind::kFRAME) {
            throw bundleError("buffer ", shown(buffer.name), ": expected no tables and frames");
        }
        if (buffer.dtype != "float16" && buffer.dtype != "float32") {
            throw bundleError("buffer ", shown(buffer.name), ": expected float16 or float32, got ", buffer.dtype);
        }
        if (buffer.kind != BufferKind::kWEIGHT && buffer.shape[0] != 1) {
            throw bundleError("buffer ", shown(buffer.name), ": expected one image, got ", buffer.shape[0]);
        }
        bool map = buffer.shape.size() == 3 && buffer.shape[1] == int64_t{plan.height} * plan.width;
        if (buffer.kind == BufferKind::kINPUT && !map) {
            throw bundleError("buffer ", shown(buffer.name), ": expected (1, ", plan.height, " * ", plan.width,
                              ", channels), got ", sides(buffer.shape));
        }
    }
    if (plan.batch != 1 || inputs != 1 || outputs == 0 || plan.launches.empty()) {
        throw bundleError("expected batch 1, one input, outputs and launches, got batch ", plan.batch, ", ",
                          inputs, " inputs, ", outputs, " outputs and ", plan.launches.size(), " launches");
    }
}

// A plan but for its front.
Plan parseNetwork(const Json &entry, Names &names) {
    entry.expectKeys({"batch", "height", "width", "buffers", "launches", "front"});
    Plan made;
    made.batch = static_cast<int>(entry.at("batch").integer(1, kMAX_BATCH));
    made.height = static_cast<int>(entry.at("height").integer(1, 4096));
    made.width = static_cast<int>(entry.at("width").integer(1, 4096));
    const Json &buffers = entry.at("buffers");
    for (size_t i = 0; i < buffers.object().size(); ++i) {
        made.buffers.push_back(parseBuffer(buffers.keys[i], buffers.items[i]));
        names.emplace(buffers.keys[i], static_cast<int>(i));
    }
    for (const Json &launch : entry.at("launches").list()) {
        made.launches.push_back(parseLaunch(launch, names));
    }
    return made;
}

Json parsePlanFile(std::string_view file) {
    if (file.size() > kMAX_PLAN_BYTES) {
        throw bundleError("expected at most ", kMAX_PLAN_BYTES, " bytes, got ", file.size());
    }
    return parseJson(file);
}

}  // namespace

uint64_t aligned(uint64_t bytes) {
    return (bytes + kALIGN_BYTES - 1) / kALIGN_BYTES * kALIGN_BYTES;
}

uint64_t Buffer::elements() const {
    uint64_t made = 1;
    for (int64_t axis : shape) {
        if (axis != 0 && made > kMAX_ELEMENTS / static_cast<uint64_t>(axis)) {
            throw bundleError("buffer ", shown(name), ": expected at most ", kMAX_ELEMENTS, " elements, got more");
        }
        made *= static_cast<uint64_t>(axis);
    }
    return made;
}

uint64_t Buffer::bytes() const {
    return elements() * itemBytes(dtype);
}

int64_t Launch::programs() const {
    int64_t made = 0;
    for (const Call &call : calls) {
        made += call.programs;
    }
    return made;
}

int Launch::numWarps() const {
    int made = 1;
    for (const Call &call : calls) {
        made = std::max(made, call.numWarps);
    }
    return made;
}

uint64_t Plan::arenaBytes() const {
    uint64_t end = 0;
    for (const Buffer &buffer : buffers) {
        end = std::max(end, buffer.offset + aligned(buffer.bytes()));
    }
    return end;
}

int Plan::find(std::string_view name) const {
    for (size_t i = 0; i < buffers.size(); ++i) {
        if (buffers[i].name == name) {
            return static_cast<int>(i);
        }
    }
    throw bundleError("expected a plan with a buffer ", name, ", got one without");
}

std::vector<const Launch *> Plan::allLaunches() const {
    std::vector<const Launch *> made;
    if (front) {
        made.push_back(&*front);
    }
    for (const Launch &launch : launches) {
        made.push_back(&launch);
    }
    return made;
}

// The digest of what Python's json.dumps writes of the same; numbers are as the plan's file, also written by it.
std::string Plan::kernelKey(const Launch &launch) const {
    std::string made = "[";
    for (const Call &call : launch.calls) {
        made += (made.size() > 1 ? ", [\"" : "[\"") + call.op + "\", [";
        const char *between = "";
        for (int index : call.buffers) {
            made += between + (index == kNO_BUFFER ? "null" : '"' + buffers[index].dtype + '"');
            between = ", ";
        }
        made += "], [";
        between = "";
        for (const std::string &constant : call.constants) {
            made += between + constant;
            between = ", ";
        }
        made += "], " + std::to_string(call.numWarps) + "]";
    }
    return sha256(made + "]").substr(0, 16);
}

Plan parsePlan(std::string_view file) {
    Json entry = parsePlanFile(file);
    Names names;
    Plan made = parseNetwork(entry, names);
    checkPlan(made);
    if (!entry.at("front").isNull()) {
        made.front = parseLaunch(entry.at("front"), names);
        checkFront(made);
    }
    return made;
}

Plan parseSubPlan(std::string_view file) {
    Json entry = parsePlanFile(file);
    Names names;
    Plan made = parseNetwork(entry, names);
    checkSubPlan(made);
    if (!entry.at("front").isNull()) {
        throw bundleError("front: expected null, got a launch");
    }
    return made;
}

}  // namespace omniad

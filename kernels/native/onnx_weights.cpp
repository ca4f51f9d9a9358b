#include "onnx_weights.h"

#include <cstring>

#include "error.h"
#include "number_formats.h"

namespace omniad {
namespace {

// Field numbers of onnx.proto3: of ModelProto, GraphProto and TensorProto.
constexpr uint64_t kGRAPH = 7, kINITIALIZER = 5, kDIMS = 1, kDATA_TYPE = 2, kNAME = 8, kRAW_DATA = 9;
constexpr uint64_t kFLOAT = 1, kFLOAT16 = 10;
constexpr int64_t kMAX_ELEMENTS = int64_t{1} << 31;
constexpr size_t kMAX_AXES = 8;

// A field of a protobuf message: a number, or the bytes of what is longer.
struct Field {
    uint64_t key;
    bool isNumber;
    uint64_t number;
    std::string_view bytes;
};

class Message {
public:
    explicit Message(std::string_view bytes) : mRest(bytes) {}

    bool ended() const { return mRest.empty(); }

    uint64_t varint() {
        uint64_t value = 0;
        for (int shift = 0; shift < 64 && !mRest.empty(); shift += 7) {
            auto byte = static_cast<unsigned char>(mRest.front());
            mRest.remove_prefix(1);
            value |= uint64_t{byte & 127u} << shift;
            if (byte < 128) {
                return value;
            }
        }
        throw bundleError("expected a number of at most 64 bits, got one that does not end");
    }

    Field next() {
        uint64_t key = varint(), wire = key & 7;
        if (wire == 0) {
            return {key >> 3, true, varint(), {}};
        }
        if (wire != 1 && wire != 2 && wire != 5) {
            throw bundleError("expected a field of a known wire type, got ", wire);
        }
        uint64_t size = wire == 2 ? varint() : wire == 1 ? 8 : 4;
        if (size > mRest.size()) {
            throw bundleError("expected a field of ", size, " bytes, ", mRest.size(), " are left");
        }
        Field field{key >> 3, false, 0, mRest.substr(0, size)};
        mRest.remove_prefix(size);
        return field;
    }

private:
    std::string_view mRest;
};

void addAxis(Tensor &tensor, uint64_t size) {
    if (size > kMAX_ELEMENTS || tensor.shape.size() == kMAX_AXES) {
        throw bundleError("expected an array of at most ", kMAX_AXES, " axes, got one more or an axis of ", size);
    }
    tensor.shape.push_back(static_cast<int64_t>(size));
}

void readField(Tensor &tensor, std::string &name, bool &typed, const Field &field) {
    if (field.key == kDIMS && field.isNumber) {
        addAxis(tensor, field.number);
    } else if (field.key == kDIMS) {
        for (Message sizes(field.bytes); !sizes.ended();) {
            addAxis(tensor, sizes.varint());
        }
    } else if (field.key == kDATA_TYPE) {
        if (!field.isNumber || (field.number != kFLOAT && field.number != kFLOAT16)) {
            throw bundleError("expected an array of fp16 or fp32, got ONNX type ", field.number);
        }
        tensor.half = field.number == kFLOAT16;
        typed = true;
    } else if (field.key == kNAME && !field.isNumber) {
        name = field.bytes;
    } else if (field.key == kRAW_DATA && !field.isNumber) {
        tensor.data = field.bytes;
    }
}

void readTensor(Tensors &tensors, std::string_view bytes) {
    Tensor tensor;
    std::string name;
    bool typed = false;
    for (Message message(bytes); !message.ended();) {
        readField(tensor, name, typed, message.next());
    }
    int64_t elements = tensor.size();
    if (!typed || tensor.data.size() != static_cast<size_t>(elements) * (tensor.half ? 2 : 4)) {
        throw bundleError("array ", shown(name), ": expected ", elements, " elements, got ", tensor.data.size(),
                          " bytes");
    }
    tensors.insert_or_assign(name, tensor);
}

}  // namespace

int64_t Tensor::size() const {
    int64_t made = 1;
    for (int64_t axis : shape) {
        if (axis != 0 && made > kMAX_ELEMENTS / axis) {
            throw bundleError("expected an array of at most ", kMAX_ELEMENTS, " elements, got a larger one");
        }
        made *= axis;
    }
    return made;
}

double Tensor::operator[](int64_t i) const {
    if (half) {
        uint16_t value;
        std::memcpy(&value, data.data() + 2 * i, sizeof(value));
        return fromHalf(value);
    }
    float value;
    std::memcpy(&value, data.data() + 4 * i, sizeof(value));
    return value;
}

Tensors readWeights(std::string_view file) {
    Tensors tensors;
    for (Message model(file); !model.ended();) {
        Field graph = model.next();
        if (graph.key != kGRAPH) {
            continue;
        }
        for (Message message(graph.bytes); !message.ended();) {
            if (Field field = message.next(); field.key == kINITIALIZER && !field.isNumber) {
                readTensor(tensors, field.bytes);
            }
        }
    }
    return tensors;
}

}  // namespace omniad

// Omni-blocks and decoders as nodes of a TensorRT engine: each runs a plan of ours, which it carries itself.
//
// One library for TensorRT 10.3 to 11.x. What it derives from and reads (IPluginV3 and its capabilities,
// creators, fields, descriptors, expressions) lies in memory alike in all of them. ILogger, ILoggerFinder and
// IPluginRegistry do not, and are not touched: words go to stderr, and REGISTER_TENSORRT_PLUGIN is not used. An
// error recorder does, but is given once and may be gone when it is needed. TensorRT itself reports every status
// that is not 0.
#include <NvInferRuntime.h>

#include <array>
#include <cstdio>
#include <new>

#include "error.h"
#include "plan_node.h"

namespace omniad {
namespace {

using namespace nvinfer1;

constexpr const char *kNAMESPACE = "omniad", *kVERSION = "1";
constexpr int32_t kFAILED = -1;
constexpr size_t kUNOBTAINABLE_BYTES = size_t{1} << 50;

struct FieldOf {
    const char *name;
    PluginFieldType type;
    std::string NodeFields::*value;
};

constexpr FieldOf kFIELDS[] = {{"plan", PluginFieldType::kCHAR, &NodeFields::plan},
                               {"arch", PluginFieldType::kCHAR, &NodeFields::arch},
                               {"kernel_index", PluginFieldType::kCHAR, &NodeFields::kernelIndex},
                               {"kernels", PluginFieldType::kINT8, &NodeFields::kernels}};

void say(const char *who, const char *words) noexcept {
    std::fprintf(stderr, "omniad: %s: %s\n", who, words);
}

// No exception reaches TensorRT.
template <typename Result, typename Work>
Result guarded(const char *who, Result failed, Work work) noexcept {
    try {
        return work();
    } catch (const std::bad_alloc &) {
        say(who, "the host has too little memory; end what else uses it");
    } catch (const std::exception &error) {
        say(who, error.what());
    } catch (...) {
        say(who, "an unknown exception; report this error");
    }
    return failed;
}

DataType typeOf(const Buffer &buffer) {
    return buffer.dtype == "float16" ? DataType::kHALF : DataType::kFLOAT;
}

void expectAxis(const Buffer &buffer, int axis, int64_t size) {
    bool batch = axis == 0 && buffer.kind != BufferKind::kWEIGHT;
    if (!batch && size != buffer.shape[axis]) {
        throw inputError("input ", shown(buffer.name), ": expected ", buffer.shape[axis], " along axis ", axis,
                         ", got ", size);
    }
}

void expectAxes(const Buffer &buffer, int32_t count) {
    if (count != static_cast<int32_t>(buffer.shape.size())) {
        throw inputError("input ", shown(buffer.name), ": expected ", buffer.shape.size(), " axes, got ", count);
    }
}

class PlanPlugin final : public IPluginV3,
                         public IPluginV3OneCore,
                         public IPluginV3OneBuild,
                         public IPluginV3OneRuntime {
public:
    PlanPlugin(const char *name, std::shared_ptr<const PlanNode> node) : mName(name), mNode(std::move(node)) {}

    // IPluginV3

    IPluginCapability *getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
        case PluginCapabilityType::kCORE:
            return static_cast<IPluginV3OneCore *>(this);
        case PluginCapabilityType::kBUILD:
            return static_cast<IPluginV3OneBuild *>(this);
        case PluginCapabilityType::kRUNTIME:
            return static_cast<IPluginV3OneRuntime *>(this);
        }
        return nullptr;
    }

    // Not attached to any context.
    IPluginV3 *clone() noexcept override {
        return guarded(mName, static_cast<IPluginV3 *>(nullptr), [&] { return new PlanPlugin(mName, mNode); });
    }

    // IPluginV3OneCore

    const AsciiChar *getPluginName() const noexcept override { return mName; }
    const AsciiChar *getPluginVersion() const noexcept override { return kVERSION; }
    const AsciiChar *getPluginNamespace() const noexcept override { return kNAMESPACE; }

    // IPluginV3OneBuild. There are no tactics to choose from: the exporter chose the kernels for the GPU.

    int32_t configurePlugin(const DynamicPluginTensorDesc *inputs, int32_t inputCount,
                            const DynamicPluginTensorDesc *, int32_t outputCount) noexcept override {
        return guarded(mName, kFAILED, [&] {
            expectCounts(inputCount, outputCount);
            mNode->scratchBytes(inputs[0].max.d[0]);  // refuses what is too many
            return 0;
        });
    }

    int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(mNode->outputs.size()); }

    int32_t getOutputDataTypes(DataType *types, int32_t outputCount, const DataType *,
                               int32_t inputCount) const noexcept override {
        return guarded(mName, kFAILED, [&] {
            expectCounts(inputCount, outputCount);
            for (int32_t i = 0; i < outputCount; ++i) {
                types[i] = typeOf(output(i));
            }
            return 0;
        });
    }

    int32_t getOutputShapes(const DimsExprs *inputs, int32_t inputCount, const DimsExprs *, int32_t,
                            DimsExprs *outputs, int32_t outputCount, IExprBuilder &builder) noexcept override {
        return guarded(mName, kFAILED, [&] {
            expectCounts(inputCount, outputCount);
            for (int32_t i = 0; i < inputCount; ++i) {
                expectAxes(input(i), inputs[i].nbDims);
                for (int32_t axis = 0; axis < inputs[i].nbDims; ++axis) {
                    if (inputs[i].d[axis]->isConstant()) {  // what is not is checked by onShapeChange
                        expectAxis(input(i), axis, inputs[i].d[axis]->getConstantValue());
                    }
                }
            }
            for (int32_t i = 0; i < outputCount; ++i) {
                outputs[i].nbDims = static_cast<int32_t>(output(i).shape.size());
                outputs[i].d[0] = inputs[0].d[0];
                for (int32_t axis = 1; axis < outputs[i].nbDims; ++axis) {
                    outputs[i].d[axis] = builder.constant(output(i).shape[axis]);
                }
            }
            return 0;
        });
    }

    bool supportsFormatCombination(int32_t place, const DynamicPluginTensorDesc *tensors, int32_t inputCount,
                                   int32_t outputCount) noexcept override {
        return guarded(mName, false, [&] {
            expectCounts(inputCount, outputCount);
            const Buffer &buffer = place < inputCount ? input(place) : output(place - inputCount);
            const PluginTensorDesc &given = tensors[place].desc;
            return given.format == TensorFormat::kLINEAR && given.type == typeOf(buffer);
        });
    }

    // Of what it cannot say it asks for more than there is, so that nothing is run with less than it needs.
    size_t getWorkspaceSize(const DynamicPluginTensorDesc *inputs, int32_t, const DynamicPluginTensorDesc *,
                            int32_t) const noexcept override {
        return guarded(mName, kUNOBTAINABLE_BYTES,
                       [&] { return static_cast<size_t>(mNode->scratchBytes(inputs[0].max.d[0])); });
    }

    const char *getTimingCacheID() noexcept override { return mNode->digest.c_str(); }

    // IPluginV3OneRuntime

    IPluginV3 *attachToContext(IPluginResourceContext *) noexcept override {
        return guarded(mName, static_cast<IPluginV3 *>(nullptr), [&] {
            auto made = std::make_unique<PlanPlugin>(mName, mNode);
            made->mRunner = std::make_unique<NodeRunner>(mNode);
            return made.release();
        });
    }

    int32_t onShapeChange(const PluginTensorDesc *inputs, int32_t inputCount, const PluginTensorDesc *,
                          int32_t outputCount) noexcept override {
        return guarded(mName, kFAILED, [&] {
            expectCounts(inputCount, outputCount);
            for (int32_t i = 0; i < inputCount; ++i) {
                expectAxes(input(i), inputs[i].dims.nbDims);
                for (int32_t axis = 0; axis < inputs[i].dims.nbDims; ++axis) {
                    expectAxis(input(i), axis, inputs[i].dims.d[axis]);
                }
            }
            runner().arrange(inputs[0].dims.d[0]);
            return 0;
        });
    }

    int32_t enqueue(const PluginTensorDesc *inputDescs, const PluginTensorDesc *, const void *const *inputs,
                    void *const *outputs, void *workspace, cudaStream_t stream) noexcept override {
        return guarded(mName, kFAILED, [&] {
            if (runner().images() != inputDescs[0].dims.d[0]) {
                throw inputError("enqueue: expected batch ", runner().images(), " as onShapeChange said, got ",
                                 inputDescs[0].dims.d[0]);
            }
            runner().launch(inputs, outputs, workspace, stream);
            return 0;
        });
    }

    const PluginFieldCollection *getFieldsToSerialize() noexcept override {
        return guarded(mName, static_cast<const PluginFieldCollection *>(nullptr), [&] {
            mFields.clear();
            for (const FieldOf &field : kFIELDS) {
                const std::string &value = mNode->fields.*field.value;
                if (!value.empty()) {
                    mFields.emplace_back(field.name, value.data(), field.type, static_cast<int32_t>(value.size()));
                }
            }
            mCollection.nbFields = static_cast<int32_t>(mFields.size());
            mCollection.fields = mFields.data();
            return &mCollection;
        });
    }

private:
    const Buffer &input(int32_t place) const { return mNode->plan.buffers[mNode->inputs[place]]; }
    const Buffer &output(int32_t place) const { return mNode->plan.buffers[mNode->outputs[place]]; }

    void expectCounts(int32_t inputs, int32_t outputs) const {
        size_t wantedInputs = mNode->inputs.size(), wantedOutputs = mNode->outputs.size();
        if (inputs != static_cast<int32_t>(wantedInputs) || outputs != static_cast<int32_t>(wantedOutputs)) {
            throw inputError("expected ", wantedInputs, " inputs (x, then each weight of the plan) and ",
                             wantedOutputs, " outputs, got ", inputs, " and ", outputs);
        }
    }

    NodeRunner &runner() const {
        if (!mRunner) {
            throw inputError("expected a plugin that is attached to an execution context");
        }
        return *mRunner;
    }

    const char *mName;
    std::shared_ptr<const PlanNode> mNode;
    std::unique_ptr<NodeRunner> mRunner;  // of what attachToContext made
    std::vector<PluginField> mFields;     // valid until they are asked for again
    PluginFieldCollection mCollection{};
};

// Fields of other names are let pass: a newer parser may add its own.
NodeFields readFields(const PluginFieldCollection *collection) {
    NodeFields made;
    int32_t count = collection == nullptr ? 0 : collection->nbFields;
    for (int32_t i = 0; i < count; ++i) {
        const PluginField &given = collection->fields[i];
        for (const FieldOf &field : kFIELDS) {
            if (given.name == nullptr || std::string_view(given.name) != field.name) {
                continue;
            }
            std::string &value = made.*field.value;
            bool whole = given.length >= 0 && (given.data != nullptr || given.length == 0);
            if (given.type != field.type || !whole || !value.empty()) {
                throw bundleError(field.name, ": expected it once, as ",
                                  field.type == PluginFieldType::kCHAR ? "text" : "int8", ", got type ",
                                  static_cast<int32_t>(given.type), " of length ", given.length);
            }
            value.assign(static_cast<const char *>(given.data), given.length);
            if (field.type == PluginFieldType::kCHAR && !value.empty() && value.back() == '\0') {
                value.pop_back();  // the ONNX parser counts the zero that ends a text
            }
        }
    }
    return made;
}

class PlanPluginCreator final : public IPluginCreatorV3One {
public:
    explicit PlanPluginCreator(const char *name) : mName(name) {
        for (size_t i = 0; i < mFields.size(); ++i) {
            mFields[i] = PluginField(kFIELDS[i].name, nullptr, kFIELDS[i].type, 0);
        }
        mCollection.nbFields = static_cast<int32_t>(mFields.size());
        mCollection.fields = mFields.data();
    }

    const AsciiChar *getPluginName() const noexcept override { return mName; }
    const AsciiChar *getPluginVersion() const noexcept override { return kVERSION; }
    const AsciiChar *getPluginNamespace() const noexcept override { return kNAMESPACE; }
    const PluginFieldCollection *getFieldNames() noexcept override { return &mCollection; }

    // The same in both phases: no GPU is needed before a context is attached.
    IPluginV3 *createPlugin(const AsciiChar *node, const PluginFieldCollection *fields,
                            TensorRTPhase) noexcept override {
        return guarded(node == nullptr ? mName : node, static_cast<IPluginV3 *>(nullptr), [&] {
            return new PlanPlugin(mName, std::make_shared<PlanNode>(readFields(fields)));
        });
    }

private:
    const char *mName;
    std::array<PluginField, std::size(kFIELDS)> mFields;
    PluginFieldCollection mCollection{};
};

}  // namespace
}  // namespace omniad

#define EXPORT extern "C" __attribute__((visibility("default")))

// What TensorRT looks for in a plugin library.
EXPORT nvinfer1::IPluginCreatorInterface *const *getCreators(int32_t &count) {
    static omniad::PlanPluginCreator block("OmniBlock"), decoder("OmniDecoder");
    static nvinfer1::IPluginCreatorInterface *const creators[] = {&block, &decoder};
    count = static_cast<int32_t>(std::size(creators));
    return creators;
}

EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder *) {}

// Stands in for TensorRT's builder and runtime: does to the plugin what they do, with TensorRT's headers and no
// library of it. On a machine with an NVIDIA GPU `run` computes there; its outputs are for comparing.
//
// plugin_harness LIBRARY VERB ...; a NODE is a folder with
//   <field>.<type>  a field of the plugin's, of type char, int8, int32; .null, .negative: a text without its bytes
//   tensors         a line for each input, then each output: "in float16 1 1024 32", of one image
//   input0 ...      the inputs' bytes: of as many images as `run` is given, weights once
#include <NvInferRuntime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "cuda_driver.h"

using namespace nvinfer1;

namespace {

using Plugin = std::unique_ptr<IPluginV3>;

std::string read(const std::filesystem::path &path) {
    std::ifstream file(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
}

template <typename Function>
Function standIn(const char *name) {
    static void *library = dlopen("libcuda.so.1", RTLD_NOW);
    return reinterpret_cast<Function>(library == nullptr ? nullptr : dlsym(library, name));
}

// Dimensions as the builder has them; -1 for one that is known at run time only.
struct Dimension final : IDimensionExpr {
    struct Impl final : apiv::VDimensionExpr {
        int64_t value = 0;
        bool isConstant() const override { return value >= 0; }
        int64_t getConstantValue() const override { return value; }
        bool isSizeTensor() const override { return false; }
    } impl;
    explicit Dimension(int64_t value) {
        impl.value = value;
        mImpl = &impl;
    }
    ~Dimension() noexcept override = default;
};

struct Dimensions final : IExprBuilder {
    struct Impl final : apiv::VExprBuilder {
        std::deque<Dimension> made;
        const IDimensionExpr *constant(int64_t value) override { return &made.emplace_back(value); }
        const IDimensionExpr *operation(DimensionOperation, const IDimensionExpr &,
                                        const IDimensionExpr &) override {
            return nullptr;
        }
        const IDimensionExpr *declareSizeTensor(int32_t, const IDimensionExpr &, const IDimensionExpr &) override {
            return nullptr;
        }
    } impl;
    Dimensions() { mImpl = &impl; }
    ~Dimensions() noexcept override = default;
};

struct Node {
    explicit Node(const std::filesystem::path &folder) : folder(folder) {
        for (const auto &entry : std::filesystem::directory_iterator(folder)) {
            addField(entry.path());
        }
        std::istringstream lines(read(folder / "tensors"));
        for (std::string line; std::getline(lines, line);) {
            std::istringstream words(line);
            std::string way, dtype;
            words >> way >> dtype;
            PluginTensorDesc made{};
            made.type = dtype == "float16" ? DataType::kHALF : DataType::kFLOAT;
            made.format = TensorFormat::kLINEAR;
            while (words >> made.dims.d[made.dims.nbDims]) {
                made.dims.nbDims += 1;
            }
            (way == "in" ? inputs : outputs).push_back(made);
        }
    }

    void addField(const std::filesystem::path &path) {
        std::string type = path.extension();
        PluginFieldType kind = type == ".int8"    ? PluginFieldType::kINT8
                               : type == ".int32" ? PluginFieldType::kINT32
                                                  : PluginFieldType::kCHAR;
        if (type == ".null" || type == ".negative") {
            names.push_back(path.stem());
            fields.emplace_back(names.back().c_str(), type == ".null" ? nullptr : "{}", kind,
                                type == ".null" ? 2 : -1);
        } else if (type == ".char" || type == ".int8" || type == ".int32") {
            names.push_back(path.stem());
            const std::string &value = values.emplace_back(read(path));
            fields.emplace_back(names.back().c_str(), value.data(), kind,
                                static_cast<int32_t>(value.size() / (type == ".int32" ? 4 : 1)));
        }
    }

    PluginFieldCollection collection() const {
        PluginFieldCollection made{};
        made.nbFields = static_cast<int32_t>(fields.size());
        made.fields = fields.data();
        return made;
    }

    // All but the weights are of so many images.
    void setImages(int64_t images) {
        inputs[0].dims.d[0] = images;
        for (PluginTensorDesc &output : outputs) {
            output.dims.d[0] = images;
        }
    }

    // As in a profile of 1 to so many images.
    std::vector<DynamicPluginTensorDesc> profile(int64_t images) {
        std::vector<DynamicPluginTensorDesc> made;
        setImages(images);
        for (const auto *tensors : {&inputs, &outputs}) {
            for (const PluginTensorDesc &tensor : *tensors) {
                made.push_back({tensor, tensor.dims, tensor.dims, tensor.dims});
                made.back().min.d[0] = std::min<int64_t>(1, tensor.dims.d[0]);
            }
        }
        return made;
    }

    int32_t inputCount() const { return static_cast<int32_t>(inputs.size()); }
    int32_t outputCount() const { return static_cast<int32_t>(outputs.size()); }

    std::filesystem::path folder;
    std::deque<std::string> names, values;
    std::vector<PluginField> fields;
    std::vector<PluginTensorDesc> inputs, outputs;
};

struct Creators {
    IPluginCreatorInterface *const *all = nullptr;
    int32_t count = 0;

    static IPluginCreatorV3One *v3(IPluginCreatorInterface *creator) {
        bool ours = std::strcmp(creator->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0;
        return ours ? static_cast<IPluginCreatorV3One *>(creator) : nullptr;
    }

    IPluginCreatorV3One *find(const std::string &name) const {
        for (int32_t i = 0; i < count; ++i) {
            if (v3(all[i])->getPluginName() == name) {
                return v3(all[i]);
            }
        }
        std::fprintf(stderr, "no creator %s\n", name.c_str());
        std::exit(2);
    }

    Plugin make(const std::string &name, const PluginFieldCollection *fields, TensorRTPhase phase) const {
        return Plugin(find(name)->createPlugin("node", fields, phase));
    }
};

template <typename Capability>
Capability &as(IPluginV3 &plugin, PluginCapabilityType type) {
    return *static_cast<Capability *>(plugin.getCapabilityInterface(type));
}

IPluginV3OneBuild &building(IPluginV3 &plugin) {
    return as<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
}

IPluginV3OneRuntime &running(IPluginV3 &plugin) {
    return as<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

// As it comes out of an engine's file; null if the plugin refuses its own fields.
Plugin reloaded(const Creators &creators, IPluginV3 &plugin) {
    const char *name = as<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE).getPluginName();
    return creators.make(name, running(plugin).getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
}

std::string shown(const PluginFieldCollection &fields) {
    std::string made;
    for (int32_t i = 0; i < fields.nbFields; ++i) {
        const PluginField &field = fields.fields[i];
        made += std::string(field.name) + " " + std::to_string(static_cast<int>(field.type)) + " " +
                std::to_string(field.length) + " " +
                (field.data == nullptr ? "" : std::string(static_cast<const char *>(field.data), field.length)) +
                "\n";
    }
    return made;
}

// creators: who is there, and which fields he reads
int listCreators(const Creators &creators) {
    for (int32_t i = 0; i < creators.count; ++i) {
        IPluginCreatorV3One &creator = *Creators::v3(creators.all[i]);
        InterfaceInfo info = creator.getInterfaceInfo();
        std::printf("%s %s %s %d.%d", creator.getPluginNamespace(), creator.getPluginName(),
                    creator.getPluginVersion(), info.major, info.minor);
        const PluginFieldCollection &fields = *creator.getFieldNames();
        for (int32_t j = 0; j < fields.nbFields; ++j) {
            std::printf(" %s:%d", fields.fields[j].name, static_cast<int>(fields.fields[j].type));
        }
        std::puts("");
    }
    return 0;
}

// create NAME NODE...: whether each is taken
int create(const Creators &creators, int count, char **words) {
    for (int i = 1; i < count; ++i) {
        Node node(words[i]);
        PluginFieldCollection fields = node.collection();
        std::puts(creators.make(words[0], &fields, TensorRTPhase::kBUILD) ? "made" : "null");
    }
    return 0;
}

void printShapes(IPluginV3OneBuild &build, Node &node, int64_t images) {
    Dimensions builder;
    std::vector<DimsExprs> inputs, outputs(node.outputs.size());
    node.setImages(images);
    for (const PluginTensorDesc &input : node.inputs) {
        inputs.emplace_back();
        inputs.back().nbDims = input.dims.nbDims;
        for (int32_t axis = 0; axis < input.dims.nbDims; ++axis) {
            inputs.back().d[axis] = builder.constant(input.dims.d[axis]);
        }
    }
    int32_t status = build.getOutputShapes(inputs.data(), node.inputCount(), nullptr, 0, outputs.data(),
                                           node.outputCount(), builder);
    std::printf("shapes %d", status);
    for (const DimsExprs &output : outputs) {
        std::printf(" (");
        for (int32_t axis = 0; axis < output.nbDims && status == 0; ++axis) {
            std::printf(axis ? ", %ld" : "%ld", static_cast<long>(output.d[axis]->getConstantValue()));
        }
        std::printf(")");
    }
    std::puts("");
}

// Each tensor as it is, then with another type, then in another format; the others are as they are.
void printFormats(IPluginV3OneBuild &build, Node &node) {
    std::string made;
    std::vector<DynamicPluginTensorDesc> tensors = node.profile(1);
    for (size_t i = 0; i < tensors.size(); ++i) {
        auto takes = [&](DataType type, TensorFormat format) {
            std::vector<DynamicPluginTensorDesc> changed = tensors;
            changed[i].desc.type = type;
            changed[i].desc.format = format;
            auto place = static_cast<int32_t>(i);
            return build.supportsFormatCombination(place, changed.data(), node.inputCount(), node.outputCount());
        };
        DataType type = tensors[i].desc.type;
        made += takes(type, TensorFormat::kLINEAR) ? '1' : '0';
        made += takes(type == DataType::kHALF ? DataType::kFLOAT : DataType::kHALF, TensorFormat::kLINEAR) ? '1'
                                                                                                           : '0';
        made += takes(type, TensorFormat::kHWC8) ? "1 " : "0 ";
    }
    std::printf("formats %s\n", made.c_str());
}

// build NAME NODE BATCH...: all that a builder asks; workspaces are of these batches
int build(const Creators &creators, int count, char **words) {
    Node node(words[1]);
    PluginFieldCollection fields = node.collection();
    Plugin plugin = creators.make(words[0], &fields, TensorRTPhase::kBUILD);
    if (!plugin) {
        return 1;
    }
    IPluginV3OneBuild &asked = building(*plugin);
    std::vector<DataType> given, types(node.outputs.size());
    for (const PluginTensorDesc &input : node.inputs) {
        given.push_back(input.type);
    }
    std::printf("outputs %d\n", asked.getNbOutputs());
    std::printf("types %d", asked.getOutputDataTypes(types.data(), node.outputCount(), given.data(),
                                                     node.inputCount()));
    for (DataType type : types) {
        std::printf(" %d", static_cast<int>(type));
    }
    std::puts("");
    printShapes(asked, node, 5);
    printShapes(asked, node, -1);
    printFormats(asked, node);
    for (int i = 2; i < count; ++i) {
        std::vector<DynamicPluginTensorDesc> tensors = node.profile(std::atoll(words[i]));
        const DynamicPluginTensorDesc *outputs = tensors.data() + node.inputs.size();
        int32_t status = asked.configurePlugin(tensors.data(), node.inputCount(), outputs, node.outputCount());
        size_t bytes = asked.getWorkspaceSize(tensors.data(), node.inputCount(), outputs, node.outputCount());
        std::printf("workspace %d %zu\n", status, bytes);
    }
    std::printf("wrong counts %d\n",
                asked.getOutputDataTypes(types.data(), node.outputCount(), given.data(), node.inputCount() - 1));
    std::printf("tactics %d, timing cache %s\n", asked.getNbTactics(), asked.getTimingCacheID());
    Plugin clone(plugin->clone()), again = reloaded(creators, *clone);
    bool same = again && shown(*running(*again).getFieldsToSerialize()) ==
                             shown(*running(*plugin).getFieldsToSerialize());
    same = same && std::strcmp(building(*again).getTimingCacheID(), asked.getTimingCacheID()) == 0;
    std::printf("round trip %s\n", same ? "equal" : "different");
    PluginTensorDesc none{};
    std::printf("not attached %d\n", running(*plugin).enqueue(&none, &none, nullptr, nullptr, nullptr, nullptr));
    return 0;
}

size_t bytesOf(const PluginTensorDesc &tensor) {
    size_t made = tensor.type == DataType::kHALF ? 2 : 4;
    for (int32_t axis = 0; axis < tensor.dims.nbDims; ++axis) {
        made *= tensor.dims.d[axis];
    }
    return made;
}

// Memory on the GPU and a stream, in the context that is current.
class Gpu {
public:
    explicit Gpu(omniad::Driver &driver) : mDriver(driver) {
        driver.call(driver.api.cuStreamCreate, &stream, omniad::kSTREAM_NON_BLOCKING);
        mOwned.add([this] { mDriver.free(mDriver.api.cuStreamDestroy_v2, stream); });
    }

    void *memory(size_t bytes) {
        omniad::CudaAddress address = 0;
        mDriver.call(mDriver.api.cuMemAlloc_v2, &address, bytes);
        mOwned.add([this, address] { mDriver.free(mDriver.api.cuMemFree_v2, address); });
        return reinterpret_cast<void *>(address);
    }

    void *copyOf(const std::string &bytes) {
        void *made = memory(bytes.size());
        mDriver.call(mDriver.api.cuMemcpyHtoDAsync_v2, reinterpret_cast<omniad::CudaAddress>(made),
                     static_cast<const void *>(bytes.data()), bytes.size(), stream);
        synchronize();
        return made;
    }

    std::string bytesAt(void *address, size_t bytes) {
        std::string made(bytes, '\0');
        mDriver.call(mDriver.api.cuMemcpyDtoHAsync_v2, static_cast<void *>(made.data()),
                     reinterpret_cast<omniad::CudaAddress>(address), bytes, stream);
        synchronize();
        return made;
    }

    void synchronize() { mDriver.call(mDriver.api.cuStreamSynchronize, stream); }

    omniad::CudaStream stream = nullptr;

private:
    omniad::Driver &mDriver;
    omniad::Owned mOwned;
};

// What a runtime does for a batch. Prints statuses, the workspace's bytes, and where it and each tensor are.
void runBatch(omniad::Driver &driver, IPluginV3 &attached, Node &node, int64_t images, bool captured) {
    Gpu gpu(driver);
    std::vector<DynamicPluginTensorDesc> tensors = node.profile(images);
    std::vector<const void *> inputs;
    std::vector<void *> outputs;
    for (size_t i = 0; i < node.inputs.size(); ++i) {
        std::string bytes = read(node.folder / ("input" + std::to_string(i)));
        bytes.resize(bytesOf(node.inputs[i]));
        inputs.push_back(gpu.copyOf(bytes));
    }
    for (const PluginTensorDesc &output : node.outputs) {
        outputs.push_back(gpu.memory(bytesOf(output)));
    }
    const DynamicPluginTensorDesc *behind = tensors.data() + node.inputs.size();
    size_t scratch = building(attached).getWorkspaceSize(tensors.data(), node.inputCount(), behind,
                                                         node.outputCount());
    void *workspace = scratch == 0 ? nullptr : gpu.memory(scratch);
    IPluginV3OneRuntime &run = running(attached);
    int32_t shaped = run.onShapeChange(node.inputs.data(), node.inputCount(), node.outputs.data(),
                                       node.outputCount());
    omniad::CudaGraph graph = nullptr;
    if (captured) {
        driver.call(driver.api.cuStreamBeginCapture_v2, gpu.stream, omniad::kCAPTURE_MODE_THREAD_LOCAL);
    }
    int32_t queued = run.enqueue(node.inputs.data(), node.outputs.data(), inputs.data(), outputs.data(), workspace,
                                 gpu.stream);
    if (captured) {
        driver.call(driver.api.cuStreamEndCapture, gpu.stream, &graph);
        driver.free(driver.api.cuGraphDestroy, graph);
    }
    gpu.synchronize();
    std::printf("run %d %d %zu %zu", shaped, queued, scratch, reinterpret_cast<size_t>(workspace));
    for (const void *input : inputs) {
        std::printf(" %zu", reinterpret_cast<size_t>(input));
    }
    for (void *output : outputs) {
        std::printf(" %zu", reinterpret_cast<size_t>(output));
    }
    std::puts("");
    for (size_t i = 0; i < outputs.size(); ++i) {
        std::ofstream file(node.folder / ("output" + std::to_string(i)), std::ios::binary | std::ios::app);
        std::string bytes = gpu.bytesAt(outputs[i], bytesOf(node.outputs[i]));
        file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    }
}

// run NAME NODE BATCH...: each batch in turn by a plugin that was serialised; outputs are appended to files
// NODE/output0 and on. A batch like c4 is captured in a graph, which is not run.
int run(const Creators &creators, int count, char **words) {
    Node node(words[1]);
    PluginFieldCollection fields = node.collection();
    Plugin plugin = creators.make(words[0], &fields, TensorRTPhase::kBUILD);
    Plugin loaded = plugin ? reloaded(creators, *plugin) : nullptr;
    omniad::Driver driver;
    omniad::Context context(driver, 0);
    auto entered = std::make_unique<omniad::Entered>(context);
    Plugin attached(loaded ? running(*loaded).attachToContext(nullptr) : nullptr);
    if (!attached) {
        std::puts("not attached");
        return 1;
    }
    for (int i = 2; i < count; ++i) {
        bool captured = words[i][0] == 'c';
        runBatch(driver, *attached, node, std::atoll(words[i] + captured), captured);
    }
    entered.reset();  // who destroys a plugin need not have its context
    attached.reset();
    return 0;
}

// attach NAME NODE: in a thread without a context of CUDA
int attach(const Creators &creators, char **words) {
    Node node(words[1]);
    PluginFieldCollection fields = node.collection();
    Plugin plugin = creators.make(words[0], &fields, TensorRTPhase::kRUNTIME);
    std::puts(Plugin(running(*plugin).attachToContext(nullptr)) ? "attached" : "not attached");
    return 0;
}

// Batches of a plugin in memory that nothing is computed in.
struct Dry {
    alignas(256) static char memory[256];

    explicit Dry(Node &node)
        : node(node), inputs(node.inputs.size(), memory), outputs(node.outputs.size(), memory) {}

    int32_t announce(IPluginV3 &plugin, int64_t images) {
        node.setImages(images);
        return running(plugin).onShapeChange(node.inputs.data(), node.inputCount(), node.outputs.data(),
                                             node.outputCount());
    }
    int32_t enqueue(IPluginV3 &plugin, int64_t images) {
        node.setImages(images);
        return running(plugin).enqueue(node.inputs.data(), node.outputs.data(), inputs.data(), outputs.data(),
                                       workspace, nullptr);
    }

    Node &node;
    std::vector<const void *> inputs;
    std::vector<void *> outputs;
    void *workspace = memory;
};
char Dry::memory[256];

void makeContextCurrent() {
    standIn<int (*)(void *)>("cuCtxPushCurrent_v2")(reinterpret_cast<void *>(77));
}

// misuse NAME NODE: what a runtime does not do
int misuse(const Creators &creators, char **words) {
    Node node(words[1]);
    PluginFieldCollection fields = node.collection();
    Plugin plugin = creators.make(words[0], &fields, TensorRTPhase::kRUNTIME);
    makeContextCurrent();
    Plugin attached(running(*plugin).attachToContext(nullptr));
    Dry dry(node);
    std::printf("%d\n", dry.enqueue(*attached, 1));
    dry.announce(*attached, 1);
    std::printf("%d\n", dry.enqueue(*attached, 2));
    dry.workspace = nullptr;
    std::printf("%d\n", dry.enqueue(*attached, 1));
    dry.workspace = Dry::memory;
    dry.outputs[0] = Dry::memory + 8;
    std::printf("%d\n", dry.enqueue(*attached, 1));
    dry.outputs[0] = Dry::memory;
    dry.inputs[0] = nullptr;
    std::printf("%d\n", dry.enqueue(*attached, 1));
    dry.inputs[0] = Dry::memory;
    std::printf("%d\n", dry.enqueue(*attached, 1));
    return 0;
}

// How far a plugin comes: its attachment, two batches.
const char *life(IPluginV3 &plugin, Node &node) {
    Plugin attached(running(plugin).attachToContext(nullptr));
    if (!attached) {
        return "attach";
    }
    Dry dry(node);
    for (int images = 1; images <= 2; ++images) {
        if (dry.announce(*attached, images)) {
            return "shape";
        }
        if (dry.enqueue(*attached, images)) {
            return "enqueue";
        }
    }
    return "end";
}

// faults NAME NODE STATUS: the stand-in for the driver fails at each call in turn
int faults(const Creators &creators, char **words) {
    auto fail = standIn<void (*)(int, int)>("stand_in_fail");
    auto name = standIn<const char *(*)(int)>("stand_in_name");
    auto alive = standIn<int (*)()>("stand_in_alive");
    Node node(words[1]);
    PluginFieldCollection fields = node.collection();
    Plugin plugin = creators.make(words[0], &fields, TensorRTPhase::kBUILD);
    for (int at = 2; at < 1000; ++at) {  // the first call is the harness's own
        fail(at, std::atoi(words[2]));
        makeContextCurrent();
        int before = alive();
        const char *end = life(*plugin, node);
        if (*name(at) == '\0') {
            return 0;
        }
        std::printf("%d %s %s\n", alive() - before, name(at), end);
    }
    return 1;
}

}  // namespace

int main(int count, char **words) {
    setvbuf(stdout, nullptr, _IONBF, 0);  // in order with what the plugin says on stderr
    void *library = count > 2 ? dlopen(words[1], RTLD_NOW | RTLD_LOCAL) : nullptr;
    if (library == nullptr) {
        std::fprintf(stderr, "usage: plugin_harness LIBRARY VERB ...; %s\n", count > 2 ? dlerror() : "");
        return 2;
    }
    using GetCreators = IPluginCreatorInterface *const *(*)(int32_t &);
    reinterpret_cast<void (*)(ILoggerFinder *)>(dlsym(library, "setLoggerFinder"))(nullptr);
    Creators creators;
    creators.all = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"))(creators.count);
    std::string verb = words[2];
    words += 3, count -= 3;
    int code = 2;
    if (verb == "creators") {
        code = listCreators(creators);
    } else if (verb == "create") {
        code = create(creators, count, words);
    } else if (verb == "build") {
        code = build(creators, count, words);
    } else if (verb == "run") {
        code = run(creators, count, words);
    } else if (verb == "attach") {
        code = attach(creators, words);
    } else if (verb == "misuse") {
        code = misuse(creators, words);
    } else if (verb == "faults") {
        code = faults(creators, words);
    }
    dlclose(library);
    return code;
}

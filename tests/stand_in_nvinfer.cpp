// Lets TensorRT's Python bindings be imported without TensorRT: of what they link, a plugin registry that loads
// libraries; all else answers with nothing. Serves as libnvinfer, libnvinfer_plugin and libnvonnxparser, of the
// major version of the headers it is built with.
#include <NvInfer.h>
#include <dlfcn.h>

#include <cstring>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace nvinfer1;

class Registry final : public IPluginRegistry {
public:
    PluginLibraryHandle loadLibrary(const AsciiChar *path) noexcept override {
        void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) {
            return nullptr;
        }
        using GetCreators = IPluginCreatorInterface *const *(*)(int32_t &);
        auto getCreators = reinterpret_cast<GetCreators>(dlsym(library, "getCreators"));
        auto setLoggerFinder = reinterpret_cast<void (*)(ILoggerFinder *)>(dlsym(library, "setLoggerFinder"));
        setLoggerFinder(&mFinder);
        int32_t count = 0;
        IPluginCreatorInterface *const *creators = getCreators(count);
        for (int32_t i = 0; i < count; ++i) {
            registerCreator(*creators[i], "");
        }
        return library;
    }

    bool registerCreator(IPluginCreatorInterface &creator, const AsciiChar *) noexcept override {
        mCreators.push_back(&creator);
        return true;
    }

    bool deregisterCreator(const IPluginCreatorInterface &) noexcept override { return false; }
    void deregisterLibrary(PluginLibraryHandle) noexcept override {}

    IPluginCreatorInterface *const *getAllCreators(int32_t *count) const noexcept override {
        *count = static_cast<int32_t>(mCreators.size());
        return mCreators.data();
    }

    IPluginCreatorInterface *const *getAllCreatorsRecursive(int32_t *count) noexcept {  // since 10.10
        return getAllCreators(count);
    }

    IPluginCreatorInterface *getCreator(const AsciiChar *name, const AsciiChar *version,
                                        const AsciiChar *space) noexcept override {
        for (IPluginCreatorInterface *creator : mCreators) {
            auto v3 = static_cast<IPluginCreatorV3One *>(creator);
            bool same = std::strcmp(v3->getPluginName(), name) == 0;
            same = same && std::strcmp(v3->getPluginVersion(), version) == 0;
            if (same && std::strcmp(v3->getPluginNamespace(), space) == 0) {
                return creator;
            }
        }
        return nullptr;
    }

    void setErrorRecorder(IErrorRecorder *) noexcept override {}
    IErrorRecorder *getErrorRecorder() const noexcept override { return nullptr; }
    bool isParentSearchEnabled() const override { return true; }
    void setParentSearchEnabled(bool) override {}
    IPluginResource *acquirePluginResource(const AsciiChar *, IPluginResource *) noexcept override {
        return nullptr;
    }
    int32_t releasePluginResource(const AsciiChar *) noexcept override { return 0; }

#if NV_TENSORRT_MAJOR < 11
    bool registerCreator(IPluginCreator &, const AsciiChar *) noexcept override { return false; }
    bool deregisterCreator(const IPluginCreator &) noexcept override { return false; }
    IPluginCreator *const *getPluginCreatorList(int32_t *count) const noexcept override {
        *count = 0;
        return nullptr;
    }
    IPluginCreator *getPluginCreator(const AsciiChar *, const AsciiChar *, const AsciiChar *) noexcept override {
        return nullptr;
    }
#endif

private:
    struct Finder final : ILoggerFinder {
        ILogger *findLogger() override { return nullptr; }
    } mFinder;
    std::vector<IPluginCreatorInterface *> mCreators;
} registry;

}  // namespace

EXPORT IPluginRegistry *getPluginRegistry() noexcept {
    return &registry;
}
EXPORT IPluginRegistry *getBuilderPluginRegistry(EngineCapability) noexcept {
    return &registry;
}

EXPORT void *createInferBuilder_INTERNAL(void *, int32_t) noexcept {
    return nullptr;
}
EXPORT void *createInferRefitter_INTERNAL(void *, void *, int32_t) noexcept {
    return nullptr;
}
EXPORT void *createInferRuntime_INTERNAL(void *, int32_t) noexcept {
    return nullptr;
}
EXPORT void *createNvOnnxParser_INTERNAL(void *, void *, int) {
    return nullptr;
}
EXPORT void *createNvOnnxParserRefitter_INTERNAL(void *, void *, int) {
    return nullptr;
}
EXPORT int getNvOnnxParserVersion() {
    return 0;
}
EXPORT bool initLibNvInferPlugins(void *, const char *) {
    return true;
}

"""The packages, and the native libraries, as CMakeLists.txt has them.

`libomniad_runtime.so` is built where a C++ compiler is found; without one the installation goes on without it.
`libomniad_plugin.so`, for TensorRT, is built where TENSORRT_INCLUDE_DIR is set. Neither is a Python module, so one
wheel does for all versions of Python.
"""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from itertools import chain
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

LIBRARY = os.path.join("omniad_edge", "libomniad_runtime.so")
CMAKE = "CMakeLists.txt"


def library(name: str, *own_sources: str, **options) -> Extension:
    """Of the common sources and its own."""
    core = re.search(r"add_library\(omniad_core OBJECT(.*?)\)", Path(CMAKE).read_text(encoding="utf-8"), re.DOTALL)
    return Extension(
        f"omniad_edge.{name}",
        [f"kernels/native/{source}" for source in (*own_sources, *re.findall(r"\w+\.cpp", core[1]))],
        depends=[CMAKE, *glob("kernels/native/*.*")],  # all of it belongs into the source distribution
        extra_compile_args=[
            "-std=c++17",
            "-fvisibility=hidden",
            "-fvisibility-inlines-hidden",
            "-ffp-contract=off",
            "-g0",
            "-Wno-deprecated-declarations",  # TensorRT's headers have pages of them
        ],
        libraries=["dl", "pthread"],
        language="c++",
        **options,
    )


def plugins() -> list[Extension]:
    """The TensorRT plugin if its headers are named, of any TensorRT from 10.3 on. Then it is not optional."""
    headers = os.environ.get("TENSORRT_INCLUDE_DIR", "").split(os.pathsep)[0]
    if not headers:
        return []
    folders = {
        "TENSORRT_INCLUDE_DIR": (headers, "NvInferRuntime.h"),
        "CUDA_INCLUDE_DIR": (os.environ.get("CUDA_INCLUDE_DIR", "/usr/local/cuda/include"), "cuda_runtime_api.h"),
    }
    for variable, (folder, header) in folders.items():
        if not Path(folder, header).is_file():
            raise SystemExit(f"{variable}: expected the folder of {header}; got {folder}")
    return [
        library(
            "libomniad_plugin",
            "tensorrt_plugin.cpp",
            "plan_node.cpp",
            include_dirs=[folder for folder, _ in folders.values()],
            extra_link_args=["-Wl,--gc-sections", "-Wl,--version-script=kernels/native/tensorrt_plugin.exports"],
        )
    ]


class BuildLibraries(build_ext):
    def build_extensions(self) -> None:
        runtime.define_macros.append(("OMNIAD_VERSION", f'"{self.distribution.get_version()}"'))
        compile_all, objects = self.compiler.compile, {}

        def compile_each(sources: list[str], **options) -> list[str]:
            new = [source for source in sources if source not in objects]  # the common ones: once for both
            with ThreadPoolExecutor() as pool:
                made = pool.map(lambda source: compile_all([source], **options), new)
                objects.update(zip(new, made, strict=True))
            return list(chain(*(objects[source] for source in sources)))

        self.compiler.compile = compile_each
        super().build_extensions()

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"


class RuntimeWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        built = os.path.exists(os.path.join(self.bdist_dir, LIBRARY))
        return "py3", "none", super().get_tag()[2] if built else "any"


runtime = library("libomniad_runtime", "omniad.cpp", optional=True)

# `kernels` and `export` are top-level folders of the repository but sub-packages of the product:
# a bare top-level package named `kernels` exists on PyPI already.
setup(
    packages=[
        "omniad_edge",
        "omniad_edge.backbones",
        "omniad_edge.cameras",
        "omniad_edge.export",
        "omniad_edge.kernels",
        "omniad_edge.line",
        "omniad_edge.outputs",
    ],
    package_dir={
        "omniad_edge": "omniad_edge",
        "omniad_edge.kernels": "kernels",
        "omniad_edge.export": "export",
    },
    package_data={
        "omniad_edge": ["*.json"],
        "omniad_edge.backbones": ["*"],
        "omniad_edge.line": ["*.service"],
    },
    include_package_data=False,  # not the libraries' sources, which are among the files of the source distribution
    ext_modules=[runtime, *plugins()],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": RuntimeWheel},
)

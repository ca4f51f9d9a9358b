"""The packages, and the native runtime `libomniad_runtime.so`, as CMakeLists.txt has it.

The runtime is built where a C++ compiler is found; without one the installation goes on without it. It is no
Python module, so one wheel does for all versions of Python.
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


def runtime_sources() -> list[str]:
    core = re.search(r"add_library\(omniad_core OBJECT(.*?)\)", Path(CMAKE).read_text(encoding="utf-8"), re.DOTALL)
    return [f"kernels/native/{name}" for name in ("omniad.cpp", *re.findall(r"\w+\.cpp", core[1]))]


class BuildRuntime(build_ext):
    def build_extensions(self) -> None:
        runtime.define_macros.append(("OMNIAD_VERSION", f'"{self.distribution.get_version()}"'))
        compile_all = self.compiler.compile

        def compile_each(sources: list[str], **options) -> list[str]:
            with ThreadPoolExecutor() as pool:
                return list(chain(*pool.map(lambda source: compile_all([source], **options), sources)))

        self.compiler.compile = compile_each
        super().build_extensions()

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"


class RuntimeWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        built = os.path.exists(os.path.join(self.bdist_dir, LIBRARY))
        return "py3", "none", super().get_tag()[2] if built else "any"


runtime = Extension(
    "omniad_edge.libomniad_runtime",
    runtime_sources(),
    depends=[CMAKE, *glob("kernels/native/*.h")],
    extra_compile_args=[
        "-std=c++17",
        "-fvisibility=hidden",
        "-fvisibility-inlines-hidden",
        "-ffp-contract=off",
        "-g0",
    ],
    libraries=["dl", "pthread"],
    language="c++",
    optional=True,
)

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
    include_package_data=False,  # not the runtime's sources, which are among the files of the source distribution
    ext_modules=[runtime],
    cmdclass={"build_ext": BuildRuntime, "bdist_wheel": RuntimeWheel},
)

"""Compiled kernels in the CUDA driver: loaded once each, given their parameters, launched."""

import ctypes
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from .cuda_driver import Context, Driver
from .errors import EngineError
from .kernels.plan import Kernel, Launch

SHARED_BYTES_UNASKED = 48 * 1024  # a kernel gets more only if it asks
WARP = 32


@dataclass(frozen=True)
class LoadedKernel:
    """function: the driver's handle of the kernel"""

    driver: Driver
    kernel: Kernel
    function: Any

    def launch(self, stream: Any, programs: int, values: Sequence[int], pdl: bool) -> None:
        """Starts it on the stream. pdl: perhaps before the kernel ahead of it ends, on which it then waits."""
        api = self.driver.api
        config = api.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = programs, 1, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = WARP * self.kernel.num_warps, 1, 1
        config.sharedMemBytes, config.hStream = self.kernel.shared_bytes, stream
        if pdl:
            early = api.CUlaunchAttribute()
            early.id = api.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            value = api.CUlaunchAttributeValue()
            value.programmaticStreamSerializationAllowed = 1
            early.value = value
            config.attrs, config.numAttrs = [early], 1
        memory = (ctypes.c_uint64 * len(values))(*values)
        start = ctypes.addressof(memory)
        places = (ctypes.c_void_p * len(values))(*(start + 8 * index for index in range(len(values))))
        self.driver.call("cuLaunchKernelEx", config, self.function, ctypes.addressof(places), 0)


def parameters(launch: Launch, address: Callable[[str], int]) -> list[int]:
    """The values that `kernels.jit.step` is compiled to take, 8 bytes each; of a number the first 4 count.

    Of one call its buffers; of two, those of the first, how many programs it has, those of the second. Behind
    them Triton appends two pointers to scratch memory, which these kernels do not have.
    """
    values = []
    for index, call in enumerate(launch.calls):
        values += [launch.calls[0].programs] if index else []
        values += [address(name) for name in call.buffers if name is not None]
    return [*values, 0, 0]


def load_kernels(
    driver: Driver, context: Context, kernels: Sequence[Kernel], owned: ExitStack
) -> list[LoadedKernel]:
    """Each kernel, of equal machine code one; `owned` unloads them. Raises EngineError if the GPU is too small."""
    call, api = driver.call, driver.api
    most = driver.attribute(context.device, "MAX_SHARED_MEMORY_PER_BLOCK_OPTIN")
    modules, loaded = {}, {}
    for kernel in dict.fromkeys(kernels):
        if kernel.shared_bytes > most:
            raise EngineError(
                f"kernel {kernel.name}: needs {kernel.shared_bytes} bytes of shared memory, this GPU has "
                f"{most}; export the bundle with this GPU's architecture in --targets"
            )
        if kernel.cubin not in modules:
            modules[kernel.cubin] = call("cuModuleLoadData", kernel.cubin)
            owned.callback(driver.free, "cuModuleUnload", modules[kernel.cubin])
        function = call("cuModuleGetFunction", modules[kernel.cubin], kernel.name.encode())
        if kernel.shared_bytes > SHARED_BYTES_UNASKED:
            key = api.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            call("cuFuncSetAttribute", function, key, kernel.shared_bytes)
        loaded[kernel] = LoadedKernel(driver, kernel, function)
    return [loaded[kernel] for kernel in kernels]

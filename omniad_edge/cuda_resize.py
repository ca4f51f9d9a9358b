"""Frames of any size to the network's pixels on the GPU: a plan's front, launched for each frame."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import numpy as np

from .cuda_array import DeviceArray
from .cuda_driver import Driver, pinned_array
from .cuda_kernel import LoadedKernel, parameters
from .kernels.plan import Plan
from .kernels.resize_tables import resample_tables


class CudaResize:
    """Each frame is one launch on `stream`, ahead of the network's graph, so the graph is the same for any size.

    A frame on the host goes through pinned memory, which grows to the largest so far; one on the GPU is read where
    it lies. The tables are written again only where the size changes. The owner takes turns and has its context
    current; memory is freed by `owned`.

    addresses: of the plan's buffers on the GPU
    tables:    an array in pinned memory for each of its tables
    """

    def __init__(
        self,
        plan: Plan,
        kernel: LoadedKernel,
        addresses: Mapping[str, int],
        tables: Mapping[str, np.ndarray],
        driver: Driver,
        stream: Any,
        owned: ExitStack,
    ) -> None:
        self.plan, self.kernel, self.addresses, self.tables = plan, kernel, addresses, tables
        self.driver, self.stream = driver, stream
        self.table_size = None  # rows and columns of the frames that the tables on the GPU are for
        self.staging, self.staging_address = np.empty(0, np.uint8), 0  # on the host, pinned; on the GPU
        self.staging_memory = ExitStack()
        owned.callback(self.staging_memory.close)
        self.copied = driver.call("cuEventCreate", driver.api.CUevent_flags.CU_EVENT_DEFAULT)
        owned.callback(driver.free, "cuEventDestroy", self.copied)

    def put(self, index: int, frame: np.ndarray | DeviceArray) -> None:
        """Starts what makes image `index` of the frame. A DeviceArray must stay until the stream is through.

        Raises InputError for a frame beyond the limits of `kernels.resize_tables`.
        """
        size = tuple(frame.shape[:2])
        if size != self.table_size:
            self.write_tables(*size)
        start = frame.address if isinstance(frame, DeviceArray) else self.stage(frame)
        image_bytes = self.plan.height * self.plan.width * 3
        moved = self.addresses | {"frame": start, "pixels": self.addresses["pixels"] + index * image_bytes}
        launch = self.plan.front
        self.kernel.launch(self.stream, launch.programs, parameters(launch, moved.get), pdl=False)

    def write_tables(self, rows: int, columns: int) -> None:
        tables = resample_tables(rows, columns, self.plan.height, self.plan.width)
        self.table_size = None
        self.driver.call("cuEventSynchronize", self.copied)
        for name, pinned in self.tables.items():
            np.copyto(pinned, getattr(tables, name))
            self.copy(self.addresses[name], pinned)
        self.table_size = rows, columns

    def stage(self, frame: np.ndarray) -> int:
        """Its address on the GPU, to which it is on the way."""
        self.driver.call("cuEventSynchronize", self.copied)
        if frame.nbytes > self.staging.nbytes:
            self.grow(frame.nbytes)
        pinned = self.staging[: frame.nbytes].reshape(frame.shape)
        np.copyto(pinned, frame)
        self.copy(self.staging_address, pinned)
        return self.staging_address

    def grow(self, size_bytes: int) -> None:
        call, free, memory = self.driver.call, self.driver.free, self.staging_memory
        call("cuStreamSynchronize", self.stream)  # the frame before may still be read
        self.staging = np.empty(0, np.uint8)
        memory.close()
        host = call("cuMemHostAlloc", size_bytes, 0)
        memory.callback(free, "cuMemFreeHost", host)
        device = call("cuMemAlloc", size_bytes)
        memory.callback(free, "cuMemFree", device)
        self.staging, self.staging_address = pinned_array(host, (size_bytes,), "uint8"), int(device)

    def copy(self, address: int, pinned: np.ndarray) -> None:
        """Starts the copy to the GPU; `copied` tells when the pinned memory may be written again."""
        target = self.driver.api.CUdeviceptr(address)
        self.driver.call("cuMemcpyHtoDAsync", target, pinned.ctypes.data, pinned.nbytes, self.stream)
        self.driver.call("cuEventRecord", self.copied, self.stream)

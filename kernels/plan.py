"""What runs on a GPU, written down: launches in order over one memory arena.

A plan is plain data. Torch, Triton and CUDA are not needed to read one; three executors run the same plan (the
Triton interpreter and its compiler in `jit.py`, compiled kernels through the CUDA driver in `..cuda_graph`).
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from math import prod

import numpy as np

PDL_FROM = 90  # the first architecture with programmatic dependent launch
ALIGN_BYTES = 256  # of every buffer; Triton may then use its widest loads


@dataclass(frozen=True)
class Buffer:
    """A contiguous array in the arena.

    kind:   "weight", "input", "output", "scratch"; "table", which a change of the frame's size rewrites; "frame",
            of a shape not known here and not in the arena: each launch is told where it is
    recipe: of a weight, how it is made of the folded network's (see `pack.py`)
    """

    shape: tuple[int, ...]
    dtype: str  # of NumPy
    kind: str
    offset_bytes: int
    recipe: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Call:
    """One operation: `op(pid, *buffers, *constants)` for every pid below `programs`.

    op:        "file.function", a Triton device function of this package
    buffers:   names of the plan's buffers; None for one that this call goes without
    constants: numbers known when the kernel is compiled; the batch is not among them
    programs:  of all images; those of one image lie behind those of the image before it
    """

    op: str
    buffers: tuple[str | None, ...]
    constants: tuple[int | float | bool, ...]
    programs: int
    num_warps: int = 4


@dataclass(frozen=True)
class Launch:
    """One kernel launch: one call, or two that do not depend on each other and run side by side."""

    calls: tuple[Call, ...]

    @property
    def programs(self) -> int:
        return sum(call.programs for call in self.calls)

    @property
    def num_warps(self) -> int:
        return max(call.num_warps for call in self.calls)

    @classmethod
    def from_dict(cls, entry: dict) -> "Launch":
        calls = (
            Call(**(call | {key: tuple(call[key]) for key in ("buffers", "constants")})) for call in entry["calls"]
        )
        return cls(tuple(calls))


@dataclass(frozen=True)
class Kernel:
    """A launch compiled for one architecture: entry point, machine code, what a launch of it needs."""

    name: str
    cubin: bytes
    shared_bytes: int
    num_warps: int


@dataclass(frozen=True)
class Plan:
    """The launches of one network for one batch size; buffers by name.

    front: before them, once for each image: a frame of any size to that image of "pixels". It writes the first
           image; for another one the address is moved. None of a part of a network.
    """

    batch: int
    height: int
    width: int
    buffers: dict[str, Buffer]
    launches: tuple[Launch, ...]
    front: Launch | None = None

    @property
    def arena_bytes(self) -> int:
        return max(buffer.offset_bytes + aligned(buffer.size_bytes) for buffer in self.buffers.values())

    @property
    def all_launches(self) -> tuple[Launch, ...]:
        """The front, if there is one, and those of the network."""
        return self.launches if self.front is None else (self.front, *self.launches)

    def kernel_key(self, launch: Launch) -> str:
        """Equal for launches that the same kernel does: everything that is known when it is compiled."""
        calls = [
            (c.op, [b and self.buffers[b].dtype for b in c.buffers], c.constants, c.num_warps)
            for c in launch.calls
        ]
        return hashlib.sha256(json.dumps(calls).encode()).hexdigest()[:16]

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, entry: dict) -> "Plan":
        buffers = {
            name: Buffer(**(buffer | {key: tuple(buffer[key]) for key in ("shape", "recipe")}))
            for name, buffer in entry["buffers"].items()
        }
        front = entry["front"] and Launch.from_dict(entry["front"])
        launches = tuple(map(Launch.from_dict, entry["launches"]))
        return cls(**(entry | {"buffers": buffers, "launches": launches, "front": front}))


def aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES

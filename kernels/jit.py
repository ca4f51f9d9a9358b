"""Runs calls with Triton: compiled for the GPU at hand, or interpreted on the CPU under TRITON_INTERPRET=1."""

from importlib import import_module

import numpy as np
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .plan import Buffer, Call, Launch, Plan


@triton.jit
def step(
    first: tl.constexpr,  # a device function, called with its program number and *first_arguments
    first_arguments,
    n_first,  # programs of the first, if there is a second
    second: tl.constexpr,  # another for the programs from there on, or None
    second_arguments,
    PDL: tl.constexpr,  # the next kernel's programs may start before this one's end, and wait here for it
):
    pid = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if second is None:
        first(pid, *first_arguments)
    else:
        if pid < n_first:
            first(pid, *first_arguments)
        else:
            second(pid - n_first, *second_arguments)


def run(launch: Launch, tensors: dict[str, torch.Tensor]) -> None:
    """Do one launch; `tensors` has all its buffers, contiguous, on the device that Triton uses."""
    arguments = []
    for call in launch.calls:
        buffers = (None if name is None else tensors[name] for name in call.buffers)
        arguments += [device_function(call), (*buffers, *map(tl.constexpr, call.constants))]
        arguments += [call.programs] if len(arguments) == 2 else []
    if len(launch.calls) == 1:
        arguments += [None, ()]
    step[(launch.programs,)](*arguments, False, num_warps=launch.num_warps)


def device_function(call: Call) -> triton.JITFunction:
    file, function = call.op.split(".")
    return getattr(import_module(f".{file}", __package__), function)


class JitPlan:
    """Runs a plan in one arena on `device`: the reference for the executor of compiled kernels."""

    def __init__(self, plan: Plan, weights: dict[str, np.ndarray], device: str) -> None:
        self.plan = plan
        self.arena = torch.zeros(plan.arena_bytes, dtype=torch.uint8, device=device)
        self.tensors = {name: self.view(buffer) for name, buffer in plan.buffers.items()}
        for name, value in weights.items():
            self.tensors[name].copy_(torch.tensor(value))  # a copy: stored weights are read-only

    def view(self, buffer: Buffer) -> torch.Tensor:
        part = self.arena[buffer.offset_bytes :][: buffer.size_bytes]
        return part.view(getattr(torch, buffer.dtype)).view(buffer.shape)

    def launch(self) -> None:
        for launch in self.plan.launches:
            run(launch, self.tensors)

    def run(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """pixels (N, H, W, 3) uint8 RGB -> anomaly_map (N, H, W), pred_score (N,), embedding (N, D), fp32."""
        self.tensors["pixels"].copy_(torch.from_numpy(pixels))
        self.launch()
        made = (self.tensors[name].cpu().numpy().copy() for name in ("anomaly_map", "peaks", "embedding"))
        anomaly_map, peaks, embedding = made
        return anomaly_map, peaks.max(1), embedding

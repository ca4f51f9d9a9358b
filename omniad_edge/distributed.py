"""Several processes train one model, as torchrun starts them: the result is that of one with the whole batch.

Gradients are averaged by torch's DistributedDataParallel. What else looks at the whole batch is here: batch
norm's statistics and the jitter's noise. Every process must have the same number of images in a step.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import InputError, TrainingError
from .model import Neck, OmniAD


@dataclass(frozen=True)
class World:
    """This process's device and its place among all (rank of size); local_size: those on this machine."""

    device: torch.device
    rank: int = 0
    size: int = 1
    local_size: int = 1


@contextmanager
def processes(device: str) -> Iterator[World]:
    """Join the processes that torchrun started (gloo on the CPU, nccl on CUDA); a world of one without it.

    device: "auto" (CUDA if there is one), "cpu", "cuda" or "cuda:1". Raises InputError if there is none such,
    TrainingError if the processes do not find each other.
    """
    chosen = choose_device(device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(chosen)
        return
    rank, local_size = int(os.environ["RANK"]), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    try:
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    except (RuntimeError, ValueError) as exc:
        raise TrainingError(f"process {rank} of {size} cannot join the others: {exc}") from exc
    try:
        yield World(chosen, rank, size, local_size)
    finally:
        dist.destroy_process_group()


def choose_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as exc:
        raise InputError(f'device: expected "auto", "cpu", "cuda" or "cuda:1"; got {name!r}') from exc
    there = torch.cuda.device_count()
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= there):
        raise InputError(f"device: expected the CPU or one of the {there} CUDA devices here; got {name!r}")
    return device


class Student(nn.Module):
    """The trained parts of a model: teacher features -> their reconstruction."""

    def __init__(self, model: OmniAD) -> None:
        super().__init__()
        self.neck, self.decoder = model.neck, model.decoder

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        return self.decoder(self.neck(*features))


def share(model: OmniAD, world: World) -> nn.Module:
    """The model's student; among several processes, all starting from the first one's weights."""
    student = Student(model)
    if world.size == 1:
        return student
    for tensor in model.state_dict().values():
        dist.broadcast(tensor, src=0)
    share_batch(model.neck, world)
    return DistributedDataParallel(student)


def share_batch(neck: Neck, world: World) -> None:
    """Batch statistics and jitter of the neck become those of the global batch."""
    for module in neck.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = GlobalBatchNorm  # the same parameters, buffers and names

    def draw_noise(x: Tensor) -> Tensor:
        """Every process draws the noise of the global batch and takes its own images' part."""
        noise = torch.randn(world.size, *x.shape, dtype=x.dtype, device=x.device)
        return noise[world.rank]

    neck.draw_noise = draw_noise


class GlobalBatchNorm(nn.BatchNorm2d):
    """Batch norm with the statistics of all processes' images; torch's SyncBatchNorm is for GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        mean = mean_over_processes(x.float().mean((0, 2, 3), keepdim=True))
        centred = x.float() - mean
        var = mean_over_processes(centred.square().mean((0, 2, 3), keepdim=True))
        with torch.no_grad():
            n = x.numel() / x.shape[1] * dist.get_world_size()
            self.running_mean.lerp_(mean.flatten(), self.momentum)
            self.running_var.lerp_(var.flatten() * (n / (n - 1)), self.momentum)
            self.num_batches_tracked += 1
        scale, shift = (p[:, None, None] for p in (self.weight, self.bias))
        return (centred * (var + self.eps).rsqrt() * scale + shift).to(x.dtype)


def mean_over_processes(x: Tensor) -> Tensor:
    """Mean of the processes' x, differentiable."""
    return SumOverProcesses.apply(x) / dist.get_world_size()


class SumOverProcesses(torch.autograd.Function):
    """Every process's loss depends on every process's x: the gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return total(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return total(gradient)


def total(x: Tensor) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x)
    return x


def mean_of_losses(losses: Tensor, world: World) -> Tensor:
    """The losses of all processes' images."""
    return losses if world.size == 1 else total(losses) / world.size

"""Buffers for kernels with a guard around: a stray read shows in the result, a stray write in the guard."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 4096  # elements, a multiple of the 256 bytes that Triton may assume


def guarded(value: torch.Tensor) -> torch.Tensor:
    """A copy on the device, with NaN (the largest value of integers) around it."""
    fill = float("nan") if value.is_floating_point() else torch.iinfo(value.dtype).max
    memory = torch.full((value.numel() + 2 * GUARD,), fill, dtype=value.dtype, device=DEVICE)
    memory[GUARD:-GUARD] = value.flatten().to(DEVICE)
    return memory[GUARD:-GUARD].view(value.shape)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Full of NaN, so that what is not written shows."""
    return guarded(torch.full(shape, float("nan"), dtype=dtype))


def unharmed(value: torch.Tensor) -> bool:
    """Whether nobody wrote around this tensor of `guarded`."""
    memory = torch.as_strided(value, (value.numel() + 2 * GUARD,), (1,), 0)
    guards = torch.cat((memory[:GUARD], memory[-GUARD:]))
    whole = guards.isnan() if value.is_floating_point() else guards == torch.iinfo(value.dtype).max
    return bool(whole.all())

"""From calls in reading order to launches, and from buffers to places in the arena."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from ..errors import InputError
from .plan import Buffer, Call, Launch, Plan, aligned

Sizes = dict[str, int]
PER_IMAGE = ("input", "output", "scratch")  # kinds of buffers whose first axis is the batch


def schedule(calls: Sequence[Call], written_before: set[str]) -> tuple[Launch, ...]:
    """Launches of one call or two, as few as list scheduling by the longest way to the end finds.

    calls: each buffer is written once, by the first call that names it; written_before: inputs and weights.
    """
    producer, needs = {}, []
    for index, call in enumerate(calls):
        named = {name for name in call.buffers if name is not None and name not in written_before}
        needs.append({producer[name] for name in named if name in producer})
        producer |= {name: index for name in named if name not in producer}
    way = [1] * len(calls)
    for index in reversed(range(len(calls))):
        for needed in needs[index]:
            way[needed] = max(way[needed], way[index] + 1)
    launches, done, left = [], set(), list(range(len(calls)))
    while left:
        ready = sorted((i for i in left if needs[i] <= done), key=lambda i: -way[i])[:2]
        launches.append(Launch(tuple(calls[i] for i in ready)))
        done.update(ready)
        left = [i for i in left if i not in done]
    return tuple(launches)


def place(launches: Sequence[Launch], scratch: Sizes, kept: Sizes) -> dict[str, int]:
    """Offset of each buffer in bytes; scratch ones share memory where they are not needed at the same launch.

    kept: sizes of the buffers that nothing else may overwrite.
    """
    offsets, end = {}, 0
    for name, size in kept.items():
        offsets[name] = end
        end += aligned(size)
    first, last = {}, {}
    for index, launch in enumerate(launches):
        for call in launch.calls:
            for name in filter(None, call.buffers):
                first.setdefault(name, index)
                last[name] = index
    placed: list[str] = []
    for name in sorted(scratch, key=lambda name: -scratch[name]):  # large ones first leaves smaller gaps
        size, offset = aligned(scratch[name]), end
        overlapping = (other for other in placed if first[other] <= last[name] and first[name] <= last[other])
        for other in sorted(overlapping, key=offsets.get):
            if offset + size <= offsets[other]:
                break
            offset = max(offset, offsets[other] + aligned(scratch[other]))
        offsets[name] = offset
        placed.append(name)
    return offsets


def arrange(
    batch: int,
    height: int,
    width: int,
    buffers: dict[str, Buffer],
    launches: tuple[Launch, ...],
    front: Launch | None = None,
) -> Plan:
    """The plan with every buffer in its place."""
    sizes = {
        kind: {n: b.size_bytes for n, b in buffers.items() if (b.kind == "scratch") is kind}
        for kind in (True, False)
    }
    offsets = place(launches, sizes[True], sizes[False])
    placed = {name: replace(buffer, offset_bytes=offsets[name]) for name, buffer in buffers.items()}
    return Plan(batch, height, width, placed, launches, front)


def for_batch(plan: Plan, batch: int) -> Plan:
    """The same network for another number of images; the kernels are the same too.

    Raises InputError for more images than the kernels' 32-bit offsets reach.
    """
    buffers = {
        name: replace(b, shape=(batch, *b.shape[1:])) if b.kind in PER_IMAGE else b
        for name, b in plan.buffers.items()
    }
    largest = max(prod(b.shape) for b in buffers.values() if b.kind in PER_IMAGE)
    if largest >= 1 << 31:
        raise InputError(
            f"images: expected fewer than {batch} of {plan.width}x{plan.height} at once, so that each buffer has "
            f"fewer than 2^31 elements; one would have {largest}. Smaller images, or tiles (--tiles), fit"
        )
    launches = tuple(
        Launch(tuple(replace(c, programs=c.programs // plan.batch * batch) for c in launch.calls))
        for launch in plan.launches
    )
    return arrange(batch, plan.height, plan.width, buffers, launches, plan.front)

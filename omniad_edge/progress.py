"""What takes long shows itself on stderr: a bar in a terminal, else a plain line, at most one in five seconds."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_EVERY_S = 5.0

Report = Callable[[dict], None]
PhaseReport = Callable[
    [str, int, int], None
]  # name of the phase, steps done, steps of it; at its end these are equal


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress_display() -> Iterator[Report]:
    """Give a function that takes training's reports: epoch, epochs, step, steps, loss, lr; at an epoch's end
    also seconds and perhaps val_loss."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield plain_lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("ETA"), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("training", total=None)

        def update(report: dict) -> None:
            done = report["epoch"] - 1 + report["step"] / report["steps"]
            bar.update(task, description=describe(report), completed=done, total=report["epochs"])

        yield update


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Give a function that takes how many of `total` are done."""
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


@contextmanager
def phase_display(what: str) -> Iterator[PhaseReport]:
    """Give a function that takes reports of phases, which may lie within each other; calls must take turns."""
    console, started = Console(stderr=True), time.monotonic()
    if not console.is_terminal:
        say(f"{what}; this takes minutes")
        yield plain_phases(what, started)
        say(f"{what}: ended after {time.monotonic() - started:.0f} s")
        return
    text = TextColumn("{task.description}", markup=False)  # a phase's name may have brackets
    columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bars:
        bars.add_task(what, total=None)
        tasks = {}

        def update(phase: str, done: int, steps: int) -> None:
            if done == steps:
                if phase in tasks:
                    bars.remove_task(tasks.pop(phase))
            elif phase in tasks:
                bars.update(tasks[phase], completed=done)
            else:
                tasks[phase] = bars.add_task(f"  {phase}", total=steps)

        yield update


def plain_phases(what: str, started: float) -> PhaseReport:
    last_line = started

    def line(phase: str, done: int, steps: int) -> None:
        nonlocal last_line
        now = time.monotonic()
        if now - last_line >= LINE_EVERY_S:
            last_line = now
            say(f"{what}: {phase}, {done} of {steps}, {now - started:.0f} s")

    return line


def plain_lines() -> Report:
    """Prints the end of the first and of the last epoch, and of those in between every LINE_EVERY_S."""
    started = time.monotonic()
    first, last_line = 0, -LINE_EVERY_S

    def line(report: dict) -> None:
        nonlocal first, last_line
        epoch, epochs = report["epoch"], report["epochs"]
        first = first or epoch  # of this call: a resumed run does not begin with epoch 1
        now = time.monotonic() - started
        if "seconds" not in report or (epoch < epochs and now - last_line < LINE_EVERY_S):
            return
        last_line = now
        left = now / (epoch - first + 1) * (epochs - epoch)
        say(f"{describe(report)}, {now:.0f} s, {left:.0f} s left")

    return line


def describe(report: dict) -> str:
    text = f"epoch {report['epoch']}/{report['epochs']}, loss {report['loss']:.4f}, lr {report['lr']:g}"
    return text + (f", held out {report['val_loss']:.4f}" if "val_loss" in report else "")

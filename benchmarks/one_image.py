"""The time of one image and the memory it takes, of several methods in turn, each in a process of its own.

As a script it serves one of our engines, until its stdin ends:
    python benchmarks/one_image.py FILE BACKEND PRECISION THREADS HEIGHT WIDTH
"""

import json
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from omniad_edge.errors import OmniADError

SAMPLES, WARM_UP = 30, 3


def time_in_turns(commands: Mapping[str, Sequence[str]]) -> dict[str, dict]:
    """p50, p90 and raw samples in ms and the peak in MiB of each command, whose process must `serve` (process.py).

    Each round asks all of them once, in an order shuffled anew, so that the machine's noise hits all alike.
    Raises OmniADError if one ends before its time.
    """
    answers = {name: [] for name in commands}
    shuffle = random.Random(0).shuffle
    with ExitStack() as stack:
        processes = {name: stack.enter_context(start(command)) for name, command in commands.items()}
        for index in range(-WARM_UP, SAMPLES):
            shuffle(order := list(processes))
            for name in order:
                answer = ask(name, processes[name])
                if index >= 0:
                    answers[name].append(answer)
    return {name: summary(given) for name, given in answers.items()}


def start(command: Sequence[str]) -> subprocess.Popen:
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def ask(name: str, process: subprocess.Popen) -> dict:
    try:
        process.stdin.write("\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())
    except (BrokenPipeError, ValueError) as exc:
        raise OmniADError(f"{name}: its process ended before it was timed; stderr above says why") from exc


def summary(answers: list[dict]) -> dict:
    samples_ms = [answer["ms"] for answer in answers]
    p50, p90 = np.percentile(samples_ms, (50, 90))
    times = {"p50_ms": round(float(p50), 3), "p90_ms": round(float(p90), 3), "samples_ms": samples_ms}
    return times | {"peak_mib": answers[-1]["peak_mib"]}


def serve_engine(file: str, backend: str, precision: str, threads: int, height: int, width: int) -> None:
    from cases import Case, open_case, random_pixels
    from process import serve

    run, _ = open_case(Case("", Path(file), backend, precision), threads)
    serve(partial(run, random_pixels((1, height, width, 3))))


if __name__ == "__main__":
    serve_engine(*sys.argv[1:4], *map(int, sys.argv[4:]))

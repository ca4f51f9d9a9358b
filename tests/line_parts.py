"""A camera and a detector that do what a test tells them."""

import threading
from dataclasses import replace
from queue import Empty, Queue
from time import monotonic

import numpy as np
from records import make_result

from omniad_edge.errors import CameraError
from omniad_edge.frame import EndOfSource, Frame


class FakeCamera:
    """Gives the frames pushed to it. answers: a software-triggered one gives a frame for each trigger."""

    def __init__(self, name="cam", live=True, software_trigger=False, answers=True) -> None:
        self.name, self.live, self.software_trigger, self.answers = name, live, software_trigger, answers
        self.queue: Queue = Queue()
        self.sequence = 0
        self.opened = self.triggers = 0
        self.refuses = 0  # so many attempts to open fail

    def push(self, value: int = 1, lost: int = 0) -> None:
        """A frame all of this value, after so many lost ones."""
        self.sequence += lost
        self.queue.put(self.make(value))

    def make(self, value: int = 1) -> Frame:
        image = np.random.default_rng(self.sequence).integers(60, 200, (8, 8, 3), np.uint8)
        image[0, 0] = value
        self.sequence += 1
        return Frame(image, self.sequence - 1, 0.0, self.name)

    def lose(self) -> None:
        self.queue.put(CameraError(f"{self.name}: connection reset"))

    def end(self) -> None:
        self.queue.put(EndOfSource())

    def open(self) -> None:
        self.opened += 1
        if self.refuses:
            self.refuses -= 1
            raise CameraError(f"{self.name}: connection refused")

    def read(self, timeout_s: float) -> Frame | None:
        try:
            item = self.queue.get(timeout=timeout_s)
        except Empty:
            return None
        if isinstance(item, Exception):
            raise item
        return replace(item, captured_s=monotonic(), source=self.name)

    def trigger(self) -> None:
        self.triggers += 1
        if self.answers:
            self.push()

    def close(self) -> None:
        pass


class FakeDetector:
    """Scores a frame by its first value: defective from 100 on; 13 raises. Closed `gate`: calls hang."""

    def __init__(self) -> None:
        self.products = ("gear", "cap")
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.batches: list[int] = []
        self.seen: list[str | None] = []

    def __call__(self, images, product=None):
        values = [int(image[0, 0, 0]) for image in images]
        if any(values):  # not a blank frame to warm up with
            self.entered.set()
            self.batches.append(len(values))
            self.seen.append(product)
            self.gate.wait()
        if 13 in values:
            raise ZeroDivisionError("division by zero")
        return [make_result(0.8 if value >= 100 else 0.2, product=product or "gear") for value in values]

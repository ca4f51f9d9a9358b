"""From capture to JSON lines: is every frame there, and what does the line add to the engine's time?

    python benchmarks/stream.py --json stream.json              an engine that waits 1 ms; 1,000 frames/s
    python benchmarks/stream.py --film line.mp4 --bundle line3.omniad --minutes 30

First form: frames of 640x480 arrive at a fixed rate, from one camera, from four in turn or from four at the same
instants (there the last of a burst also waits for the others' share of the CPU), are checked for camera faults,
wait 1 ms in the stand-in of an engine that resizes on its GPU, are judged (mask, regions of a 256x256 map) and
written as JSON lines. `overhead` is the time from a frame's arrival to its line in the file, less the call of the
detector that it was in: queues, threads, bookkeeping, JSON. Second form: the real engine on a film in a loop;
memory and the frames' age over time.
Data on stdout, progress on stderr; exit code 0, 1 failure (also if a frame is missing), 2 usage.
"""

import json
import sys
import tempfile
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from time import monotonic, sleep

import cv2
import numpy as np
from command import exit_code, make_parser, write_json
from machine import facts, load_average
from process import memory_mib

from omniad_edge import Detector
from omniad_edge.calibration import Calibration
from omniad_edge.errors import CameraError, InputError, OmniADError
from omniad_edge.frame import EndOfSource, Frame
from omniad_edge.line.line import Line
from omniad_edge.outputs.json_lines import JsonLines
from omniad_edge.progress import say
from omniad_edge.result import Result, decide

SIZE_PX = 256  # of the stand-in's anomaly maps
FRAME = (480, 640, 3)
SETTINGS = (  # cameras, frames/s of each, whether all expose at the same instant
    ("one camera, 1000 frames/s", 1, 1000, True),
    ("four cameras, 250 frames/s each", 4, 250, False),
    ("four cameras, 250 frames/s each, triggered together", 4, 250, True),
)
START_S = 1.0  # until the first frame: the line measures its engine meanwhile
PERCENTILES = (50, 90, 99, 100)
SAMPLE_EVERY_S = 10.0  # of memory and age


class PacedCamera:
    """Gives frames at a fixed rate, whether they are fetched or not: one not fetched in time is lost."""

    live, software_trigger = True, False

    def __init__(self, name: str, rate_hz: float, n_frames: int, first_s: float) -> None:
        """first_s: when the first frame comes, a time of `monotonic`."""
        self.start_s = first_s
        self.name, self.period_s, self.n_frames = name, 1 / rate_hz, n_frames
        rng = np.random.default_rng(7)
        self.images = [rng.integers(0, 256, FRAME, np.uint8) for _ in range(8)]
        self.count = 0

    def open(self) -> None:
        pass

    def read(self, timeout_s: float) -> Frame:
        if self.count == self.n_frames:
            raise EndOfSource
        due_s = self.start_s + self.count * self.period_s
        if (wait_s := due_s - monotonic()) > 0:
            sleep(wait_s)
        frame = Frame(self.images[self.count % len(self.images)], self.count, due_s, self.name)
        self.count += 1
        return frame

    def trigger(self) -> None:
        raise CameraError(f"{self.name}: runs by itself")

    def close(self) -> None:
        pass


class WaitingDetector:
    """Everything a Detector does, but its engine waits 1 ms a call and finds one defect in four."""

    products = ("part",)

    def __init__(self) -> None:
        self.calibration = Calibration(0.5, 10, None, 0.26, 0.95, 0, 0, 0.1)
        self.maps = np.random.default_rng(3).random((4, SIZE_PX, SIZE_PX), np.float32) * 0.4
        self.maps[0, 80:120, 80:120] = 0.9

    def __call__(self, images: list[np.ndarray], product: str | None = None) -> list[Result]:
        start = monotonic()
        sleep(0.001)
        inferred = monotonic()
        results = []
        for index, image in enumerate(images):
            anomaly_map = self.maps[(index + int(image[0, 0, 0])) % 4]
            decision = decide(anomaly_map, anomaly_map.max(), self.calibration, *image.shape[:2])
            results.append((decision, monotonic()))
        n = len(images)
        return [
            Result(
                **decision,
                product="part",
                product_assumed=False,
                speed_ms={
                    "preprocess": 0.0,
                    "engine": 1e3 * (inferred - start) / n,
                    "postprocess": 1e3 * (results[-1][1] - inferred) / n,
                    "total": 1e3 * (results[-1][1] - start),  # of the whole call, which this frame waited for
                },
                backend="waits 1 ms",
                precision="none",
            )
            for decision, _ in results
        ]


class TimedJsonLines(JsonLines):
    """JSON lines that note when each verdict's line was in the file."""

    def __init__(self, path: Path, keep: int) -> None:
        """keep: so many latest samples, as memory is measured too."""
        super().__init__(path)
        self.overhead_ms: deque[float] = deque(maxlen=keep)
        self.age_ms: deque[float] = deque(maxlen=keep)

    def write(self, records: list) -> None:
        super().write(records)
        now_s = monotonic()
        for record in records:
            if record.kind == "verdict" and record.results:
                age_ms = 1e3 * (now_s - record.frames[0].captured_s)
                self.age_ms.append(age_ms)
                self.overhead_ms.append(age_ms - record.results[0].speed_ms["total"])


def paced(label: str, n_cameras: int, rate_hz: float, together: bool, seconds: float) -> dict:
    """One setting's row."""
    n_frames, names = int(rate_hz * seconds), [f"camera {n}" for n in range(n_cameras)]
    expected, start_s = n_cameras * n_frames, monotonic() + START_S
    phase_s = 0 if together else 1 / rate_hz / n_cameras
    cameras = {
        name: PacedCamera(name, rate_hz, n_frames, start_s + index * phase_s) for index, name in enumerate(names)
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "verdicts.jsonl"
        output = TimedJsonLines(path, expected)
        started = monotonic()
        line = Line(WaitingDetector(), cameras).add(output)
        counts = line.run()
        took_s = monotonic() - started
        lines = [json.loads(text) for text in path.read_text().splitlines()]
    verdicts = [text for text in lines if text["kind"] == "verdict"]
    seen = {(frame["source"], frame["sequence"]) for verdict in verdicts for frame in verdict["frames"]}
    if not counts.inspected == len(verdicts) == len(seen) == expected:
        raise OmniADError(f"{label}: {expected} frames, {counts}, {len(verdicts)} lines of {len(seen)} frames")
    return {
        "setting": label,
        "frames": expected,
        "seconds": round(took_s, 1),
        "lost": 0,
        "overhead_ms": percentiles(output.overhead_ms),
        "age_ms": percentiles(output.age_ms),
    }


def percentiles(values: Iterable[float]) -> dict[str, float]:
    values = list(values)
    return {f"p{p}" if p < 100 else "max": round(float(np.percentile(values, p)), 3) for p in PERCENTILES}


# ---- a film in a loop


def film(path: Path, bundle: Path, minutes: float) -> dict:
    """The real engine on a film again and again at the film's rate: memory and the frames' age over time."""
    capture = cv2.VideoCapture(str(path))
    rate_hz = capture.get(cv2.CAP_PROP_FPS)
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1])
    capture.release()
    if not frames:
        raise InputError(f"{path}: expected a film, no frame can be read")
    detector, samples = Detector(bundle), []
    camera = PacedCamera("film", rate_hz, int(60 * minutes * rate_hz), monotonic() + START_S)
    camera.images = frames
    with tempfile.TemporaryDirectory() as folder:
        output = TimedJsonLines(Path(folder) / "verdicts.jsonl", int(SAMPLE_EVERY_S * rate_hz))
        line = Line(detector, camera).add(output)
        next_s = monotonic() + SAMPLE_EVERY_S
        for _ in line:
            if monotonic() >= next_s:
                next_s += SAMPLE_EVERY_S
                age = percentiles(output.age_ms)
                samples.append({"seconds": round(line.snapshot().uptime_s), **memory_mib(), **age})
                say(str(samples[-1]))
        counts = line.snapshot().counts
    return {"film": path.name, "rate_hz": rate_hz, "minutes": minutes, "counts": str(counts), "samples": samples}


# ---- command line


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each setting (default: 20)")
    parser.add_argument("--film", type=Path, help="loop this film through a real engine instead")
    parser.add_argument("--bundle", type=Path, help="the engine for --film")
    parser.add_argument("--minutes", type=float, default=30.0, help="of --film (default: 30)")
    args = parser.parse_args(argv)
    if (args.film is None) != (args.bundle is None):
        parser.error("--film and --bundle: give both or none")
    report = {"schema": 1, "machine": facts(), "load_before": load_average()}

    def work() -> None:
        if args.film:
            report["film"] = film(args.film, args.bundle, args.minutes)
        else:
            report["rows"] = [paced(*setting, args.seconds) for setting in SETTINGS]
            for row in report["rows"]:
                print(json.dumps(row))
        write_json(args.json, report)

    return exit_code("stream", work)


if __name__ == "__main__":
    sys.exit(main())

"""Energy of an image on a Jetson: each case runs back to back while the module's power is read."""

import threading
from collections.abc import Callable
from time import perf_counter, sleep

from omniad_edge.jetson import Jetson

SECONDS = 5.0  # of each case, and of doing nothing before
PERIOD_S = 0.02  # between readings; a reading of three rails over I2C takes some milliseconds


def measure_energy(runs: dict[str, Callable[[], object]], jetson: Jetson, seconds: float = SECONDS) -> list[dict]:
    """A row for each case, whose call computes one image; none where the power of a module cannot be read.

    mj_per_image is mean power times time over images; mj_per_image_above_idle the part that the work adds.
    """
    if jetson.module_mw() is None:
        return []
    idle_mw, _ = mean_power(lambda: sleep(seconds), jetson)
    return [energy_row(name, run, jetson, idle_mw, seconds) for name, run in runs.items()]


def energy_row(name: str, run: Callable[[], object], jetson: Jetson, idle_mw: float, seconds: float) -> dict:
    images = 0
    start = perf_counter()

    def work() -> None:
        nonlocal images
        while perf_counter() - start < seconds:
            run()
            images += 1

    mean_mw, samples = mean_power(work, jetson)
    taken_s = perf_counter() - start
    return {
        "case": name,
        "images": images,
        "seconds": round(taken_s, 6),
        "power_samples": samples,
        "idle_mw": round(idle_mw, 1),
        "mean_mw": round(mean_mw, 1),
        "mj_per_image": round(mean_mw * taken_s / images, 3),
        "mj_per_image_above_idle": round((mean_mw - idle_mw) * taken_s / images, 3),
    }


def mean_power(work: Callable[[], object], jetson: Jetson) -> tuple[float, int]:
    """Of the module while `work` runs, in mW; and from how many readings."""
    readings, done = [], threading.Event()

    def read() -> None:
        while True:
            readings.append(jetson.module_mw())
            if done.wait(PERIOD_S):
                return

    reader = threading.Thread(target=read)
    reader.start()
    try:
        work()
    finally:
        done.set()
        reader.join()
    known = [value for value in readings if value is not None]
    return sum(known) / len(known), len(known)


def print_energy(rows: list[dict]) -> None:
    for row in rows:
        mean, idle = (row[f"{what}_mw"] / 1000 for what in ("mean", "idle"))
        above = row["mj_per_image_above_idle"]
        print(f"{row['case']:<28}{row['mj_per_image']:.1f} mJ an image, {above:.1f} above idle", end="")
        print(f" ({mean:.2f} W, idle {idle:.2f} W, {row['images']} images of 1920x1080)")

"""Parts that arrive one by one: does an engine that was idle take longer than one that runs all the time?"""

from time import perf_counter, sleep

import numpy as np

from omniad_edge import Detector

RATES_HZ = (1, 5, 20)
FRAME = (1080, 1920, 3)
LEAST_IDLE = 0.2  # of the period; an arrival rate that leaves less is left out, as the engine would never be idle


def measure_paced(detectors: dict[str, Detector], samples: int) -> list[dict]:
    """Frame to verdict of 1080p frames, back to back and at each rate, in milliseconds; every detector in turn.

    Of rates at which the engine would hardly be idle there is no row.
    """
    frame = np.random.default_rng(5).integers(0, 256, FRAME, np.uint8)
    rows = []
    for name, detector in detectors.items():
        busy = row(name, "back to back", [call_ms(detector, frame) for _ in range(samples + 2)][2:])
        rows.append(busy)
        for rate in RATES_HZ:
            idle_s = 1 / rate - busy["p50_ms"] / 1e3
            if idle_s < LEAST_IDLE / rate:
                continue
            values = []
            for _ in range(samples):
                sleep(idle_s)
                values.append(call_ms(detector, frame))
            paced = row(name, f"{rate} per s", values)
            rows.append(paced | {"ratio": round(paced["p50_ms"] / busy["p50_ms"], 2)})
    return rows


def call_ms(detector: Detector, frame: np.ndarray) -> float:
    start = perf_counter()
    detector(frame)
    return 1e3 * (perf_counter() - start)


def row(name: str, arrivals: str, samples_ms: list[float]) -> dict:
    p50, p99 = np.percentile(samples_ms, (50, 99))
    return {
        "case": name,
        "arrivals": arrivals,
        "p50_ms": round(float(p50), 3),
        "p99_ms": round(float(p99), 3),
        "samples_ms": [round(value, 3) for value in samples_ms],
    }

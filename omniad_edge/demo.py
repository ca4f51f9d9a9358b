"""`omniad demo`: everything the product does, on a small generated line, in a few minutes on two cores."""

import csv
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from .detector import Detector
from .evaluate import Evaluation, calibrate_bundle, evaluate_model, report_evaluation
from .export.bundle_export import export_bundle
from .metrics import mean_metrics
from .model import PRESETS
from .products import write_conveyor, write_line
from .progress import say
from .report import write_metrics_json
from .result import GOOD, Result
from .train import train
from .versions import versions

SIZE_PX = 128
EPOCHS = 60
CONFIG = replace(PRESETS["small"], depths=(1, 1, 1, 1), height=SIZE_PX, width=SIZE_PX)
PARTS = {"n_train": 60, "n_calibration": 160, "n_test_good": 20, "n_test_per_kind": 6}
MAX_FALSE_REJECT = 0.05


def run_demo(out: Path) -> None:
    """Generate the line, train, export, calibrate, evaluate, inspect a film; a table and `out`/report.html.

    What a finished earlier call left in `out` is used again.
    """
    started = time.perf_counter()
    bundle, film, truth = out / "line.omniad", out / "conveyor.mp4", out / "conveyor.csv"
    say(f"1/5 generating three products in {out}")
    write_line(out / "line", **PARTS)
    write_conveyor(film, truth, n_parts=10)
    data = out / "line" / "data"

    say("2/5 training one model on the good images of all three")
    run = out / "run"
    trained = train(
        data,
        run,
        CONFIG,
        epochs=EPOCHS,
        backbone_weights="procedural",
        cache_features=True,
        resume=(run / "last.safetensors").exists(),
    )
    say("3/5 exporting in fp16, behind the parity gate")
    export_bundle(run, bundle, fp16=True)
    say("4/5 calibrating on good images that were not trained on")
    calibrate_bundle(bundle, out / "line" / "calibration", MAX_FALSE_REJECT)
    say("5/5 measuring detection on test images and inspecting the conveyor")
    evaluation = evaluate_model(bundle, data)
    results = inspect_film(Detector(bundle), film, truth)
    table, latency = summary(evaluation, results)
    evaluation.facts.update(
        {
            "training": f"{trained.trained_on} good images, {EPOCHS} epochs, {trained.seconds:.0f} s",
            "bundle": f"{bundle.name}, {bundle.stat().st_size / 1e6:.1f} MB",
            "measured": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        }
    )
    report, result = out / "report.html", out / "result.json"
    report_evaluation(report, "omniad-edge demo line", evaluation, latency)
    seconds = f"{time.perf_counter() - started:.0f} s"
    write_metrics_json(result, evaluation.metrics, evaluation.facts | latency | {"demo, whole": seconds})
    Console().print(table)
    for name, path in (("report", report), ("figures", result), ("bundle", bundle)):
        print(f"{name + ':':<8} {path}")
    say(f"done in {seconds}")


def inspect_film(detector: Detector, film: Path, truth: Path) -> list[tuple[str, Result]]:
    """Every frame of the conveyor film through the detector: (true kind, result) each."""
    with truth.open(newline="") as file:
        rows = list(csv.DictReader(file))
    capture = cv2.VideoCapture(str(film))
    results = []
    for row in rows:
        _, frame = capture.read()
        results.append((row["kind"], detector(frame, row["product"])))
    capture.release()
    return results


def summary(evaluation: Evaluation, results: list[tuple[str, Result]]) -> tuple[Table, dict[str, str]]:
    """The closing table, and the film's rows for the report."""
    table = Table(title="omniad-edge demo", caption="latency: camera frame to verdict, on the conveyor film")
    for heading in ("product", "image AUROC", "pixel AUROC", "AUPRO", "p50 ms", "p99 ms", "film verdicts right"):
        table.add_column(heading, justify="left" if heading == "product" else "right")
    latency = {}
    for metrics in (*evaluation.metrics, mean_metrics(evaluation.metrics)):
        of = [(kind, r) for kind, r in results if metrics.product in (r.product, "mean")]
        p50, p99 = np.percentile([result.speed_ms["total"] for _, result in of], (50, 99))
        right = sum((kind != GOOD) == (result.pred_label != GOOD) for kind, result in of)
        values = (metrics.image_auroc, metrics.pixel_auroc, metrics.aupro)
        cells = [f"{100 * value:.1f}" for value in values] + [f"{p50:.1f}", f"{p99:.1f}", f"{right}/{len(of)}"]
        table.add_row(metrics.product, *cells)
        latency[f"{metrics.product}: frame to verdict, p50 / p99"] = f"{p50:.1f} / {p99:.1f} ms"
        latency[f"{metrics.product}: film verdicts right"] = f"{right} of {len(of)} frames"
    return table, latency

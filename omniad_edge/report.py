"""What an evaluation found: an HTML report of one file, JSON, CSV and a console table.

The HTML needs nothing but itself: styles, charts (SVG) and pictures (JPEG) are inside, no script, no network.
Blue is good and orange is defective everywhere; wrong verdicts are marked in words, not by colour alone.
"""

import base64
import csv
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import cv2
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.markup import escape as escape_markup
from rich.table import Table

from . import page
from .data import GOOD
from .errors import InputError
from .files import atomic_write
from .metrics import METRICS, ProductMetrics, checked_scores, mean_metrics, roc_curve

HEADINGS = (
    *("Product", "Good", "Defective", "Image AUROC", "Image AP", "Image F1-max"),
    *("Pixel AUROC", "Pixel AP", "Pixel F1-max", "AUPRO", "mAD"),
)
PICTURE_PX = 320  # longest side; shown at half of it, sharp on a phone too
BINS = 40

# The scale's colours are those of `Result.draw`: no tint at 0, then OpenCV's turbo map, 0.5 is the threshold.
PICTURES = """<p class="muted">Left: image. Right: heatmap, from the usual on good parts
<span class="scale">threshold</span> to twice as far; white outline: mask, above the threshold.</p>"""


@dataclass(frozen=True)
class Case:
    """One inspected image to show.

    image, overlay: (H, W, 3) uint8 BGR; the overlay is `Result.draw`'s, with heatmap and mask outline.
    kind: "good" or the defect's name. pred_label: as in `Result`; all but "good" are rejected.
    Raises InputError if a picture is anything else or a number is not finite.
    """

    image: np.ndarray
    overlay: np.ndarray
    product: str
    kind: str
    pred_score: float
    threshold: float
    path: str
    pred_label: str

    def __post_init__(self) -> None:
        for name, picture in (("image", self.image), ("overlay", self.overlay)):
            is_array = isinstance(picture, np.ndarray)
            if not is_array or picture.dtype != np.uint8 or picture.shape[2:] != (3,) or not picture.size:
                came = f"{picture.dtype} {picture.shape}" if is_array else type(picture).__name__
                raise InputError(f"{self.path}: {name}: expected uint8 (H, W, 3) BGR, got {came}")
        for name, value in (("pred_score", self.pred_score), ("threshold", self.threshold)):
            if not math.isfinite(value):
                raise InputError(f"{self.path}: {name}: expected a finite number, got {value}")

    @property
    def is_good(self) -> bool:
        return self.kind == GOOD

    @property
    def is_rejected(self) -> bool:
        return self.pred_label != GOOD

    @property
    def mark(self) -> str:
        """One of "MISS", "FALSE REJECT" and "correct"."""
        if self.is_rejected != self.is_good:
            return "correct"
        return "FALSE REJECT" if self.is_good else "MISS"


@dataclass(frozen=True)
class ProductScores:
    """All test scores of one product: scores (N,) finite, labels (N,) bool, True is defective.

    rejected: (N,) bool, the verdicts; of parts that are not recognised they do not follow from the score.
    Raises InputError if they are anything else.
    """

    product: str
    scores: np.ndarray
    labels: np.ndarray
    threshold: float
    rejected: np.ndarray

    def __post_init__(self) -> None:
        checked_scores(self.scores, self.labels)
        checked_scores(self.scores, self.rejected)
        if not math.isfinite(self.threshold):
            raise InputError(f"{self.product}: threshold: expected a finite number, got {self.threshold}")

    # In float64: NumPy rounds the threshold to float32 to compare it with such scores, and verdicts flip.
    @property
    def good(self) -> np.ndarray:
        return np.asarray(self.scores, np.float64)[~np.asarray(self.labels)]

    @property
    def defective(self) -> np.ndarray:
        return np.asarray(self.scores, np.float64)[np.asarray(self.labels)]

    @property
    def mistakes(self) -> tuple[int, int]:
        """The number of defective images missed and of good ones rejected."""
        labels, rejected = np.asarray(self.labels), np.asarray(self.rejected)
        return int((labels & ~rejected).sum()), int((rejected & ~labels).sum())


def choose_cases(
    kinds: Sequence[str], scores: Sequence[float], rejected: Sequence[bool], per_group: int = 6
) -> list[int]:
    """Indices of one product's images worth a picture, so that only their overlays need be drawn.

    The lowest-scored misses and the highest false rejects, `per_group` of each, then of every kind the
    image with the middle score among those judged rightly. Raises InputError on NaN and unequal lengths.
    """
    values = np.asarray(scores, dtype=np.float64)
    good = np.array([kind == GOOD for kind in kinds], dtype=bool)
    if not len(values) == len(good) == len(rejected):
        came = f"{len(good)}, {len(values)} and {len(rejected)}"
        raise InputError(f"expected one kind, score and verdict an image, got {came}")
    if not np.isfinite(values).all():
        raise InputError("scores: expected finite numbers, got NaN or inf")
    ascending = np.argsort(values, kind="stable")
    misses = [int(i) for i in ascending if not good[i] and not rejected[i]]
    false_rejects = [int(i) for i in ascending[::-1] if good[i] and rejected[i]]
    typical = []
    for kind in sorted(set(kinds)):
        right = [int(i) for i in ascending if kinds[i] == kind and rejected[i] != good[i]]
        typical += right[len(right) // 2 :][:1]
    return misses[:per_group] + false_rejects[:per_group] + typical


def write_report(
    path: str | Path,
    title: str,
    facts: Mapping[str, str],
    metrics: Sequence[ProductMetrics],
    scores: Sequence[ProductScores] = (),
    cases: Sequence[Case] = (),
    latency: Mapping[str, str] | None = None,
) -> None:
    """Write the HTML report, atomically.

    facts: what was measured and where (weights, preset, input size, machine, versions), in order.
    metrics: one a product; their mean is added if there are several. scores: gives a product its verdict
    counts and charts. cases: pictures, sorted here: worst misses, highest false rejects, then by kind.
    latency: further rows, for example {"engine, p50 / p99": "6.1 / 7.0 ms"}.
    Raises InputError if scores or cases belong to a product that has no metrics; OSError as `atomic_write`.
    """
    names = [one.product for one in metrics]
    strangers = {one.product for one in (*scores, *cases)} - set(names)
    if strangers:
        raise InputError(f"report: no metrics for {sorted(strangers)}; there are metrics for {names}")
    # A file name that is not UTF-8 has surrogates in Python; they must not cost the whole report.
    with atomic_write(path) as part, part.open("w", encoding="utf-8", errors="replace") as file:
        file.write(f"{page.head(title)}{page.pairs(facts)}<h2>Metrics</h2>\n{_metrics(metrics)}")
        if scores:
            file.write(f"<h2>Verdicts at the threshold</h2>\n{_verdicts(scores, names)}")
        if latency:
            file.write(f"<h2>In operation</h2>\n{page.pairs(latency)}")
        for index, name in enumerate(names):
            file.write(f'<section id="product-{index}">\n<h2>{escape(name)}</h2>\n')
            own = [one for one in scores if one.product == name]
            file.writelines(f'<div class="charts">\n{_roc(one)}{_histogram(one)}</div>\n' for one in own)
            file.writelines(_groups([case for case in cases if case.product == name], own))
            file.write("</section>\n")
        file.write("</body></html>\n")


def write_metrics_json(
    path: str | Path, metrics: Sequence[ProductMetrics], facts: Mapping[str, str] | None = None
) -> None:
    """Write {"facts", "products": [...], "mean"} with metrics as fractions 0..1, null where there is none."""
    mean = _numbers(mean_metrics(metrics))
    document = {"facts": dict(facts or {}), "products": [*map(_numbers, metrics)], "mean": mean}
    with atomic_write(path) as part:
        part.write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def write_metrics_csv(path: str | Path, metrics: Sequence[ProductMetrics]) -> None:
    """Write a header and one row a product, metrics as fractions 0..1, empty where there is none."""
    with atomic_write(path) as part, part.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ("product", "n_good", "n_defective", *METRICS, "mad"))
        writer.writeheader()
        writer.writerows(map(_numbers, metrics))


def metrics_table(metrics: Sequence[ProductMetrics]) -> Table:
    """The metrics in percent for the console, with their mean if there are several products."""
    # Two-line headings and narrow gaps: it fits 80 columns, and a long product name folds, not the numbers.
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column(HEADINGS[0], overflow="fold")
    for heading in HEADINGS[1:]:
        heading = heading.replace(" ", "\n").replace("Defective", "Defec-\ntive")
        table.add_column(heading, justify="right", no_wrap=True)
    for one in metrics:
        table.add_row(*map(escape_markup, _cells(one)))
    if len(metrics) > 1:
        table.add_section()
        table.add_row(*_cells(mean_metrics(metrics)), style="bold")
    return table


def _numbers(one: ProductMetrics) -> dict[str, str | int | float | None]:
    values = one.to_dict().items()
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in values}


def _percent(fraction: float) -> str:
    return "n/a" if math.isnan(fraction) else f"{100 * fraction:.1f}"


def _cells(one: ProductMetrics) -> list[str]:
    values = [_percent(getattr(one, name)) for name in (*METRICS, "mad")]
    return [one.product, str(one.n_good), str(one.n_defective), *values]


def _metrics(metrics: Sequence[ProductMetrics]) -> str:
    rows = [page.row(map(escape, _cells(one))) for one in metrics]
    mean = page.row(_cells(mean_metrics(metrics))) if len(metrics) > 1 else ""
    note = "Good and defective: number of test images. Metrics: percent, higher is better; mAD: mean of the seven."
    return f'{page.table(HEADINGS, rows, mean)}<p class="muted">{note}</p>\n'


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / whole:.1f} %)" if whole else "n/a"


def _verdicts(scores: Sequence[ProductScores], names: Sequence[str]) -> str:
    def row(one: ProductScores) -> str:
        link = f'<a href="#product-{names.index(one.product)}">{escape(one.product)}</a>'
        counts = map(_share, one.mistakes, (len(one.defective), len(one.good)))
        return page.row((link, f"{one.threshold:#.4g}", *counts))

    return page.table(("Product", "Threshold", "Defects missed", "Good rejected"), map(row, scores))


def _figure(label: str, axes: tuple[str, str], width: int, marks: Iterable[str], caption: str) -> str:
    """A chart with its marks in a frame of width x 210 px whose left upper corner is at (48, 12)."""
    box = f'width="{width + 60}" height="262" viewBox="0 0 {width + 60} 262"'
    frame = (
        f'<rect class="axis" x="48" y="12" width="{width}" height="210"/>'
        f'<text x="{48 + width / 2}" y="256" text-anchor="middle">{axes[0]}</text>'
        f'<text transform="translate(12 117) rotate(-90)" text-anchor="middle">{axes[1]}</text>'
    )
    svg = f'<svg {box} role="img" aria-label="{escape(label)}">{frame}{"".join(marks)}</svg>'
    return f"<figure>{svg}<figcaption class='muted'>{caption}</figcaption></figure>\n"


def _roc(one: ProductScores) -> str:
    """ROC curve with the threshold's own point."""
    fpr, tpr = roc_curve(one.scores, one.labels)
    if not len(fpr):
        return "<figure><p class='muted'>ROC curve: n/a, it needs good and defective images.</p></figure>\n"
    points = " ".join(f"{48 + 210 * x:.1f},{222 - 210 * y:.1f}" for x, y in zip(fpr, tpr, strict=True))
    now_x, now_y = (one.good > one.threshold).mean(), (one.defective > one.threshold).mean()
    marks = [
        '<line class="axis" x1="48" y1="222" x2="258" y2="12" stroke-dasharray="2 4"/>',
        f'<polyline class="curve" points="{points}"/>',
        f'<circle class="now" cx="{48 + 210 * now_x:.1f}" cy="{222 - 210 * now_y:.1f}" r="5"/>',
        *(f'<text x="{48 + 2.1 * n}" y="238" text-anchor="middle">{n}</text>' for n in (0, 50, 100)),
        *(f'<text x="42" y="{226 - 2.1 * n}" text-anchor="end">{n}</text>' for n in (0, 50, 100)),
    ]
    axes = "good rejected, %", "defects found, %"
    return _figure(f"ROC curve of {one.product}", axes, 210, marks, "ROC curve; the dot is the threshold")


def _histogram(one: ProductScores) -> str:
    """Good scores upwards, defective ones downwards, each as shares of its own class on one scale.

    The threshold is an edge between two bars, so a bar is wholly below it, or at it, or wholly above.
    """
    every = np.concatenate([one.good, one.defective, [one.threshold]])
    step = (every.max() - every.min()) / BINS or 1.0
    bins = np.append(np.ceil((every - one.threshold) / step).astype(int) - 1, 0)
    first, count = int(bins.min()), int(np.ptp(bins)) + 1  # the threshold and the 0 put bars -1 and 0 in
    bars = np.split(bins[: len(every) - 1] - first, [len(one.good)])
    shares = [np.bincount(bar, minlength=count) / max(len(bar), 1) for bar in bars]
    top, width = max(float(share.max()) for share in shares) or 1.0, 360 / count
    marks = []
    for name, share in zip(("good", "bad"), shares, strict=True):
        for index in np.flatnonzero(share):
            height = 98 * share[index] / top
            place = f'x="{48 + index * width:.1f}" y="{117 - height if name == "good" else 117:.1f}"'
            marks.append(f'<rect class="{name}" {place} width="{width - 1:.1f}" height="{height:.1f}"/>')
    cut, low, high = 48 - first * width, one.threshold + first * step, one.threshold + (first + count) * step
    place = f'x="{cut + 5:.1f}"' if cut < 228 else f'x="{cut - 5:.1f}" text-anchor="end"'
    marks += [
        '<line class="axis" x1="48" y1="117" x2="408" y2="117"/>',
        f'<line class="cut" x1="{cut:.1f}" y1="0" x2="{cut:.1f}" y2="222"/>',
        f'<text class="now" {place} y="9">threshold {one.threshold:#.4g}</text>',
        *(f'<text x="42" y="{121 + n}" text-anchor="end">{abs(n) / 0.98 * top:.3g}</text>' for n in (-98, 0, 98)),
        f'<text x="48" y="238">{low:#.4g}</text><text x="408" y="238" text-anchor="end">{high:#.4g}</text>',
    ]
    axes = "anomaly score, no unit", "share of its class, %"
    caption = f"{len(one.good)} good upwards in blue, {len(one.defective)} defective downwards in orange"
    return _figure(f"Scores of {one.product}", axes, 360, marks, caption)


def _groups(cases: Sequence[Case], scores: Sequence[ProductScores]) -> Iterator[str]:
    """Headings and pictures of one product's cases, the costliest mistakes first, each "shown of all"."""
    ordered = sorted(cases, key=lambda case: case.pred_score - case.threshold)
    by_kind = sorted(ordered, key=lambda case: (case.is_good, case.kind))
    groups = {
        "Worst misses": [case for case in ordered if case.mark == "MISS"],
        "Highest false rejects": [case for case in reversed(ordered) if case.mark == "FALSE REJECT"],
        "Judged rightly": [case for case in by_kind if case.mark == "correct"],
    }
    counts = [(*one.mistakes, len(one.scores) - sum(one.mistakes)) for one in scores]
    totals = np.sum(counts, axis=0) if counts else [len(group) for group in groups.values()]
    yield PICTURES if cases else ""
    for (heading, group), total in zip(groups.items(), totals, strict=True):
        if group:
            yield f'<h3>{heading} ({len(group)} of {total})</h3>\n<div class="cases">\n'
            yield from map(_case, group)
            yield "</div>\n"


def _case(case: Case) -> str:
    ratio = f" = {case.pred_score / case.threshold:.2f} × threshold" if case.threshold > 0 else ", threshold"
    return (
        f'<figure class="case {case.mark.lower().replace(" ", "-")}"><div class="pair">'
        f"{_picture(case.image, 'camera image')}{_picture(case.overlay, 'anomaly heatmap')}</div>"
        f'<figcaption><span class="mark">{case.mark}</span> {escape(case.kind)}, verdict {case.pred_label}<br>'
        f"score {case.pred_score:#.4g}{ratio} {case.threshold:#.4g}"
        f'<span class="path">{escape(case.path)}</span></figcaption></figure>\n'
    )


def _picture(pixels: np.ndarray, alt: str) -> str:
    height, width = pixels.shape[:2]
    shrink = min(1.0, PICTURE_PX / max(height, width))
    size = max(1, round(width * shrink)), max(1, round(height * shrink))
    small = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    encoded = base64.b64encode(cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, 85])[1]).decode()
    return f'<img src="data:image/jpeg;base64,{encoded}" width="{size[0]}" height="{size[1]}" alt="{alt}">'

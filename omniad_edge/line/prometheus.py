"""What Prometheus reads of a line: counted from its records, or looked up in its snapshot at each scrape."""

import threading
from collections import defaultdict, deque
from collections.abc import Iterator

import numpy as np

from ..errors import MissingDependencyError
from ..result import Result
from ..verdict import Late, Record, Status, Verdict
from .snapshot import Snapshot, Watched

SCORES = 1000  # the newest of a product, for the quantiles
QUANTILES = (0.5, 0.9, 0.99)
MAX_NAMES = 100  # of products, and of events; further ones are counted together
OTHERS = "others"
STAGES = ("preprocess", "engine", "postprocess")
CAMERA_STATES = ("connecting", "running", "lost", "ended")
FATES = ("inspected", "dropped", "late", "failed")
# Seconds: a stage takes from under a millisecond on a GPU to a second on a small CPU.
BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)


class LineMetrics:
    """count each record; `text` gives what /metrics says. Set `line` for what comes from its snapshot.

    Raises MissingDependencyError without prometheus-client.
    """

    line: Watched | None = None

    def __init__(self) -> None:
        try:
            import prometheus_client
            from prometheus_client import core
        except ImportError as exc:
            raise MissingDependencyError("prometheus-client", "line") from exc
        self._client = client = prometheus_client
        self._families = core
        self._registry = registry = client.CollectorRegistry()
        self._lock = threading.Lock()
        self._scores: dict[str, deque[tuple[float, float]]] = {}  # of each product: score, threshold
        self._names: dict[str, set[str]] = defaultdict(set)
        seconds = {"registry": registry, "buckets": BUCKETS}
        self._parts = client.Counter("omniad_parts", "Verdicts", ("decision", "product"), registry=registry)
        self._other = client.Counter(
            "omniad_other_products", "Frames that do not show the product", ("label",), registry=registry
        )
        self._events = client.Counter("omniad_events", "Status records", ("event",), registry=registry)
        self._stages = client.Histogram("omniad_stage_seconds", "A frame in a stage", ("stage",), **seconds)
        self._latency = client.Histogram("omniad_part_latency_seconds", "From trigger to verdict", **seconds)
        self._age = client.Histogram("omniad_frame_age_seconds", "From first frame to verdict", **seconds)
        registry.register(self)

    def count(self, record: Record) -> None:
        if isinstance(record, Verdict):
            self._parts.labels(record.decision, self._bounded("product", record.product)).inc()
            self._latency.observe(record.latency_ms / 1e3)
            if record.age_ms is not None:
                self._age.observe(record.age_ms / 1e3)
            for result in record.results:
                self._count_result(result)
        elif isinstance(record, Late):
            self._count_result(record.result)
        elif isinstance(record, Status):
            self._events.labels(self._bounded("event", record.event)).inc()

    def text(self) -> tuple[bytes, str]:
        """Prometheus' text format, and its content type."""
        return self._client.generate_latest(self._registry), self._client.CONTENT_TYPE_LATEST

    def collect(self) -> Iterator:
        """For the registry, at each scrape."""
        yield from self._score_quantiles()
        if self.line is not None:
            snapshot = self.line.snapshot()
            yield from self._line_metrics(snapshot)
            yield from self._camera_metrics(snapshot)
            yield from self._output_metrics(snapshot)

    def _bounded(self, label: str, name: str) -> str:
        """A time series for every name a trigger may invent would fill Prometheus."""
        names = self._names[label]
        if name not in names and len(names) >= MAX_NAMES:
            return OTHERS
        names.add(name)
        return name

    def _count_result(self, result: Result) -> None:
        for stage in STAGES:
            self._stages.labels(stage).observe(result.speed_ms[stage] / 1e3)
        if result.product_fault:  # its score is of no product
            self._other.labels(result.pred_label).inc()
            return
        with self._lock:
            newest = self._scores.setdefault(self._bounded("product", result.product), deque(maxlen=SCORES))
            newest.append((result.pred_score, result.threshold))

    def _score_quantiles(self) -> Iterator:
        help = f"of the last {SCORES} frames of a product"
        scores = self._gauge("omniad_score", f"Score {help}", "product", "quantile")
        ratios = self._gauge("omniad_score_to_threshold", f"Score / threshold {help}", "product", "quantile")
        with self._lock:
            newest = {product: np.array(values) for product, values in self._scores.items()}
        for product, values in newest.items():
            score, threshold = values.T
            above_zero = threshold > 0
            for quantile in QUANTILES:
                labels = [product, str(quantile)]
                scores.add_metric(labels, np.quantile(score, quantile))
                if above_zero.any():
                    ratio = score[above_zero] / threshold[above_zero]
                    ratios.add_metric(labels, np.quantile(ratio, quantile))
        return iter((scores, ratios))

    def _line_metrics(self, now: Snapshot) -> Iterator:
        info = self._families.InfoMetricFamily("omniad_line", "The line and what it inspects")
        info.add_metric([], {"line": now.line, "product": now.product or ""})
        yield info
        yield self._gauge("omniad_line_running", "1 while it inspects", value=now.state == "running")
        yield self._gauge("omniad_uptime_seconds", "Since the line was started", value=now.uptime_s)
        yield self._gauge("omniad_open_parts", "Triggered, without a verdict yet", value=now.open_parts)
        yield self._gauge("omniad_queue_depth", "Frames in a queue or in the engine", value=now.counts.waiting)
        yield self._counter("omniad_triggers", "Parts announced", value=now.triggers)
        decisions = self._counter("omniad_decisions", "Verdicts, as the line counts them", "decision")
        for decision, count in now.decisions.items():
            decisions.add_metric([decision], count)
        yield decisions

    def _camera_metrics(self, now: Snapshot) -> Iterator:
        captured = self._counter("omniad_frames_captured", "Frames that reached the line", "camera")
        frames = self._counter("omniad_frames", "Frames by what became of them", "camera", "fate")
        lost = self._counter("omniad_frames_lost", "Gaps in the camera's numbering", "camera")
        reconnects = self._counter("omniad_camera_reconnects", "Times it came back", "camera")
        states = self._gauge("omniad_camera_state", "1 for the state it is in", "camera", "state")
        faulty = self._gauge("omniad_camera_faulty", "1 while its frames are not fit to inspect", "camera")
        for camera in now.cameras:
            captured.add_metric([camera.name], camera.counts.captured)
            lost.add_metric([camera.name], camera.lost_frames)
            reconnects.add_metric([camera.name], camera.reconnects)
            faulty.add_metric([camera.name], bool(camera.fault))
            for fate in FATES:
                frames.add_metric([camera.name, fate], getattr(camera.counts, fate))
            for state in CAMERA_STATES:
                states.add_metric([camera.name, state], camera.state == state)
        return iter((captured, frames, lost, reconnects, states, faulty))

    def _output_metrics(self, now: Snapshot) -> Iterator:
        waiting = self._gauge("omniad_output_queue_depth", "Records that wait in memory", "output")
        spooled = self._gauge("omniad_spool_depth", "Records kept on disk until they can be sent", "output")
        records = self._counter("omniad_output_records", "Records by what became of them", "output", "fate")
        for output in now.outputs:
            waiting.add_metric([output.name], output.waiting)
            spooled.add_metric([output.name], output.spooled)
            for fate in ("written", "failed", "dropped"):
                records.add_metric([output.name, fate], getattr(output, fate))
        return iter((waiting, spooled, records))

    def _gauge(self, name: str, help: str, *labels: str, value: float | None = None):
        return self._families.GaugeMetricFamily(name, help, labels=labels or None, value=value)

    def _counter(self, name: str, help: str, *labels: str, value: float | None = None):
        return self._families.CounterMetricFamily(name, help, labels=labels or None, value=value)

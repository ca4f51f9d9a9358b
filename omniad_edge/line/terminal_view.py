"""What `omniad run` shows on stderr: a live view in a terminal, else a line every 10 s and one for each event."""

import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import datetime
from statistics import quantiles

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..credentials import without_credentials
from ..errors import InputError
from ..outputs.delivery import Output, OutputStatus
from ..verdict import NO_VERDICT, REJECT, Record, Status, Verdict, now
from .snapshot import CameraState, Snapshot, Watched

VERDICTS = 1000  # the newest, for the percentiles
NEWEST, TALL = 6, 32  # rejects, and events, to be seen on so many rows or more; half on fewer
LINE_EVERY_S = 10.0
REFRESH_HZ = 4
STATE_STYLES = {"running": "green", "ended": "dim", "starting": "yellow", "connecting": "yellow", "stopped": "dim"}


class TerminalView(Output):
    """`line.add(TerminalView())`; it ends with the line and leaves its last picture on the screen.

    console: of rich; stderr if not given
    """

    name = "terminal"
    kinds = ("verdict", "status")
    images = False

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._line: Watched | None = None
        self._live: Live | None = None
        self._lock = threading.Lock()
        self._latencies_ms: deque[float] = deque(maxlen=VERDICTS)
        self._ages_ms: deque[float] = deque(maxlen=VERDICTS)
        self._rejects: deque[Verdict] = deque(maxlen=NEWEST)
        self._events: deque[Status] = deque(maxlen=NEWEST)
        self._next_line_s = 0.0
        self._opened = False

    def attach(self, line: Watched) -> None:
        """line: anything with a `snapshot()`."""
        self._line = line

    def open(self) -> None:
        if self._line is None:
            raise InputError("terminal view: not part of a line; line.add(view) does it")
        self._next_line_s = time.monotonic() + LINE_EVERY_S
        if self._console.is_terminal and not self._console.is_dumb_terminal and self._live is None:
            self._live = Live(
                console=self._console,
                get_renderable=self.render,
                refresh_per_second=REFRESH_HZ,
                redirect_stdout=sys.stdout.isatty(),  # results in a pipe or a file are not for the screen
            )
            self._live.start()
        self._opened = True

    def write(self, records: list[Record]) -> None:
        for record in records:
            if isinstance(record, Verdict):
                self._take_verdict(record)
            elif isinstance(record, Status):
                with self._lock:
                    self._events.append(record)
                if self._live is None:
                    self._print(event_line(record))
        if self._live is None and time.monotonic() >= self._next_line_s:
            self._next_line_s = time.monotonic() + LINE_EVERY_S
            self._print(self._summary(self._line.snapshot()))

    def close(self) -> None:
        """The last counts stay to be read."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._opened:
            self._print(self._summary(self._line.snapshot()))
        self._opened = False

    def render(self) -> Group:
        """The whole view, for 80 columns and more."""
        snapshot = self._line.snapshot()
        rows = NEWEST if self._console.height >= TALL else NEWEST // 2
        with self._lock:
            rejects, events = list(self._rejects)[-rows:], list(self._events)[-rows:]
        parts = [headline(snapshot), self._figures(snapshot), cameras_table(snapshot.cameras)]
        if snapshot.outputs:
            parts.append(outputs_table(snapshot.outputs))
        if rejects:
            parts.append(rejects_table(rejects))
        if events:
            parts.append(events_table(events))
        return Group(*parts)

    def _take_verdict(self, verdict: Verdict) -> None:
        with self._lock:
            self._latencies_ms.append(verdict.latency_ms)
            if verdict.age_ms is not None:
                self._ages_ms.append(verdict.age_ms)
            if verdict.decision == REJECT:
                self._rejects.append(verdict)

    def _figures(self, snapshot: Snapshot) -> Table:
        with self._lock:
            latency, age = percentiles(self._latencies_ms), percentiles(self._ages_ms)
        parts = sum(snapshot.decisions.values())
        rejects, none = snapshot.decisions.get(REJECT, 0), snapshot.decisions.get(NO_VERDICT, 0)
        share = f" ({100 * rejects / parts:.1f} %)" if parts else ""
        shown = f"{parts:,}: {rejects:,} rejected{share}, {none:,} without verdict, {snapshot.open_parts} open"
        grid = Table.grid(padding=(0, 2, 0, 0))
        for what, figure in (("parts", shown), ("latency", latency), ("frame age", age)):
            grid.add_row(Text(what, "dim"), Text(figure, no_wrap=True, overflow="ellipsis"))
        return grid

    def _summary(self, snapshot: Snapshot) -> str:
        with self._lock:
            latency = percentiles(self._latencies_ms)
        parts, counts = sum(snapshot.decisions.values()), snapshot.counts
        text = (
            f"{clock(now())} {parts} parts, {snapshot.decisions.get(REJECT, 0)} rejected, "
            f"{snapshot.decisions.get(NO_VERDICT, 0)} no verdict, latency {latency}, "
            f"{counts.captured} frames: {counts.dropped} dropped, {counts.late} late, {counts.failed} failed"
        )
        away = [f"{one_line(camera.name)} {trouble(camera)}" for camera in snapshot.cameras if trouble(camera)]
        return ", ".join([text, *away])

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def percentiles(values_ms: deque[float]) -> str:
    if not values_ms:
        return "-"
    cuts = quantiles(values_ms, n=100, method="inclusive") if len(values_ms) > 1 else [values_ms[0]] * 99
    return f"p50 {cuts[49]:.1f} ms, p99 {cuts[98]:.1f} ms"


def trouble(camera: CameraState) -> str:
    """Why this camera gives no frames to inspect; "" if it does, or has ended."""
    if camera.state in ("connecting", "lost"):
        return camera.state
    return camera.fault if camera.state == "running" else ""


def headline(snapshot: Snapshot) -> Text:
    hours, seconds = divmod(int(snapshot.uptime_s), 3600)
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append(one_line(snapshot.line), "bold")
    text.append(f"  {one_line(snapshot.product or 'product as triggered')}  ")
    text.append(snapshot.state, STATE_STYLES[snapshot.state])
    text.append(f"  {hours}:{seconds // 60:02}:{seconds % 60:02}")
    return text


def cameras_table(cameras: Sequence[CameraState]) -> Table:
    """gaps: frames that were lost before they reached the line; losses: of the camera, that it came back from."""
    table = new_table(["camera", "state"], ("frames", "dropped", "late", "failed", "waiting", "gaps", "losses"))
    table.columns[1].no_wrap = True  # says what to do; a name can be guessed from its beginning
    for camera in cameras:
        counts, state = camera.counts, (trouble(camera) or camera.state).removesuffix(" frame")
        values = counts.captured, counts.dropped, counts.late, counts.failed, counts.waiting
        shown = Text(state, STATE_STYLES.get(state, "bold red"))
        add_row(table, [camera.name, shown], [*values, camera.lost_frames, camera.reconnects])
    return table


def outputs_table(outputs: Sequence[OutputStatus]) -> Table:
    table = new_table(["output"], ("written", "waiting", "spooled", "dropped", "failed"))
    for output in outputs:
        add_row(
            table, [output.name], [output.written, output.waiting, output.spooled, output.dropped, output.failed]
        )
    return table


def rejects_table(rejects: Sequence[Verdict]) -> Table:
    table = new_table(["last rejects", "part", "score", "threshold", "product", "reason"])
    for verdict in reversed(rejects):
        score, threshold = ("-" if x is None else f"{x:.4f}" for x in (verdict.pred_score, verdict.threshold))
        shown = clock(verdict.origin.time), verdict.part_id, score, threshold, verdict.product, verdict.reason
        add_row(table, shown)
    return table


def events_table(events: Sequence[Status]) -> Table:
    table = new_table(["last events", "", "", ""])
    for status in reversed(events):
        add_row(table, (clock(status.origin.time), status.event, status.who, status.detail))
    return table


def new_table(words: Sequence[str], numbers: Sequence[str] = ()) -> Table:
    """Columns of words give way where the terminal is narrow; numbers stay whole."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for name in words:
        table.add_column(Text(name, no_wrap=True, overflow="ellipsis"), overflow="ellipsis")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True, header_style="dim")
    return table


def add_row(table: Table, words: Sequence[str | Text], numbers: Sequence[int] = ()) -> None:
    cells = [word if isinstance(word, Text) else Text(one_line(word)) for word in words]
    for cell in cells:
        cell.no_wrap, cell.overflow = True, "ellipsis"
    table.add_row(*cells, *(f"{number:,}" for number in numbers))


def event_line(status: Status) -> str:
    words = ": ".join(filter(None, (status.event, status.who, status.detail)))
    return f"{clock(status.origin.time)} {one_line(words)}"


def one_line(words: str) -> str:
    """Nothing in it moves the cursor or changes colours: words may come from a device."""
    printable = "".join(letter if letter.isprintable() else " " for letter in without_credentials(words))
    return " ".join(printable.split())


def clock(time_utc: str) -> str:
    """ISO 8601 -> the wall clock here."""
    return datetime.fromisoformat(time_utc).astimezone().strftime("%H:%M:%S")

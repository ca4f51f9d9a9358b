"""`omniad run line3.toml`: the line of a file as a program, for a terminal or for systemd."""

import sys
from pathlib import Path

from ..credentials import without_credentials
from ..errors import OmniADError
from .file import read_line_file
from .health import Health
from .line import Line
from .log import StatusLog, start_log
from .snapshot import Snapshot
from .systemd import Watchdog
from .terminal_view import TerminalView


def run_file(path: Path, check: bool = False) -> int:
    """Run the line until its sources end or SIGINT or SIGTERM comes; or only check its file. -> exit code: 1 where
    an output lost records, too.

    Raises InputError with every mistake of the file, else the error that stopped the line.
    """
    line = read_line_file(path)
    if check:
        print(summary(path, line))
        return 0
    start_log()
    # Both would say every event twice; and a log that a program reads has to be JSON alone.
    line.add(TerminalView() if sys.stderr.isatty() else StatusLog())
    watchdog = Watchdog(line)
    watchdog.start()
    try:
        line.run()
    except OmniADError:
        raise
    except Exception as exc:
        print(f"error: {without_credentials(f'{type(exc).__name__}: {exc}')}", file=sys.stderr)
        return 1
    finally:
        watchdog.stop()
        print(closing_counts(line.snapshot()), flush=True)
    return 1 if any(output.lost for output in line.snapshot().outputs) else 0


def closing_counts(snapshot: Snapshot) -> str:
    """What became of parts and frames; and of records, for outputs that have not taken all."""
    counts, decisions = snapshot.counts, snapshot.decisions
    frames = f"{counts.inspected} inspected, {counts.dropped} dropped, {counts.late} late, {counts.failed} failed"
    parts = ", ".join(f"{count} {decision.replace('_', ' ')}" for decision, count in decisions.items())
    lines = [f"parts {sum(decisions.values())}: {parts}; frames {counts.captured}: {frames}"]
    for output in snapshot.outputs:
        if output.lost or output.spooled:
            lost = f"{output.failed} failed, {output.dropped} dropped, {output.spooled} left in the spool"
            lines.append(f"{output.name}: {output.written} records written, {lost}")
    return "\n".join(lines)


def summary(path: Path, line: Line) -> str:
    """What would run."""
    detector, parts, outputs = line.detector, line.parts, [queue.output for queue in line.outputs]
    product = line.product or f"as recognised, else by the strictest threshold: {detector.strictest_product()}"
    if detector.not_recognised:
        product = f"{product} (products are not recognised: {detector.not_recognised})"
    if parts.each_frame:
        trigger = f"every frame is a part, policy {parts.policy}"
    else:
        period = line.period
        trigger = f"every {period:g} s" if isinstance(period, int | float) else period.name
        trigger += f", {parts.views} frame{'s' * (parts.views > 1)} of each source a part"
    if line.deadline_ms is not None:
        trigger += f", within {line.deadline_ms:g} ms, else {parts.safe}"
    rows = [
        ("line", line.name),
        ("product", product),
        ("engine", f"{detector.tiling}, {detector.reason}"),
        *(("source", name) for name in line.sources),
        ("trigger", trigger),
        *((("health", address_of(out)) if isinstance(out, Health) else ("output", out.name)) for out in outputs),
    ]
    return "\n".join([f"{path}: no mistakes", *(f"  {what:<8} {text}" for what, text in rows)])


def address_of(health: Health) -> str:
    host = f"[{health.host}]" if ":" in health.host else health.host
    return f"http://{host}:{health.port}/healthz and /metrics"

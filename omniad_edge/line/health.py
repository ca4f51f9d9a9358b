"""A line's health over HTTP: /metrics for Prometheus, /healthz for whoever asks whether it inspects."""

import json
import logging
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from socket import AF_INET, AF_INET6
from socketserver import ThreadingTCPServer

from ..errors import InputError, OutputError
from ..outputs.delivery import Output
from ..verdict import Record, Status
from .prometheus import LineMetrics
from .snapshot import Snapshot, Watched

QUIET_S = 10.0  # without a sign of life of the line, it hangs
FAILING_S = 30.0  # an output, the engine, or what triggers, that fails for longer fails hard
REQUEST_S = 5.0  # for a client to say what it wants

log = logging.getLogger(__name__)


class Health(Output):
    """Serves http://host:port/metrics and /healthz while the line runs; `line.add(Health())` is all it needs.

    host: only this machine can ask unless told otherwise; "0.0.0.0" lets the whole network, without a password
    port: 0 takes a free one, which `port` says after `open`
    /healthz answers 200 if the line runs and progresses, every camera runs with sound frames and no output,
    engine or trigger has failed for more than 30 s; else 503. Both with JSON: "healthy", "reasons" in words, and
    the line's name, state and uptime.
    Raises InputError for a port out of range, MissingDependencyError without prometheus-client; `open` raises
    OutputError if the port is taken or the address is not this machine's.
    """

    name = "health"
    images = False

    def __init__(self, port: int = 9464, host: str = "127.0.0.1") -> None:
        if not 0 <= port <= 65535:
            raise InputError(f"port: expected 0 to 65535, got {port!r}")
        self.host, self.port = host, port
        self._metrics = LineMetrics()
        self._line: Watched | None = None
        self._failing: dict[str, float] = {}  # outputs, triggers and the engine, and since when
        self._server: Server | None = None

    def attach(self, line: Watched) -> None:
        """line: anything with a `snapshot()`. Raises InputError if this belongs to another line already."""
        if self._line not in (None, line):
            raise InputError("health: serves one line; give each its own Health and port")
        self._line = self._metrics.line = line

    def open(self) -> None:
        try:
            server = Server(self, AF_INET6 if ":" in self.host else AF_INET)
        except OSError as exc:
            raise OutputError(
                f"health: cannot listen at {self.host}, port {self.port}: {exc.strerror or exc}; "
                "stop the other program there, or choose another port"
            ) from exc
        self.port, self._server = server.server_address[1], server
        threading.Thread(target=server.serve_forever, args=(0.05,), name="health", daemon=True).start()

    def write(self, records: list[Record]) -> None:
        for record in records:
            self._metrics.count(record)
            if isinstance(record, Status):
                self._follow(record)

    def _follow(self, status: Status) -> None:
        what, _, how = status.event.partition(" ")
        if what not in ("output", "trigger", "engine"):
            return
        if how in ("failed", "lost"):
            self._failing.setdefault(f"{what} {status.who}".rstrip(), time.monotonic())
        elif how == "back":
            self._failing.pop(f"{what} {status.who}".rstrip(), None)

    def close(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def health(self) -> dict:
        """What /healthz says: {"healthy": bool, "reasons": [...], "line": ..., "state": ..., "uptime_s": ...}."""
        if self._line is None:
            return {"healthy": False, "reasons": ["not part of a line: line.add(health) does it"]}
        snapshot = self._line.snapshot()
        reasons = list(troubles(snapshot, dict(self._failing), time.monotonic()))
        told = {"line": snapshot.line, "state": snapshot.state, "uptime_s": round(snapshot.uptime_s, 1)}
        return {"healthy": not reasons, "reasons": reasons, **told}

    def metrics(self) -> tuple[bytes, str]:
        """What /metrics says, and its content type."""
        return self._metrics.text()


def troubles(snapshot: Snapshot, failing: dict[str, float], now_s: float) -> Iterator[str]:
    """In words, what keeps the line from inspecting.

    failing: outputs, triggers and the engine, as far as they fail, and since when; times are of time.monotonic()
    """
    if snapshot.state != "running":
        yield f"the line is {snapshot.state}"
    if (quiet_s := now_s - snapshot.last_progress_s) > QUIET_S and snapshot.state != "stopped":
        yield f"the line gave no sign of life for {quiet_s:.0f} s"
    for camera in snapshot.cameras:
        if camera.state not in ("running", "ended"):
            yield f"camera {camera.name}: {camera.state}"
        elif camera.fault:
            yield f"camera {camera.name}: {camera.fault}"
    for name, since_s in failing.items():
        if now_s - since_s > FAILING_S:
            yield f"{name}: failing for {now_s - since_s:.0f} s"


class Server(ThreadingTCPServer):
    """Not http.server's own, which asks the DNS for its name and may wait for that."""

    allow_reuse_address = True  # of connections that are closed, not of a port that somebody listens at
    daemon_threads = True
    block_on_close = False

    def __init__(self, health: Health, family: int) -> None:
        self.health, self.address_family = health, family
        super().__init__((health.host, health.port), Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Called for clients that hang up, which is no matter of ours."""


class Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_S

    def do_GET(self) -> None:
        try:
            answer = self._look_up(self.path.partition("?")[0])
        except Exception as exc:
            log.exception("health page: %s", self.path)
            answer = 500, f"{type(exc).__name__}; the log has more\n".encode(), "text/plain; charset=utf-8"
        self._answer(*answer)

    def _look_up(self, path: str) -> tuple[int, bytes, str]:
        if path == "/metrics":
            return 200, *self.server.health.metrics()
        if path == "/healthz":
            health = self.server.health.health()
            return 200 if health["healthy"] else 503, json.dumps(health).encode(), "application/json"
        return 404, b"/metrics and /healthz are here\n", "text/plain; charset=utf-8"

    do_HEAD = do_GET

    def _answer(self, code: int, body: bytes, content_type: str) -> None:
        self.send_response(code)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """A scrape every few seconds is no news."""

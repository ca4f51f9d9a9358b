"""Brokers, disks and outputs that fail under a running line: no verdict late, no record lost."""

from collections.abc import Iterator
from contextlib import suppress
from threading import Event
from time import monotonic

import pytest
from line_parts import FakeDetector
from records import small_disk, wait_until
from test_mqtt import Broker, Subscriber, needs_broker
from test_webhook import Server
from watched_line import NOISE_MS, LargerCamera, WatchedLine, p99_ms

from omniad_edge.outputs import delivery
from omniad_edge.outputs.mqtt import Mqtt
from omniad_edge.outputs.rejects import Rejects
from omniad_edge.outputs.webhook import Webhook
from omniad_edge.verdict import Verdict


class Inspected(WatchedLine):
    """A line whose camera gives a frame when the test wants it."""

    def __init__(self, folder, *added, **options) -> None:
        self.camera = LargerCamera()
        super().__init__(folder, FakeDetector(), self.camera, *added, **options)

    def inspect(self, defective: bool = False) -> Verdict:
        number = self.camera.sequence
        self.camera.push(120 if defective else 50)
        return self.keeper.wait(number + 1)[number]

    def inspect_for(self, seconds: float) -> list[Verdict]:
        """Parts one after another, every tenth defective."""
        end_s, verdicts, pace = monotonic() + seconds, [], Event()
        while monotonic() < end_s:
            verdicts.append(self.inspect(defective=len(verdicts) % 10 == 9))
            pace.wait(0.005)
        return verdicts

    def status(self, name: str) -> delivery.OutputStatus:
        return next(status for status in self.line.snapshot().outputs if status.name == name)

    def ids(self) -> list[str]:
        return [verdict.to_dict()["id"] for verdict in self.keeper.of("verdict")]


@pytest.fixture
def quick(monkeypatch):
    """Short pauses between tries."""
    monkeypatch.setattr(delivery, "RETRY_S", (0.02, 0.2))


@pytest.fixture
def broker(tmp_path) -> Iterator[Broker]:
    broker = Broker(tmp_path).start()
    yield broker
    broker.stop()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@needs_broker
@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_a_broker_that_is_away_delays_no_verdict_and_gets_all_later(tmp_path, broker, quick, seconds):
    subscriber = Subscriber(broker)
    output = Mqtt(f"mqtt://{broker.address}/line3", tmp_path / "spool.db")
    with Inspected(tmp_path, output) as line:
        up = line.inspect_for(1)
        broker.stop()
        down = line.inspect_for(seconds)
        line.wait_event("output failed", output.name)
        broker.start()
        up += line.inspect_for(1)
        line.wait_event("output back", output.name)
        ids = line.ids()
        subscriber.wait(lambda s: any(ids[-1].encode() in text for _, text, _ in s.messages[-20:]))
        wait_until(lambda: line.status(output.name).spooled == 0)
        status = line.status(output.name)
        assert status.dropped == status.failed == 0
    subscriber.close()
    assert [record_id for record_id in subscriber.ids() if record_id in set(ids)] == ids
    assert len(down) > 50 and p99_ms(down) < p99_ms(up) + NOISE_MS


def test_a_full_disk_stops_nothing_and_loses_nothing(tmp_path, quick, server):
    with small_disk(tmp_path / "disk", 16_384) as disk:
        rejects = Rejects(disk / "rejects")
        webhook = Webhook(f"http://127.0.0.1:{server.port}/", disk / "spool.db")
        with Inspected(disk, rejects, webhook) as line:
            for _ in range(5):
                line.inspect()
            wait_until(lambda: set(line.ids()) <= set(server.taken))
            names = [webhook.name, f"JSON lines {line.file}", rejects.name]
            fill(disk / "ballast")
            full = line.inspect_for(2)
            for name in names:
                line.wait_event("output failed", name)
            assert line.status(names[1]).waiting and line.line.snapshot().state == "running"
            (disk / "ballast").unlink()
            free = line.inspect_for(1)
            for name in names:
                line.wait_event("output back", name)
            wait_until(lambda: set(line.ids()) <= set(server.taken))
            wait_until(lambda: not any(line.status(name).waiting for name in names))
            assert not any(line.status(name).dropped or line.status(name).failed for name in names)
            rejected = [v.origin.number for v in line.keeper.of("verdict") if v.is_rejected]
        saved = [int(path.stem.rsplit("-", 1)[1]) for path in sorted((disk / "rejects").glob("*/*.json"))]
    assert sorted(saved) == rejected and len(rejected) >= 10
    assert server.taken == list(dict.fromkeys(server.taken))
    assert p99_ms(full) < p99_ms(free) + NOISE_MS


def fill(path) -> None:
    """Until the disk takes not one byte more."""
    with suppress(OSError), open(path, "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def test_slow_and_raising_outputs_delay_no_verdict_and_are_counted(tmp_path):
    def slow(verdict):
        Event().wait(0.5)

    def broken(verdict):
        raise ValueError("no such coil")

    with Inspected(tmp_path) as line:
        alone = line.inspect_for(1)
    (tmp_path / "more").mkdir()
    with Inspected(tmp_path / "more", slow, broken) as line:
        beside = line.inspect_for(2)
        line.wait_event("output error", "broken")
        wait_until(lambda: line.status("broken").failed == len(beside))
    slow_status, n = line.status("slow"), len(beside)
    assert n > 50 and p99_ms(beside) < p99_ms(alone) + NOISE_MS
    assert slow_status.written + slow_status.dropped == n and 2 <= slow_status.written <= 8
    assert (line.status("broken").failed, line.status("broken").written) == (n, 0)

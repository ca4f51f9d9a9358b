"""The spool over kills, full disks and broken files; sending from it over a network that comes and goes."""

import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from records import Events, check, make_status, make_verdict, of_every_kind, small_disk, started, wait_until

from omniad_edge.errors import OutputError
from omniad_edge.outputs import delivery
from omniad_edge.outputs.delivery import OutputStatus
from omniad_edge.outputs.spool import ROW_BYTES, Spool, SpoolCounts, Spooled


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(delivery, "RETRY_S", (0.001, 0.002))
    monkeypatch.setattr(delivery, "TICK_S", 0.005)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "spool" / "mqtt.db"


def opened(path: Path, limit_bytes: int = 10**9, report=lambda event, detail: None) -> Spool:
    queue = Spool(path, limit_bytes, report)
    queue.open()
    return queue


def texts(queue: Spool) -> list[str]:
    return [text for _, text in queue.oldest(10**6)]


# ---- the file


def test_first_in_is_first_out(path):
    queue = opened(path)
    queue.append(["a", "b"])
    queue.append(["c"])
    assert texts(queue) == ["a", "b", "c"] and queue.depth == 3
    (_, first), (second_id, second) = queue.oldest(2)
    assert (first, second) == ("a", "b")
    queue.remove(second_id)
    assert texts(queue) == ["c"] and queue.depth == 1
    queue.close()


def test_it_is_there_after_a_restart(path):
    for number in range(3):
        queue = opened(path)
        assert queue.depth == number
        queue.append([f"text {number}"])
        queue.close()
    queue = opened(path)
    assert texts(queue) == ["text 0", "text 1", "text 2"]
    assert queue.counts.bytes == 3 * (6 + ROW_BYTES)
    queue.close()


def test_an_id_is_never_used_again(path):
    """Or a `remove` that comes late could take a record that was not sent."""
    queue = opened(path)
    queue.append(["a"])
    [(first, _)] = queue.oldest(5)
    queue.remove(first)
    queue.append(["b"])
    queue.remove(first)
    assert texts(queue) == ["b"]
    queue.close()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.one_of(st.lists(st.integers(0, 300), min_size=1, max_size=5), st.just("remove"))))
def test_it_is_a_bounded_queue(tmp_path_factory, steps):
    limit = 1000
    queue = opened(tmp_path_factory.mktemp("spool") / "s.db", limit)
    model, dropped, removed, number = [], 0, 0, 0
    for step in steps:
        if step == "remove":
            some = queue.oldest(2)
            if some:
                queue.remove(some[-1][0])
                model, removed = model[len(some) :], removed + len(some)
        else:
            new = [f"{number + i}".ljust(length, "x") for i, length in enumerate(step)]
            number += len(new)
            queue.append(new)
            model += new
            while sum(len(text) + ROW_BYTES for text in model) > limit:
                del model[0]
                dropped += 1
        assert texts(queue) == model
        size = sum(len(text) + ROW_BYTES for text in model)
        assert queue.counts == SpoolCounts(len(model), size, removed, dropped)
    queue.close()


def test_the_file_is_little_larger_than_the_limit_and_shrinks(path):
    queue = opened(path, limit_bytes=2_000_000)
    for number in range(200):
        queue.append([f"{number:05}".ljust(400, "x")] * 50)
    assert queue.depth == 2_000_000 // (400 + ROW_BYTES)
    wal = path.with_name(path.name + "-wal")
    assert path.stat().st_size < 1.25 * 2_000_000 and wal.stat().st_size < 6_000_000
    while rows := queue.oldest(100):
        queue.remove(rows[-1][0])
    queue.close()
    assert path.stat().st_size < 1_500_000


def test_two_processes_cannot_use_it(path):
    queue = opened(path)
    queue.append(["a"])
    second = Spool(path, 1000)
    with pytest.raises(OutputError, match=r"mqtt\.db: database is locked; another output or process uses it"):
        second.open()
    second.close()
    queue.append(["b"])
    assert texts(queue) == ["a", "b"]
    queue.close()
    second.open()
    assert second.depth == 2
    second.close()


def test_after_closing_it_says_so(path):
    queue = opened(path)
    queue.close()
    with pytest.raises(OutputError, match="it is closed"):
        queue.append(["a"])


def test_several_threads(path):
    queue = opened(path)
    got = []

    def take():
        while len(got) < 400:
            for row_id, text in queue.oldest(7):
                got.append(text)
                queue.remove(row_id)

    def give(name):
        for number in range(100):
            queue.append([f"{name}{number}", f"{name}{number}'"])

    threads = [threading.Thread(target=take), *(threading.Thread(target=give, args=(name,)) for name in "ab")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    wanted = [f"{number}{end}" for number in range(100) for end in ("", "'")]
    assert [text[1:] for text in got if text[0] == "a"] == wanted == [text[1:] for text in got if text[0] == "b"]
    assert queue.counts == SpoolCounts(0, 0, 400, 0)
    queue.close()


# ---- kills


KILLED = """
    import sys
    from omniad_edge.outputs.spool import Spool
    spool = Spool(sys.argv[1], 10**9)
    spool.open()
    number = int(sys.argv[2])
    while True:
        count = 1 + number % 4
        spool.append([str(number + i).ljust(50 + number % 3000) for i in range(count)])
        number += count
        print("appended", number, flush=True)
        if number % 3 == 0:
            row_id, text = spool.oldest(1)[0]
            print("removing", int(text), flush=True)
            spool.remove(row_id)
"""


def test_what_was_appended_survives_a_kill_at_any_moment(path):
    randoms = random.Random(4)
    appended, removing = 0, -1
    for _ in range(5):
        command = [sys.executable, "-c", textwrap.dedent(KILLED), str(path), str(appended)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            lines = [process.stdout.readline() for _ in range(randoms.randrange(1, 400))]
            process.send_signal(signal.SIGKILL)
            lines += [line for line in process.stdout if line.endswith("\n")]
        for what, number in (line.split() for line in lines):
            if what == "appended":
                appended = int(number)
            else:
                removing = int(number)
        queue = opened(path)
        numbers = [int(text) for text in texts(queue)]
        # One more append or one removal may have been done without saying so.
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        assert numbers[0] in (removing, removing + 1) or removing == -1
        assert appended - 1 <= numbers[-1] < appended + 4
        assert queue.depth == len(numbers)
        appended = numbers[-1] + 1
        queue.close()
        db = sqlite3.connect(path)
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        db.close()


# ---- a full disk


def test_a_full_disk_is_an_error_until_there_is_space(tmp_path):
    with small_disk(tmp_path / "disk", size_kb=1024) as disk:
        queue = opened(disk / "s.db")
        queue.append(["first"])
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(500_000))
        acknowledged = 1
        with pytest.raises(OutputError, match=r"s\.db: database or disk is full; free space"):
            while True:
                queue.append([str(acknowledged).ljust(900)] * 3)
                acknowledged += 3
        assert queue.depth == acknowledged == len(texts(queue))  # all can be sent, and removed
        queue.remove(queue.oldest(1)[0][0])
        assert queue.depth == acknowledged - 1
        ballast.unlink()
        queue.append(["last"])
        queue.close()
        queue = opened(disk / "s.db")
        left = texts(queue)
        assert len(left) == acknowledged and left[-1] == "last"
        queue.close()


def test_what_cannot_be_removed_is_not_given_again(path, monkeypatch):
    """A full disk may refuse even that: what was sent is not sent over and over."""
    queue = opened(path)
    queue.append(["a", "b", "c"])

    def full(db):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(queue, "_remove", full)
    with pytest.raises(OutputError, match="full"):
        queue.remove(queue.oldest(1)[0][0])
    assert texts(queue) == ["b", "c"] and queue.depth == 3
    monkeypatch.undo()
    queue.remove(0)
    assert texts(queue) == ["b", "c"] and queue.counts.removed == 1
    queue.remove(queue.oldest(1)[0][0])
    assert texts(queue) == ["c"] and queue.counts.removed == 2
    queue.close()


# ---- a broken file


@pytest.mark.parametrize("content", [b"not a database" * 100, b"SQLite format 3\0" + bytes(4080)])
def test_a_file_that_is_no_spool_is_moved_aside(content, path):
    path.parent.mkdir()
    path.write_bytes(content)
    seen = []
    queue = opened(path, report=lambda *what: seen.append(what))
    queue.append(["a"])
    assert texts(queue) == ["a"]
    queue.close()
    [aside] = path.parent.glob("mqtt.db.damaged-*")
    assert aside.read_bytes() == content
    [(event, detail)] = seen
    assert event == "spool damaged" and str(aside) in detail


def test_an_empty_file_is_a_new_spool(path):
    path.parent.mkdir()
    path.touch()
    queue = opened(path, report=lambda *what: pytest.fail(str(what)))
    queue.append(["a"])
    assert queue.depth == 1
    queue.close()


@pytest.mark.parametrize("seed", range(12))
def test_pages_overwritten_at_random_stop_nothing(seed, path):
    """Whatever is damaged: in a few tries records go through again, or the file is moved aside."""
    randoms = random.Random(seed)
    queue = opened(path)
    queue.append([str(number).ljust(300) for number in range(300)])
    queue.close()
    content = bytearray(path.read_bytes())
    if seed % 4 == 3:
        del content[randoms.randrange(100, len(content)) :]
    else:
        for _ in range(1 + seed):
            at = randoms.randrange(len(content) - 200)
            content[at : at + 200] = randoms.randbytes(200)
    path.write_bytes(content)
    seen = []
    queue = Spool(path, 10**9, lambda *what: seen.append(what))
    came = False
    for _ in range(20):
        try:
            queue.open()
            queue.append(["new"])
            while rows := queue.oldest(50):
                came = came or rows[-1][1] == "new"
                queue.remove(rows[-1][0])
        except OutputError:
            continue
        if came:
            break
    assert came, seen
    queue.close()


def test_damage_found_while_running_is_survived(path):
    seen = []
    queue = opened(path, report=lambda *what: seen.append(what))
    queue.append([str(number).ljust(300) for number in range(300)])
    queue.close()
    content = bytearray(path.read_bytes())
    content[4096 * 8 : 4096 * 12] = bytes([0xEE]) * (4096 * 4)
    path.write_bytes(content)
    queue.open()
    assert queue.depth == 300 and seen == []
    with pytest.raises(OutputError, match="malformed"):
        queue.oldest(1000)
    assert [event for event, _ in seen] == ["spool damaged"] and queue.counts == SpoolCounts(0, 0, 0, 300)
    queue.append(["new"])
    assert texts(queue) == ["new"]
    queue.close()


# ---- sending


class Network(Spooled):
    """A network that takes what `script` says: "ok", "away", or refuses."""

    send_batch = 10

    def __init__(self, path: Path, keep: str = "1MB") -> None:
        super().__init__("network", path, keep)
        self.away = threading.Event()
        self.connected = threading.Event()
        self.refuse: set[str] = set()
        self.sent: list[str] = []
        self.left = False
        self.tries = 0

    def connect(self):
        self.tries += 1
        if self.away.is_set():
            raise ConnectionRefusedError("nobody there")
        self.connected.set()

    def send(self, messages):
        if self.away.is_set():
            raise OutputError("no acknowledgement")
        for message in messages:
            check(message.record)
        self.sent += [message.record["id"] for message in messages if message.record["id"] not in self.refuse]
        return [f"{m.record['id']} is not wanted" for m in messages if m.record["id"] in self.refuse]

    def disconnect(self):
        self.left = True


def ids(*numbers: int) -> list[str]:
    return [f"a1b2-{number}" for number in numbers]


def test_records_go_through_the_spool_in_order(path):
    network, events = Network(path), Events()
    queue = started(network, events)
    records = of_every_kind()
    for record in records:
        queue.put(record)
    wait_until(lambda: queue.status().written == 5)
    assert queue.status() == OutputStatus("network", waiting=0, written=5, failed=0, dropped=0, spooled=0)
    queue.close(20)
    assert network.sent == ids(1, 2, 3, 4, 5) and network.left and events.seen == []


def test_a_network_that_is_away_delays_nothing_and_loses_nothing(path, quick):
    network, events = Network(path), Events()
    network.away.set()
    queue = started(network, events)
    for number in range(50):
        queue.put(make_verdict(number))
    wait_until(lambda: queue.status().spooled == 50)
    assert queue.status() == OutputStatus("network", waiting=0, written=0, failed=0, dropped=0, spooled=50)
    assert "nobody there" in events.wait("output failed")
    tries = network.tries
    wait_until(lambda: network.tries > tries + 3)
    network.away.clear()
    events.wait("output back")
    wait_until(lambda: queue.status().spooled == 0)
    assert network.sent == ids(*range(50)) and queue.status().written == 50
    queue.close(20)
    assert events.names() == ["output failed", "output back"]


def test_what_was_not_sent_is_sent_after_the_next_start(path, quick):
    network = Network(path)
    network.away.set()
    queue = started(network, Events())
    for number in range(3):
        queue.put(make_status(number))
    wait_until(lambda: queue.status().spooled == 3)
    queue.close(20)
    assert queue.status() == OutputStatus("network", waiting=0, written=0, failed=0, dropped=0, spooled=3)
    again = Network(path)
    queue = started(again, Events())
    queue.put(make_status(3))
    wait_until(lambda: queue.status().spooled == 0 and len(again.sent) == 4)
    queue.close(20)
    assert again.sent == ids(0, 1, 2, 3)


def test_closing_sends_what_it_can(path, monkeypatch):
    network = Network(path)
    queue = started(network, Events())
    assert network.connected.wait(20)
    for number in range(300):
        queue.put(make_status(number))
    queue.close(20)
    assert network.sent == ids(*range(300)) and queue.status().spooled == 0


def test_a_refused_record_is_counted_and_holds_up_none(path, quick):
    network, events = Network(path), Events()
    network.refuse = set(ids(2, 4))
    network.away.set()
    queue = started(network, events)
    for number in range(6):
        queue.put(make_status(number))
    wait_until(lambda: queue.status().spooled == 6)
    network.away.clear()
    wait_until(lambda: queue.status().spooled == 0 and queue.status().failed == 2)
    queue.close(20)
    assert network.sent == ids(0, 1, 3, 5)
    assert queue.status() == OutputStatus("network", waiting=0, written=4, failed=2, dropped=0, spooled=0)
    assert [detail for event, _, detail in events.seen if event == "output refused"] == [
        "2 records: a1b2-4 is not wanted"
    ]


def test_a_full_spool_drops_the_oldest_and_says_so(path, quick):
    network, events = Network(path, keep="2kB"), Events()
    network.away.set()
    queue = started(network, events)
    for number in range(40):
        queue.put(make_status(number))
        wait_until(lambda: queue.status().waiting == 0)
    status = queue.status()
    assert 5 < status.spooled < 40 and status.dropped == 40 - status.spooled
    assert events.wait("output dropped") == "1 record: the spool was full or damaged"
    network.away.clear()
    wait_until(lambda: queue.status().spooled == 0)
    queue.close(20)
    assert network.sent == ids(*range(40 - status.spooled, 40))
    assert queue.status().written + queue.status().dropped == 40


def test_text_damaged_on_disk_is_refused_and_passed_over(path):
    network, events = Network(path), Events()
    spooled = opened(path)
    spooled.append(['{"id": "a1b2', "\udcff".encode(errors="replace").decode()])
    spooled.close()
    queue = started(network, events)
    queue.put(make_status(1))
    wait_until(lambda: queue.status().spooled == 0 and bool(network.sent))
    queue.close(20)
    assert network.sent == ids(1)
    assert (queue.status().written, queue.status().failed) == (1, 2)


def test_status_does_not_wait_for_a_disk_that_hangs(path):
    """A line asks for it with its lock held."""
    network = Network(path)
    queue = started(network, Events())
    assert network.connected.wait(20)
    with network._spool._lock:
        for number in range(5):
            queue.put(make_status(number))
        answered = []
        asking = threading.Thread(target=lambda: answered.append(queue.status()))
        asking.start()
        asking.join(20)
        assert answered[0].waiting == 5
    queue.close(20)
    assert network.sent == ids(*range(5))


def test_an_error_of_ours_while_sending_is_reported_and_loses_nothing(path, quick):
    network, events = Network(path), Events()
    send, errors = network.send, [KeyError("topic")]

    def broken(messages):
        if errors:
            raise errors.pop()
        return send(messages)

    network.send = broken
    queue = started(network, events)
    queue.put(make_status(1))
    assert events.wait("output failed") == "KeyError: 'topic'"
    events.wait("output back")
    wait_until(lambda: network.sent == ids(1))
    queue.close(20)

"""Every line of the file is a whole record, whatever happens to the process, the disk and the file."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from records import Events, check, make_status, make_verdict, of_every_kind, small_disk, started

from omniad_edge.errors import OutputError
from omniad_edge.outputs import delivery
from omniad_edge.outputs.json_lines import JsonLines


@pytest.fixture
def opened(tmp_path):
    output = JsonLines(tmp_path / "logs" / "line.jsonl")
    output.open()
    yield output
    output.close()


def numbers(path: Path) -> list[int]:
    """Of the records in a file of whole lines."""
    text = path.read_text(encoding="ascii")
    assert text == "" or text.endswith("\n")
    return [int(check(json.loads(line))["id"].split("-")[1]) for line in text.splitlines()]


def test_each_record_is_a_line(opened):
    records = of_every_kind()
    opened.write(records[:2])
    opened.write(records[2:])
    assert [json.loads(line) for line in opened.path.read_text().splitlines()] == [r.to_dict() for r in records]
    assert numbers(opened.path) == [1, 2, 3, 4, 5]


def test_a_batch_is_one_write(opened, monkeypatch):
    writes = []
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: writes.append(data) or write(file, data))
    opened.write([make_status(number) for number in range(50)])
    assert len(writes) == 1 and writes[0].count(b"\n") == 50


def test_a_second_start_appends(opened):
    opened.write([make_status(1)])
    opened.close()
    opened.open()
    opened.write([make_status(2)])
    assert numbers(opened.path) == [1, 2]


@pytest.mark.parametrize("half", ['{"schema": 1, "ki', "{", '{"schema": 1}'])
def test_what_a_crash_cut_off_is_kept_and_ended(half, tmp_path):
    path = tmp_path / "line.jsonl"
    path.write_text('{"whole": 1}\n' + half)
    output = JsonLines(path)
    output.open()
    output.write([make_status(7)])
    output.close()
    first, torn, record = path.read_text().splitlines()
    assert (first, torn) == ('{"whole": 1}', half) and json.loads(record)["id"] == "a1b2-7"


def test_a_killed_process_leaves_whole_lines(tmp_path):
    """What was written before the kill is there: nothing waits in the process."""
    path = tmp_path / "line.jsonl"
    code = f"""
        from records import make_status
        from omniad_edge.outputs.json_lines import JsonLines
        output = JsonLines({str(path)!r})
        output.open()
        number = 0
        while True:
            output.write([make_status(number)])
            print(number, flush=True)
            number += 1
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True) as process:
        while int(process.stdout.readline()) < 200:
            pass
        process.send_signal(signal.SIGKILL)
        said = 200 + len(process.stdout.readlines())
    assert numbers(path)[: said + 1] == list(range(said + 1))


def test_a_rotated_file_is_left_alone(opened):
    opened.write([make_status(1)])
    rotated = opened.path.rename(opened.path.with_suffix(".1"))
    opened.write([make_status(2)])
    opened.write([make_status(3)])
    assert (numbers(rotated), numbers(opened.path)) == ([1], [2, 3])
    opened.path.unlink()
    opened.write([make_status(4)])
    assert numbers(opened.path) == [4]
    os.truncate(opened.path, 0)  # logrotate's copytruncate
    opened.write([make_status(5)])
    assert numbers(opened.path) == [5]


def test_a_short_write_is_taken_back(opened, monkeypatch):
    opened.write([make_status(1)])
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:-30]))
    with pytest.raises(OutputError, match=r"line\.jsonl: cannot append: .*bytes written; free space"):
        opened.write([make_status(2), make_status(3)])
    assert numbers(opened.path) == [1]
    monkeypatch.undo()
    opened.write([make_status(2), make_status(3)])
    assert numbers(opened.path) == [1, 2, 3]


def test_what_could_not_be_taken_back_at_once_is_before_the_next_write(opened, monkeypatch):
    opened.write([make_status(1)])
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:-30]))

    def refuse(file, length):
        raise OSError("I/O error")

    monkeypatch.setattr(os, "ftruncate", refuse)
    for _ in range(2):
        with pytest.raises(OSError, match="I/O error"):
            opened.write([make_status(2)])
    monkeypatch.undo()
    opened.write([make_status(2)])
    assert numbers(opened.path) == [1, 2]


def test_nothing_is_lost_or_doubled_by_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(delivery, "RETRY_S", (0.001, 0.01))
    events = Events()
    with small_disk(tmp_path / "disk", size_kb=256) as disk:
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(200_000))
        queue = started(JsonLines(disk / "line.jsonl"), events)
        for number in range(100):
            queue.put(make_verdict(number))
        assert "No space left" in events.wait("output failed")
        before = numbers(disk / "line.jsonl")
        assert len(before) < 100
        ballast.unlink()
        queue.close(20)
        status = queue.status()
        assert (status.written, status.failed, status.dropped) == (100, 0, 0), status
        assert numbers(disk / "line.jsonl") == list(range(100))
        assert events.names() == ["output failed", "output back"]


def test_nothing_is_glued_to_a_torn_line_on_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(delivery, "RETRY_S", (0.001, 0.01))
    events = Events()
    with small_disk(tmp_path / "disk", size_kb=64) as disk:
        path, ballast = disk / "line.jsonl", disk / "ballast"
        path.write_bytes(b"x" * 4096)  # to the end of a page: one byte more needs another one
        with pytest.raises(OSError, match="No space"):
            ballast.write_bytes(bytes(65_536))
        files = len(os.listdir("/proc/self/fd"))
        queue = started(JsonLines(path), events)
        queue.put(make_status(1))
        assert "No space left" in events.wait("output failed")
        ballast.unlink()
        queue.close(20)
        torn, record = path.read_text().splitlines()
        assert torn == "x" * 4096 and json.loads(record)["id"] == "a1b2-1"
        assert len(os.listdir("/proc/self/fd")) == files


def test_a_rotation_on_a_full_disk_waits_for_space(opened, monkeypatch):
    opened.write([make_status(1)])
    opened.path.write_text("torn")
    opened.path.rename(opened.path.with_suffix(".1"))
    opened.path.write_text("torn by another")
    write = os.write

    def full(file, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    for _ in range(3):
        with pytest.raises(OutputError, match="No space left"):
            opened.write([make_status(2)])
    monkeypatch.setattr(os, "write", write)
    opened.write([make_status(2)])
    torn, record = opened.path.read_text().splitlines()
    assert torn == "torn by another" and json.loads(record)["id"] == "a1b2-2"


def test_a_folder_in_its_place_is_reported(tmp_path):
    events = Events()
    queue = started(JsonLines(tmp_path), events)
    assert "IsADirectoryError" in events.wait("output failed") and str(tmp_path) in events.seen[0][2]
    queue.close(0)


def test_closing_twice_and_unopened_is_harmless(tmp_path):
    output = JsonLines(tmp_path / "line.jsonl")
    output.close()
    output.open()
    output.close()
    output.close()
    assert output.path.exists()

"""Images of rejects: which, how they are named, and what goes when there is no more room."""

import json
import re
from datetime import datetime, timedelta, timezone
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from records import (
    Events,
    check,
    make_late,
    make_origin,
    make_result,
    make_status,
    make_verdict,
    small_disk,
    started,
)

from omniad_edge.errors import InputError, OutputError
from omniad_edge.outputs import delivery, rejects
from omniad_edge.outputs.rejects import Rejects

NOW = datetime(2026, 3, 2, 10, 15, 2, 123000, timezone.utc)


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    monkeypatch.setattr(rejects, "time", NOW.timestamp)


def opened(folder: Path, **options: object) -> Rejects:
    output = Rejects(folder, **options)
    output.open()
    return output


def at(number: int, **ago: float):
    time = (NOW - timedelta(**ago)).isoformat(timespec="milliseconds")
    return make_verdict(number, origin=make_origin(number, time))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def kept(folder: Path) -> list[int]:
    """Numbers of the parts with all their files."""
    records = {path: int(path.stem.rsplit("-", 1)[1]) for path in folder.rglob("*.json")}
    for path in records:
        assert path.with_suffix(".0.png").exists() and path.with_suffix(".0.heat.jpg").exists()
    assert len(files(folder)) == 3 * len(records)
    return sorted(records.values())


def test_a_reject_is_saved_with_its_heatmap_and_record(tmp_path):
    verdict = make_verdict(12)
    opened(tmp_path).write([verdict])
    stem = "2026-03-02/101502.123_reject_A12_a1b2-12"
    assert files(tmp_path) == [f"{stem}.0.heat.jpg", f"{stem}.0.png", f"{stem}.json"]
    frame = verdict.frames[0].image
    assert np.array_equal(cv2.imread(str(tmp_path / f"{stem}.0.png")), frame)
    assert check(json.loads((tmp_path / f"{stem}.json").read_text())) == verdict.to_dict()
    drawn = cv2.imencode(".jpg", verdict.results[0].draw(frame), [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()
    assert (tmp_path / f"{stem}.0.heat.jpg").read_bytes() == drawn


def test_every_view_is_saved(tmp_path):
    output = opened(tmp_path)
    output.write([make_verdict(1, views=3)])
    assert len(files(tmp_path)) == 7
    # Two frames, one result: it is not known which frame was inspected in time.
    output.write([make_verdict(2, views=2, results=(make_result(),))])
    stem = "2026-03-02/101502.123_reject_A2_a1b2-2"
    assert [name for name in files(tmp_path) if "A2" in name] == [f"{stem}.0.png", f"{stem}.1.png", f"{stem}.json"]


def test_a_retry_writes_the_same_files(tmp_path):
    output = opened(tmp_path)
    for _ in range(3):
        output.write([make_verdict(1)])
    assert len(files(tmp_path)) == 3
    assert output._total_bytes == sum((tmp_path / name).stat().st_size for name in files(tmp_path))


@pytest.mark.parametrize(
    "record, share, wanted",
    [
        (make_verdict(1, 0.51), 0.9, True),
        (make_verdict(1, 0.46), 0.9, True),  # accepted, at 0.92 of its threshold 0.5
        (make_verdict(1, 0.44), 0.9, False),
        (make_verdict(1, 0.46), None, False),
        (make_verdict(1, 0.51), None, True),
        (make_verdict(1, None), 0.9, False),  # no verdict
        (make_verdict(1, frames=()), 0.9, False),  # nothing to save
        (make_verdict(1, None, decision="reject"), 0.9, True),  # by its deadline
        (make_late(), 0.9, False),
        (make_status(), 0.9, False),
    ],
)
def test_which_records_are_saved(record, share, wanted, tmp_path):
    output = Rejects(tmp_path, near_miss=share)
    assert output.wants(record) is wanted
    if wanted:
        output.write([record])
        assert len(list(tmp_path.rglob("*.json"))) == 1
        assert any("_near_" in name for name in files(tmp_path)) == (record.decision == "accept")


@given(st.text(st.characters(exclude_categories=()), max_size=300))
def test_any_part_id_makes_a_safe_file_name(part_id):
    output = Rejects("folder")
    day, name = output._part(make_verdict(1, part_id=part_id)).split("/")
    assert day == "2026-03-02" and re.fullmatch(r"101502\.123_reject_[A-Za-z0-9._-]{1,80}_a1b2-1", name)
    assert rejects.FILE.fullmatch(f"{name}.0.heat.jpg")[1] == name


def test_the_day_is_that_of_utc(tmp_path):
    verdict = make_verdict(1, origin=make_origin(1, "2026-03-03T00:30:00.000+01:00"))
    opened(tmp_path).write([verdict])
    assert all(name.startswith("2026-03-02/233000.000_") for name in files(tmp_path))


# ---- retention


def size_of_one(folder: Path) -> int:
    opened(folder).write([at(1)])
    return sum(path.stat().st_size for path in folder.rglob("*.*"))


def test_the_oldest_go_when_there_are_too_many(tmp_path):
    one = size_of_one(tmp_path / "probe")
    output = opened(tmp_path / "out", keep=f"{3.5 * one / 1000:.3f}kB")
    for number in range(1, 8):
        output.write([at(number, hours=10 - number)])
        assert kept(tmp_path / "out") == list(range(max(1, number - 2), number + 1))


def test_a_start_counts_what_is_there(tmp_path):
    for number in np.random.default_rng(0).permutation(np.arange(1, 21)).tolist():
        opened(tmp_path).write([at(number, hours=21 - number)])
    assert kept(tmp_path) == list(range(1, 21))
    every = sum(path.stat().st_size for path in tmp_path.rglob("*.*"))
    output = opened(tmp_path, keep=f"{every / 2000:.3f}kB", max_age="15.5h")
    left = kept(tmp_path)
    assert 8 <= len(left) <= 10 and left == list(range(21 - len(left), 21))
    assert [path.name for path in tmp_path.iterdir()] == ["2026-03-02"]  # no empty folders
    total = sum(path.stat().st_size for path in tmp_path.rglob("*.*"))
    assert output._total_bytes == total


def test_what_is_too_old_goes(tmp_path, monkeypatch):
    output = opened(tmp_path, max_age="12h")
    output.write([at(1, hours=11)])
    output.write([at(2, hours=2)])
    assert kept(tmp_path) == [1, 2]
    monkeypatch.setattr(rejects, "time", (NOW + timedelta(hours=2)).timestamp)
    output.write([at(3, hours=-2)])
    assert kept(tmp_path) == [2, 3]


def test_files_of_others_are_never_deleted(tmp_path):
    opened(tmp_path).write([at(1, days=3)])
    day = next(tmp_path.iterdir())
    ours = next(day.glob("*.json"))
    others = [
        day / "notes.txt",
        day / "101502.123_reject.png",
        day / "101502.123_reject_A1_a1b2-x.0.png",
        day / f"copy of {ours.name}",
        day / f"{ours.name}.bak",
        tmp_path / ours.name,
        tmp_path / "keep" / ours.name,
        day / "sub" / ours.name,
    ]
    for path in others:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    opened(tmp_path, keep="1kB", max_age="1h")
    assert files(tmp_path) == sorted(str(path.relative_to(tmp_path)) for path in others)


def test_what_a_crash_left_half_written_goes_at_the_next_start(tmp_path):
    opened(tmp_path).write([at(1, hours=1)])
    day = next(tmp_path.iterdir())
    record = next(day.glob("*.json"))
    half = day / f".{record.stem.replace('A1', 'A2')}.0.png.k3j_d9.part"
    half.write_bytes(b"\x89PNG")
    other = day / ".something.part"
    other.write_bytes(b"")
    opened(tmp_path)
    assert not half.exists() and other.exists() and record.exists()
    record.unlink()  # as by a crash before the last file
    assert len(list(day.glob("*A1*"))) == 2
    opened(tmp_path, max_age="30min")
    assert files(tmp_path) == [f"{day.name}/.something.part"]


# ---- a full disk


def test_a_full_disk_makes_room_by_the_oldest(tmp_path):
    with small_disk(tmp_path / "disk", size_kb=100) as disk:
        output = opened(disk / "rejects")
        for number in range(1, 31):
            output.write([at(number, hours=40 - number)])
        left = kept(disk / "rejects")
        assert 2 <= len(left) < 30 and left == list(range(31 - len(left), 31))
        total = sum(path.stat().st_size for path in (disk / "rejects").rglob("*.*") if path.is_file())
        assert output._total_bytes == total


def test_a_disk_others_filled_is_an_error_until_there_is_space(tmp_path, monkeypatch):
    monkeypatch.setattr(delivery, "RETRY_S", (0.001, 0.01))
    events = Events()
    with small_disk(tmp_path / "disk", size_kb=64) as disk:
        ballast = disk / "ballast"
        with pytest.raises(OSError, match="No space"):
            ballast.write_bytes(bytes(70_000))
        queue = started(Rejects(disk), events)
        queue.put(at(1))
        assert "disk is full, with no older images to delete" in events.wait("output failed")
        assert files(disk) == ["ballast"]
        ballast.unlink()
        queue.close(20)
        assert kept(disk) == [1] and queue.status().written == 1


def test_another_error_is_passed_on_and_leaves_nothing(tmp_path, monkeypatch):
    output = opened(tmp_path)

    def broken(self, data):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "write_bytes", broken)
    with pytest.raises(OSError, match="Input/output error") as caught:
        output.write([at(1)])
    assert not isinstance(caught.value, OutputError) and files(tmp_path) == []


@pytest.mark.parametrize(
    "options, message",
    [
        ({"keep": "much"}, "a size above 0 such as '10GB'.*got 'much'"),
        ({"max_age": "10GB"}, "an age above 0 such as '30d'.*got '10GB'"),
        ({"near_miss": 90}, "near_miss: expected a share of the threshold, above 0 to 1, or None; got 90"),
        ({"near_miss": 0}, "near_miss"),
    ],
)
def test_options_are_checked(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        Rejects(tmp_path, **options)

"""The health page over real HTTP, read as Prometheus reads it."""

import json
import socket
import sys
import threading
import urllib.error
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
from line_stand_in import SIDE, TOP, StandInLine, late, result, status, verdict
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families as families
from records import of_another_product

from omniad_edge.errors import InputError, MissingDependencyError, OutputError
from omniad_edge.line import health as health_module
from omniad_edge.line.health import FAILING_S, QUIET_S, Health, troubles
from omniad_edge.line.line import Line
from omniad_edge.line.prometheus import MAX_NAMES, OTHERS, SCORES


@pytest.fixture
def line():
    return StandInLine()


@pytest.fixture
def health(line):
    """Open, on a free port."""
    health = Health(port=0)
    health.attach(line)
    health.open()
    yield health
    health.close()


def get(health, path):
    """Status, content type and text."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{health.port}{path}", timeout=10) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as answer:
        return answer.code, answer.headers["Content-Type"], answer.read().decode()


def samples(health):
    """{(name, labels...): value} of one scrape."""
    code, content_type, text = get(health, "/metrics")
    assert code == 200 and content_type.startswith("text/plain; version=")
    return {(s.name, *sorted(s.labels.values())): s.value for f in families(text) for s in f.samples}


def healthz(health):
    code, content_type, text = get(health, "/healthz")
    told = json.loads(text)
    assert content_type == "application/json"
    assert told["healthy"] == (code == 200) and code in (200, 503)
    return told


def test_frames_cameras_and_outputs_come_from_the_line_at_each_scrape(health, line):
    now = samples(health)
    expected = {
        ("omniad_frames_captured_total", "top"): 100,
        ("omniad_frames_total", "inspected", "top"): 90,
        ("omniad_frames_total", "dropped", "top"): 4,
        ("omniad_frames_total", "late", "top"): 1,
        ("omniad_frames_total", "failed", "top"): 2,
        ("omniad_frames_total", "inspected", "side"): 50,
        ("omniad_frames_lost_total", "top"): 4,
        ("omniad_camera_reconnects_total", "top"): 1,
        ("omniad_camera_state", "running", "top"): 1,
        ("omniad_camera_state", "lost", "top"): 0,
        ("omniad_camera_faulty", "top"): 0,
        ("omniad_queue_depth",): 3,
        ("omniad_open_parts",): 1,
        ("omniad_uptime_seconds",): 3725,
        ("omniad_line_running",): 1,
        ("omniad_line_info", "cap", "line3"): 1,
        ("omniad_triggers_total",): 71,
        ("omniad_decisions_total", "reject"): 8,
        ("omniad_spool_depth", "mqtt"): 22,
        ("omniad_output_queue_depth", "mqtt"): 5,
        ("omniad_output_records_total", "mqtt", "written"): 40,
        ("omniad_output_records_total", "dropped", "mqtt"): 2,
    }
    assert {name: now.get(name) for name in expected} == expected
    line.change(cameras=(replace(TOP, state="lost", fault="black frame"), SIDE), open_parts=0)
    now = samples(health)
    assert now["omniad_camera_state", "lost", "top"] == 1 and now["omniad_camera_state", "running", "top"] == 0
    assert now["omniad_camera_faulty", "top"] == 1 and now["omniad_open_parts",] == 0


def test_parts_events_and_times_come_from_records(health):
    health.write([verdict(0.2), verdict(0.9), verdict(0.9, product="gear"), status("camera lost")])
    health.write([verdict(decision="no_verdict", latency_ms=300.0), late()])
    now = samples(health)
    assert now["omniad_parts_total", "accept", "cap"] == 1
    assert now["omniad_parts_total", "cap", "reject"] == 1
    assert now["omniad_parts_total", "gear", "reject"] == 1
    assert now["omniad_parts_total", "cap", "no_verdict"] == 1
    assert now["omniad_events_total", "camera lost"] == 1
    assert now["omniad_stage_seconds_count", "engine"] == 4  # three inspected in time, one late
    assert now["omniad_stage_seconds_sum", "engine"] == pytest.approx(4 * 0.008)
    assert now["omniad_stage_seconds_bucket", "0.005", "engine"] == 0
    assert now["omniad_stage_seconds_bucket", "0.01", "engine"] == 4
    assert now["omniad_part_latency_seconds_sum",] == pytest.approx(3 * 0.02 + 0.3)
    assert now["omniad_frame_age_seconds_count",] == 4


def test_frames_of_other_products_are_counted_apart_from_scores(health):
    health.write([verdict(0.2), replace(verdict(0.2), results=(of_another_product(), of_another_product("cap")))])
    now = samples(health)
    assert now["omniad_other_products_total", "unknown product"] == 1
    assert now["omniad_other_products_total", "wrong product"] == 1
    assert now["omniad_stage_seconds_count", "engine"] == 3
    assert {name[-1] for name in now if name[0] == "omniad_score"} == {"cap"}


def test_score_quantiles_are_of_the_newest_scores_of_a_product(health):
    health.write([verdict(9.0, threshold=9.5) for _ in range(500)])  # all of them pushed out
    health.write([verdict(n / SCORES, threshold=0.25) for n in range(SCORES)])
    health.write([verdict(0.4, threshold=0.8, product="gear"), verdict(0.1, threshold=0.0, product="flat")])
    now = samples(health)
    for quantile in (0.5, 0.9, 0.99):
        score = pytest.approx(quantile, abs=2 / SCORES)
        assert now["omniad_score", str(quantile), "cap"] == score
        assert now["omniad_score_to_threshold", str(quantile), "cap"] / 4 == score
    assert now["omniad_score_to_threshold", "0.5", "gear"] == 0.5
    assert now["omniad_score", "0.5", "flat"] == 0.1
    assert ("omniad_score_to_threshold", "0.5", "flat") not in now


def test_names_invented_by_triggers_do_not_make_ever_more_series(health):
    for n in range(2 * MAX_NAMES):
        health.write([verdict(product=f"product {n}"), status(f"event {n}")])
    now = samples(health)
    products = {name[2] for name in now if name[0] == "omniad_parts_total"}
    assert len(products) == MAX_NAMES + 1 and now["omniad_parts_total", "accept", OTHERS] == MAX_NAMES
    assert now["omniad_events_total", OTHERS] == MAX_NAMES
    assert len({name[2] for name in now if name[0] == "omniad_score"}) == MAX_NAMES + 1


def test_two_lines_do_not_mix_and_the_global_registry_stays_clean(health):
    other = Health(port=0)
    other.write([verdict()])
    health.write([verdict(), verdict()])
    assert samples(health)["omniad_parts_total", "accept", "cap"] == 2
    assert not [family.name for family in REGISTRY.collect() if family.name.startswith("omniad")]


def test_a_running_line_is_healthy(health):
    assert healthz(health) == {
        "healthy": True,
        "reasons": [],
        "line": "line3",
        "state": "running",
        "uptime_s": 3725.0,
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"state": "starting"}, "the line is starting"),
        ({"state": "stopped"}, "the line is stopped"),
        ({"cameras": (replace(TOP, state="lost"), SIDE)}, "camera top: lost"),
        ({"cameras": (TOP, replace(SIDE, state="connecting"))}, "camera side: connecting"),
        ({"cameras": (replace(TOP, fault="black frame"), SIDE)}, "camera top: black frame"),
    ],
)
def test_what_keeps_a_line_from_inspecting_is_said(health, line, changes, reason):
    line.change(**changes)
    assert healthz(health)["reasons"] == [reason]


def test_a_film_that_ended_is_no_trouble(health, line):
    line.change(cameras=(replace(TOP, state="ended"), SIDE))
    assert healthz(health)["healthy"]


def test_a_line_that_hangs_is_not_healthy(health, line):
    line.dead_s = QUIET_S + 5
    assert healthz(health)["reasons"] == ["the line gave no sign of life for 15 s"]


def test_an_output_that_stays_away_is_trouble_until_it_is_back(health, monkeypatch):
    health.write([status("output failed", "mqtt", "refused")])
    assert healthz(health)["healthy"]  # it has half a minute to come back
    monkeypatch.setattr(health_module, "FAILING_S", 0.0)
    assert healthz(health)["reasons"] == ["output mqtt: failing for 0 s"]
    health.write([status("output failed", "mqtt", "refused"), status("output back", "mqtt", "")])
    assert healthz(health)["healthy"]
    health.write([status("trigger lost", "mqtt", "refused")])
    assert healthz(health)["reasons"] == ["trigger mqtt: failing for 0 s"]
    health.write([status("trigger back", "mqtt", ""), status("engine failed", "", "no memory")])
    assert healthz(health)["reasons"] == ["engine: failing for 0 s"]


def test_a_line_brings_its_numbers():
    class Detector:
        def __call__(self, frames, product):
            return [result(0.9)] * len(frames)

    health = Health(port=0)
    pictures = [np.full((64, 64, 3), 100 + n, np.uint8) for n in range(20)]
    pictures[7][:] = 0
    Line(Detector(), pictures, name="line7").add(health).run()
    text = health.metrics()[0].decode()
    now = {(s.name, *sorted(s.labels.values())): s.value for f in families(text) for s in f.samples}
    assert now["omniad_decisions_total", "reject"] == now["omniad_triggers_total",] == 20
    assert sum(value for name, value in now.items() if name[0] == "omniad_frames_total") == 20
    assert now["omniad_stage_seconds_count", "engine"] == 19 and now["omniad_line_info", "", "line7"] == 1
    assert health.health()["reasons"] == ["the line is stopped"]


def test_an_output_is_given_its_time(line):
    snapshot = line.snapshot()
    now_s = snapshot.last_progress_s
    assert not list(troubles(snapshot, {"output mqtt": now_s - FAILING_S}, now_s))
    assert list(troubles(snapshot, {"output mqtt": now_s - FAILING_S - 1}, now_s)) == [
        "output mqtt: failing for 31 s"
    ]


def test_without_a_line_it_says_what_to_do():
    health = Health(port=0)
    health.open()
    assert "line.add" in healthz(health)["reasons"][0]
    assert not [name for name in samples(health) if name[0].startswith("omniad_camera")]
    health.close()


def test_one_health_serves_one_line(health, line):
    health.attach(line)
    with pytest.raises(InputError, match="its own Health"):
        health.attach(StandInLine())


def test_other_paths_are_not_found_and_a_query_does_not_matter(health):
    assert get(health, "/")[0] == 404
    assert get(health, "/healthz?verbose=1")[0] == 200


def test_an_error_of_our_own_is_answered_and_logged(health, line, monkeypatch, caplog):
    monkeypatch.setattr(line, "snapshot", lambda: 1 / 0)
    assert get(health, "/healthz")[::2] == (500, "ZeroDivisionError; the log has more\n")
    assert "division by zero" in caplog.text


def test_head_has_no_body(health):
    request = urllib.request.Request(f"http://127.0.0.1:{health.port}/metrics", method="HEAD")
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.status == 200 and int(answer.headers["Content-Length"]) > 0 and answer.read() == b""


def test_a_client_that_says_nothing_does_not_keep_others_waiting(health):
    with socket.create_connection(("127.0.0.1", health.port)):
        assert get(health, "/healthz")[0] == 200


def test_scrapes_during_writes(health):
    done = threading.Event()

    def write():
        for n in range(300):
            health.write([verdict(n / 300, product=f"p{n}")])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert samples(health)
    writer.join()
    counts = [value for name, value in samples(health).items() if name[0] == "omniad_parts_total"]
    assert sum(counts) == 300


def test_a_port_in_use_is_said_in_words_and_free_after_close(health):
    second = Health(port=health.port)
    with pytest.raises(OutputError, match=rf"port {health.port}: Address already in use; .* choose another port"):
        second.open()
    get(health, "/healthz")  # leaves a connection in TIME_WAIT
    health.close()
    health.close()
    second.open()
    assert get(second, "/healthz")[0] == 503
    second.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", second.port))


def test_it_listens_on_this_machine_alone(health):
    with socket.socket() as other, pytest.raises(ConnectionRefusedError):
        other.connect(("127.0.0.2", health.port))
    everywhere = Health(port=0, host="0.0.0.0")
    everywhere.open()
    with socket.create_connection(("127.0.0.2", everywhere.port)):
        pass
    everywhere.close()


@pytest.mark.parametrize("host", ["203.0.113.9", "no.such.host.invalid"])
def test_an_address_of_another_machine(host):
    with pytest.raises(OutputError, match=f"cannot listen at {host}"):
        Health(port=0, host=host).open()


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_out_of_range(port):
    with pytest.raises(InputError, match="0 to 65535"):
        Health(port=port)


def test_without_prometheus_client_the_message_has_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "omniad-edge\[line\]"'):
        Health()

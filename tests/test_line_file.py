"""A line's TOML file: what it makes, every mistake at once, no secret in any message; and `omniad run` with it."""

import json
import logging
import os
import pty
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from time import monotonic

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from line_parts import FakeDetector
from records import PATIENCE_S, check, wait_until

from omniad_edge.cameras import camera_process
from omniad_edge.cli import main
from omniad_edge.errors import InputError
from omniad_edge.line import file as line_file
from omniad_edge.line import line as line_module
from omniad_edge.line import run as run_line
from omniad_edge.line.file import LineFile, located, read_line_file
from omniad_edge.line.keys import TABLES
from omniad_edge.line.line import Line
from omniad_edge.outputs.delivery import Output, OutputStatus
from omniad_edge.outputs.json_lines import JsonLines

OMNIAD = str(Path(sys.prefix) / "bin" / "omniad")
WAITS = "outputs.webhook.timeout_s"
SECRET = "s3cr3t'q%40r"  # in a message also as s3cr3t'q@r


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Room for the file, with images; the bundle is taken for one of gear and cap."""
    (tmp_path / "parts").mkdir()
    cv2.imwrite(str(tmp_path / "parts" / "1.png"), np.full((8, 8, 3), 50, np.uint8))
    (tmp_path / "line3.omniad").touch()
    monkeypatch.setattr(line_file, "Detector", lambda *args, **options: FakeDetector())
    return tmp_path


@pytest.fixture
def real_folder(small_bundle, small_run, tmp_path):
    """As an engineer has it: bundle, images, and room for the file."""
    shutil.copy(small_bundle, tmp_path / "line3.omniad")
    shutil.copytree(small_run.data / "gear" / "test" / "good", tmp_path / "parts")
    return tmp_path


def write(folder: Path, text: str, head: str = 'bundle = "line3.omniad"\nbackend = "onnxruntime"\n') -> Path:
    path = folder / "line3.toml"
    path.write_text(head + text)
    return path


def mistakes(path: Path) -> dict[str, str]:
    """Key's path -> what is said of it."""
    with pytest.raises(InputError) as caught:
        read_line_file(path)
    head, *lines = str(caught.value).partition("\nA source is one of")[0].splitlines()
    assert head == f"{path}: {len(lines)} mistake{'s' * (len(lines) > 1)}"
    return dict(line.removeprefix("  ").split(": ", 1) for line in lines)


# ---- what a file makes


def test_a_file_gives_the_line_it_describes(real_folder, monkeypatch):
    pytest.importorskip("paho.mqtt.client")
    pytest.importorskip("prometheus_client")
    text = """
        name = "press 4"
        product = "gear"
        trigger = "every 500ms"
        deadline_ms = 50
        on_timeout = "no_verdict"
        views = 2
        rule = "all"
        on_error = "stop"
        source = { top = "parts", side = "folder://parts?watch=1" }
        [outputs]
        json_lines = "out/verdicts.jsonl"
        mqtt = "mqtt://broker/line3/results"
        webhook = { url = "https://mes.example/verdicts", keep = "2GB", timeout_s = 2.5 }
        rejects = { folder = "rejects", keep = "10GB", max_age = "30d", near_miss = false }
        spool = "spool/"
        [health]
        port = 9465
    """
    path = write(real_folder, text)
    before = sorted(real_folder.rglob("*"))
    monkeypatch.chdir("/")
    line = read_line_file(path)
    assert sorted(real_folder.rglob("*")) == before  # nothing is opened yet
    assert (line.name, line.product, line.period, line.deadline_ms) == ("press 4", "gear", 0.5, 50)
    assert (line.parts.safe, line.parts.views, line.parts.rule) == ("no_verdict", 2, "all")
    assert line.on_error == "stop" and line.detector.backend == "onnxruntime"
    assert list(line.sources) == ["top", "side"] and line.sources["side"].live
    assert line.sources["top"].path == line.sources["side"].path == real_folder / "parts"
    json_lines, rejects, mqtt, webhook, health = (queue.output for queue in line.outputs)
    assert json_lines.path == real_folder / "out" / "verdicts.jsonl" and rejects.folder == real_folder / "rejects"
    assert mqtt.name == "mqtt mqtt://broker:1883" and webhook.name == "webhook https://mes.example:443"
    assert mqtt._spool.path == real_folder / "spool" / "line3-mqtt.sqlite"
    assert webhook._spool.path == real_folder / "spool" / "line3-webhook.sqlite"
    assert (health.host, health.port) == ("127.0.0.1", 9465)


def test_bundle_and_source_are_enough(folder):
    line = read_line_file(write(folder, 'source = "parts"'))
    assert line.name == "line3" and line.product is None and line.outputs == []
    assert line.parts.each_frame and line.parts.policy == "every" and line.deadline_ms is None
    assert list(line.sources) == [str(folder / "parts")]


def test_parts_announced_over_mqtt(folder):
    pytest.importorskip("paho.mqtt.client")
    line = read_line_file(write(folder, 'source = 0\ndeadline_ms = 50\ntrigger = "mqtt://broker/line3/trigger"'))
    assert line.period.name == "trigger mqtt://broker:1883" and list(line.sources) == ["webcam:0"]
    told = []
    line.tell = lambda *event: told.append(event)
    line.period._tell("trigger lost", "no connection")  # an event of the line, as those of cameras are
    assert told == [("trigger lost", "trigger mqtt://broker:1883", "no connection")]


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("parts", "/etc/li ne/parts"),
        ("/data/parts", "/data/parts"),
        ("folder://parts?watch=1", "folder:///etc/li%20ne/parts?watch=1"),
        ("folder:parts", "folder:///etc/li%20ne/parts"),
        ("folder:///data/parts", "folder:///data/parts"),
        ("file:///data/film.mp4", "file:///data/film.mp4"),
        *((same, same) for same in ("0", "webcam:0", "rtsp://h/1", "gige://", "gst:videotestsrc ! queue", "")),
    ],
)
def test_paths_of_sources_are_relative_to_the_file(address, expected):
    assert located(address, Path("/etc/li ne")) == expected


def test_a_path_with_a_colon_is_relative_too(tmp_path):
    (tmp_path / "line:3").mkdir()
    assert located("line:3", tmp_path) == str(tmp_path / "line:3")


# ---- mistakes


def test_every_mistake_is_named_at_once(folder):
    text = """
        bundel = "line3.omniad"
        product = "bolt"
        source = { top = "nowhere", side = "gig://Basler", policy = "every", back = 1.5 }
        trigger = "call"
        deadline_ms = "50"
        on_timeout = "wait"
        views = true
        rule = "some"
        precision = "fp4"
        [outputs]
        on_error = "stop"
        json_lines = "parts"
        mqtt = { url = "http://broker", topic = "line/+" }
        webhook = { keep = "much", keeep = "1GB" }
        rejects = { folder = "line3.omniad/rejects", keep = "10 G", max_age = 30, near_miss = 2 }
        [health]
        port = 70000
        [helth]
    """
    pytest.importorskip("paho.mqtt.client")
    found = mistakes(write(folder, text, 'bundle = "line3.omniad"\nbackend = "cuda"\npolicy = "newest"\n'))
    expected = {
        "bundel": "unknown; did you mean bundle?",
        "product": "expected one of gear, cap; got 'bolt'",
        "source.top": "there is no such file or folder",
        "source.side": "there is no scheme gig:",
        "source.policy": "no name for a source; for the line's policy write it before the first [table]",
        "source.back": "expected an address, got 1.5",
        "trigger": "'call' is for programs",
        "deadline_ms": "expected a number, got the text '50'",
        "on_timeout": "expected 'reject' or 'no_verdict'; got 'wait'",
        "views": "expected a whole number, got true",
        "rule": "expected 'any' or 'all'; got 'some'",
        "policy": "expected 'every' or 'latest'; got 'newest'",
        "backend": "got 'cuda'",
        "precision": "got 'fp4'",
        "outputs.on_error": "unknown here; write it before the first [table]",
        "outputs.json_lines": "expected a file",
        "outputs.spool": "missing; expected a folder for what mqtt has not delivered",
        "outputs.mqtt": "with mqtt or mqtts; got one with scheme 'http'",
        "outputs.mqtt.topic": "without + and #",
        "outputs.webhook.url": "missing; expected an address",
        "outputs.webhook.keep": "expected a size",
        "outputs.webhook.keeep": "unknown; did you mean keep?",
        "outputs.rejects.folder": "is no folder",
        "outputs.rejects.keep": "expected a size",
        "outputs.rejects.max_age": "expected text such as '30d', got 30",
        "outputs.rejects.near_miss": "expected a share of the threshold",
        "health.port": "expected 0 to 65535, got 70000",
        "helth": "unknown; did you mean health?",
    }
    assert sorted(found) == sorted(expected)
    for key, words in expected.items():
        assert words in found[key], key


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ('source = "parts"\ntrigger = "every 2s"', "deadline_ms", "needed with a trigger"),
        ('source = "parts"\ntrigger = "evry 2s"\ndeadline_ms = 9', "trigger", "expected 'frame', 'every 500ms'"),
        ('source = "parts"\ntrigger = "every 0 ms"\ndeadline_ms = 9', "trigger", "got 'every 0 ms'"),
        ('source = "parts"\nviews = 2', "views", "only with a trigger"),
        ('source = "parts"\ndeadline_ms = 0', "deadline_ms", "above 0"),
        ('source = "parts"\ndeadline_ms = nan', "deadline_ms", "above 0"),
        ('source = "parts"\nname = ""', "name", "empty"),
        ('source = "parts"\nca_file = "none.pem"', "ca_file", "PEM"),
        ('source = "parts"\nhealth = 9464', "health", "expected a table"),
        ('source = "parts"\nproduct = "zero\\u0000"', "product", "zero byte"),
        ('source = 0\noutputs = { webhook = "http://h:x/", spool = "s" }', "outputs.webhook", "host or port"),
        ('source = 0\n[outputs]\nspool = "s"\nwebhook = { url = "http://h", timeout_s = 0 }', WAITS, "above 0"),
        ("source = {}", "source", "empty table"),
        ("source = { a = 0, b = true }", "source.b", "expected an address, got true"),
        ("source = []", "source", "got a list"),
        ("policy = 'latest'", "source", "missing"),
        ('source = "webcam:x"', "source", "camera number"),
    ],
)
def test_one_mistake_is_one_line(text, key, words, folder):
    found = mistakes(write(folder, text))
    assert list(found) == [key] and words in found[key]


def test_equal_mistakes_of_two_keys_are_both_named(folder):
    assert list(mistakes(write(folder, "source = { top = 1.5, top2 = 1.5 }"))) == ["source.top", "source.top2"]


def test_a_wrong_source_gets_the_list_of_sources(folder):
    with pytest.raises(InputError, match="A source is one of\n  webcam:0"):
        read_line_file(write(folder, 'source = "gig://"'))


def test_a_folder_without_images_is_a_mistake_unless_it_is_watched(folder):
    (folder / "empty").mkdir()
    found = mistakes(
        write(folder, 'source = { top = "empty", side = "folder:empty", new = "folder:empty?watch=1" }')
    )
    assert list(found) == ["source.top", "source.side"]
    assert all("no image in this folder" in said for said in found.values())


def test_a_software_trigger_needs_triggers(folder, monkeypatch):
    monkeypatch.setattr(camera_process.CameraProcess, "check_installed", lambda self: None)
    found = mistakes(write(folder, 'source = "gige://?trigger=Software"'))
    assert list(found) == ["trigger", "deadline_ms"] and "software trigger" in found["trigger"]


@pytest.mark.parametrize("bundle", ['bundle = "other.omniad"', 'bundle = "parts"', 'bundle = "line3.toml"', ""])
def test_a_bundle_that_is_none(bundle, real_folder):
    found = mistakes(write(real_folder, 'source = "parts"\nproduct = "bolt"', f"{bundle}\n"))
    assert list(found) == ["bundle"]


def test_what_the_engine_cannot_do(real_folder):
    text = 'source = "parts"\nthreads = 0\nproduct = "bolt"'
    found = mistakes(write(real_folder, text))
    assert found["threads"].startswith("expected a whole number from 1 on")
    assert found["product"] == "expected one of board, cap, gear; got 'bolt'" and len(found) == 2
    found = mistakes(write(real_folder, 'precision = "fp16"\nsource = "parts"'))
    assert list(found) == ["backend"] and "CPUs compute in fp32 or bf16" in found["backend"]


@pytest.mark.parametrize(
    "content", [b"bundle = line3", b"a = 1\na = 2", b"\xff\xfe", b"[outputs", b"[a]\n[a]", b"a = " + 9999 * b"["]
)
def test_what_is_not_toml_is_said_to_be(content, tmp_path):
    (tmp_path / "line3.toml").write_bytes(content)
    with pytest.raises(InputError, match=r"line3\.toml: expected TOML: "):
        read_line_file(tmp_path / "line3.toml")
    with pytest.raises(InputError, match=r"it cannot be read: No such file"):
        read_line_file(tmp_path / "line4.toml")


def test_missing_packages_are_named_with_the_command(real_folder, monkeypatch):
    for name in ("paho.mqtt", "prometheus_client", "openvino"):
        monkeypatch.setitem(sys.modules, name, None)
    text = 'backend = "openvino"\nsource = "parts"\n[outputs]\nmqtt = "mqt://h"\nspool = "s"\n[health]\nport = -1'
    path = write(real_folder, text, 'bundle = "line3.omniad"\nproduct = "bolt"\n')
    with pytest.raises(InputError) as caught:
        read_line_file(path)
    for said in (
        '  backend: OpenVINO is not installed; run: pip install "omniad-edge[openvino]"',
        "  product: expected one of board, cap, gear; got 'bolt'",
        '  outputs.mqtt: paho-mqtt is not installed; run: pip install "omniad-edge[line]"',
        "  outputs.mqtt: expected an address",
        "  health.port: expected 0 to 65535, got -1",
        '  health: prometheus-client is not installed; run: pip install "omniad-edge[line]"',
    ):
        assert f"\n{said}" in str(caught.value)


@pytest.mark.parametrize("source", ["gige://", "gst:videotestsrc"])
def test_missing_programs_are_named_with_the_command(source, folder, monkeypatch):
    monkeypatch.setattr(camera_process, "SYSTEM_PYTHON", str(folder / "no-python"))
    monkeypatch.setattr(camera_process.importlib.util, "find_spec", lambda name: None)
    found = mistakes(write(folder, f'source = {{ top = "{source}" }}'))
    assert list(found) == ["source.top"] and "is not installed; run: sudo apt install" in found["source.top"]


def test_a_folder_this_user_may_not_write_to(folder, monkeypatch):
    (folder / "closed").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder / "closed")  # root may write anywhere
    found = mistakes(write(folder, 'source = "parts"\noutputs = { json_lines = "closed/new/verdicts.jsonl" }'))
    assert "may not write" in found["outputs.json_lines"]


WORDS = st.sampled_from(
    [
        "every",
        "frame",
        "call",
        "every 1s",
        "parts",
        "0",
        "webcam:1",
        "mqtt://h/t",
        "http://h",
        "10GB",
        "",
        "\0",
        "a:b",
    ]
)
SCALARS = WORDS | st.integers() | st.floats() | st.booleans() | st.text(max_size=8)
KEYS = sorted({name for kinds in TABLES.values() for name in kinds} | {"bundel", "x.y", ""})
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=8),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(content=st.dictionaries(st.sampled_from(KEYS), TREES, max_size=12))
def test_any_content_is_a_line_or_mistakes(content):
    with pytest.MonkeyPatch.context() as patch, suppress(InputError):
        patch.setattr(line_file, "Detector", lambda *args, **options: FakeDetector())
        LineFile(Path("/nowhere/line3.toml"), content).line()


# ---- the README


def readme_block(language: str) -> str:
    text = Path(__file__).resolve().parents[1].joinpath("README.md").read_text()
    return text.split("## On the line\n")[1].split(f"```{language}\n")[1].split("```")[0]


def test_the_script_of_the_readme_runs(folder, monkeypatch, capsys):
    monkeypatch.setattr("omniad_edge.Detector", lambda bundle: FakeDetector())
    monkeypatch.chdir(folder)
    cv2.imwrite("parts/1.png", np.random.default_rng(0).integers(0, 99, (8, 8, 3), np.uint8))
    exec(readme_block("python").replace("webcam:0", "parts"), {})
    assert "parts/1.png accept" in capsys.readouterr().out and Path("verdicts.jsonl").exists()


def test_the_file_of_the_readme_is_right(folder, monkeypatch):
    pytest.importorskip("paho.mqtt.client")
    pytest.importorskip("prometheus_client")
    monkeypatch.setenv("CAMERA_LOGIN", "user:s3cr3t")
    line = read_line_file(write(folder, readme_block("toml"), ""))
    assert list(line.sources) == ["rtsp://***@10.0.0.7/1"] and len(line.outputs) == 5


# ---- the environment


def test_passwords_come_from_the_environment(folder, monkeypatch):
    monkeypatch.setenv("CAMERA_LOGIN", "u:p%40ss")
    monkeypatch.setenv("OUT", "lines")
    text = 'source = "rtsp://${CAMERA_LOGIN}@127.0.0.1/1"\noutputs = { json_lines = "${OUT}/${OUT}.jsonl" }'
    line = read_line_file(write(folder, text))
    [(name, source)] = line.sources.items()
    assert name == source.name == "rtsp://***@127.0.0.1/1"
    assert source.settings["device"] == "rtsp://u:p%40ss@127.0.0.1/1"
    assert line.outputs[0].output.path == folder / "lines" / "lines.jsonl"


def test_a_token_in_the_path_is_no_name(folder, monkeypatch):
    monkeypatch.setenv("CAMERA_KEY", "s3cr3t")
    [name] = read_line_file(write(folder, 'source = "rtsp://127.0.0.1/${CAMERA_KEY}/1"')).sources
    assert name == "rtsp://127.0.0.1/${CAMERA_KEY}/1"


def test_a_missing_variable_is_named(folder, monkeypatch):
    monkeypatch.delenv("PASSWORD_4", raising=False)
    text = (
        'source = "rtsp://u:${PASSWORD_4}@h"\n[outputs]\nspool = "s"\nwebhook = { url = "http://${PASSWORD_4}" }'
    )
    found = mistakes(write(folder, text))
    assert list(found) == ["source", "outputs.webhook.url"]
    assert all("the environment variable PASSWORD_4 is not set" in said for said in found.values())


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('product = "${SECRET}"\nsource = "parts"', "product"),
        ('policy = "${SECRET}"\nsource = "parts"', "policy"),
        ('trigger = "${SECRET}"\nsource = "parts"\ndeadline_ms = 1', "trigger"),
        ('views = "x${SECRET}"\nsource = "parts"', "views"),
        ('source = "gig://${SECRET}"', "source"),
        ('source = "webcam:${SECRET}"', "source"),
        ('source = { top = "rtsp://h/?transport=${SECRET}" }', "source.top"),
        ('source = "parts"\noutputs = { json_lines = "line3.omniad/${SECRET}" }', "outputs.json_lines"),
        ('source = "parts"\noutputs = { rejects = { folder = "r", keep = "${SECRET}" } }', "outputs.rejects.keep"),
        ('source = "parts"\noutputs = { spool = "s", webhook = "${SECRET}://h" }', "outputs.webhook"),
        ('source = "parts"\noutputs = { spool = "s", webhook = "http://u:${SECRET}/@h:x" }', "outputs.webhook"),
    ],
)
def test_no_message_holds_a_value_of_the_environment(text, key, folder, monkeypatch):
    monkeypatch.setenv("SECRET", SECRET)
    found = mistakes(write(folder, text))
    assert list(found) == [key] and "s3cr3t" not in found[key]


# ---- omniad run


def omniad(*arguments: object, **options: object) -> subprocess.CompletedProcess:
    command = [OMNIAD, "run", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=3 * PATIENCE_S, **options)


def test_check_says_what_would_run_and_does_nothing(real_folder):
    text = 'source = "rtsp://user:s3cr3t@127.0.0.1:9/1"\ndeadline_ms = 50\noutputs = { json_lines = "v.jsonl" }'
    path = write(real_folder, text)
    before = sorted(real_folder.rglob("*"))
    done = omniad("--check", path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == f"{path}: no mistakes"
    for words in ("line     line3", "product  as recognised", "ONNX Runtime in fp32", "rtsp://***@127.0.0.1:9/1"):
        assert words in done.stdout
    assert "every frame is a part, policy every, within 50 ms, else reject" in done.stdout
    assert f"JSON lines {real_folder}/v.jsonl" in done.stdout and "s3cr3t" not in done.stdout
    assert sorted(real_folder.rglob("*")) == before


def test_run_refuses_what_check_does(folder, capsys):
    path = write(folder, 'source = "rtsp://user:s3cr3t@/1"\npolicy = "newest"')
    said = []
    for arguments in (["--check"], []):
        assert main(["run", *arguments, str(path)]) == 1
        out, err = capsys.readouterr()
        assert out == "" and "2 mistakes" in err and "  policy: expected" in err and "s3cr3t" not in err
        said.append(err)
    assert said[0] == said[1]
    with pytest.raises(SystemExit) as exit:
        main(["run"])
    assert exit.value.code == 2


def test_run_gives_a_verdict_an_image_and_ends(real_folder):
    done = omniad(write(real_folder, 'product = "gear"\nsource = "parts"\noutputs = { json_lines = "v.jsonl" }'))
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (real_folder / "v.jsonl").read_text().splitlines()]
    for record in records:
        check(record)
    verdicts = [record for record in records if record["kind"] == "verdict"]
    images = sorted(str(path) for path in (real_folder / "parts").iterdir())
    assert [verdict["frames"][0]["item"] for verdict in verdicts] == images
    assert {verdict["line"] for verdict in verdicts} == {"line3"}
    counts = f"frames {len(images)}: {len(images)} inspected, 0 dropped, 0 late, 0 failed"
    assert done.stdout.startswith(f"parts {len(images)}: ") and done.stdout.endswith(f"; {counts}\n")
    events = [json.loads(line)["event"] for line in done.stderr.splitlines()]  # JSON alone
    assert events[0] == "line started" and events[-1] == "line stopped"


def test_sigterm_stops_it_and_systemd_is_told(real_folder):
    path = write(real_folder, 'source = "folder://parts?watch=1"\noutputs = { json_lines = "v.jsonl" }')
    verdicts = real_folder / "v.jsonl"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(real_folder / "notify"))
        systemd.settimeout(PATIENCE_S)
        environment = os.environ | {"NOTIFY_SOCKET": str(real_folder / "notify"), "WATCHDOG_USEC": "10000000"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        process = subprocess.Popen([OMNIAD, "run", path], env=environment, **pipes)
        try:
            wait_until(lambda: verdicts.exists() and verdicts.read_text().count('"verdict"') == 2)
        finally:
            start = monotonic()
            process.send_signal(signal.SIGTERM)
            out, err = process.communicate(timeout=PATIENCE_S)
            took_s = monotonic() - start
        told = ""
        while "STOPPING=1" not in told:
            told += systemd.recv(4096).decode()
    assert process.returncode == 0 and "Traceback" not in err
    assert out.startswith("parts 2: ") and "READY=1" in told and "WATCHDOG=1" in told
    assert took_s < 1.5  # with the end of Python; the line itself under one


def test_in_a_terminal_there_is_the_live_view(real_folder):
    path = write(real_folder, 'source = "parts"')
    ours, theirs = pty.openpty()
    process = subprocess.Popen([OMNIAD, "run", path], stdout=subprocess.PIPE, stderr=theirs, text=True)
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # Linux says so at the end
        while data := os.read(ours, 65536):
            shown += data
    os.close(ours)
    out, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0 and "frames 2: 2 inspected" in out
    assert b"line3" in shown and b"camera runs" in shown and b'"event"' not in shown


@pytest.fixture
def quiet_log():
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = before, level
    logging.captureWarnings(False)


@pytest.mark.usefixtures("quiet_log")
def test_what_stops_the_line_is_one_line_and_exit_code_1(monkeypatch, capsys):
    frame = np.random.default_rng(0).integers(60, 200, (8, 8, 3), np.uint8)
    frame[0, 0] = 13
    monkeypatch.setattr(run_line, "read_line_file", lambda path: Line(FakeDetector(), [frame], on_error="stop"))
    assert run_line.run_file(Path("line3.toml")) == 1
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == "error: ZeroDivisionError: division by zero" and "Traceback" not in err
    assert out.startswith("parts 1: 0 accept, 1 reject")


class FullDisk(Output):
    name, kinds = "full disk", ("verdict",)

    def write(self, records):
        raise OSError(28, "No space left on device")


class NoCoil(Output):
    name, kinds = "coil", ("verdict",)

    def write(self, records):
        raise ValueError("no such coil")


@pytest.mark.usefixtures("quiet_log")
@pytest.mark.parametrize(
    ("output", "counts"),
    [(FullDisk(), "0 written, 0 failed, 1 dropped"), (NoCoil(), "0 written, 1 failed, 0 dropped")],
)
def test_records_that_an_output_lost_are_exit_code_1(monkeypatch, caplog, tmp_path, output, counts):
    monkeypatch.setattr(line_module, "DRAIN_S", 0.1)
    line = Line(FakeDetector(), [np.zeros((8, 8, 3), np.uint8)]).add(JsonLines(tmp_path / "v.jsonl"), output)
    monkeypatch.setattr(run_line, "read_line_file", lambda path: line)
    assert run_line.run_file(Path("line3.toml")) == 1
    warnings = [record.getMessage() for record in caplog.records if "lost records" in record.getMessage()]
    assert warnings == [f"{output.name} lost records: {counts}; look at its disk, server or code"]


def test_the_closing_counts_tell_of_records_that_did_not_arrive():
    outputs = (OutputStatus("JSON lines v.jsonl", 0, 9, 0, 0), OutputStatus("mqtt mqtt://h:1883", 0, 3, 1, 0, 5))
    first, *others = run_line.closing_counts(replace(Line(FakeDetector(), ()).snapshot(), outputs=outputs)).split(
        "\n"
    )
    assert first.startswith("parts 0: 0 accept, 0 reject, 0 no verdict; frames 0: ")
    assert others == ["mqtt mqtt://h:1883: 3 records written, 1 failed, 0 dropped, 5 left in the spool"]

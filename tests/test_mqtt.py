"""MQTT against a real broker, which goes away, comes back, refuses and falls silent."""

import gc
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import warnings
from pathlib import Path

import pytest
from certificates import make_certificates
from hypothesis import given
from hypothesis import strategies as st
from records import Events, check, make_late, make_status, make_verdict, of_every_kind, started, wait_until

from omniad_edge.errors import InputError, MissingDependencyError
from omniad_edge.outputs import delivery, mqtt
from omniad_edge.outputs.mqtt import Mqtt, MqttTrigger, parse_part, topic_levels, topic_of

paho = pytest.importorskip("paho.mqtt.client", reason='needs paho-mqtt: pip install "omniad-edge[line]"')
MOSQUITTO = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin:/opt/homebrew/sbin")
needs_broker = pytest.mark.skipif(MOSQUITTO is None, reason="needs mosquitto: apt-get install mosquitto")


class Broker:
    """mosquitto on a free port of this machine; keeps sessions and messages over a stop."""

    def __init__(self, folder: Path, *settings: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.address = f"127.0.0.1:{self.port}"
        self.config = folder / "mosquitto.conf"
        lines = [
            f"listener {self.port} 127.0.0.1",
            "persistence true",
            f"persistence_location {folder}/",
            "user root",
        ]
        if not any(setting.startswith("password_file") for setting in settings):
            lines.append("allow_anonymous true")
        self.config.write_text("\n".join([*lines, *settings]) + "\n")
        self.process: subprocess.Popen | None = None

    def start(self) -> "Broker":
        self.process = subprocess.Popen(
            [MOSQUITTO, "-c", str(self.config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_until(self.answers)
        return self

    def answers(self) -> bool:
        assert self.process.poll() is None, "mosquitto does not start"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            self.process.wait(20)
            self.process = None


class Subscriber:
    """Receives everything, also what came while the broker was away."""

    def __init__(self, broker: Broker, topic: str = "#", tls=None, user: tuple[str, str] | None = None) -> None:
        self.messages: list[tuple[str, bytes, bool]] = []
        self.known: dict[str, None] = {}
        self.checked = 0
        self.changed = threading.Condition()
        self.subscribed = threading.Event()
        self.client = paho.Client(paho.CallbackAPIVersion.VERSION2, client_id="listener", protocol=paho.MQTTv5)
        self.client.reconnect_delay_set(0.05, 0.1)
        self.client.on_connect = lambda client, *_: client.subscribe(topic, qos=1)
        self.client.on_subscribe = lambda *_: self.subscribed.set()
        self.client.on_message = self.receive
        if tls:
            self.client.tls_set(str(tls))
        if user:
            self.client.username_pw_set(*user)
        session = paho.Properties(paho.PacketTypes.CONNECT)
        session.SessionExpiryInterval = 3600
        host = "localhost" if tls else "127.0.0.1"
        self.client.connect(host, broker.port, clean_start=False, properties=session)
        self.client.loop_start()
        assert self.subscribed.wait(20)

    def receive(self, client, userdata, message) -> None:
        with self.changed:
            self.messages.append((message.topic, message.payload, message.retain))
            self.changed.notify_all()

    def wait(self, condition) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: condition(self), 20), self.messages[-5:]

    def ids(self) -> list[str]:
        """Of the records, each once, in the order they came first."""
        # Each is checked once: this is asked at every message, and 300 of them all over again take half a minute.
        for topic, text, _ in self.messages[self.checked :]:
            if not topic.endswith("/online"):
                self.known.setdefault(check(json.loads(text))["id"])
        self.checked = len(self.messages)
        return list(self.known)

    def online(self, topic: str) -> list[str]:
        return [text.decode() for name, text, _ in self.messages if name == topic]

    def close(self) -> None:
        mqtt.end(self.client)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(delivery, "RETRY_S", (0.01, 0.05))
    monkeypatch.setattr(delivery, "TICK_S", 0.01)
    monkeypatch.setattr(mqtt, "RETRY_S", (0.05, 0.1))


@pytest.fixture
def make_broker(tmp_path):
    made = []

    def make(*settings: str) -> Broker:
        made.append(Broker(tmp_path, *settings))
        return made[-1].start()

    yield make
    for broker in made:
        broker.stop()


@pytest.fixture
def listen():
    made = []

    def make(*arguments, **options) -> Subscriber:
        made.append(Subscriber(*arguments, **options))
        return made[-1]

    yield make
    for subscriber in made:
        subscriber.close()


def ids(*numbers: int) -> list[str]:
    return [f"a1b2-{number}" for number in numbers]


# ---- records


@needs_broker
def test_records_are_published_under_their_topics(make_broker, listen, tmp_path):
    broker, events = make_broker(), Events()
    subscriber = listen(broker)
    queue = started(Mqtt(f"mqtt://{broker.address}/plant/line3", tmp_path / "s.db"), events)
    records = of_every_kind()
    for record in records:
        queue.put(record)
    subscriber.wait(lambda s: len(s.messages) == 6)
    wait_until(lambda: queue.status().written == 5)
    assert (queue.status().spooled, queue.status().waiting) == (0, 0)
    queue.close(20)
    publish(broker, b"end")
    subscriber.wait(lambda s: s.messages[-1][1] == b"end")
    assert subscriber.online("plant/line3/online") == ["true", "false"]  # said by the line, not by a last will
    got = [(topic, json.loads(text)) for topic, text, _ in subscriber.messages[:-1] if "/online" not in topic]
    topics = [*["plant/line3/verdict/gear"] * 3, "plant/line3/late/gear", "plant/line3/status"]
    assert got == [(topic, record.to_dict()) for topic, record in zip(topics, records, strict=True)]
    assert events.seen == []


@needs_broker
def test_a_line_that_dies_is_seen_to_be_offline(make_broker, listen, tmp_path):
    broker = make_broker()
    code = f"""
        import threading
        from omniad_edge.outputs.mqtt import Mqtt
        output = Mqtt("mqtt://{broker.address}/line3", {str(tmp_path / "s.db")!r})
        output.open()
        threading.Event().wait()
    """
    subscriber = listen(broker)
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)]) as process:
        subscriber.wait(lambda s: s.online("line3/online") == ["true"])
        process.kill()
    subscriber.wait(lambda s: s.online("line3/online") == ["true", "false"])
    late = Subscriber(broker)  # it is retained: the same session, subscribed again
    late.wait(lambda s: ("line3/online", b"false", True) in s.messages)
    late.close()


@needs_broker
def test_nothing_is_lost_while_the_broker_is_away(make_broker, listen, tmp_path, quick):
    broker, events = make_broker(), Events()
    subscriber = listen(broker)
    queue = started(Mqtt(f"mqtt://{broker.address}/line3", tmp_path / "s.db"), events)
    for number in range(300):
        queue.put(make_verdict(number))
        if number == 100:
            subscriber.wait(lambda s: len(s.ids()) > 50)
            broker.stop()
        if number == 200:
            assert "records wait in the spool" in events.wait("output failed")
            broker.start()
    events.wait("output back")
    subscriber.wait(lambda s: len(s.ids()) == 300)
    assert subscriber.ids() == ids(*range(300))
    wait_until(lambda: queue.status().spooled == 0)
    assert queue.status().written == 300 and queue.status().dropped == 0
    queue.close(20)
    subscriber.wait(lambda s: s.online("line3/online")[-1] == "false")
    assert events.names() == ["output failed", "output back"]


@needs_broker
def test_a_connection_without_records_is_kept_up(make_broker, listen, tmp_path, quick, monkeypatch):
    monkeypatch.setattr("omniad_edge.outputs.spool.IDLE_S", 0.02)
    broker, events = make_broker(), Events()
    queue = started(Mqtt(f"mqtt://{broker.address}/line3", tmp_path / "s.db"), events)
    listen(broker).wait(lambda s: s.online("line3/online") == ["true"])
    broker.stop()
    events.wait("output failed")
    broker.start()
    events.wait("output back")
    queue.close(20)


@needs_broker
def test_a_broker_that_falls_silent_is_left_and_tried_anew(make_broker, listen, tmp_path, quick, monkeypatch):
    broker, events = make_broker(), Events()
    subscriber = listen(broker)
    queue = started(Mqtt(f"mqtt://{broker.address}/line3", tmp_path / "s.db"), events)
    queue.put(make_status(1))
    subscriber.wait(lambda s: s.ids() == ids(1))
    wait_until(lambda: queue.status().written == 1)
    monkeypatch.setattr(mqtt, "ANSWER_S", 0.1)
    broker.process.send_signal(signal.SIGSTOP)
    queue.put(make_status(2))
    assert "no acknowledgement in 0.1 s; records wait in the spool" in events.wait("output failed")
    assert queue.status().spooled == 1
    monkeypatch.setattr(mqtt, "ANSWER_S", 5)
    broker.process.send_signal(signal.SIGCONT)
    events.wait("output back")
    subscriber.wait(lambda s: s.ids() == ids(1, 2))
    queue.close(20)
    assert subscriber.online("line3/online").count("true") == 2  # the first connection was given up


def test_a_server_that_is_no_broker_is_left(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(mqtt, "ANSWER_S", 0.1)
    events = Events()
    with socket.create_server(("127.0.0.1", 0)) as server:
        queue = started(Mqtt(f"mqtt://127.0.0.1:{server.getsockname()[1]}/line3", tmp_path / "s.db"), events)
        assert "no connection in 0.1 s" in events.wait("output failed")
        queue.close(20)


@needs_broker
def test_a_record_larger_than_the_broker_takes_holds_up_none(make_broker, listen, tmp_path, quick):
    broker, events = make_broker("max_packet_size 2000"), Events()
    subscriber = listen(broker)
    queue = started(Mqtt(f"mqtt://{broker.address}/line3", tmp_path / "s.db"), events)
    for number in range(6):
        queue.put(make_status(number, detail="x" * (5000 if number % 2 else 10)))
    subscriber.wait(lambda s: s.ids() == ids(0, 2, 4))
    wait_until(lambda: (queue.status().written, queue.status().failed) == (3, 3))
    assert "takes 2000 bytes" in events.wait("output refused")
    queue.close(20)
    assert "output failed" not in events.names()


@needs_broker
def test_a_password_opens_the_broker_and_is_shown_nowhere(make_broker, listen, tmp_path, quick):
    passwords = tmp_path / "passwords"
    password = "p@ss/w:rd#1"
    subprocess.run(["mosquitto_passwd", "-b", "-c", str(passwords), "line", password], check=True)
    broker, events = make_broker(f"password_file {passwords}"), Events()
    wrong = Mqtt(f"mqtt://line:secret123@{broker.address}/line3", tmp_path / "wrong.db")
    queue = started(wrong, events)
    assert "Not authorized" in events.wait("output failed")
    queue.close(20)
    assert "secret123" not in f"{events.seen} {wrong.name} {wrong!r} {vars(wrong)}"
    subscriber = listen(broker, user=("line", password))
    queue = started(Mqtt(f"mqtt://line:p%40ss%2Fw%3Ard%231@{broker.address}/line3", tmp_path / "s.db"), events)
    queue.put(make_status(1))
    subscriber.wait(lambda s: s.ids() == ids(1))
    queue.close(20)


@pytest.fixture
def refused_sockets():
    """paho leaves them to the garbage collector, which would complain in any later test."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@needs_broker
@pytest.mark.filterwarnings("ignore:unclosed <ssl:ResourceWarning")
def test_tls_is_verified(make_broker, listen, tmp_path, quick, refused_sockets):
    made = make_certificates(tmp_path)
    broker = make_broker(f"certfile {made.server}", f"keyfile {made.key}")
    port = broker.port
    subscriber = listen(broker, tls=made.ca)
    for number, host, ca_file, why in [
        (1, "localhost", None, "CERTIFICATE_VERIFY_FAILED.*(self-signed|self signed|unable to get)"),
        (2, "127.0.0.1", str(made.ca), "IP address mismatch"),
    ]:
        events = Events()
        queue = started(Mqtt(f"mqtts://{host}:{port}/line3", tmp_path / f"{number}.db", ca_file=ca_file), events)
        queue.put(make_status(number))
        assert re.search(why, events.wait("output failed"))
        queue.close(20)
    assert subscriber.messages == []
    queue = started(Mqtt(f"mqtts://localhost:{port}/line3", tmp_path / "s.db", ca_file=str(made.ca)), Events())
    queue.put(make_status(3))
    subscriber.wait(lambda s: s.ids() == ids(3))
    queue.close(20)


def test_a_ca_file_is_checked_at_once(tmp_path):
    with pytest.raises(InputError, match=r"ca_file: expected a file of PEM certificates, got /nowhere/ca\.pem"):
        Mqtt("mqtts://host/line3", tmp_path / "s.db", ca_file="/nowhere/ca.pem")


# ---- topics and addresses


def test_topics(tmp_path):
    verdict, late, status = (record.to_dict() for record in (make_verdict(1), make_late(), make_status()))

    def topics(template):
        levels, online = topic_levels(template)
        return online, *(topic_of(levels, record) for record in (verdict, late, status))

    assert topics("line3") == ("line3/online", "line3/verdict/gear", "line3/late/gear", "line3/status")
    assert topics("a/b/{product}/x-{kind}") == (
        "a/b/online",
        "a/b/gear/x-verdict",
        "a/b/gear/x-late",
        "a/b/x-status",
    )
    assert topics("p/{line}/{part_id}") == ("p/online", "p/line3/A1", "p/line3/A1", "p/line3")


@given(st.text(st.characters(exclude_categories=()), max_size=400))
def test_any_product_makes_one_valid_level(product):
    levels, _ = topic_levels("line3")
    topic = topic_of(levels, make_verdict(1, product=product, results=()).to_dict())
    paho.Client._raise_for_invalid_topic(topic.encode())
    assert topic.count("/") == (2 if product else 1) and topic.isprintable()


@pytest.mark.parametrize(
    "topic", ["a/+/{kind}", "a/#", "a/{colour}", "a/{kind", "{kind}/a", "a/{kind!r}", "a/{kind:9}", "a/{}", "a\n"]
)
def test_topics_that_cannot_work_are_refused(topic, tmp_path):
    with pytest.raises(InputError, match="topic: "):
        Mqtt("mqtt://host", tmp_path / "s.db", topic=topic)


@pytest.mark.parametrize(
    "url",
    [
        "http://u:secret@host/x",
        "mqtt://u:se/cret@host",
        "mqtt://u:secret@host:abc",
        "mqtt:///x",
        "",
        "host:1",
        None,
    ],
)
def test_addresses_that_cannot_work_are_refused_without_repeating_them(url, tmp_path):
    with pytest.raises(InputError, match="expected an address as mqtt://") as caught:
        Mqtt(url, tmp_path / "s.db")
    assert "se" not in str(caught.value).replace("user:password", "").replace("expected", "").replace("host's", "")


def test_the_name_shows_neither_user_nor_topic(tmp_path):
    output = Mqtt("mqtts://user:secret@broker.example:8884/plant", tmp_path / "s.db")
    assert output.name == "mqtt mqtts://broker.example:8884"
    assert "secret" not in repr(output._address)
    assert Mqtt("mqtt://[::1]/plant", tmp_path / "s.db").name == "mqtt mqtt://[::1]:1883"


@pytest.mark.parametrize("make", [lambda p: Mqtt("mqtt://h/t", p), lambda p: MqttTrigger("mqtt://h/t")])
def test_without_paho_the_command_is_named(make, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "paho.mqtt", None)
    with pytest.raises(MissingDependencyError, match=r'paho-mqtt is not .*pip install "omniad-edge\[line\]"'):
        make(tmp_path / "s.db")


# ---- triggers


def test_what_a_message_says_of_a_part():
    for payload, part in [
        (b"A7", ("A7", None)),
        (b" A7\n", ("A7", None)),
        (b"", (None, None)),
        (b"  ", (None, None)),
        (b'{"part_id": "A7", "recipe": 3}', ("A7", None)),
        (b'{"part_id": 7, "product": "cap"}', ("7", "cap")),
        (b'{"part_id": null}', (None, None)),
        (b'{"product": "cap"}', (None, "cap")),
        (b"[7]", ("[7]", None)),
        ("Teil-ä".encode(), ("Teil-ä", None)),
    ]:
        assert parse_part(payload) == part
    unreadable = (b'{"part"', b'{"id": "A7"}', b'{"part_id": ["A7"]}', b"\xff\xfe", b'{"part_id": 1.5}')
    for payload in (*unreadable, b'{"part_id": "A7", "product": 3}'):
        with pytest.raises(ValueError, match=r"expected a part id as text or \{.*\}, got b"):
            parse_part(payload)


class Parts:
    """A `trigger` that keeps the part ids it was called with, but for "probe"; it knows the product "cap"."""

    def __init__(self) -> None:
        self.seen: list[str | None] = []
        self.products: list[str | None] = []
        self.changed = threading.Condition()
        self.probed = False

    def __call__(self, part_id: str | None, product: str | None) -> None:
        if product not in (None, "cap"):
            raise InputError(f"product: expected one of cap; got {product!r}")
        with self.changed:
            if part_id == "probe":
                self.probed = True
                return
            self.seen.append(part_id)
            self.products.append(product)
            self.changed.notify_all()
        if part_id == "bad":
            raise InputError("this line is stopped")

    def wait(self, *part_ids: str | None) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: self.seen == list(part_ids), 20), self.seen


@pytest.fixture
def trigger_on(quick):
    made = []

    def make(broker: Broker, parts: Parts, events: Events) -> MqttTrigger:
        trigger = MqttTrigger(f"mqtt://{broker.address}/line3/trigger", on_event=events)
        made.append(trigger)
        trigger.start(parts)
        return trigger

    yield make
    for trigger in made:
        trigger.stop()


def publish(broker: Broker, *payloads: bytes, retain: bool = False) -> None:
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    client.connect("127.0.0.1", broker.port)
    client.loop_start()
    for payload in payloads:
        client.publish("line3/trigger", payload, qos=1, retain=retain).wait_for_publish(20)
    mqtt.end(client)


def wait_for_subscription(broker: Broker, parts: Parts) -> None:
    """Which nothing tells but a message that comes."""

    def come() -> bool:
        publish(broker, b"probe")
        return parts.probed

    wait_until(come)


@needs_broker
def test_each_message_is_a_part(make_broker, trigger_on):
    broker, parts, events = make_broker(), Parts(), Events()
    publish(broker, b"stale", retain=True)
    trigger = trigger_on(broker, parts, events)
    wait_for_subscription(broker, parts)
    publish(broker, b"A1", b'{"part_id": "A2"}', b"", b"{broken", b"bad", b"A3")
    parts.wait("A1", "A2", None, None, "bad", "A3")
    assert [event for event, _, _ in events.seen] == ["trigger fault"] * 2
    assert "got b'{broken'" in events.seen[0][2] and "this line is stopped" in events.seen[1][2]
    trigger.stop()
    publish(broker, b"A4")
    trigger.stop()
    assert parts.seen[-1] == "A3"


@needs_broker
def test_a_message_names_the_product(make_broker, trigger_on):
    broker, parts, events = make_broker(), Parts(), Events()
    trigger_on(broker, parts, events)
    wait_for_subscription(broker, parts)
    publish(broker, b'{"part_id": "A1", "product": "cap"}', b'{"part_id": "A2", "product": "nut"}', b"A3")
    parts.wait("A1", "A2", "A3")
    assert parts.products == ["cap", None, None]  # the part of an unknown one is judged all the same
    ((event, _, detail),) = events.seen
    assert event == "trigger fault" and "expected one of cap; got 'nut'" in detail


@needs_broker
def test_a_trigger_comes_back_with_the_broker(make_broker, trigger_on):
    broker, parts, events = make_broker(), Parts(), Events()
    trigger_on(broker, parts, events)
    wait_for_subscription(broker, parts)
    broker.stop()
    events.wait("trigger lost")
    broker.start()
    events.wait("trigger back")
    publish(broker, b"A1")
    parts.wait("A1")
    assert events.names() == ["trigger lost", "trigger back"]


@needs_broker
def test_a_trigger_waits_for_a_broker_that_starts_later(make_broker, trigger_on):
    broker, parts, events = make_broker(), Parts(), Events()
    broker.stop()
    trigger_on(broker, parts, events)
    events.wait("trigger lost")
    broker.start()
    events.wait("trigger back")
    publish(broker, b"A1")
    parts.wait("A1")


def test_a_trigger_needs_a_topic_and_may_be_stopped_unstarted():
    with pytest.raises(InputError, match="expected a topic, as in mqtt://host/line3/trigger"):
        MqttTrigger("mqtt://host/")
    MqttTrigger("mqtt://host/a").stop()

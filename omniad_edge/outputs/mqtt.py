"""Records to an MQTT broker, and triggers from one (MQTT 5, through paho-mqtt)."""

import json
import socket
import ssl
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from string import Formatter
from typing import Any

from ..address import Address, parse_address, trusted
from ..errors import InputError, MissingDependencyError, OutputError
from .spool import Message, Spooled

PORTS = {"mqtt": 1883, "mqtts": 8883}
FIELDS = ("line", "kind", "product", "part_id")
ANSWER_S = 5.0  # for a connection, and for acknowledgements
KEEPALIVE_S = 10  # a broker that fell silent is noticed after one and a half of it
RETRY_S = (1, 5)
FOR_GOOD = (0x90, 0x95, 0x99)  # topic name invalid, packet too large, payload format invalid


def load_paho() -> Any:
    """paho.mqtt.client. Raises MissingDependencyError."""
    try:
        from paho.mqtt import client
    except ImportError:
        raise MissingDependencyError("paho-mqtt", "line") from None
    return client


def make_client(address: Address, tls: ssl.SSLContext | None, **options: Any) -> Any:
    """A paho client that is not connected yet."""
    paho = load_paho()
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5, **options)
    client.connect_timeout = ANSWER_S
    if address.user is not None:
        client.username_pw_set(address.user, address.password)
    if tls is not None:
        client.tls_set_context(tls)
    return client


def end(client: Any) -> None:
    """Say goodbye and stop its thread, in a bounded time even if the broker takes nothing any more."""
    client.disconnect()
    stopping = threading.Thread(target=client.loop_stop, daemon=True)
    stopping.start()
    stopping.join(0.5)  # for the goodbye to be sent; cut off before it, the broker would publish the last will
    if stopping.is_alive():
        with suppress(OSError, ValueError, AttributeError):
            client.socket().shutdown(socket.SHUT_RDWR)
        stopping.join(0.5)


class Mqtt(Spooled):
    """Publishes each record as JSON with QoS 1; it stays in the spool until the broker has acknowledged it.

    url:     mqtt:// or mqtts://user:password@host:port/topic; shown as scheme, host and port
    spool:   file for the records that are not delivered yet, of this output alone; keep: its size
    topic:   instead of the url's path; of text and {line}, {kind}, {product}, {part_id}. One without any of them
             gets /{kind}/{product} behind it; without both it is omniad/{kind}/{product}. Levels that a record
             has not (a status has no product) are left out
    ca_file: certificates to trust instead of the system's

    The levels before the first {...}, with /online behind, are a retained "true" while connected, else "false".
    Raises InputError for what cannot work, MissingDependencyError without paho-mqtt.
    """

    send_batch = 20  # the window brokers have at least, so that none is held back by it

    def __init__(
        self,
        url: str,
        spool: str | Path,
        *,
        topic: str | None = None,
        keep: str = "1GB",
        ca_file: str | None = None,
    ) -> None:
        load_paho()
        self._address = parse_address(url, PORTS)
        super().__init__(f"mqtt {self._address.shown}", spool, keep)
        self._levels, self._online = topic_levels(topic or self._address.path.strip("/") or "omniad")
        self._tls = trusted(ca_file) if self._address.scheme == "mqtts" else None
        self._session: _Session | None = None

    def connect(self) -> None:
        if self._session is None or self._session.lost:
            self._leave()
            self._session = _Session(self.name, self._address, self._tls, self._online)
            self._session.publish([(self._online, "true")], retain=True)

    def send(self, messages: list[Message]) -> list[str]:
        session, refused, packets = self._session, [], []
        for message in messages:
            topic = topic_of(self._levels, message.record)
            # A broker cuts the connection at a larger packet, and would at each try.
            if len(topic) + len(message.text) + 50 > session.max_packet_bytes:
                refused.append(
                    f"{self.name} takes {session.max_packet_bytes} bytes, {topic} has {len(message.text)}"
                )
            else:
                packets.append((topic, message.text))
        try:
            for start in range(0, len(packets), session.window):
                refused += session.publish(packets[start : start + session.window])
        except Exception:
            self._leave()
            raise
        return refused

    def disconnect(self) -> None:
        if self._session is not None and not self._session.lost:
            with suppress(OutputError):  # else the broker says so, as the last will
                self._session.publish([(self._online, "false")], retain=True)
        self._leave()

    def _leave(self) -> None:
        if self._session is not None:
            session, self._session = self._session, None
            session.end()


class _Session:
    """One connection, from its beginning to its loss. A new one begins with nothing of the old left to send."""

    def __init__(self, name: str, address: Address, tls: ssl.SSLContext | None, online: str) -> None:
        self._name = name
        self.lost = False
        self.max_packet_bytes, self.window = 2**28, Mqtt.send_batch
        self._changed = threading.Condition()  # guards what follows
        self._answer: Any = None
        self._acknowledged: dict[int, Any] = {}
        self._client = client = make_client(address, tls, reconnect_on_failure=False)
        client.on_connect, client.on_disconnect = self._connected, self._disconnected
        client.on_publish = self._published
        client.will_set(online, "false", qos=1, retain=True)
        try:
            client.connect(address.host, address.port, keepalive=KEEPALIVE_S, clean_start=True)
        except (OSError, ValueError) as exc:
            raise OutputError(f"{name}: {type(exc).__name__}: {exc}; records wait in the spool") from exc
        client.loop_start()
        try:
            self._wait(lambda: self._answer is not None, "connection")
            if self._answer.is_failure:
                raise OutputError(f"{name}: the broker refused the connection: {self._answer}")
        except OutputError:
            self.end()
            raise

    def publish(self, packets: list[tuple[str, str]], retain: bool = False) -> list[str]:
        """Topics and texts, at most `window` -> why those were refused that never can be taken. Waits for all."""
        with self._changed:
            self._acknowledged.clear()
        sent = [(self._client.publish(topic, text, qos=1, retain=retain).mid, topic) for topic, text in packets]
        mids = {mid for mid, _ in sent}
        self._wait(lambda: mids <= self._acknowledged.keys(), "acknowledgement")
        failed = [(self._acknowledged[mid], topic) for mid, topic in sent if self._acknowledged[mid].is_failure]
        for reason, topic in failed:
            if reason.value not in FOR_GOOD:
                raise OutputError(f"{self._name}: the broker did not take {topic}: {reason}")
        return [f"{self._name}: {reason}: {topic}" for reason, topic in failed]

    def end(self) -> None:
        end(self._client)

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: condition() or self.lost, ANSWER_S)
            if not condition():
                why = "the connection was lost" if self.lost else f"no {what} in {ANSWER_S:g} s"
                raise OutputError(f"{self._name}: {why}; records wait in the spool")

    # ---- called from paho's thread

    def _connected(self, client: Any, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        with self._changed:
            self.max_packet_bytes = getattr(properties, "MaximumPacketSize", self.max_packet_bytes)
            self.window = min(self.window, getattr(properties, "ReceiveMaximum", self.window))
            self._answer = reason
            self._changed.notify_all()

    def _disconnected(self, client: Any, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        with self._changed:
            self.lost = True
            self._changed.notify_all()

    def _published(self, client: Any, userdata: Any, mid: int, reason: Any, properties: Any) -> None:
        with self._changed:
            self._acknowledged[mid] = reason
            self._changed.notify_all()


def topic_levels(template: str) -> tuple[list[str], str]:
    """The template's levels, and the topic that says whether the line is online. Raises InputError."""
    try:
        fields = [field for field in Formatter().parse(template) if field[1] is not None]
    except ValueError as exc:
        raise InputError(f"topic: {template!r}: {exc}") from None
    plain = all(name in FIELDS and not form and not conversion for _, name, form, conversion in fields)
    if not plain or "+" in template or "#" in template or not template.isprintable():
        names = ", ".join(f"{{{name}}}" for name in FIELDS)
        raise InputError(f"topic: expected levels of text and {names}, without + and #; got {template!r}")
    if not fields:
        template = f"{template}/{{kind}}/{{product}}"
    levels = template.split("/")
    fixed = levels[: next(i for i, level in enumerate(levels) if "{" in level)]
    if not any(fixed):
        raise InputError(f"topic: expected a first level without {{...}}, for .../online; got {template!r}")
    return levels, "/".join([*fixed, "online"])


def topic_of(levels: list[str], record: dict) -> str:
    product = record.get("product") or record.get("result", {}).get("product", "")
    values = {
        "line": record["line"],
        "kind": record["kind"],
        "product": product,
        "part_id": record.get("part_id", ""),
    }
    values = {name: _safe_level(value) for name, value in values.items()}
    filled = [level.format_map(values) for level in levels]
    return "/".join(level for level, template in zip(filled, levels, strict=True) if level or not template)


def _safe_level(text: str) -> str:
    """Brokers cut the connection at control characters, and / + # have their meaning in topics."""
    return "".join(c if c.isprintable() and c not in "/+#" else "_" for c in text[:200])


class MqttTrigger:
    """Announces a part for every message on a topic; connects again by itself.

    url:      mqtt:// or mqtts://user:password@host:port/topic; ca_file as for Mqtt
    on_event: on_event(event, who, detail): "trigger lost", "trigger back", "trigger fault"; by default they become
        status records of the line

    A message is the part's id as text, or JSON as {"part_id": "A7", "product": "gear"}, one of them at least; an
    empty one, and one that is neither (a "trigger fault"), is a part without an id: it lies before the camera all
    the same. So does one of a product that the line does not know (a "trigger fault"): it is judged as if none was
    named. Retained messages and those of the time without a connection are not delivered: their parts are gone.
    """

    def __init__(
        self,
        url: str,
        *,
        ca_file: str | None = None,
        on_event: Callable[[str, str, str], None] | None = None,
    ) -> None:
        load_paho()
        self._address = parse_address(url, PORTS)
        self.name = f"trigger {self._address.shown}"
        self._topic = self._address.path.strip("/")
        if not self._topic:
            raise InputError(
                "MqttTrigger: expected a topic, as in mqtt://host/line3/trigger; got an address without"
            )
        self._tls = trusted(ca_file) if self._address.scheme == "mqtts" else None
        self.on_event = on_event
        self._client: Any = None
        self._trigger: Callable[[str | None, str | None], Any] | None = None
        self._lost = False

    def start(self, trigger: Callable[[str | None, str | None], Any]) -> None:
        """Call trigger(part_id, product) at each message, from a thread of this object's own. Returns at once."""
        self._trigger = trigger
        self._client = client = make_client(self._address, self._tls)
        client.reconnect_delay_set(*RETRY_S)
        client.on_connect, client.on_subscribe = self._connected, self._subscribed
        client.on_message = self._message
        client.on_connect_fail = lambda client, userdata: self._gone("no connection")
        client.on_disconnect = lambda client, userdata, flags, reason, properties: self._gone(str(reason))
        client.connect_async(self._address.host, self._address.port, keepalive=KEEPALIVE_S, clean_start=True)
        client.loop_start()

    def stop(self) -> None:
        """No trigger comes afterwards. May be called twice, and before `start`."""
        self._trigger = None
        if self._client is not None:
            client, self._client = self._client, None
            end(client)

    def _connected(self, client: Any, userdata: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self._gone(f"the broker refused the connection: {reason}")
            return
        from paho.mqtt.subscribeoptions import SubscribeOptions

        client.subscribe(self._topic, options=SubscribeOptions(qos=1, retainHandling=2))

    def _subscribed(self, client: Any, userdata: Any, mid: int, reasons: list, properties: Any) -> None:
        if reasons[0].is_failure:
            self._gone(f"the broker refused the subscription to {self._topic}: {reasons[0]}")
        elif self._lost:
            self._lost = False
            self._tell("trigger back", "")

    def _gone(self, reason: str) -> None:
        if self._trigger is not None and not self._lost:
            self._lost = True
            self._tell("trigger lost", reason)

    def _tell(self, event: str, detail: str) -> None:
        if self.on_event is None:
            return
        try:
            self.on_event(event, self.name, detail)
        except Exception:  # or paho's thread would end, and with it all triggers
            traceback.print_exc()

    def _message(self, client: Any, userdata: Any, message: Any) -> None:
        trigger = self._trigger
        if trigger is None:
            return
        try:
            part_id, product = parse_part(message.payload)
        except ValueError as exc:
            part_id = product = None
            self._tell("trigger fault", str(exc))
        if product is not None and not self._announce(trigger, part_id, product):
            product = None
        if product is None:
            self._announce(trigger, part_id, None)

    def _announce(self, trigger: Callable[[str | None, str | None], Any], *part: str | None) -> bool:
        try:
            trigger(*part)
        except Exception as exc:
            self._tell("trigger fault", f"{type(exc).__name__}: {exc}")
            return False
        return True


def parse_part(payload: bytes) -> tuple[str | None, str | None]:
    """-> part id and product, each None where it is not said.

    Raises ValueError, in words, for what is neither text nor JSON with one of these.
    """
    expected = 'expected a part id as text or {"part_id": "A7", "product": "gear"}'
    try:
        text = payload.decode("utf-8").strip()
        part = json.loads(text) if text.startswith("{") else {"part_id": text}
    except ValueError:
        raise ValueError(f"{expected}, got {payload[:80]!r}") from None
    part_id, product = part.get("part_id"), part.get("product")
    known = "part_id" in part or "product" in part
    if not known or not isinstance(part_id, str | int | None) or not isinstance(product, str | None):
        raise ValueError(f"{expected}, got {payload[:80]!r}")
    return (None if part_id in (None, "") else str(part_id)), product or None

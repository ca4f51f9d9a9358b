"""Webhooks against a real server that refuses, fails, hangs, moves and shows certificates."""

import json
import re
import ssl
import threading
from base64 import b64encode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import create_server

import pytest
from certificates import make_certificates
from records import Events, check, make_status, make_verdict, of_every_kind, started, wait_until

from omniad_edge.errors import InputError
from omniad_edge.outputs import delivery
from omniad_edge.outputs.delivery import OutputStatus
from omniad_edge.outputs.webhook import Webhook


class Server(ThreadingHTTPServer):
    """Answers each POST with the next status of `answers`, then with 204; keeps what it got."""

    daemon_threads = True

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.port = self.server_address[1]
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.answers: list[int] = []
        self.headers: dict[str, str] = {}
        self.body = b""
        self.requests: list[tuple[str, dict, str]] = []
        self.taken: list[str] = []
        self.connections = 0
        self.closes = False
        self.hang = threading.Event()
        self.hang.set()
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        self.hang.set()
        self.shutdown()
        self.server_close()
        self.thread.join()

    def handle_error(self, request, client_address) -> None:
        """A client that goes away, as some here do, is no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 20
    server: Server

    def setup(self) -> None:
        super().setup()
        self.server.connections += 1

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"])).decode("ascii")
        record = check(json.loads(text))
        self.server.requests.append((self.path, dict(self.headers), text))
        self.server.hang.wait(20)
        status = self.server.answers.pop(0) if self.server.answers else 204
        if 200 <= status < 300:
            self.server.taken.append(record["id"])
        self.send_response(status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)
        self.close_connection = self.server.closes

    def log_message(self, format, *args) -> None:
        pass


@pytest.fixture
def server():
    server = Server()
    yield server
    server.stop()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(delivery, "RETRY_S", (0.005, 0.01))
    monkeypatch.setattr(delivery, "TICK_S", 0.01)


def ids(*numbers: int) -> list[str]:
    return [f"a1b2-{number}" for number in numbers]


def send(output: Webhook, *numbers: int, events: Events | None = None):
    queue = started(output, events or Events())
    for number in numbers:
        queue.put(make_status(number))
    return queue


def test_each_record_is_posted_with_its_id(server, tmp_path):
    events = Events()
    queue = started(Webhook(f"http://127.0.0.1:{server.port}/hook/a b?key=1", tmp_path / "s.db"), events)
    records = of_every_kind()
    for record in records:
        queue.put(record)
    wait_until(lambda: queue.status().written == 5)
    queue.close(20)
    assert [json.loads(text) for _, _, text in server.requests] == [record.to_dict() for record in records]
    for number, (path, headers, _) in enumerate(server.requests, 1):
        assert path == "/hook/a%20b?key=1" and headers["Content-Type"] == "application/json"
        assert headers["Idempotency-Key"] == f"a1b2-{number}" and "Authorization" not in headers
    assert server.connections == 1 and events.seen == []
    assert queue.status().written == 5 and queue.status().spooled == 0


@pytest.mark.parametrize("status", [500, 503, 408, 425, 429, 301])
def test_what_may_pass_is_tried_again(status, server, tmp_path, quick):
    events = Events()
    server.answers = [200, status, status, status, 201]
    server.headers = {"Location": "http://127.0.0.1:9/elsewhere"}
    queue = send(Webhook(f"http://127.0.0.1:{server.port}", tmp_path / "s.db"), 1, 2, 3, events=events)
    events.wait("output back")
    wait_until(lambda: queue.status().spooled == 0)
    queue.close(20)
    assert server.taken == ids(1, 2, 3)
    assert [json.loads(text)["id"] for _, _, text in server.requests] == ids(1, 2, 2, 2, 2, 3)
    assert f"answered {status}" in events.seen[0][2] and "records wait in the spool" in events.seen[0][2]
    assert ("it redirects" in events.seen[0][2]) == (status == 301)
    assert events.names() == ["output failed", "output back"]
    assert queue.status() == OutputStatus(queue.output.name, waiting=0, written=3, failed=0, dropped=0, spooled=0)


@pytest.mark.parametrize("status", [400, 404, 413, 422])
def test_a_refused_record_is_reported_and_passed_over(status, server, tmp_path, quick):
    events = Events()
    server.answers = [200, status]
    queue = send(Webhook(f"http://127.0.0.1:{server.port}", tmp_path / "s.db"), 1, 2, 3, events=events)
    wait_until(lambda: (queue.status().written, queue.status().failed) == (2, 1))
    queue.close(20)
    assert server.taken == ids(1, 3) and len(server.requests) == 3
    assert events.names() == ["output refused"]
    assert re.fullmatch(
        rf"1 record: webhook http://127\.0\.0\.1:\d+ answered {status} .* to record a1b2-2", events.seen[0][2]
    )


def test_a_server_that_is_away_delays_nothing(server, tmp_path, quick):
    with create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    events = Events()
    queue = send(Webhook(f"http://127.0.0.1:{port}", tmp_path / "s.db"), 1, 2, 3, events=events)
    assert "ConnectionRefusedError" in events.wait("output failed")
    wait_until(lambda: queue.status().spooled == 3)
    queue.close(20)
    queue = send(Webhook(f"http://127.0.0.1:{server.port}", tmp_path / "s.db"), 4)
    wait_until(lambda: queue.status().spooled == 0 and len(server.taken) == 4)
    queue.close(20)
    assert server.taken == ids(1, 2, 3, 4)


def test_a_server_that_hangs_is_left_after_its_time(server, tmp_path, quick):
    events = Events()
    server.hang.clear()
    output = Webhook(f"http://127.0.0.1:{server.port}", tmp_path / "s.db", timeout_s=0.1)
    queue = send(output, 1, events=events)
    assert "no answer" in events.wait("output failed")
    wait_until(lambda: server.connections > 2)  # a new one each time: an old one's answer may still come
    server.hang.set()
    events.wait("output back")
    wait_until(lambda: queue.status().spooled == 0)
    queue.close(20)
    assert set(server.taken) == set(ids(1)) and queue.status().written == 1


def test_a_server_that_closes_idle_connections_costs_nothing(server, tmp_path, quick):
    events = Events()
    server.closes = True  # without saying so in a header
    queue = send(Webhook(f"http://127.0.0.1:{server.port}", tmp_path / "s.db"), *range(5), events=events)
    wait_until(lambda: queue.status().written == 5)
    queue.close(20)
    assert server.taken == ids(*range(5)) and server.connections == 5 and events.seen == []


def test_a_long_answer_is_not_read(server, tmp_path, quick):
    events = Events()
    server.body = bytes(1_000_000)
    server.answers = [200] * 3
    queue = send(Webhook(f"http://127.0.0.1:{server.port}", tmp_path / "s.db"), 1, 2, 3, events=events)
    wait_until(lambda: queue.status().written == 3)
    queue.close(20)
    assert server.taken == ids(1, 2, 3) and server.connections == 3 and events.seen == []


def test_an_answer_that_is_no_http_is_an_error_to_retry(tmp_path, quick):
    def answer_once():
        with listening.accept()[0] as connection:
            connection.recv(65536)
            connection.sendall(b"SSH-2.0-OpenSSH\r\n")

    events = Events()
    with create_server(("127.0.0.1", 0)) as listening:
        answering = threading.Thread(target=answer_once)
        answering.start()
        queue = send(
            Webhook(f"http://127.0.0.1:{listening.getsockname()[1]}", tmp_path / "s.db"), 1, events=events
        )
        assert "BadStatusLine" in events.wait("output failed")
        answering.join(20)
    queue.close(20)
    assert queue.status().spooled == 1


def test_user_and_password_are_sent_and_shown_nowhere(server, tmp_path, quick):
    events = Events()
    output = Webhook(f"http://line:p%40ss%2Fword@127.0.0.1:{server.port}/secret-path", tmp_path / "s.db")
    server.answers = [500]
    queue = send(output, 1, events=events)
    wait_until(lambda: queue.status().written == 1)
    events.wait("output failed")
    queue.close(20)
    assert server.requests[0][1]["Authorization"] == "Basic " + b64encode(b"line:p@ss/word").decode()
    shown = f"{events.seen} {output.name} {output._address!r}"
    assert not any(secret in shown for secret in ("p@ss", "p%40", "secret-path", "line:"))


def test_a_strange_id_is_still_a_header(server, tmp_path):
    queue = started(Webhook(f"http://127.0.0.1:{server.port}", tmp_path / "s.db"), Events())
    verdict = make_verdict(1)
    object.__setattr__(verdict.origin, "run", "läuf\r\nX-Evil: 1")
    queue.put(verdict)
    wait_until(lambda: queue.status().written == 1)
    queue.close(20)
    assert server.requests[0][1]["Idempotency-Key"] == "l_uf__X-Evil:_1-1"
    assert "X-Evil" not in server.requests[0][1]


# ---- TLS


@pytest.fixture
def tls_server(tmp_path):
    made = make_certificates(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(made.server, made.key)
    server = Server(context)
    server.ca = str(made.ca)
    yield server
    server.stop()


def test_tls_with_an_authority_of_ones_own(tls_server, tmp_path):
    output = Webhook(f"https://localhost:{tls_server.port}/hook", tmp_path / "s.db", ca_file=tls_server.ca)
    queue = send(output, 1, 2)
    wait_until(lambda: queue.status().written == 2)
    queue.close(20)
    assert tls_server.taken == ids(1, 2)


@pytest.mark.parametrize(
    "host, trusts, why",
    [("localhost", False, "CERTIFICATE_VERIFY_FAILED"), ("127.0.0.1", True, "IP address mismatch")],
)
def test_an_unknown_authority_and_a_wrong_host_are_refused(host, trusts, why, tls_server, tmp_path, quick):
    events = Events()
    ca_file = tls_server.ca if trusts else None
    queue = send(
        Webhook(f"https://{host}:{tls_server.port}", tmp_path / "s.db", ca_file=ca_file), 1, events=events
    )
    assert why in events.wait("output failed")
    wait_until(lambda: queue.status().spooled == 1)
    queue.close(20)
    assert tls_server.requests == []


# ---- what cannot work


@pytest.mark.parametrize(
    "url", ["ftp://host/x", "host/hook", "https://", "http://host:port/", "https://u:pw/x@host/"]
)
def test_addresses_are_checked(url, tmp_path):
    with pytest.raises(InputError, match="expected an address as https://user:password@host:port/path"):
        Webhook(url, tmp_path / "s.db")


def test_sizes_and_certificates_are_checked(tmp_path):
    with pytest.raises(InputError, match="such as '10GB'"):
        Webhook("https://host/", tmp_path / "s.db", keep="a lot")
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    with pytest.raises(InputError, match=r"expected a file of PEM certificates, got .*empty\.pem"):
        Webhook("https://host/", tmp_path / "s.db", ca_file=str(empty))

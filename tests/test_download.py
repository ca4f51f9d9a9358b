"""Downloads against a server of our own: cut, wrong, missing, refused."""

import hashlib
import socket
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from omniad_edge import download
from omniad_edge.download import fetch
from omniad_edge.errors import DownloadError
from omniad_edge.files import file_sha256

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves `server.content`; the n-th answer stops after `server.cuts[n]` bytes of it."""

    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        if self.path != "/models/net.pth":
            self.send_error(404)
            return
        content, start = self.server.content, 0
        if asked and self.server.supports_range:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        cut = self.server.cuts.pop(0) if self.server.cuts else len(content)
        self.wfile.write(content[start : start + cut])

    def log_message(self, *_):
        pass


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.content, server.cuts, server.ranges, server.supports_range = CONTENT, [], [], True
        server.url = f"http://127.0.0.1:{server.server_address[1]}/models/net.pth"
        thread = Thread(target=partial(server.serve_forever, poll_interval=0.02))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_fetched_once_and_kept(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OMNIAD_CACHE", str(tmp_path / "cache"))
    path = fetch(server.url, SHA256[:8])
    assert path == tmp_path / "cache" / "net.pth" and path.read_bytes() == CONTENT
    assert fetch(server.url, SHA256[:8]) == path
    assert server.ranges == [None]
    assert [p.name for p in path.parent.iterdir()] == ["net.pth"]


def test_a_cut_connection_goes_on_where_it_stopped(server, tmp_path):
    server.cuts = [300_000, 1_000]
    assert fetch(server.url, SHA256[:8], tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-", "bytes=301000-"]


def test_a_download_cut_for_good_is_resumed_by_the_next_call(server, tmp_path):
    server.cuts = [500_000, 0]
    with pytest.raises(DownloadError, match="cut at 500000 of 1024000"):
        fetch(server.url, SHA256[:8], tmp_path)
    assert not (tmp_path / "net.pth").exists()
    assert fetch(server.url, SHA256[:8], tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=500000-", "bytes=500000-"]


def test_a_server_without_range_starts_again(server, tmp_path):
    server.supports_range = False
    server.cuts = [300_000]
    assert fetch(server.url, SHA256[:8], tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-"]


@pytest.mark.parametrize("part", [b"\0" * 1000, CONTENT, CONTENT + b"more"], ids=["other", "whole", "longer"])
def test_a_useless_part_is_replaced(server, tmp_path, part):
    (tmp_path / "net.pth.part").write_bytes(part)
    assert fetch(server.url, SHA256[:8], tmp_path).read_bytes() == CONTENT
    assert not (tmp_path / "net.pth.part").exists()


def test_wrong_content_is_not_kept(server, tmp_path):
    server.content = b"<html>please log in</html>"
    came = hashlib.sha256(server.content).hexdigest()
    with pytest.raises(DownloadError, match=f"begins with {SHA256[:8]}; got {came}"):
        fetch(server.url, SHA256[:8], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_cached_file_is_fetched_again(server, tmp_path):
    (tmp_path / "net.pth").write_bytes(CONTENT[:-1] + b"?")
    assert fetch(server.url, SHA256[:8], tmp_path).read_bytes() == CONTENT
    assert file_sha256(tmp_path / "net.pth") == SHA256


def test_not_found(server, tmp_path):
    with pytest.raises(DownloadError, match="404"):
        fetch(server.url + ".old", SHA256[:8], tmp_path)


def test_offline_says_which_file_to_put_where(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/net.pth"
        with pytest.raises(DownloadError) as error:
            fetch(url, SHA256[:8], tmp_path, size_mb=84)
        for words in (url, "84 MB", str(tmp_path / "net.pth"), "local file"):
            assert words in str(error.value)
        assert "checksum is wrong" not in str(error.value)
        (tmp_path / "net.pth").write_bytes(b"brought by hand, but broken")
        with pytest.raises(DownloadError, match="checksum is wrong"):
            fetch(url, SHA256[:8], tmp_path)


def test_a_silent_server_does_not_hang(tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/net.pth"
        with pytest.raises(DownloadError, match="timed out"):
            fetch(url, SHA256[:8], tmp_path)


def test_a_cache_that_cannot_be_written(server, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(DownloadError, match=r"net\.pth"):
        fetch(server.url, SHA256[:8], tmp_path / "cache")

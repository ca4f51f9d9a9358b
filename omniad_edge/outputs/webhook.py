"""Records to a web service: one POST each."""

import re
from base64 import b64encode
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from urllib.parse import quote

from ..address import parse_address, trusted
from ..errors import InputError, OutputError
from .spool import Message, Spooled

LATER = (408, 425, 429)  # of the 4xx those that say: the same again, but not now
MAX_ANSWER_BYTES = 65_536


class Webhook(Spooled):
    """POSTs each record as JSON, with its id as `Idempotency-Key`, over one connection that is kept.

    url:       http:// or https://, with user:password@ for basic authentication; shown as scheme, host and port
    spool:     file for the records that are not delivered yet, of this output alone; keep: its size
    timeout_s: without an answer
    ca_file:   certificates to trust instead of the system's

    2xx is an acknowledgement. 4xx refuses this record: it is counted as failed and the next is sent; but for 408,
    425 and 429, with which as with everything else the record is sent again later. Redirects are not followed.
    Raises InputError for an address, size or ca_file that cannot be one.
    """

    def __init__(
        self, url: str, spool: str | Path, *, timeout_s: float = 5.0, keep: str = "1GB", ca_file: str | None = None
    ) -> None:
        if not timeout_s > 0:
            raise InputError(f"timeout_s: expected seconds above 0, got {timeout_s!r}")
        self._address = parse_address(url, {"https": 443, "http": 80})
        super().__init__(f"webhook {self._address.shown}", spool, keep)
        self._path = quote(self._address.path or "/", safe="/?#[]@!$&'()*+,;=:%~")
        self._timeout_s = timeout_s
        self._tls = trusted(ca_file) if self._address.scheme == "https" else None
        self._headers = {"Content-Type": "application/json", "User-Agent": "omniad-edge"}
        if self._address.user is not None:
            login = f"{self._address.user}:{self._address.password or ''}".encode()
            self._headers["Authorization"] = f"Basic {b64encode(login).decode()}"
        self._connection: HTTPConnection | None = None

    def send(self, messages: list[Message]) -> list[str]:
        [message] = messages
        try:
            status, reason = self._post(message)
        except (OSError, HTTPException) as exc:
            self.disconnect()
            what = "no answer" if isinstance(exc, TimeoutError) else f"{type(exc).__name__}: {exc}"
            raise OutputError(f"{self.name}: {what}; records wait in the spool") from exc
        if 200 <= status < 300:
            return []
        answer = f"{self.name} answered {status} {reason[:80]!r}"
        if 400 <= status < 500 and status not in LATER:
            return [f"{answer} to record {message.record['id']}"]
        redirect = "; it redirects: give the address it redirects to" if 300 <= status < 400 else ""
        raise OutputError(f"{answer}{redirect}; records wait in the spool")

    def disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _post(self, message: Message) -> tuple[int, str]:
        kept = self._connection is not None
        try:
            return self._exchange(message)
        except ConnectionError:
            self.disconnect()
            if not kept:
                raise
            return self._exchange(message)  # the server had closed a connection that was idle

    def _exchange(self, message: Message) -> tuple[int, str]:
        if self._connection is None:
            host, port = self._address.host, self._address.port
            if self._tls is None:
                self._connection = HTTPConnection(host, port, timeout=self._timeout_s)
            else:
                self._connection = HTTPSConnection(host, port, timeout=self._timeout_s, context=self._tls)
        key = re.sub(r"[^\x21-\x7e]", "_", str(message.record["id"]))
        headers = self._headers | {"Idempotency-Key": key}
        self._connection.request("POST", self._path, message.text.encode(), headers)
        response: HTTPResponse = self._connection.getresponse()
        response.read(MAX_ANSWER_BYTES)
        if not response.isclosed():  # more than that: the next answer cannot be read behind it
            self.disconnect()
        return response.status, response.reason

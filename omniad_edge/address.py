"""Addresses of brokers and servers, whose users and passwords are shown nowhere; and whom of them to trust."""

import ssl
from dataclasses import dataclass, field
from urllib.parse import SplitResult, unquote, urlsplit

from .errors import InputError


@dataclass(frozen=True)
class Address:
    """scheme://user:password@host:port/path?query, with the path's first "/" and without its escapes resolved."""

    scheme: str
    host: str
    port: int
    path: str = field(repr=False)
    user: str | None = field(repr=False)
    password: str | None = field(repr=False)

    @property
    def shown(self) -> str:
        """Without all that may be a secret: also a path is one in the addresses of some services."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def parse_address(url: str, default_ports: dict[str, int]) -> Address:
    """default_ports: of each scheme that is allowed. Raises InputError, which repeats nothing of the address."""
    expected = f"expected an address as {next(iter(default_ports))}://user:password@host:port/path"
    try:
        parts: SplitResult = urlsplit(url)
        host, port = parts.hostname, parts.port
    except (ValueError, AttributeError, TypeError):
        # The message may hold half a password.
        raise InputError(
            f"{expected}; this one's host or port is none: write @ : / # in a password as %40 %3A %2F %23"
        ) from None
    if parts.scheme not in default_ports or not host:
        raise InputError(
            f"{expected}, with {' or '.join(default_ports)}; got one with scheme {parts.scheme[:10]!r}"
            + ("" if host else " and no host")
        )
    path = parts.path + (f"?{parts.query}" if parts.query else "")
    user, password = (None if text is None else unquote(text) for text in (parts.username, parts.password))
    return Address(parts.scheme, host, port or default_ports[parts.scheme], path, user, password)


def trusted(ca_file: str | None) -> ssl.SSLContext:
    """Verifies certificates and host names against `ca_file`, else the system's. Raises InputError."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except OSError as exc:
        raise InputError(f"ca_file: expected a file of PEM certificates, got {ca_file}: {exc}") from exc

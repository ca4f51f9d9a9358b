"""A certificate authority of a test's own."""

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest


class Certificates(NamedTuple):
    """PEM files: the authority's certificate; a server's certificate for "localhost" alone, and its key."""

    ca: Path
    server: Path
    key: Path


def make_certificates(folder: Path) -> Certificates:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl; install it with: apt-get install openssl")
    made = Certificates(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    ca_key = folder / "ca.key"
    # Python 3.13 asks an authority for both extensions.
    authority = ["-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign"]
    openssl(*new, *authority, "-subj", "/CN=test authority", "-keyout", ca_key, "-out", made.ca)
    request = folder / "server.csr"
    extensions = folder / "extensions.txt"
    extensions.write_text(
        "subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\nauthorityKeyIdentifier=keyid\n"
        "keyUsage=digitalSignature\nextendedKeyUsage=serverAuth\n"
    )
    new = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl(*new, "-subj", "/CN=localhost", "-keyout", made.key, "-out", request)
    signing = ["x509", "-req", "-in", request, "-CA", made.ca, "-CAkey", ca_key, "-CAcreateserial", "-days", "2"]
    openssl(*signing, "-extfile", extensions, "-out", made.server)
    return made


def openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)

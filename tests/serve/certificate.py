"""A certificate for this machine that nobody has signed."""

from __future__ import annotations

import subprocess
from pathlib import Path

from serve.run import Tls


def make_certificate(folder: Path) -> Tls:
    """In `folder`; clients trust it where SSL_CERT_FILE names it."""
    made = Tls(folder / "cert.pem", folder / "key.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", made.key, "-out",
         made.certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    return made

"""Certificates: one that was given, or one that this machine makes for itself.

Browsers give a page of another machine a camera only over https. A certificate that nobody has
signed is enough for that: the browser asks once whether it is trusted.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from infra.runtime.errors import UserError

DAYS = 397  # that browsers take of one at most
LEFT = datetime.timedelta(days=2)  # below which it is made anew


@dataclass(frozen=True)
class Tls:
    """PEM files of a certificate (with its chain) and its key."""

    certificate: Path
    key: Path

    def check(self) -> None:
        """Raises UserError for files that make no server."""
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
                self.certificate, self.key
            )
        except OSError as error:  # ssl.SSLError is one
            raise UserError(
                f"no TLS with certificate {self.certificate} and key {self.key}: {error}; both "
                "are PEM files, and belong together"
            ) from error


def addresses() -> list[str]:
    """IPv4 addresses at which others may reach this machine."""
    every = chain.from_iterable(psutil.net_if_addrs().values())
    found = {a.address for a in every if a.family == socket.AF_INET}
    return sorted(a for a in found if not ipaddress.ip_address(a).is_loopback)


def own_certificate(folder: Path) -> Tls:
    """A certificate for this machine by all its names, kept in `folder` for as long as it fits:
    who has trusted it once is not asked again."""
    names = ["localhost", socket.gethostname(), "127.0.0.1", *addresses()]
    made = Tls(folder / "cert.pem", folder / "key.pem")
    if not _fits(made, names):
        folder.mkdir(parents=True, exist_ok=True)
        _make(made, names)
    return made


def _fits(tls: Tls, names: Sequence[str]) -> bool:
    with contextlib.suppress(OSError, ValueError, x509.ExtensionNotFound):
        certificate = x509.load_pem_x509_certificate(tls.certificate.read_bytes())
        told = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
        return left > LEFT and set(_general(names)) <= set(told) and tls.key.is_file()
    return False


def _make(tls: Tls, names: Sequence[str]) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "LiveEdit on this machine")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # for clocks that are behind
        .not_valid_after(now + datetime.timedelta(days=DAYS - 1))
        .add_extension(x509.SubjectAlternativeName(_general(names)), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    with open(tls.key, "wb", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
        file.write(secret)
    tls.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def _general(names: Sequence[str]) -> list[x509.GeneralName]:
    general: list[x509.GeneralName] = []
    for name in names:
        try:
            general.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            general.append(x509.DNSName(name))
    return general

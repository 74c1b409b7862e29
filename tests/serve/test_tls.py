"""TLS by a proxy that serves under a prefix; a server of its own that speaks it is tested in
tests/pipelines/commands/test_serve.py."""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from serve.client import connect, edit_frames, served_model
from serve.run import start
from serve.settings import ServeSettings
from serve.tls import DAYS, Tls, own_certificate
from tests.serve.conftest import Server, clip

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return own_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def trusted(tls: Tls, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tls.certificate))


@asynccontextmanager
async def proxy(tls: Tls, port: int, prefix: str) -> AsyncIterator[str]:
    """Ends TLS, strips the prefix, refuses what is outside it; returns its address."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tls.certificate, tls.key)

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        inside = re.sub(rb"^(\w+) " + prefix.encode() + rb"(/\S*)", rb"\1 \2", head)
        if inside == head:
            writer.write(b"HTTP/1.1 418 outside\r\nContent-Length: 0\r\n\r\n")
            writer.close()
            return
        up, down = await asyncio.open_connection("127.0.0.1", port)
        down.write(inside)
        await asyncio.gather(pump(up, writer), pump(reader, down), return_exceptions=True)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    async with server:
        yield f"localhost:{server.sockets[0].getsockname()[1]}{prefix}"


async def test_clients_find_their_way_through_a_proxy_with_a_prefix(
    server: Server, tls: Tls, trusted: None
) -> None:
    async with proxy(tls, server.port, "/video/edit") as place:
        for scheme in ("wss", "https"):
            for end in ("", "/", "/v1/stream"):
                model = await asyncio.to_thread(served_model, f"{scheme}://{place}{end}")
                assert model["name"] == "small"
        got = []
        url = f"wss://{place}"
        async with connect(url, "red", width=48, height=32, fps=16) as stream:
            for frame in clip(9):
                await stream.send(frame)
            stream.finish()
            got = [edited.index async for edited in stream]
        assert got == list(range(9))
        frames = await asyncio.to_thread(
            lambda: list(edit_frames(f"https://{place}/", clip(9), "red", fps=16))
        )
        assert np.shape(frames) == (9, 32, 48, 3)


def test_a_certificate_of_our_own_is_kept_for_as_long_as_it_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.tls.addresses", lambda: ["192.0.2.1"])
    made = own_certificate(tmp_path)
    made.check()
    assert made.key.stat().st_mode & 0o077 == 0, "others may read the key"
    before = made.certificate.read_bytes()
    assert own_certificate(tmp_path) == made
    assert made.certificate.read_bytes() == before
    monkeypatch.setattr("serve.tls.addresses", lambda: ["192.0.2.2"])  # another network
    own_certificate(tmp_path).check()
    moved = made.certificate.read_bytes()
    assert moved != before
    for gone in (made.key, made.certificate):
        gone.unlink()
        own_certificate(tmp_path).check()
        assert made.certificate.read_bytes() != moved
        moved = made.certificate.read_bytes()
    made.certificate.write_text("half a certif")
    own_certificate(tmp_path).check()
    moved = made.certificate.read_bytes()
    monkeypatch.setattr("serve.tls.LEFT", timedelta(days=DAYS))  # it ends soon
    own_certificate(tmp_path).check()
    assert made.certificate.read_bytes() != moved


def test_what_a_certificate_of_our_own_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Browsers refuse one that lasts a second longer, or begins after their own clock."""
    monkeypatch.setattr("serve.tls.addresses", lambda: ["192.0.2.1"])
    monkeypatch.setattr("serve.tls.socket.gethostname", lambda: "studio")
    made = own_certificate(tmp_path)
    found = x509.load_pem_x509_certificate(made.certificate.read_bytes())
    assert found.not_valid_after_utc - found.not_valid_before_utc == timedelta(days=DAYS)
    age = datetime.now(UTC) - found.not_valid_before_utc
    assert timedelta(days=1) <= age < timedelta(days=1, minutes=1)
    told = {extension.oid: extension.value for extension in found.extensions}
    names = told[x509.SubjectAlternativeName.oid]
    assert isinstance(names, x509.SubjectAlternativeName)
    assert names.get_values_for_type(x509.DNSName) == ["localhost", "studio"]
    addresses = map(str, names.get_values_for_type(x509.IPAddress))
    assert list(addresses) == ["127.0.0.1", "192.0.2.1"]
    assert told[x509.BasicConstraints.oid] == x509.BasicConstraints(ca=False, path_length=None)
    assert list(told[x509.ExtendedKeyUsage.oid]) == [ExtendedKeyUsageOID.SERVER_AUTH]  # type: ignore[call-overload]


def test_files_that_make_no_certificate_are_named_before_anything_starts(
    tls: Tls, tmp_path: Path
) -> None:
    (tmp_path / "other").write_text("no key")
    for key in (tmp_path / "other", tmp_path / "absent"):
        with pytest.raises(ValueError, match=f"no TLS with certificate .* and key {key}"):
            start(ServeSettings("demo"), tls=Tls(tls.certificate, key))

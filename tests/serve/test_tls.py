"""TLS by the server itself, and by a proxy that serves it under a prefix."""

from __future__ import annotations

import asyncio
import re
import ssl
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from serve.client import connect, edit_frames, served_model
from serve.run import Tls, free_port, start
from serve.settings import ServeSettings
from tests.serve.conftest import Server, clip

pytestmark = [pytest.mark.anyio, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    """A certificate for this machine that nobody has signed."""
    folder = tmp_path_factory.mktemp("tls")
    made = Tls(folder / "cert.pem", folder / "key.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
         "-nodes", "-days", "2", "-subj", "/CN=localhost", "-addext",
         "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", made.key, "-out",
         made.certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    return made


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


def test_a_server_with_a_certificate_speaks_tls_only(
    small_model: Path, tls: Tls, trusted: None
) -> None:
    settings = ServeSettings(
        str(small_model), measured_capacity=False, editor_cpus=0.5, front_cpus=0.25
    )
    running = start(settings, port=free_port(), cpus=4, tls=tls)
    try:
        assert running.url.startswith("https://")
        assert running.stream_url.startswith("wss://")
        assert served_model(running.url)["name"] == running.model()["name"] == "small"
        context = ssl.create_default_context(cafile=str(tls.certificate))
        page = httpx.get(running.url, verify=context)
        assert "<title>LiveEdit" in page.text
        frames = list(edit_frames(running.stream_url, clip(9), "make it red", fps=16))
        assert len(frames) == 9
        with pytest.raises(httpx.TransportError):
            httpx.get(running.url.replace("https", "http"))
    finally:
        running.stop()


def test_files_that_make_no_certificate_are_named_before_anything_starts(
    tls: Tls, tmp_path: Path
) -> None:
    (tmp_path / "other").write_text("no key")
    for key in (tmp_path / "other", tmp_path / "absent"):
        with pytest.raises(ValueError, match=f"no TLS with certificate .* and key {key}"):
            start(ServeSettings("demo"), tls=Tls(tls.certificate, key))

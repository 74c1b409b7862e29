"""The application on a Ray of its own: two fronts, two editors, and what happens when they die."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import signal
import struct
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import ray
from ray import serve as ray_serve
from websockets.asyncio.client import connect as connect_async
from websockets.sync.client import connect as connect_socket
from websockets.typing import Subprotocol

from data.video import read_frames
from infra.runtime.ray_private import Replica, serve_replicas
from pipelines.cli import main
from serve.app import app, build
from serve.client import connect
from serve.hub.hub import NAMESPACE, hub_name
from serve.limits import Limits
from serve.run import APP, Running, free_port, start
from serve.settings import ServeSettings
from serve.wire.protocol import WireError
from tests.serve.client.test_stream import send_all
from tests.serve.conftest import clip
from tests.serve.front.test_http import video

pytestmark = [pytest.mark.anyio, pytest.mark.slow, pytest.mark.timeout(600)]

UPLOAD_S = 120.0  # for which an upload may stand still


@pytest.fixture(scope="module")
def settings(small_model: Path) -> ServeSettings:
    return ServeSettings(
        model=str(small_model), measured_capacity=False, max_sessions=2, fronts=2,
        min_editors=2, max_editors=2, editor_cpus=0.5, front_cpus=0.25, drain_s=60.0,
        limits=Limits(upload_idle_s=UPLOAD_S),
    )  # fmt: skip


@pytest.fixture(scope="module")
def running(settings: ServeSettings) -> Iterator[Running]:
    started = start(settings, port=free_port(), cpus=8)
    try:
        yield started
    finally:
        started.stop()


def alive(replica: Replica) -> bool:
    """Running, also by the kernel's word: Serve hears of a death later."""
    return replica.running and replica.pid is not None and Path(f"/proc/{replica.pid}").exists()


@pytest.fixture(autouse=True)
def whole(running: Running) -> None:
    """What the test before has killed is back, so that there is room for this one's sessions."""
    deadline = time.monotonic() + 120
    while [alive(replica) for replica in serve_replicas(APP)] != [True] * 4:
        assert time.monotonic() < deadline, serve_replicas(APP)
        time.sleep(0.2)


async def kept(token: str) -> None:
    """Returns when the hub, which may have been started again, has the session's record."""
    asked = [(token, -1)]  # a holder that there never was
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(ValueError, ray.exceptions.RayError):  # it is being started
                hub = ray.get_actor(hub_name(APP), namespace=NAMESPACE)
                if await hub.part.remote("store", "beat", [asked], {}) == asked:
                    return
            await asyncio.sleep(0.1)


async def stream(
    running: Running,
    count: int,
    *,
    seed: int = 0,
    pause: float = 0.02,
    waits: bool = False,
    at: dict[int, Callable[[], Awaitable[None]]] | None = None,
) -> int:
    """Streams `count` frames and checks that each comes back once; returns the reconnections.

    `at` says what to do when so many edited frames have come; who `waits` is not refused while
    there is no room.
    """
    got: list[int] = []
    heard = (lambda place: None) if waits else None
    async with connect(
        running.stream_url, "make it red", width=48, height=32, fps=16, seed=seed, on_queue=heard
    ) as opened:
        sending = asyncio.create_task(send_all(opened, clip(count), pause))
        async for edited in opened:
            got.append(edited.index)
            if at and len(got) in at:
                assert opened.opened is not None
                await kept(opened.opened.resume)
                await at[len(got)]()
        await sending
    assert got == list(range(count))
    return opened.reconnects


async def test_a_close_after_the_last_chunk_ends_the_stream(running: Running) -> None:
    """Then nothing is left to edit, and the editor gets a last work without frames."""
    got: list[int] = []
    async with connect(running.stream_url, "make it red", width=48, height=32, fps=16) as opened:
        for frame in clip(21):
            await opened.send(frame)
        async for edited in opened:
            got.append(edited.index)
            if len(got) == 21:
                opened.finish()
    assert got == list(range(21))
    assert opened.reconnects == 0


def kill(running: Running, deployment: str) -> Callable[[], Awaitable[None]]:
    async def do() -> None:
        assert await asyncio.to_thread(running.kill, deployment)

    return do


def kill_all(deployment: str) -> Callable[[], Awaitable[None]]:
    """Every replica of it, so that the one which has a session is among them."""

    async def do() -> None:
        for replica in await asyncio.to_thread(serve_replicas, APP):
            if replica.deployment == deployment and alive(replica):
                assert replica.pid is not None
                os.kill(replica.pid, signal.SIGKILL)

    return do


async def test_streams_models_and_metrics(running: Running) -> None:
    await asyncio.gather(*(stream(running, 60, seed=n) for n in range(3)))
    (model,) = httpx.get(f"{running.url}/v1/models").json()["models"]
    assert (model["name"], model["editors"]) == ("small", 2)
    assert (model["work_size"], model["detail"], model["max_side"]) == ("native", "source", 1920)
    text = httpx.get(f"{running.url}/metrics").text
    assert text.count("liveedit_editor_load{") == 2
    assert text.count("liveedit_sessions{") == 2


def test_an_application_is_measured_as_it_is_set(
    running: Running,
    settings: ServeSettings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By `liveedit bench serve` without any option that only `/v1/models` would spare."""

    @contextlib.contextmanager
    def started(asked: ServeSettings) -> Iterator[Running]:
        assert asked.model == settings.model
        yield running

    monkeypatch.setattr("pipelines.commands.serve.application", started)
    arguments = ["bench", "serve", str(settings.model), "--sessions", "1", "--seconds", "2"]
    monkeypatch.setattr(sys, "argv", ["liveedit", *arguments, "--mode", "lossless"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr()
    assert not ended.value.code, said.err
    assert "48x32 edited at native, 16 fps, lossless" in said.out
    assert re.search(r"frames lost / repeated\W+0 / 0\b", said.out)


async def test_a_whole_video_goes_through_the_ingress(running: Running) -> None:
    async with httpx.AsyncClient(timeout=60) as client:
        edited = await client.post(
            f"{running.url}/v1/edits",
            files={"video": ("clip.mp4", video(clip(30)))},
            data={"prompt": "make it red"},
        )
    assert edited.status_code == 200
    assert len(list(read_frames(io.BytesIO(edited.content)))) == 30


async def test_held_uploads_leave_room_for_everything_else(running: Running) -> None:
    """More than both fronts have slots for: those above `max_uploads` are refused at once."""
    begin = (
        b"POST /v1/edits HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n"
        b"Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
    )
    slots = 2 * (Limits().max_sessions + 64)
    held = []
    try:
        for _ in range(slots + 40):
            _, writer = await asyncio.open_connection("127.0.0.1", running.port)
            writer.write(begin)
            held.append(writer)
        async with httpx.AsyncClient(timeout=UPLOAD_S / 2) as client:
            for path in ("healthz", "metrics", "readyz"):
                assert (await client.get(f"{running.url}/{path}")).status_code == 200
        await stream(running, 24)
    finally:
        for writer in held:
            writer.close()


async def test_logs_name_the_session(running: Running) -> None:
    assert running.folder is not None
    logs = (running.folder / "session_latest" / "logs" / "serve").glob("*.log")
    text = "".join(log.read_text() for log in logs)
    opened = re.findall(r"session (\w{12}): opened", text)
    assert opened
    for name in opened:
        assert re.search(rf"session {name}: stream {name}-\d+-\d+ opens", text)
        assert re.search(rf"session {name}: close after .* frames edited", text)


async def test_the_ingress_compresses_nothing_and_controls_the_flow(running: Running) -> None:
    url = f"{running.stream_url}/v1/stream"
    with connect_socket(url, subprotocols=["liveedit.v1"], compression="deflate") as socket:
        assert socket.protocol.extensions == []
        socket.send('{"type":"nonsense"}')
        assert json.loads(socket.recv(timeout=20))["code"] == "bad_request"


async def test_the_ingress_reads_no_further_than_the_session_wants(running: Running) -> None:
    frame = clip(1, width=96, height=96)[0].tobytes()
    opening = {
        "type": "open", "prompt": "x", "width": 96, "height": 96, "fps": 16,
        "mode": "lossless", "format": "rgb24",
    }  # fmt: skip
    sent = 0
    async with connect_async(
        f"{running.stream_url}/v1/stream",
        subprotocols=[Subprotocol("liveedit.v1")],
        compression=None,
        close_timeout=0.1,
    ) as socket:
        await socket.send(json.dumps(opening))
        await socket.recv()
        socket.transport.pause_reading()  # nothing edited is taken, so nothing more may be read
        with contextlib.suppress(TimeoutError):
            while True:
                data = struct.pack("<IIQ", sent, 0, 0) + frame
                await asyncio.wait_for(socket.send(data), 3)
                sent += 1
        socket.transport.abort()
    # 12 MB lie in the kernel's buffers and in frames that are being edited, not 1000s in Ray.
    assert sent * len(frame) < 40e6, f"{sent} frames were swallowed"


async def test_more_sessions_than_editors_have_room_for(running: Running) -> None:
    answers: list[str] = []
    everybody = asyncio.Event()  # has an answer

    def answer(said: str) -> None:
        answers.append(said)
        if len(answers) == 6:
            everybody.set()

    async def hold() -> None:
        try:
            # One frame a second, so that the limit is the slots and not this machine's speed.
            async with connect(running.stream_url, "x", width=48, height=32, fps=1) as opened:
                assert opened.opened is not None
                answer("held")
                await everybody.wait()
        except WireError as error:
            answer(f"{error.code}, retry after {error.retry_after_s} s")

    async with asyncio.timeout(60):
        await asyncio.gather(*(hold() for _ in range(6)))
    assert sorted(answers) == ["at_capacity, retry after 5.0 s"] * 2 + ["held"] * 4


async def test_a_killed_editor_is_survived_without_the_socket_closing(running: Running) -> None:
    reconnects = await asyncio.gather(
        stream(running, 200, at={40: kill(running, "editor"), 120: kill(running, "editor")}),
        stream(running, 200, seed=1),
    )
    assert reconnects == [0, 0]


@pytest.mark.parametrize(
    ("deployment", "pause"), [("front", 0.05), ("editor", 0.05), ("editor", 0.3)]
)
async def test_a_replica_killed_while_sessions_open(
    running: Running, deployment: str, pause: float
) -> None:
    async def later() -> None:
        await asyncio.sleep(pause)
        await kill(running, deployment)()

    # Two, which one editor alone has room for, once it is known that the other is dead.
    await asyncio.gather(later(), *(stream(running, 24, seed=n, waits=True) for n in range(2)))


async def test_a_new_hub_and_killed_fronts_are_survived(running: Running) -> None:
    """The hub unnoticed, the fronts by coming back to what the new hub knows."""

    async def kill_hub() -> None:
        ray.kill(ray.get_actor(hub_name(APP), namespace=NAMESPACE), no_restart=False)

    assert await stream(running, 120, at={40: kill_hub}) == 0
    reconnects = await asyncio.gather(  # waiting until the new hub has heard of both editors
        stream(running, 120, waits=True, at={40: kill_all("front")}),
        stream(running, 120, waits=True, seed=1),
        stream(running, 120, waits=True, seed=2),
    )
    assert reconnects[0] >= 1


async def test_a_new_version_is_rolled_out_under_running_sessions(
    running: Running, settings: ServeSettings
) -> None:
    before = {replica.name for replica in serve_replicas(APP)}

    async def deploy() -> None:
        changed = build(replace(settings, downscale_delay_s=300.0))
        options = {"name": APP, "route_prefix": "/", "blocking": False}
        await asyncio.to_thread(ray_serve.run, changed, **options)

    streaming = [asyncio.create_task(stream(running, 300, seed=n, pause=0.05)) for n in range(2)]
    await asyncio.sleep(2)
    await deploy()
    await asyncio.gather(*streaming)
    deadline = time.monotonic() + 120
    while before & {replica.name for replica in await asyncio.to_thread(serve_replicas, APP)}:
        assert time.monotonic() < deadline, "the old version goes on"
        await asyncio.sleep(0.2)


def test_what_cannot_start_says_so_at_once(running: Running, settings: ServeSettings) -> None:
    with pytest.raises(ValueError, match=f"{running.port}.*choose another port"):
        start(settings, port=running.port)
    with pytest.raises(ValueError, match="no model directory"):
        start(replace(settings, model="/absent"))
    with pytest.raises(ValueError, match="fp8=true needs an editor with a GPU"):
        start(replace(settings, device="cpu", fp8=True))


def test_serve_deploys_it_from_a_config_file(small_model: Path) -> None:
    built = app({"model": str(small_model), "fronts": 2, "max_editors": 4})
    assert built._bound_deployment.name == "front"
    with pytest.raises(ValueError, match="frnots"):
        app({"model": str(small_model), "frnots": 2})
    with pytest.raises(ValueError, match="cannot be read"):
        app({"model": str(small_model), "token_file": "/absent"})

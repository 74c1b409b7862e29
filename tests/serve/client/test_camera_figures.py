"""What a camera says of its session, by hand: a clock that stands still, frames that come then."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from serve.client import ConnectError, EditedFrame, Event, cameras
from serve.client.cameras import BenchReport, CameraLoad, CameraReport
from serve.wire.protocol import Chunk, Dropped, WireError

pytestmark = pytest.mark.anyio

OPENED, CHUNK = 100.0, 4  # at 8 frames a second a chunk lasts half a second
FIRST = [(n, OPENED + 1 + n / 8) for n in range(8)]  # two chunks, which settle


def frame(index: int, came: float) -> EditedFrame:
    return EditedFrame(index, 0, b"", "jpeg", (48, 32), came)


def chunk(index: int, first: int, frames: int = CHUNK, compute_ms: float = 100.0) -> Chunk:
    return Chunk(index, first, frames, 0.0, compute_ms, 1.0, 4)


async def watched(mode: str, *events: Event) -> CameraReport:
    """The report of `events`; source frame n was sent n / 8 s after the opening."""

    async def come() -> AsyncIterator[Event]:
        for event in events:
            yield event

    load = CameraLoad(fps=8.0, mode=mode)  # type: ignore[arg-type]
    stream = SimpleNamespace(opened=SimpleNamespace(chunk_frames=CHUNK), events=come)
    report, shown = CameraReport(), []
    sent = {n: OPENED + n / 8 for n in range(40)}
    await cameras._watch(stream, load, sent, report, shown.append)  # type: ignore[arg-type]
    assert len(shown) == report.edited
    return report


@pytest.fixture(autouse=True)
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cameras, "time", SimpleNamespace(monotonic=lambda: OPENED))


@pytest.mark.parametrize(("mode", "latency"), [("live", 250.0), ("lossless", 625.0)])
async def test_a_chunk_is_there_with_its_first_frame_live_and_with_its_last_lossless(
    mode: str, latency: float
) -> None:
    """Its last source frame was sent 11 / 8 s after the opening."""
    third = [(n, OPENED + 1.625 + (n - 8) / 8) for n in range(8, 12)]
    report = await watched(
        mode,
        *(frame(*at) for at in FIRST), chunk(0, 0), chunk(1, 4),
        *(frame(*at) for at in third), chunk(2, 8),
    )  # fmt: skip
    assert report.latency_ms == [pytest.approx(latency)]
    assert report.overhead_ms == [pytest.approx(latency - 100)]
    assert report.compute_ms == [100.0]
    assert report.missed_deadlines == (latency > 500)
    assert report.first_chunk_ms == pytest.approx(1000.0)
    assert (report.edited, report.repeated, report.stalls) == (12, 0, 0)
    assert len(report.interval_ms) == 11
    assert report.interval_ms[:7] == pytest.approx([125.0] * 7)


async def test_the_first_two_chunks_and_a_short_last_one_are_no_measure() -> None:
    late = [(n, OPENED + 9.0) for n in range(8, 10)]
    report = await watched(
        "lossless",
        *(frame(*at) for at in FIRST), chunk(0, 0), chunk(1, 4),
        *(frame(*at) for at in late), chunk(2, 8, frames=2),
    )  # fmt: skip
    assert report.latency_ms == report.overhead_ms == []
    assert report.missed_deadlines == 0


async def test_stalls_drops_and_repeats_are_counted() -> None:
    came = [(0, 1.0), (1, 1.75), (1, 1.8), (4, 2.6)]  # 0.75 s, one and a half chunks, is no stall
    events: list[Event] = [frame(index, OPENED + at) for index, at in came]
    report = await watched("live", *events[:3], Dropped(2, 2), *events[3:])
    assert (report.edited, report.repeated, report.dropped) == (4, 1, 2)
    assert report.stalls == 1


async def test_a_frame_that_was_said_to_be_dropped_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Five are sent: two come back, two are told as dropped, of one nothing is heard."""

    class Told:
        opened = SimpleNamespace(chunk_frames=CHUNK)
        reconnects = 3

        def __init__(self) -> None:
            self.sent, self.finished = 0, asyncio.Event()

        async def send_encoded(self, image: bytes) -> int:
            self.sent += 1
            return self.sent - 1

        def finish(self) -> None:
            self.finished.set()

        async def events(self) -> AsyncIterator[Event]:
            await self.finished.wait()
            for event in (frame(0, OPENED), frame(1, OPENED), Dropped(2, 2)):
                yield event

    @asynccontextmanager
    async def connect(*_: object, **__: object) -> AsyncIterator[Told]:
        yield Told()

    monkeypatch.setattr(cameras, "connect", connect)
    load = CameraLoad(fps=1000.0, seconds=0.005, token="secret")
    report = await cameras.camera("ws://here", load, [b"image"], "red")
    assert (report.sent, report.edited, report.dropped, report.lost) == (5, 2, 2, 1)
    assert report.reconnects == 3
    told = BenchReport(load, [report], 0, 1.0, [], []).to_dict()
    assert told["frames_lost"] == 1
    assert "secret" not in str(told)


def test_a_session_that_failed_counts_in_its_frames_and_not_in_how_long_it_took() -> None:
    """How soon it was let in and what came first are of those that were held to the end."""
    held = CameraReport(
        first_chunk_ms=800.0, waited_ms=10.0, latency_ms=[100.0, 200.0], overhead_ms=[30.0, 50.0],
        compute_ms=[70.0, 150.0], interval_ms=[40.0, 60.0], sent=9, edited=8, dropped=1,
        missed_deadlines=1, stalls=2, reconnects=1,
    )  # fmt: skip
    other = CameraReport(first_chunk_ms=1000.0, waited_ms=20.0, sent=1, edited=1, repeated=1)
    failed = CameraReport(
        first_chunk_ms=5000.0, waited_ms=700.0, latency_ms=[300.0], overhead_ms=[70.0],
        compute_ms=[230.0], interval_ms=[80.0], sent=20, edited=7, dropped=2, lost=11, repeated=3,
        missed_deadlines=4, stalls=5, reconnects=6, error="too_slow: z",
    )  # fmt: skip
    early = CameraReport(error="at_capacity: a")
    cameras = [held, other, failed, early, early]
    report = BenchReport(CameraLoad(token="secret"), cameras, 2, 9.96, [1, 3, 2], ["pings", "lies"])
    found = report.to_dict()
    assert found.pop("load") == {
        "width": 192, "height": 128, "fps": 16.0, "mode": "live", "format": "jpeg",
        "seconds": 20.0, "queue": False, "work_size": None, "detail": None,
    }  # fmt: skip
    assert found == {
        "seconds": 10.0, "sessions": 5, "sessions_held": 2, "kills": 2, "attacks": "pings, lies",
        "editors_first": 1, "editors_most": 3, "editors_last": 2,
        "waited_ms_p50": 15.0, "waited_ms_max": 20.0, "chunks": 3,
        "frames_sent": 30, "frames_edited": 16, "frames_dropped": 3, "frames_lost": 11,
        "frames_repeated": 4, "first_chunk_ms_p50": 900.0, "first_chunk_ms_max": 1000.0,
        "chunk_latency_ms_p50": 200.0, "chunk_latency_ms_p95": 290.0, "chunk_latency_ms_p99": 298.0,
        "overhead_ms_p50": 50.0, "overhead_ms_p95": 68.0, "overhead_ms_p99": 69.6,
        "compute_ms_p50": 150.0, "jitter_ms": 16.3, "deadline_misses": 5, "stalls": 7,
        "reconnects": 7, "errors": "at_capacity: a; too_slow: z",
    }  # fmt: skip
    nothing = BenchReport(CameraLoad(), [early], 0, 1.0, [], []).summary()
    assert {name for name, value in nothing.items() if value is None} == {
        "editors_first", "editors_most", "editors_last", "waited_ms_p50", "waited_ms_max",
        "first_chunk_ms_p50", "first_chunk_ms_max", "compute_ms_p50", "jitter_ms",
        *(f"{name}_p{p}" for name in ("chunk_latency_ms", "overhead_ms") for p in (50, 95, 99)),
    }  # fmt: skip


async def test_all_that_a_camera_is_told_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """In what it opens with, or in how long and how fast it films."""
    asked: dict[str, object] = {}

    @asynccontextmanager
    async def connect(url: str, prompt: str, **named: object) -> AsyncIterator[None]:
        asked.update(named, url=url, prompt=prompt)
        raise ConnectError("as told")
        yield

    monkeypatch.setattr(cameras, "connect", connect)
    told = {
        "width": 48, "height": 32, "fps": 8.0, "mode": "lossless", "format": "png",
        "work_size": "1/2", "detail": "off", "token": "secret",
    }  # fmt: skip
    for queue in (False, True):
        load = CameraLoad(**told, seconds=1.0, queue=queue)  # type: ignore[arg-type]
        assert told.keys() | {"seconds", "queue"} == load.__dataclass_fields__.keys()
        report = await cameras.camera("ws://here", load, [b"image"], "red", seed=7)
        assert report.error == "as told"
        assert (asked.pop("on_queue") is not None) is queue
        assert asked == {**told, "url": "ws://here", "prompt": "red", "seed": 7}


async def test_a_server_that_says_no_number_has_one_editor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one without a hub, of which each is its own."""
    models = itertools.chain([{"editors": 3}, {}], itertools.repeat({"editors": 2}))
    monkeypatch.setattr(cameras, "COUNT_S", 0.0)
    monkeypatch.setattr(cameras, "served_model", lambda url, token: next(models))
    editors: list[int] = []
    counting = asyncio.create_task(cameras._count("ws://here", None, editors))
    while len(editors) < 3:
        await asyncio.sleep(0.001)
    counting.cancel()
    assert editors[:3] == [3, 1, 2]


async def test_what_a_session_that_failed_did_not_bring_is_not_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is an error of its own; the figure is of those that were held."""

    @asynccontextmanager
    async def connect(*_: object, **__: object) -> AsyncIterator[object]:
        yield SimpleNamespace(reconnects=0)

    async def film(*given: object) -> None:
        given[-1].sent = 5  # type: ignore[attr-defined]

    async def watch(*_: object) -> None:
        await asyncio.sleep(0)
        raise WireError("too_slow", "no frame was taken")

    for name, stand_in in (("connect", connect), ("_film", film), ("_watch", watch)):
        monkeypatch.setattr(cameras, name, stand_in)
    report = await cameras.camera("ws://x", CameraLoad(), [], "red")
    assert (report.error, report.sent, report.lost) == ("too_slow", 5, 0)


@pytest.mark.parametrize(("width", "height"), [(48, 32), (100, 60)])
def test_a_camera_films_a_square_that_crosses_the_picture_and_stays_in_it(
    width: int, height: int
) -> None:
    """Behind the edge it would leave a still life, of which a mask cache recomputes nothing."""
    load = CameraLoad(width=width, height=height, format="rgb24")
    images = [np.frombuffer(image, np.uint8) for image in cameras.pictures(load, seed=1)]
    frames = np.reshape(images, (-1, height, width, 3))
    square = (frames != np.median(frames, axis=0)).any(-1)
    rows, columns = square.any(2), square.any(1)
    assert (rows == rows[0]).all()
    assert (rows.sum(1) == height // 4).all()
    assert (columns.sum(1) == height // 4).all()
    assert (np.diff(columns.argmax(1)) > 0).all()


async def test_cameras_do_not_start_in_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for the first, and each as the last time; one after the other has another prompt."""
    begun: list[tuple[object, ...]] = []
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    async def camera(url: str, load: CameraLoad, images: object, prompt: str, *, seed: int) -> None:
        begun.append((prompt, seed))

    monkeypatch.setattr(cameras, "camera", camera)
    monkeypatch.setattr(cameras, "pictures", lambda load, seed: [])
    # Its own name of it: a server of other tests sleeps in this process, too.
    clock = SimpleNamespace(sleep=sleep, to_thread=asyncio.to_thread)
    monkeypatch.setattr(cameras, "asyncio", clock)
    for _ in range(2):
        for number in range(4):
            await cameras._simulated("ws://x", CameraLoad(), number)
    prompts = [*cameras.PROMPTS, cameras.PROMPTS[0]]
    assert begun == 2 * [(prompt, seed) for seed, prompt in enumerate(prompts)]
    assert slept[:4] == slept[4:]
    assert slept[0] == 0
    assert len({0.0, *slept}) == 4

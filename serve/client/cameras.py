"""Simulated cameras over real sockets: what sessions of a running server get.

`measure` runs them and returns a `BenchReport`; all times are the client's own clock. A chunk's
latency runs from when its last source frame was sent until its first edited frame came (lossless:
its last), and what of it is not the model's compute is the overhead. The overhead of one session
alone is transport, codecs and bookkeeping; with several it holds the wait for the accelerator too.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import multiprocessing
import random
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.synchronize import Semaphore

import numpy as np

from serve.client import ConnectError, EditedFrame, Stream, connect, served_model
from serve.client.attacks import ATTACKS
from serve.wire import codec
from serve.wire.protocol import Chunk, Detail, Dropped, Format, InQueue, Mode, WireError

PROMPTS = ("make the square red", "make the square blue", "turn the scene into night")
PICTURES = 24  # encoded once and sent in turn, so that a camera costs the client little
STALL_CHUNKS = 1.5
COUNT_S = 1.0
SETTLE_CHUNKS = 2  # first chunks of a session that count for the first-chunk time only


@dataclass(frozen=True)
class CameraLoad:
    """What every camera does."""

    width: int = 192
    height: int = 128
    fps: float = 16.0
    mode: Mode = "live"
    format: Format = "jpeg"
    seconds: float = 20.0
    token: str | None = None
    queue: bool = False  # wait where there is no room
    work_size: str | None = None  # None: the server's
    detail: Detail | None = None


@dataclass
class CameraReport:
    """One session; times in milliseconds."""

    first_chunk_ms: float | None = None  # since it was opened
    waited_ms: float | None = None  # to be opened
    latency_ms: list[float] = field(default_factory=list)
    overhead_ms: list[float] = field(default_factory=list)
    compute_ms: list[float] = field(default_factory=list)
    interval_ms: list[float] = field(default_factory=list)  # between edited frames
    sent: int = 0
    edited: int = 0
    dropped: int = 0
    lost: int = 0  # neither edited nor said to be dropped
    repeated: int = 0
    missed_deadlines: int = 0
    stalls: int = 0
    reconnects: int = 0
    error: str | None = None


@dataclass(frozen=True)
class BenchReport:
    load: CameraLoad
    cameras: list[CameraReport]
    kills: int
    seconds: float
    editors: list[int]  # that were ready, every second
    attacks: list[str]

    def summary(self) -> dict[str, float | int | str | None]:
        """The numbers to report; percentiles over all chunks of all sessions."""
        cameras = self.cameras
        good = [camera for camera in cameras if camera.error is None]
        chunks = sum(len(camera.latency_ms) for camera in cameras)

        def of(name: str) -> list[float]:
            return list(itertools.chain.from_iterable(getattr(c, name) for c in cameras))

        first = [c.first_chunk_ms for c in good if c.first_chunk_ms is not None]
        intervals = of("interval_ms")
        return {
            "sessions": len(cameras),
            "sessions_held": len(good),
            "kills": self.kills,
            "attacks": ", ".join(self.attacks),
            "editors_first": self.editors[0] if self.editors else None,
            "editors_most": max(self.editors, default=None),
            "editors_last": self.editors[-1] if self.editors else None,
            "waited_ms_p50": percentile([c.waited_ms for c in good if c.waited_ms is not None], 50),
            "waited_ms_max": max(
                (c.waited_ms for c in good if c.waited_ms is not None), default=None
            ),
            "chunks": chunks,
            "frames_sent": sum(c.sent for c in cameras),
            "frames_edited": sum(c.edited for c in cameras),
            "frames_dropped": sum(c.dropped for c in cameras),
            "frames_lost": sum(c.lost for c in cameras),
            "frames_repeated": sum(c.repeated for c in cameras),
            "first_chunk_ms_p50": percentile(first, 50),
            "first_chunk_ms_max": max(first, default=None),
            **{f"chunk_latency_ms_p{p}": percentile(of("latency_ms"), p) for p in (50, 95, 99)},
            **{f"overhead_ms_p{p}": percentile(of("overhead_ms"), p) for p in (50, 95, 99)},
            "compute_ms_p50": percentile(of("compute_ms"), 50),
            "jitter_ms": round(statistics.pstdev(intervals), 1) if len(intervals) > 1 else None,
            "deadline_misses": sum(c.missed_deadlines for c in cameras),
            "stalls": sum(c.stalls for c in cameras),
            "reconnects": sum(c.reconnects for c in cameras),
            "errors": "; ".join(sorted({c.error for c in cameras if c.error})) or None,
        }

    def to_dict(self) -> dict[str, object]:
        load = {name: value for name, value in asdict(self.load).items() if name != "token"}
        return {"load": load, "seconds": round(self.seconds, 1), **self.summary()}


def percentile(values: list[float], percent: float) -> float | None:
    return round(float(np.percentile(values, percent)), 1) if values else None


def measure(
    url: str,
    load: CameraLoad,
    sessions: int,
    *,
    kill: Callable[[], Awaitable[bool]] | None = None,
    kill_every_s: float = 10.0,
    attacks: Sequence[str] = (),
    every_second: Callable[[], None] = lambda: None,
) -> BenchReport:
    """Run `sessions` cameras at once; with `kill`, call it every `kill_every_s` meanwhile.

    `kill` says whether there was something to kill. `attacks` (of `ATTACKS`) run beside them, and
    `every_second` is called in a thread.
    """
    kills, editors = 0, list[int]()

    async def killing() -> None:
        nonlocal kills
        while kill is not None:
            await asyncio.sleep(kill_every_s)
            kills += await kill()

    async def run() -> list[CameraReport]:
        chores = (killing(), _count(url, load.token, editors), _repeat(every_second))
        beside = [asyncio.create_task(chore) for chore in chores]
        cameras = await asyncio.gather(*(_simulated(url, load, n) for n in range(sessions)))
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
        return cameras

    with attackers(attacks, url, load):
        started = time.monotonic()
        cameras = asyncio.run(run())
        seconds = time.monotonic() - started
    return BenchReport(load, cameras, kills, seconds, editors, list(attacks))


@contextlib.contextmanager
def attackers(names: Sequence[str], url: str, load: CameraLoad) -> Iterator[None]:
    """A process for each attack, whose work is not the cameras' delay; all have begun: their
    imports, which take seconds, are no attack."""
    context = multiprocessing.get_context("spawn")
    begun = context.Semaphore(0)
    told = (url, load.width, load.height, load.token, begun)
    processes = [context.Process(target=_attack, args=(name, *told), daemon=True) for name in names]
    try:
        for process in processes:
            process.start()
        for _ in processes:
            while not begun.acquire(timeout=COUNT_S):
                for name, process in zip(names, processes, strict=True):
                    if process.exitcode is not None:
                        raise RuntimeError(f"the attack {name} ended: {process.exitcode}")
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def _attack(
    name: str, url: str, width: int, height: int, token: str | None, begun: Semaphore
) -> None:
    begun.release()
    asyncio.run(ATTACKS[name](url, width, height, token))  # type: ignore[arg-type]


async def _repeat(call: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(COUNT_S)
        await asyncio.to_thread(call)


async def _count(url: str, token: str | None, editors: list[int]) -> None:
    """Adds, every second, how many editors are ready."""
    while True:
        with contextlib.suppress(WireError, ConnectError):  # none is: that is a number, too
            model = await asyncio.to_thread(served_model, url, token=token)
            editors.append(model.get("editors", 1))
        await asyncio.sleep(COUNT_S)


def pictures(load: CameraLoad, seed: int) -> list[bytes]:
    """A square that moves over a gradient, encoded."""
    generator = np.random.default_rng(seed)
    back = np.zeros((load.height, load.width, 3), np.uint8)
    back[..., 0] = np.linspace(0, 255, load.width)
    back[..., 1] = np.linspace(0, 255, load.height)[:, None]
    colour, side = generator.integers(80, 255, 3), max(4, load.height // 4)
    out = []
    for n in range(PICTURES):
        frame = back.copy()
        x = (load.width - side) * n // PICTURES
        frame[side : 2 * side, x : x + side] = colour
        out.append(codec.encode(frame, load.format))
    return out


async def _simulated(url: str, load: CameraLoad, number: int) -> CameraReport:
    images = await asyncio.to_thread(pictures, load, number)
    # Cameras do not start in step.
    await asyncio.sleep(random.Random(number).uniform(0, 1) if number else 0)
    return await camera(url, load, images, PROMPTS[number % len(PROMPTS)], seed=number)


async def camera(
    url: str,
    load: CameraLoad,
    images: list[bytes],
    prompt: str,
    *,
    seed: int = 0,
    on_frame: Callable[[EditedFrame], None] = lambda frame: None,
) -> CameraReport:
    """One session: `images` (encoded as `load` says) are sent in turn, at its frame rate.

    What the server refuses is an error in the report.
    """
    report = CameraReport()
    asked = time.monotonic()
    try:
        async with connect(
            url,
            prompt,
            width=load.width,
            height=load.height,
            fps=load.fps,
            mode=load.mode,
            format=load.format,
            seed=seed,
            work_size=load.work_size,
            detail=load.detail,
            token=load.token,
            on_queue=_unheard if load.queue else None,
        ) as stream:
            report.waited_ms = (time.monotonic() - asked) * 1000
            sent: dict[int, float] = {}
            filming = asyncio.create_task(_film(stream, load, images, sent, report))
            try:
                await _watch(stream, load, sent, report, on_frame)
                await filming
            finally:
                filming.cancel()
            report.reconnects = stream.reconnects
    except (WireError, ConnectError) as error:
        report.error = getattr(error, "code", None) or str(error)
    report.lost = report.sent - report.edited - report.dropped if report.error is None else 0
    return report


def _unheard(place: InQueue) -> None:
    """A camera waits as long as it takes."""


async def _film(
    stream: Stream,
    load: CameraLoad,
    images: list[bytes],
    sent: dict[int, float],
    report: CameraReport,
) -> None:
    started = time.monotonic()
    for n in range(round(load.seconds * load.fps)):
        await asyncio.sleep(max(0.0, started + n / load.fps - time.monotonic()))
        now = time.monotonic()
        index = await stream.send_encoded(images[n % len(images)])
        if index is not None:
            sent[index] = now
            report.sent += 1
    stream.finish()


async def _watch(
    stream: Stream,
    load: CameraLoad,
    sent: dict[int, float],
    report: CameraReport,
    on_frame: Callable[[EditedFrame], None],
) -> None:
    opened, last_came, last_index = time.monotonic(), 0.0, -1
    came: dict[int, float] = {}
    assert stream.opened is not None
    chunk_s = stream.opened.chunk_frames / load.fps
    async for event in stream.events():
        if isinstance(event, EditedFrame):
            report.edited += 1
            report.repeated += event.index <= last_index
            last_index = event.index
            came[event.index] = event.came
            if last_came:
                gap = event.came - last_came
                report.interval_ms.append(gap * 1000)
                report.stalls += gap > STALL_CHUNKS * chunk_s
            last_came = event.came
            on_frame(event)
        elif isinstance(event, Dropped):
            report.dropped += event.frames
        elif isinstance(event, Chunk):
            if report.first_chunk_ms is None:
                report.first_chunk_ms = (came[event.first_frame] - opened) * 1000
            # The last chunk, cut short by the close, comes before its turn and waits for the one
            # before it.
            if event.index < SETTLE_CHUNKS or event.frames < stream.opened.chunk_frames:
                continue
            last = event.first_frame + event.frames - 1
            done = came[event.first_frame if load.mode == "live" else last]
            latency = (done - sent[last]) * 1000
            report.latency_ms.append(latency)
            report.compute_ms.append(event.compute_ms)
            report.overhead_ms.append(latency - event.compute_ms)
            report.missed_deadlines += latency > chunk_s * 1000

"""How a stream's benchmark times, counts and shows, by hand: its editor edits by a script."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from modeling.config import MaskCacheConfig
from modeling.presets import PRESETS
from pipelines.bench import report as shown
from pipelines.bench import stream as module
from pipelines.bench.chunk_times import ChunkTimer, ChunkTimes
from pipelines.bench.plot import LATE, PARTS, draw
from pipelines.bench.stream import StreamBench, percentiles, summary
from pipelines.bench.subject import noise_frames
from tests.pipelines.bench.test_figures import OPTIONS, measured
from tests.pipelines.bench.test_figures import shown as printed

DEMO = PRESETS["demo"]
CACHE = MaskCacheConfig()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    told = SimpleNamespace(perf_counter=lambda: now[0], strftime=time.strftime, gmtime=time.gmtime)
    for name in ("bench.chunk_times", "bench.stream"):
        monkeypatch.setattr(f"pipelines.{name}.time", told)
    monkeypatch.setattr("modeling.streaming.device.time", told)
    return now


def chunk(whole: float, answer: float | None = None) -> ChunkTimes:
    return ChunkTimes(1, 2, 3, 4, whole if answer is None else answer, whole, 0.5, 0)


class Timer:
    """Takes what it is told for a chunk; notes which stream it was given, and how many."""

    def __init__(self, clock: list[float], *times: float) -> None:
        self.clock, self.times = clock, iter(times)
        self.asked: list[tuple[str, int]] = []

    def push(self, stream: str) -> ChunkTimes:
        self.asked.append((stream, 1))
        self.clock[0] += 1.0
        return chunk(next(self.times))

    def run(self, stream: str, count: int) -> list[ChunkTimes]:
        self.asked.append((stream, count))
        return [chunk(next(self.times)) for _ in range(count)]

    def last_frame(self, stream: str) -> float:
        self.asked.append((stream, 0))
        return next(self.times)


@pytest.fixture
def bench(clock: list[float]) -> Callable[..., StreamBench]:
    """With an editor that takes two seconds to open a stream, which it calls by number."""

    def make(*times: float, cache: MaskCacheConfig | None = CACHE, **options: Any) -> StreamBench:
        opened: list[Any] = []

        def open_(prompt: str, **given: Any) -> str:
            clock[0] += 2.0
            opened.append(given)
            return f"stream {len(opened)}"

        editor: Any = SimpleNamespace(
            settings=DEMO.stream, mask_cache=cache, device=torch.device("cpu"),
            accelerated=False, open=open_, opened=opened,
            transformer=torch.nn.Linear(2, 3), vae=torch.nn.Linear(4, 5),
        )  # fmt: skip
        made = StreamBench(editor, replace(OPTIONS, **options), note=lambda text: None)
        made.timer = Timer(clock, *times)  # type: ignore[assignment]
        return made

    return make


def test_a_stream_is_timed_from_its_opening_until_its_window_is_full(
    bench: Callable[..., StreamBench],
) -> None:
    """Four chunks of a window, and two more; frames, sizes and detail are those asked for."""
    made = bench(5, 30, 70, 50, 20, 10, size=(32, 48), work_size="1/2", detail="source")
    stream, figures = made._start("mask cache")
    assert stream == "stream 1"
    assert figures == {"first_chunk_ms": 3000.0, "slowest_next_ms": 70, "chunks": 5}
    assert made.source.shape == (12, 32, 48, 3)
    made.timer = Timer([0.0], *range(9))  # type: ignore[assignment]
    made._start("dense")
    asked = {"height": 32, "width": 48, "work_size": "1/2", "detail": "source"}
    editor: Any = made.editor
    assert editor.opened == [asked | {"mask_cache": CACHE}, asked | {"mask_cache": None}]
    assert bench().size == (DEMO.stream.height, DEMO.stream.width)
    assert list(bench(cache=None).variants) == ["dense"]


def test_variants_take_turns_and_each_has_its_own_figures(
    bench: Callable[..., StreamBench],
) -> None:
    times = [float(n) for n in range(1, 19)]
    made = bench(*times, chunks=5)
    found = made._time_variants({"dense": "a", "mask cache": "b"})  # type: ignore[dict-item]
    asked: Any = made.timer.asked  # type: ignore[attr-defined]
    assert asked == [("a", 3), ("b", 3)] * 2 + [("a", 0)] * 3 + [("b", 0)] * 3
    for name, halves, last in (
        ("dense", ([1, 2, 3], [7, 8, 9]), [13.0, 14.0, 15.0]),
        ("mask cache", ([4, 5, 6], [10, 11, 12]), [16.0, 17.0, 18.0]),
    ):
        wanted = summary([[chunk(ms) for ms in half] for half in halves], 12)
        assert found[name] == wanted | {"last_frame": percentiles(last)}


def test_sessions_are_added_until_one_is_late(
    bench: Callable[..., StreamBench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 300 ms every 750: of three sessions the last waits for both others, and more from
    chunk to chunk."""
    memory = iter([1.5, 2.5, 3.5])
    made = bench(*[300.0] * 99, chunks=5, sessions=9)
    monkeypatch.setattr(made.memory, "peak", lambda: next(memory))
    monkeypatch.setattr(made.memory, "reset", lambda: resets.append(made.timer.asked[:]))  # type: ignore[attr-defined]
    resets: list[Any] = []
    found = made._sessions("dense")
    assert resets == [[]], "what was held before them is not theirs"
    assert (found["variant"], found["deadline_ms"], found["held"]) == ("dense", 750.0, 2)
    one, two, three = found["tried"]
    latencies = [300, 600, 900, 450, 750, 1050, 600, 900, 1200]
    assert one == {"sessions": 1, "holds": True, "p50_ms": 300.0, "p99_ms": 300.0, "late": 0.0,
                   "memory_gib": 1.5}  # fmt: skip
    assert (two["holds"], two["memory_gib"]) == (True, 2.5)
    assert two["p99_ms"] == pytest.approx(600)
    assert three == {"sessions": 3, "holds": False, **percentiles(latencies),
                     "late": pytest.approx(4 / 9), "memory_gib": 3.5}  # fmt: skip
    assert len(bench(*[1.0] * 99, sessions=2)._sessions("dense")["tried"]) == 2
    assert bench(sessions=0)._sessions("dense")["held"] == 0
    exact = bench(*[750.0] * 99, sessions=1)._sessions("dense")
    assert exact["held"] == 1, "at the deadline it is not late"


def test_a_session_that_does_not_fit_ends_the_search(
    bench: Callable[..., StreamBench], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = bench(*[100.0] * 99, chunks=2, sessions=9)
    starts = iter(["stream", torch.OutOfMemoryError("full")])

    def start(name: str) -> tuple[Any, dict[str, float]]:
        given = next(starts)
        if isinstance(given, Exception):
            raise given
        return given, {}

    monkeypatch.setattr(made, "_start", start)
    found = made._sessions("dense")
    assert found["held"] == 1
    assert found["tried"][1] == {"sessions": 2, "holds": False, "out_of_memory": True}


def test_a_run_tells_what_came_first_and_what_one_stream_holds(
    bench: Callable[..., StreamBench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is reset between the cold stream and the warm one, and read before any other; streams
    that are over are let go of before others come."""
    made, events = bench(), []
    monkeypatch.setattr(made, "_start", lambda name: events.append(name) or (name, len(events)))
    monkeypatch.setattr(made, "_time_variants", lambda streams: dict(streams))
    monkeypatch.setattr(
        made, "_sessions", lambda name: (events.append("sessions"), f"sessions of {name}")[1]
    )
    monkeypatch.setattr(made, "time_plain", lambda: (events.append("plain"), "plain")[1])
    monkeypatch.setattr(made, "_free", lambda: events.append("free"))
    memory = SimpleNamespace(
        measure="m", reset=lambda: events.append("reset"),
        peak=lambda: 10.0 + len(events), held=lambda: 20.0 + len(events),
    )  # fmt: skip
    made.memory = memory  # type: ignore[assignment]
    monkeypatch.setattr(module, "yardstick", lambda device: {"ms": 2.0})
    monkeypatch.setattr(module, "ratios", lambda measured: sorted(measured))
    found = made.run()
    assert events == [
        "mask cache", "free", "reset", "mask cache", "dense", "free", "plain", "sessions",
    ]  # fmt: skip
    assert found["start"] == {"cold": 1, "warm": 4}
    numbers = (2 * 3 + 3) + (4 * 5 + 5)
    assert found["memory"] == {"measure": "m", "weights_gib": numbers * 4 / 2**30,
                               "one_stream_gib": 14.0, "held_gib": 24.0}  # fmt: skip
    assert found["variants"] == {"dense": "dense", "mask cache": "mask cache"}
    assert (found["sessions"], found["plain"]) == ("sessions of mask cache", "plain")
    assert "variants" in found["ratios"]


def test_other_work_than_the_stored_is_told_before_anything_is_timed(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report says how long the model took to be built, and of which machine and work it is."""
    events: list[str] = []
    editor: Any = SimpleNamespace(device=torch.device("cpu"))

    def build(options: Any) -> Any:
        clock[0] += 4.0
        return editor

    class Bench:
        def __init__(self, editor: Any, options: Any, note: Any) -> None:
            clock[0] += 16.0
            self.size, self.timer = (48, 64), self

        @contextmanager
        def watch(self) -> Iterator[None]:
            events.append("watched")
            yield
            events.append("done")

        def run(self) -> dict[str, Any]:
            events.append("run")
            return {"ratios": {}}

    monkeypatch.setattr(module, "build_editor", build)
    monkeypatch.setattr(module, "StreamBench", Bench)
    monkeypatch.setattr(module, "describe", lambda *given: {"vae": "tiny", "a": given[2]})
    said: list[str] = []
    told = module.measure(OPTIONS, note=said.append)
    assert (told["load_s"], told["schema"], told["ratios"]) == (4.0, 1, {})
    assert told["config"] == {"vae": "tiny", "a": (48, 64)}
    assert told["hardware"]["device"] == "cpu"
    assert (events, said) == (["watched", "run", "done"], ["building the model"])
    module.measure(OPTIONS, told)
    events.clear()
    with pytest.raises(ValueError, match="vae wan there, tiny here"):
        module.measure(OPTIONS, told | {"config": told["config"] | {"vae": "wan"}})
    assert events == []


def test_the_plain_path_is_timed_when_its_window_is_full_and_let_go_of(
    bench: Callable[..., StreamBench], clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dense, on networks of its own, over which the editor's watch does not reach."""
    made, events = bench(work_size="1/2", detail="source"), list[Any]()
    plain: Any = SimpleNamespace(open=lambda prompt, **given: events.append(given) or "stream")
    monkeypatch.setattr(module, "plain_editor", lambda editor: plain)

    class Watched(Timer):
        @contextmanager
        def watch(self) -> Iterator[None]:
            events.append("watched")
            yield
            events.append(self.asked)

    def timer(editor: Any, source: np.ndarray) -> Watched:
        assert (editor, source.shape) == (plain, made.source.shape)
        return Watched(clock, *[900.0] * 6, *range(1, 7))

    monkeypatch.setattr(module, "ChunkTimer", timer)
    monkeypatch.setattr(made, "_free", lambda: events.append("free"))
    assert made.time_plain() is None
    made.editor.accelerated = True
    assert made.time_plain() == summary([[chunk(float(ms)) for ms in range(1, 7)]], 12)
    height, width = made.size
    asked = {"height": height, "width": width, "work_size": "1/2", "detail": "source"}
    assert events == [
        asked | {"mask_cache": None}, "watched", [("stream", 6), ("stream", 6)], "free",
    ]  # fmt: skip


def test_what_a_device_does_after_its_answer_is_charged_to_the_run(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two chunks answered in two seconds each; when the device is free another five are over."""
    pushed: list[int] = []

    def push(frames: np.ndarray) -> Iterator[Any]:
        pushed.append(len(frames))
        if len(frames) != 11:
            editor.vae.encode()
            editor.vae.decode()
            editor.resize()
            clock[0] += 2.0
            yield SimpleNamespace(recomputed=1.0, index=len(pushed))

    nothing = lambda: None  # noqa: E731
    vae = SimpleNamespace(encode=nothing, decode=nothing)
    marked = dict.fromkeys(("resize", "following", "transfer"), nothing)
    editor: Any = SimpleNamespace(device=torch.device("cpu"), vae=vae, **marked)
    timer = ChunkTimer(editor, noise_frames(12, 2, 2))
    monkeypatch.setattr(timer, "_wait", lambda: clock.__setitem__(0, clock[0] + 5.0))
    stream: Any = SimpleNamespace(wanted_frames=12, push=push)
    with timer.watch():
        first, second = timer.run(stream, 2)
        assert [(t.answer, t.whole, t.index) for t in (first, second)] == [
            (2000, 7000, 1), (2000, 2000, 2),
        ]  # fmt: skip
        assert timer.push(stream).whole == 7000
        assert timer.last_frame(stream) == 2000  # not what was there before the last frame
    assert pushed == [12, 12, 12, 11, 1]
    # The device is free before each time begins and, of chunks, when it ends.
    assert clock[0] == 100.0 + 3 * 2.0 + 2.0 + 5 * 5.0


def test_every_row_of_the_table_is_of_its_own_figures() -> None:
    report = measured()
    for v, entry in enumerate(report["variants"].values()):
        for n, part in enumerate(("D", "E", "V", "encode", "decode", "detail")):
            ms = 100.0 * (v + 1) + n
            entry[part] = {"p50_ms": ms, "p99_ms": ms + 50, "fps": ms / 2, "spread": ms / 1000}
        entry["last_frame"] = {"p50_ms": 7.0 + v, "p99_ms": 9.0 + v}
        entry["recomputed"] = 1 - v / 4
    rows = {}
    for line in printed(shown.table(report)).splitlines():
        name, *cells = [cell.strip() for cell in line.strip("┃│").split("│")]
        rows[name] = [" ".join(cell.split()) for cell in cells]
    for n, label in enumerate(
        ("D transformer", "E D + VAE decode", "V video to video", "VAE encode", "VAE decode",
         "detail")
    ):  # fmt: skip
        wanted = [100.0 * v + n for v in (1, 2)]
        assert rows[label] == [f"{ms:.1f} / {ms + 50:.1f} {ms / 2:.1f}" for ms in wanted]
    assert rows["last frame in to edit out"] == ["7.0 / 9.0", "8.0 / 10.0"]
    assert rows["tokens recomputed"] == ["100%", "75%"]
    assert rows["spread of D, of V"] == ["10.0%, 10.2%", "20.0%, 20.2%"]


@pytest.mark.parametrize(
    ("work", "said"),
    [
        ({}, "832x480, "),
        ({"detail": "off"}, "832x480 edited at 416x240, "),
        ({"detail": "source"}, "832x480 edited at 416x240 with the source's detail, "),
        (
            {"detail": "source", "guide_blur": 0.5},
            "416x240 with the source's detail, its guide blurred by 0.5 pixels, bfloat16",
        ),
    ],
)
def test_the_facts_say_what_was_asked_and_nothing_of_what_is_not_there(
    work: dict[str, Any], said: str
) -> None:
    report = measured()
    sizes = {"work_width": 416, "work_height": 240} if work else {}
    report["config"] |= sizes | work
    del report["hardware"]["gpu"]
    report |= {"plain": None, "sessions": {"tried": []}}
    report["memory"]["held_gib"] = None
    facts = shown.facts(report)
    assert said in facts[0]
    assert facts[1].startswith("a cpu, torch 2")
    assert facts[-1] == "memory (cuda reserved): weights 2.50 GiB, with one stream 3.25 GiB"


def test_sessions_that_do_not_hold_are_drawn_in_the_colour_of_what_is_late() -> None:
    from matplotlib.colors import to_rgba

    report = measured()
    figure = draw(report)
    bars = figure.axes[2].containers[0]
    colours = [to_rgba(colour) for colour in (PARTS["D"], LATE, LATE)]
    assert [bar.get_facecolor() for bar in bars] == colours
    assert figure.axes[2].get_title(loc="left") == "P99 of concurrent sessions, deadline 750 ms"
    assert [text.get_text() for text in figure.axes[2].get_yticklabels()] == [
        "1 sessions", "2 sessions", "3 sessions",
    ]  # fmt: skip
    assert figure._suptitle.get_text() == "demo, tiny VAE, 832x480, A card"  # type: ignore[attr-defined]
    titles = [axes.get_title(loc="left") for axes in figure.axes[:2]]
    assert titles == ["median of a chunk, ms", "V of each timed chunk, ms"]
    without = deepcopy(report)
    without["sessions"]["tried"] = []
    del without["hardware"]["gpu"]
    assert len(draw(without).axes) == 2
    assert draw(without)._suptitle.get_text().endswith(", a cpu")  # type: ignore[attr-defined]


def test_what_was_watched_is_as_it_was_also_after_an_error() -> None:
    class Part:
        def call(self) -> None: ...

        encode = decode = resize = following = transfer = call

    editor: Any = Part()
    editor.vae, editor.device = Part(), torch.device("cpu")
    own = editor.vae.decode = lambda: None  # as a compiled one stands before the class's
    with suppress(ZeroDivisionError), ChunkTimer(editor, noise_frames(12, 2, 2)).watch():
        assert vars(editor.vae).keys() == {"encode", "decode"}
        raise ZeroDivisionError
    assert vars(editor.vae) == {"decode": own}
    assert vars(editor).keys() == {"vae", "device"}

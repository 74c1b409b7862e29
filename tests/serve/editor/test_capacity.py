"""How many sessions an editor takes: figures by hand, at the border and one beyond."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeling.streaming.quality import Quality
from modeling.streaming.stream import EditedChunk, EditStream
from serve.admission.admission import Editor, Seat, Sizes, Warm
from serve.admission.rungs import Means
from serve.editor import capacity as capacity_module
from serve.editor.capacity import KNOWN, Capacity, means_of
from serve.wire.protocol import WireError
from serve.wire.work import Opening
from tests.known_editors import known_editor
from tests.serve.editor.works import opening

SIZE = (128, 192)
SIZES = Sizes(SIZE, SIZE, "off")


def capacity(cost: float, *, max_sessions: int = 8, measured: bool = True) -> Capacity:
    made = Capacity(chunk_frames=12, max_sessions=max_sessions, measured=measured)
    made.observe(SIZES, cost)
    return made


def test_all_that_placement_is_told() -> None:
    means = Means((SIZE,), 4, True)
    made = Capacity(chunk_frames=24, max_sessions=3, means=means)
    made.observe(SIZES, 0.25)
    made.models, made.frame_s = {"m": Warm(12)}, 1e-9
    name = made.admit(replace(opening("a"), version="m"))
    shares = 0.25 * 16 / 12
    assert made.known("e", "n") == Editor(
        name="e", chunk_frames=24, max_sessions=3, measured=True, frame_s=1e-9, means=means,
        streams={name: Seat("a", pytest.approx(shares), pytest.approx(shares), "m")},
        costs={SIZES: 0.25}, models={"m": Warm(12)}, loading="n",
    )  # fmt: skip
    assert made.known("e").loading == ""


def takes(made: Capacity, *openings: Opening) -> list[bool]:
    taken, told = [], set()
    for asked in openings:
        try:
            made.admit(asked)
        except WireError as error:
            told.add((error.code, error.retry_after_s))
            taken.append(False)
        else:
            taken.append(True)
    assert told <= {("at_capacity", 5.0)}
    return taken


def test_the_share_is_compute_per_second_of_video() -> None:
    made = capacity(0.21)
    name = made.admit(opening("a"))
    # A chunk of 12 frames lasts 0.75 s at 16 frames a second.
    assert made.load == pytest.approx(0.28)
    made.admit(opening("b", fps=4.0))
    assert made.load == pytest.approx(0.28 + 0.07)
    with pytest.raises(WireError, match=r"2 sessions use 35% of this editor.* need 56%"):
        made.admit(opening("c", fps=32.0))
    assert len(made.loads) == 2
    made.release(name)
    made.release(name)  # twice, once counted
    assert made.load == pytest.approx(0.07)


@pytest.mark.parametrize(
    ("cost", "taken"),
    [(0.2999, [True, True, False]), (0.3001, [True, False, False]), (0.15, [True] * 3)],
)
def test_four_fifths_of_the_accelerator_may_be_promised(cost: float, taken: list[bool]) -> None:
    # At a chunk a second two of 0.3 s and a bit less fit in 0.6 s, not in less: 0.75 * 0.8.
    made = capacity(cost)
    assert takes(made, *(opening(name) for name in "abc")) == taken


def test_the_border_itself_is_taken() -> None:
    made = Capacity(chunk_frames=10, max_sessions=8)
    made.observe(SIZES, 0.4)
    assert takes(made, opening("a", fps=10.0), opening("b", fps=10.0)) == [True, True]
    assert made.load == 0.8
    assert takes(made, opening("c", fps=0.01)) == [False]


def test_the_first_session_is_taken_however_slow_the_machine_is() -> None:
    made = capacity(100.0)
    assert takes(made, opening("a"), opening("b")) == [True, False]
    made.release(*made.loads)
    assert takes(made, opening("b")) == [True]


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("most", [1, 2, 5])
def test_no_more_than_max_sessions(measured: bool, most: int) -> None:
    made = capacity(0.001, max_sessions=most, measured=measured)
    openings = [opening(str(n)) for n in range(most + 2)]
    assert takes(made, *openings) == [True] * most + [False] * 2
    assert made.load == pytest.approx(most * 0.001 * 16 / 12)


def test_unmeasured_capacity_only_counts() -> None:
    made = capacity(100.0, max_sessions=3, measured=False)
    assert takes(made, *(opening(name) for name in "abcd")) == [True, True, True, False]


def test_what_was_refused_is_not_counted() -> None:
    made = capacity(0.3001)
    takes(made, opening("a"), *(opening(str(n)) for n in range(20)))
    made.release(*made.loads)
    assert made.load == 0


def test_a_streams_share_follows_what_its_own_chunks_cost() -> None:
    """Not what was thought when it was let in, nor what another's of the same size cost."""
    made = capacity(0.1)
    dear, cheap = made.admit(opening("a")), made.admit(opening("b"))
    for _ in range(200):
        made.observe(SIZES, 0.45, dear)
    assert made.share(dear) == pytest.approx(0.45 * 16 / 12)
    assert made.share(cheap) == pytest.approx(0.1 * 16 / 12)
    assert made.load == pytest.approx(0.55 * 16 / 12)
    # A new one would cost what chunks of its size cost now: 0.6, of which 0.07 is left.
    assert takes(made, opening("c")) == [False]
    before = made.share(cheap)
    made.observe(SIZES, 1.1, cheap)
    assert made.share(cheap) == pytest.approx(0.9 * before + 0.1 * 1.1 * 16 / 12)


def test_each_stream_of_a_session_is_released_by_itself() -> None:
    """The older one's end does not free the place of the newer."""
    made = capacity(0.1)
    old, new = made.admit(opening("a")), made.admit(opening("a"))
    assert made.load == pytest.approx(2 * 0.1 * 16 / 12)
    made.release(old)
    assert list(made.loads) == [new]
    assert made.load == pytest.approx(0.1 * 16 / 12)
    named = made.admit(replace(opening("a"), stream="a-0-7"))
    assert named == "a-0-7"  # the name that the hub knows it by
    made.release(named)
    made.release(new)
    assert made.load == 0


def test_one_slow_chunk_decides_nothing_and_many_do() -> None:
    made = capacity(0.1)
    made.observe(SIZES, 1.1)
    assert made.cost(SIZES) == pytest.approx(0.9 * 0.1 + 0.1 * 1.1)
    made.observe(SIZES, 0.1)
    assert made.cost(SIZES) == pytest.approx(0.9 * 0.2 + 0.1 * 0.1)
    for _ in range(100):
        made.observe(SIZES, 0.5)
    assert made.cost(SIZES) == pytest.approx(0.5, rel=0.01)


def test_unknown_sizes_are_guessed_and_known_ones_measured() -> None:
    made = Capacity(chunk_frames=12, max_sessions=8)
    assert made.cost(SIZES) == 0.0  # nothing is known yet
    made.observe(Sizes((100, 100), (100, 100)), 0.1)
    assert made.cost(Sizes((100, 100), (200, 100))) == pytest.approx(0.2)
    made.frame_s = 5e-6  # half of what was measured
    assert made.cost(Sizes((200, 100), (200, 100))) == pytest.approx(0.2)
    assert made.cost(Sizes((400, 100), (100, 100))) == pytest.approx(0.05 + 0.2)
    assert made.cost(Sizes((100, 100), (100, 100))) == 0.1  # to ask changes nothing
    made.observe(Sizes((400, 100), (100, 100)), 0.3)
    # The first measurement counts whole, and only for these sizes.
    assert made.cost(Sizes((400, 100), (100, 100))) == pytest.approx(0.3)
    assert made.cost(Sizes((100, 100), (100, 100))) == 0.1


def test_a_session_counts_by_the_size_it_is_worked_at() -> None:
    made = Capacity(chunk_frames=12, max_sessions=8)
    made.observe(Sizes((480, 832), (480, 832)), 0.8)
    small = replace(opening("a", (480, 832)), work_size="416x240", detail="source")
    assert takes(made, small, small) == [True, True]  # 0.2 s each, and 0.6 s may be promised
    assert made.load == pytest.approx(2 * 0.2 * 16 / 12)
    assert takes(made, replace(small, work_size="full")) == [False]


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.booleans()), max_size=30))
def test_the_load_is_that_of_the_sessions_that_are_there(steps: list[tuple[str, bool]]) -> None:
    made, there = capacity(0.1, max_sessions=4), dict[str, str]()
    for name, comes in steps:
        if not comes:
            made.release(there.pop(name, "unknown"))
        elif name not in there and len(there) == 4:
            assert takes(made, opening(name)) == [False]
        elif name not in there:
            there[name] = made.admit(opening(name))
        assert len(made.loads) == len(there)
        assert made.load == pytest.approx(len(there) * 0.1 * 16 / 12)
        assert len(there) <= 4


def test_the_warm_up_measures_a_chunk_that_costs_what_all_others_will(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The third that sees a full window, whatever those before took; for every size."""
    editor = known_editor()
    costs = iter([9.0, 9.0, 9.0, 9.0, 8.0, 0.25, 9.0, 9.0, 9.0, 9.0, 8.0, 0.125, 7.0, 7.0])
    opened, details = editor.open, list[object]()

    def timed(*args: object, **named: object) -> object:
        details.append((named["detail"], named["work_size"]))
        stream = opened(*args, **named)
        push = stream.push

        def measured(frames: object) -> object:
            for chunk in push(frames):
                yield replace(chunk, compute_ms=1000 * next(costs))

        stream.push = measured
        return stream

    monkeypatch.setattr(editor, "open", timed)
    settings = editor.settings
    chunks = settings.window_latents // settings.chunk_latents + 2
    assert chunks == 6
    made, told = Capacity(chunk_frames=12, max_sessions=8), list[str]()
    own = settings.height, settings.width
    small = Sizes((50, 34), (16, 32), "off", "it")
    steps = made.warm_up(editor, "it", [small, Sizes(own, own, model="it")], told.append)
    assert next(steps) is None
    assert told == ["warming 96x64 at 96x64"]  # a chunk at a step, so that others come between
    assert made.models == {}
    assert len(list(steps)) == 2 * chunks - 1
    assert made.models == {"it": Warm(12)}
    assert made.costs == {Sizes(own, own, model="it"): 0.25, small: 0.125}
    assert told == ["warming 96x64 at 96x64", "warming 34x50 at 32x16", "measuring capacity"]
    assert made.frame_s > 0
    assert details == [("source", "96x64"), ("off", "32x16")]  # as sessions of these sizes have it


def test_sizes_that_were_not_met_for_longest_are_forgotten() -> None:
    """Clients choose them, and every report has them all."""
    made = Capacity(chunk_frames=12, max_sessions=8)
    for side in range(KNOWN):
        made.observe(Sizes((side + 1, 1), (16, 16)), 0.1)
    made.observe(Sizes((1, 1), (16, 16)), 0.2)
    made.observe(SIZES, 0.3)
    assert len(made.costs) == KNOWN
    assert Sizes((2, 1), (16, 16)) not in made.costs
    assert made.cost(Sizes((1, 1), (16, 16))) == pytest.approx(0.11)


def test_the_warm_up_measures_every_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    """And each at what it is: what a chunk costs there is what sessions are let in by."""
    editor, push, worked = known_editor(), EditStream.push, list[Quality]()

    def noting(stream: EditStream, frames: np.ndarray) -> Iterator[EditedChunk]:
        worked.append(stream.quality)
        return push(stream, frames)

    monkeypatch.setattr(EditStream, "push", noting)
    made = Capacity(chunk_frames=12, max_sessions=8, means=means_of(editor))
    assert made.means == Means(((64, 96),), 4, masked=True)
    own = Sizes((64, 96), (64, 96))
    assert len(list(made.warm_up(editor))) == 6 + 2 * 3  # a window full, then each rung
    assert made.warm == made.costs
    assert list(made.warm) == [
        own, replace(own, sparing=True), replace(own, sparing=True, halved=True)
    ]  # fmt: skip
    assert made.warm[own] > 0
    size = (64, 96)
    assert worked == [
        *[Quality(size)] * 6, *[Quality(size, sparing=True)] * 3, *[Quality(size, True, True)] * 3
    ]  # fmt: skip
    assert made.models[""].means == made.means


def test_what_showing_a_frame_costs_is_for_each_of_its_pixels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of frames twice as wide and high as the model's, the second time: the first prepares."""

    class Clock:
        def __init__(self, device: object) -> None: ...
        def mark(self) -> None: ...
        def wait(self, mark: None) -> None: ...
        def between(self, began: None, done: None) -> float:
            return 500.0

    monkeypatch.setattr(capacity_module, "DeviceClock", Clock)
    editor = known_editor()
    pixels = 4 * editor.settings.height * editor.settings.width
    assert capacity_module._frame_seconds(editor) == pytest.approx(0.5 / pixels)

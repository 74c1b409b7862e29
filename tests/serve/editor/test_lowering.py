"""Who an editor edits less well, and when it goes up again: figures by hand."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace

import pytest

from serve.admission.admission import Sizes, Warm
from serve.admission.ladder import Calm, Decision
from serve.admission.rungs import Means, Rung
from serve.editor.capacity import Capacity
from serve.editor.engine import Engine, _open
from serve.wire.protocol import WireError
from serve.wire.work import Edited, Frames
from tests.serve.editor.works import SIZES as KNOWN
from tests.serve.editor.works import Source, chunks, opening, replaced

SIZE = (128, 192)
SIZES = Sizes(SIZE, SIZE, "off")
MEANS = Means(steps=4, masked=True)


def degrading(full: float, mask: float, steps: float) -> tuple[Capacity, Time]:
    """As warmed up with these seconds a chunk on each rung."""
    clock = Time()
    made = Capacity(chunk_frames=12, max_sessions=8, means=MEANS, clock=clock.now)
    for sizes, cost in (
        (SIZES, full),
        (replace(SIZES, sparing=True), mask),
        (replace(SIZES, sparing=True, halved=True), steps),
    ):
        made.costs[sizes] = made.warm[sizes] = cost
    return made, clock


class Time:
    def __init__(self) -> None:
        self.s = 0.0

    def now(self) -> float:
        return self.s


def test_sessions_are_edited_less_well_before_one_is_refused() -> None:
    made, _ = degrading(0.3, 0.25, 0.14)  # 0.4, 0.33 and 0.19 of the accelerator at 16 a second
    names = []
    for name, rungs in (("a", [0]), ("b", [0, 0]), ("c", [1, 2, 2]), ("d", [2, 2, 2, 2])):
        names.append(made.admit(opening(name)))
        made.decide()
        assert sorted(load.rung for load in made.loads.values()) == rungs, name
    assert made.load == pytest.approx(4 * 0.4)  # as asked, which is what scaling counts
    with pytest.raises(WireError, match="use 160% of this editor and this one would need 40%"):
        made.admit(opening("e"))
    known = made.known("e1")
    assert known.means == MEANS
    assert [s.least for s in known.streams.values()] == [pytest.approx(0.14 * 16 / 12)] * 4
    assert made.rung(names[0]) == Rung("steps", SIZE, sparing=True, halved=True)


def test_what_a_warm_up_finds_counts_for_who_is_there_already() -> None:
    """A rung that nobody has measured is guessed, first without what a frame costs; a session is
    looked at while another version is warmed up, before that is known and after."""
    means = Means(trained=((64, 96),), steps=3)
    made = Capacity(chunk_frames=12, max_sessions=8, means=means)
    made.costs[SIZES] = made.warm[SIZES] = 0.3
    name = made.admit(opening("a"))

    def least() -> float:
        return 12 / 16 * (made.known("e").streams[name].least or 0)

    assert least() == pytest.approx(0.3 / 4)
    made.frame_s = 0.1 / (128 * 192)
    assert least() == pytest.approx(0.2 / 4 + 0.1)
    made.warm = {**made.warm, Sizes(SIZE, (64, 96), "off"): 0.12}
    assert least() == pytest.approx(0.12)
    # While nothing changes it is worked out once, not for each of all sessions at every chunk.
    (load,) = made.loads.values()
    warm, shares = load.warm, load.shares
    least()
    assert load.warm is warm
    assert load.shares is shares


def test_who_was_lowered_is_counted_also_when_its_version_has_left() -> None:
    made, _ = degrading(0.3, 0.25, 0.14)
    made.means, made.models[""] = None, Warm(12, MEANS)
    names = []
    for name in "abc":
        names.append(made.admit(opening(name)))
        made.decide()
    before = [(made.rung(name), made.share(name)) for name in names]
    assert sorted(load.rung for load in made.loads.values()) == [1, 2, 2]
    del made.models[""]  # it takes no more sessions, and those that it has finish their chunks
    assert made.decide().close is None
    assert [(made.rung(name), made.share(name)) for name in names] == before
    assert len(made.known("e").streams) == 3


def test_a_lossless_one_waits_for_a_place_and_then_for_its_turn() -> None:
    made, _ = degrading(0.3, 0.25, 0.14)
    file = replace(opening("f"), mode="lossless")
    name = made.admit(file)
    for live in "abc":
        made.admit(opening(live))
        made.decide()
    assert made.rung(name).name == "slowed"
    with pytest.raises(WireError, match="use 160%"):  # no live one is lowered for it
        made.admit(replace(file, session="g"))
    made.release(*[key for key in made.loads if key != name][:1])
    assert made.known("e").streams[name].least == pytest.approx(0.3 / 5)


def test_who_has_just_been_lowered_stays_so_for_a_while() -> None:
    """What was decided before is remembered: cost and rung follow no chunk up and down."""
    made, clock = degrading(0.3, 0.25, 0.14)
    names = []
    for name in "abc":
        names.append(made.admit(opening(name)))
        made.decide()
    made.release(names.pop())
    before = [load.rung for load in made.loads.values()]
    assert max(before) == 2
    for _ in range(9):
        clock.s += 1
        made.decide()
        assert [load.rung for load in made.loads.values()] == before
    clock.s += 1
    made.decide()
    assert sum(load.rung for load in made.loads.values()) < sum(before)


def test_all_go_up_again_however_dear_it_was_once() -> None:
    """Measured as asked while the machine was busy, and not since."""
    made, clock = degrading(0.3, 0.25, 0.14)
    name = made.admit(opening("a"))
    for _ in range(50):
        made.observe(SIZES, 3.0, name)
    made.decide()
    assert made.rung(name).name == "steps"
    low = replace(SIZES, sparing=True, halved=True)
    for _ in range(100):
        clock.s += 1
        made.observe(low if made.rung(name).halved else SIZES, 0.14, name)
        made.decide()
    assert made.rung(name).name == "full"
    assert made.share(name) == pytest.approx(0.14 * 16 / 12, rel=0.01)


def test_without_means_or_measuring_nobody_is_lowered() -> None:
    for means, measured in ((None, True), (MEANS, False)):
        made = Capacity(chunk_frames=12, max_sessions=8, means=means, measured=measured)
        made.observe(SIZES, 2.0)
        name = made.admit(opening("a"))
        assert made.decide().rungs == {}
        assert made.rung(name).name == "full"


@pytest.mark.anyio
async def test_a_chunk_is_not_counted_on_a_rung_that_it_was_not_edited_on(
    engine: Engine,
) -> None:
    """Another session may have come while it was edited."""
    engine.capacity.costs[KNOWN] = engine.capacity.warm[KNOWN] = 0.01
    async with aclosing(engine.edit(replaced(mode="live"), Source(*chunks(2)).take)) as stream:
        while not isinstance(await anext(stream), Frames):
            pass
        (load,) = engine.capacity.loads.values()
        load.rung = 1
        assert isinstance(await anext(stream), Edited)
    assert list(engine.capacity.costs) == [KNOWN]


@pytest.mark.anyio
async def test_only_the_first_chunk_on_a_rung_is_a_change(engine: Engine) -> None:
    """It may prepare what those after it use; a stream's own first is none."""
    with engine._admitted(replaced(mode="live"), 0) as at:
        stream, found = _open(engine.editor, at.opening), []
        for rung in (0, 0, 2, 2, 1, 1):
            engine.capacity.loads[at.name].rung = rung
            await engine._suit(at, stream)
            found.append(at.changed)
    assert found == [False, False, True, False, True, False]


@pytest.mark.anyio
async def test_everybody_is_weighed_when_one_comes_and_after_every_chunk(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what it has just cost."""
    decide, weighed = engine.capacity.decide, list[int]()

    def noted() -> Decision:
        weighed.append(sum(stream.edited for stream in engine._streams.values()))
        return decide()

    monkeypatch.setattr(engine.capacity, "decide", noted)
    async with aclosing(engine.edit(replaced(mode="live"), Source(*chunks(3)).take)) as stream:
        async for _ in stream:
            pass
    assert weighed == [0, 1, 2, 3]


@pytest.mark.anyio
async def test_who_cannot_be_kept_is_closed_and_nobody_else(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        engine._admitted(replaced(session="a"), 0) as stays,
        engine._admitted(replaced(session="b"), 1) as goes,
    ):
        decided = Decision({}, Calm(), close=goes.name)
        monkeypatch.setattr(engine.capacity, "decide", lambda: decided)
        engine._weigh()
        assert not stays._ended.done()
        with pytest.raises(WireError, match="cannot keep up with this session"):
            await goes.until(asyncio.sleep(0))

"""What a client that comes back finds, whatever happened to its session meanwhile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from serve.hub.records import Commit, Progress
from serve.limits import Limits
from serve.versions.catalog import Menu
from serve.versions.rolling import Offer, Version
from serve.wire.protocol import WireError
from serve.wire.work import Opening
from tests.serve.front.arithmetic import CHUNK, FIRST
from tests.serve.front.running import indices, resumed, say, shown
from tests.serve.front.world import OPEN, StoreLink, Wire, World, frames


def lost(world: World, wire: Wire) -> None:
    wire.disconnect()
    world.settle()


@pytest.mark.parametrize("first", [None, True, False])
@pytest.mark.parametrize("again", [None, True, False])
def test_whether_it_waits_is_what_it_says_now(first: bool | None, again: bool | None) -> None:
    with World() as world:
        wire = world.connect(OPEN | {"queue": first})
        lost(world, wire)
        resumed(world, wire, 0, queue=again)
        waits = [opening.waits for opening in world.editors.openings]
        assert waits == [bool(first), bool(again)]
        assert [opening.again for opening in world.editors.openings] == [False, True]
        assert [opening.epoch for opening in world.editors.openings] == [0, 1]


def test_native_is_the_size_that_it_was_at_first() -> None:
    """Also where another version, trained at another size, is served by now."""
    with World() as world:
        wire = world.connect(OPEN | {"work_size": "native"})
        assert wire.messages[0]["work_size"] == "48x48"
        version = Version("known 2", (32, 32))
        world.menu = Menu((Offer("known", version.key),), {version.key: version})
        assert world.connect(OPEN).messages[0]["work_size"] == "32x32"
        lost(world, wire)
        back = resumed(world, wire, 0, work_size="native")
        assert (back.messages[0]["type"], back.messages[0]["work_size"]) == ("opened", "48x48")
        lost(world, back)
        other = resumed(world, wire, 0, work_size="32x32")
        assert other.messages[-1]["code"] == "bad_request"


def test_the_newest_prompt_is_kept_also_while_no_chunk_was_edited_by_it() -> None:
    with World() as world:
        world.editors.chunk_s = 1.0
        wire = world.connect(OPEN, *frames(0, FIRST))
        say(world, wire, [{"type": "prompt", "prompt": "prompt 3"}])
        world.advance(2.0)
        world.editors.chunk_s = 0.0
        wire.kill_front()
        back = resumed(world, wire, FIRST)
        say(world, back, frames(FIRST, CHUNK))
        assert {picture[0, 0, 1] for picture in shown(back)} == {3}
        kinds = [message["type"] for message in back.messages]
        assert kinds == ["opened", "chunk", "prompt_applied", "chunk"]


def test_what_is_kept_of_its_opening_is_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a state, which would go to the hub twice with every chunk from then on."""
    kept: list[Opening] = []
    commit = StoreLink.commit

    async def noted(self: StoreLink, made: Commit) -> bool:
        kept.append(made.header.opening)
        return await commit(self, made)

    monkeypatch.setattr(StoreLink, "commit", noted)
    with World() as world:
        wire = world.connect(OPEN, *frames(0, FIRST))
        lost(world, wire)
        say(world, resumed(world, wire, FIRST), frames(FIRST, CHUNK))
    assert len(kept) == 2
    assert kept[0] == kept[1]
    assert (kept[1].state, kept[1].epoch) == (None, 0)


def progress_of(world: World, monkeypatch: pytest.MonkeyPatch) -> list[Progress]:
    """Of each commit that the store takes from here on."""
    told: list[Progress] = []
    commit = world.store.commit

    async def noted(made: Commit) -> bool:
        told.append(made.progress)
        return await commit(made)

    monkeypatch.setattr(world.store, "commit", noted)
    return told


def test_a_chunk_is_kept_with_where_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with where those stand that were edited while the one before it was on its way."""
    with World() as world:
        told = progress_of(world, monkeypatch)
        world.commits_go_on.clear()
        world.connect(OPEN, *frames(0, FIRST + 2 * CHUNK))
        world.commits_go_on.set()
        world.settle()
        ends = [FIRST, FIRST + CHUNK, FIRST + 2 * CHUNK]
        assert [(each.next_frame, each.edited) for each in told] == [(end, end) for end in ends]


def test_drops_are_kept_until_the_session_is_past_them(monkeypatch: pytest.MonkeyPatch) -> None:
    with World() as world:
        told = progress_of(world, monkeypatch)
        world.editors.chunk_s = 10.0  # busy with the first chunk all the while
        world.connect(OPEN | {"mode": "live"}, *frames(0, FIRST + 18 + CHUNK))
        world.advance(11.0)
        assert [(each.next_frame, each.dropped) for each in told] == [
            (0, ((FIRST, CHUNK),)),
            (FIRST + CHUNK, ()),
        ]


def test_a_session_that_comes_back_counts_for_the_model_that_edits_it_now() -> None:
    with World() as world:
        wire = world.connect(OPEN, *frames(0, FIRST))
        lost(world, wire)
        world.editors.model = "known 2"
        say(world, resumed(world, wire, FIRST), frames(FIRST, CHUNK))
        for name, model, count in (
            ("sessions_admitted_total", "known", 1), ("sessions_resumed_total", "known 2", 1),
            ("frames_edited_total", "known", FIRST), ("frames_edited_total", "known 2", CHUNK),
        ):  # fmt: skip
            assert world.sample(name, model=model) == count


def test_one_that_had_edited_nothing_comes_back_as_itself() -> None:
    with World() as world:
        wire = world.connect(OPEN, *frames(0, 2))
        lost(world, wire)
        assert resumed(world, wire, 0).messages[0]["next_frame"] == 0
        for name, count in (("admitted", 1), ("resumed", 1)):
            assert world.sample(f"sessions_{name}_total") == count


@pytest.mark.parametrize("code", ["bad_request", "unsupported_size", "internal", "at_capacity"])
def test_what_an_editor_refuses_is_tried_again(code: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal before an editor has it ends the try, not the session."""
    with World() as world:
        wire = world.connect(OPEN, *frames(0, FIRST))
        lost(world, wire)

        def edit(*_: Any) -> Any:
            raise WireError(code, "not here")

        monkeypatch.setattr(world.editors, "edit", edit)
        refused = resumed(world, wire, FIRST)
        assert refused.messages[-1]["code"] == code
        monkeypatch.undo()
        back = resumed(world, wire, FIRST)
        say(world, back, frames(FIRST, CHUNK))
        assert indices(back) == list(range(FIRST, FIRST + CHUNK))


def test_the_rest_of_a_session_that_was_over_holds_no_front() -> None:
    """Nor does a client that takes nothing of it: the front ends it as any other."""
    limits = Limits(idle_timeout_s=1e6, stalled_reader_s=1e6)
    with World(replace(limits, resume_s=60.0)) as world:
        wire = world.connect(OPEN, *frames(0, FIRST), {"type": "close"})
        assert wire.code == 1000
        back = Wire(world, subprotocols=["liveedit.v1"])
        back.reading.clear()
        say(world, back, [OPEN | {"resume": wire.messages[0]["resume"], "received": 0}])
        assert not back.task.done()
        back.front.leave()
        world.advance(1.0)
        assert (back.task.done(), back.code) == (True, 1012)
        whole = resumed(world, wire, 0)
        assert (indices(whole), whole.code) == (list(range(FIRST)), 1000)

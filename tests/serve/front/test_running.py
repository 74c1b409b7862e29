"""A session between its socket, its editor and the store: single steps of what may go wrong."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from serve.front import coder
from serve.front.running import QUEUED_EVERY_S
from serve.versions.catalog import Menu
from serve.versions.rolling import Offer, Version
from serve.wire.work import Edited, Frames, Queued, Work
from tests.serve.front import arithmetic
from tests.serve.front.arithmetic import CHUNK, FIRST, SIDE, Known, edit, source
from tests.serve.front.running import indices, resumed, say, shown
from tests.serve.front.world import OPEN, Inline, StoreLink, Wire, World, frames


def test_frames_leave_only_when_they_are_safe() -> None:
    with World() as world:
        world.commits_go_on.clear()
        wire = world.connect(OPEN, *frames(0, 21))
        world.advance(5.0)
        assert wire.frames == []
        world.commits_go_on.set()
        world.settle()
        assert indices(wire) == list(range(21))


def test_each_new_session_draws_its_version_by_itself() -> None:
    """By its own name, so that it has the same one wherever it is drawn again."""
    with World() as world:
        offer, sizes = Offer("known", "known 1", "known 2", 0.5), (48, 64)
        world.menu = Menu((offer,), {key: Version(key, sizes) for key in offer.keys})
        for _ in range(24):
            world.connect(OPEN)
        drawn = [(o.version, offer.choose(o.session)) for o in world.editors.openings]
        assert all(found == wanted for found, wanted in drawn)
        assert {found for found, _ in drawn} == {"known 1", "known 2"}


def test_the_record_holds_what_the_next_front_needs() -> None:
    with World() as world:
        wire = world.connect(OPEN, *frames(0, FIRST + 5))
        say(world, wire, [{"type": "prompt", "prompt": "prompt 1"}])
        say(world, wire, frames(FIRST + 5, CHUNK - 5))
        say(world, wire, frames(FIRST + CHUNK, 5))
        record = world.clock.run(world.store.claim(wire.messages[0]["resume"], 0))
        progress = record.progress
        assert progress.next_frame == progress.edited == FIRST + CHUNK
        assert (progress.prompt, progress.applied_prompt) == ("prompt 1", "prompt 1")
        assert not progress.finished
        assert world.editors.openings[0].state is None
        assert [entry.position for entry in record.tail if isinstance(entry.data, bytes)] == list(
            range(21)
        )
        assert record.header.opening.prompt == "prompt 0"
        assert record.header.ready.model == "known"


def test_a_session_goes_on_from_its_state_its_prompt_and_its_place() -> None:
    with World() as world:
        wire = world.connect(OPEN | {"seed": 7}, *frames(0, FIRST))
        say(world, wire, [{"type": "prompt", "prompt": "prompt 1"}])
        say(world, wire, frames(FIRST, CHUNK + 3))  # three of them are started and not answered
        wire.disconnect()
        world.settle()
        # As a client opens that lost its connection: with the prompt it first opened with.
        back = resumed(world, wire, FIRST + 2)
        opened = back.messages[0]
        assert opened["next_frame"] == FIRST + CHUNK
        opening = world.editors.openings[1]
        assert (opening.width, opening.height, opening.seed, opening.fps) == (SIDE, SIDE, 7, 16.0)
        assert opening.state is not None
        say(world, back, frames(FIRST + CHUNK, CHUNK))
        assert indices(back) == list(range(FIRST + 2, FIRST + 2 * CHUNK))
        assert {picture[0, 0, 1] for picture in shown(back)} == {1}
        # It was announced with the frames that the client had not got.
        assert [m["type"] for m in back.messages] == ["opened", "chunk", "chunk"]
        assert world.sample("sessions_resumed_total") == 1
        assert world.sample("sessions_admitted_total") == 1


def test_a_frame_that_was_told_of_as_dropped_is_not_edited_after_a_reconnect() -> None:
    with World() as world:
        world.editors.chunk_s = 10.0  # busy with the first chunk all the while
        wire = world.connect(OPEN | {"mode": "live"}, *frames(0, FIRST + 18 + CHUNK))
        drops = {"type": "dropped", "first_frame": FIRST, "frames": CHUNK}
        assert wire.messages[-1] == drops
        wire.disconnect()
        world.settle()
        world.editors.chunk_s = 0.0
        back = resumed(world, wire, 0, mode="live")
        assert back.messages[0]["next_frame"] == 0
        assert back.messages[1] == drops  # its way to the client is not known
        sent = 0
        for count in (FIRST, CHUNK, CHUNK, 6):
            say(world, back, frames(sent, count))
            world.advance(2.0)
            sent += count
        say(world, back, [{"type": "close"}])
        world.advance(2.0)
        assert indices(back) == [*range(FIRST), *range(FIRST + CHUNK, FIRST + 18 + CHUNK)]


def test_what_is_kept_when_drops_are_told_is_where_the_session_stands() -> None:
    """Between two chunks, too: not where it began."""
    with World() as world:
        wire = world.connect(OPEN | {"mode": "live"}, *frames(0, FIRST))
        world.advance(2.0)
        world.editors.chunk_s = 10.0
        say(world, wire, frames(FIRST, CHUNK))
        say(world, wire, frames(FIRST + CHUNK, 18 + CHUNK))
        assert wire.messages[-1]["type"] == "dropped"
        wire.disconnect()
        world.settle()
        back = resumed(world, wire, FIRST, mode="live")
        assert back.messages[0]["next_frame"] == FIRST
        assert world.editors.openings[-1].state is not None


class Backwards(Inline):
    """Encodes at once, and tells of it in the other order than it was asked."""

    def __init__(self, world: World) -> None:
        self.world, self.asked = world, 0

    def submit(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        done = super().submit(function, *args, **named)
        if function is not coder._encode_all:
            return done
        later: Future[Any] = Future()
        self.asked += 1
        self.world.clock.loop.call_later(1 / self.asked, later.set_result, done.result())
        return later


def test_pieces_that_were_encoded_apart_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coder, "CORES", 4)
    monkeypatch.setattr(coder, "PIECE", 2 * SIDE * SIDE)
    with World() as world:
        codecs = Backwards(world)
        front = world.front(StoreLink(world.store, world))
        front.services = replace(front.services, codecs=codecs)
        wire = Wire(world, subprotocols=["liveedit.v1"], front=front)
        say(world, wire, [OPEN, *frames(0, FIRST)])
        world.advance(2.0)
        assert codecs.asked == 4
        checksum = 0
        for n, picture in enumerate(shown(wire)):
            np.testing.assert_array_equal(picture, edit(source(n), "prompt 0", checksum))
        assert indices(wire) == list(range(FIRST))


def test_who_waits_hears_of_its_place_when_that_changes_and_every_few_seconds() -> None:
    with World() as world:
        world.editors.places = [3, 3, *[2] * 12, 1]
        wire = world.connect(OPEN | {"queue": True})
        heard, at = [], []
        for _ in range(80):
            at += [world.clock.now] * (len(wire.messages) - len(heard))
            heard = list(wire.messages)
            world.advance(0.1)
        assert [m.get("place", m["type"]) for m in heard] == [3, 2, 2, 1, "opened"]
        assert heard[1] == {"type": "queued", "place": 2, "expected_s": 20.0}
        assert [after - before for before, after in pairwise(at)] == pytest.approx(
            [1.0, QUEUED_EVERY_S + 0.5, 0.5, 0.5], abs=0.15
        )


def test_another_prompt_on_resume_is_a_change() -> None:
    with World() as world:
        wire = world.connect(OPEN, *frames(0, FIRST))
        wire.disconnect()
        world.settle()
        back = resumed(world, wire, FIRST, prompt="prompt 5")
        say(world, back, frames(FIRST, CHUNK))
        assert {picture[0, 0, 1] for picture in shown(back)} == {5}
        applied = {"type": "prompt_applied", "prompt": "prompt 5", "first_frame": FIRST}
        assert applied in back.messages


def test_a_quality_that_was_told_before_is_not_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    push = Known.push

    def lower(self: Known, work: Work) -> tuple[Frames, Edited] | None:
        made = push(self, work)
        return made and (made[0], replace(made[1], rung="size", work_size="16x16"))

    monkeypatch.setattr(Known, "push", lower)
    with World() as world:
        wire = world.connect(OPEN, *frames(0, FIRST))
        told = {"type": "quality", "level": "size", "first_frame": 0, "work_size": "16x16"}
        assert [m for m in wire.messages if m["type"] == "quality"] == [told | {"steps": 4}]
        wire.disconnect()
        world.settle()
        back = resumed(world, wire, FIRST)
        say(world, back, frames(FIRST, CHUNK))
        assert indices(back) == list(range(FIRST, FIRST + CHUNK))
        assert not [m for m in back.messages if m["type"] == "quality"]
        assert world.sample("chunks_lowered_total", rung="size") == 2
        # It opened with its first chunk, and not again when it came back.
        assert world.sample("first_chunk_seconds_count") == 1


def test_what_was_not_sent_before_counts_as_not_sent_after() -> None:
    with World() as world:
        wire = world.connect(OPEN)
        wire.reading.clear()
        say(world, wire, frames(0, 60))
        before = world.committed
        # 21 wait, so another chunk is begun; with 33 none is.
        assert before == FIRST + 2 * CHUNK
        wire.disconnect()
        world.settle()
        back = Wire(world, subprotocols=["liveedit.v1"])
        back.reading.clear()
        token = wire.messages[0]["resume"]
        say(world, back, [OPEN | {"resume": token, "received": 0}, *frames(before, 40)])
        assert world.committed == before
        back.reading.set()
        world.settle()
        assert indices(back) == list(range(before + 36))


def test_the_holder_that_was_superseded_ends_with_its_next_chunk() -> None:
    with World() as world:
        old = world.connect(OPEN, *frames(0, FIRST))
        new = resumed(world, old, FIRST)
        say(world, old, frames(FIRST, CHUNK))
        assert (old.code, indices(old)) == (1001, list(range(FIRST)))
        assert world.sample("sessions_ended_total", reason="superseded") == 1
        say(world, new, frames(FIRST, CHUNK))
        assert indices(new) == list(range(FIRST, FIRST + CHUNK))
        assert world.sample("sessions") == 1


def test_the_holder_that_was_superseded_ends_with_the_next_beat() -> None:
    with World() as world:
        old = world.connect(OPEN, *frames(0, FIRST))
        new = resumed(world, old, FIRST)
        world.advance(11.0)
        assert old.code == 1001
        assert new.code is None


@pytest.mark.parametrize("last_words", [b"noise", None])
def test_what_an_old_holder_does_is_nothing_to_the_session(last_words: bytes | None) -> None:
    with World() as world:
        old = world.connect(OPEN, *frames(0, FIRST))
        new = resumed(world, old, 2)
        if last_words is None:
            old.disconnect()
        else:
            old.say(last_words)
        world.settle()
        world.advance(300.0)  # the new holder's beats keep it
        assert len(world.store) == 1
        assert indices(resumed(world, new, 4)) == list(range(4, FIRST))


def test_a_session_that_was_over_is_told_again_to_the_end() -> None:
    with World() as world:
        wire = world.connect(OPEN, *frames(0, 12), {"type": "close"})
        assert wire.messages[-1] == {"type": "closed", "frames": 12, "reason": "close"}
        again = resumed(world, wire, 10)
        assert indices(again) == [10, 11]
        assert again.messages[0]["next_frame"] == 12
        assert again.messages[-1] == {"type": "closed", "frames": 12, "reason": "close"}
        assert again.code == 1000
        assert len(world.editors.openings) == 1  # no editor was asked


def test_every_frame_is_its_own() -> None:
    """In place, colour and size: the whole of every picture, over a lost editor and a move."""
    with World() as world:
        wire = world.connect(OPEN | {"mask": True}, *frames(0, FIRST + 6))
        world.editors.die()
        world.advance(1.0)
        say(world, wire, frames(FIRST + 6, 10))
        world.editors.leave()
        say(world, wire, [*frames(FIRST + 16, 11), {"type": "close"}])
        pictures = shown(wire)
        sums = sorted({int(picture[0, 0, 2]) for picture in pictures})
        assert len(pictures) == 36
        assert len(sums) == 4  # one for every chunk
        for n, picture in enumerate(pictures):
            np.testing.assert_array_equal(picture[..., 0], n)
            np.testing.assert_array_equal(picture[..., 1], 0)
        np.testing.assert_array_equal(pictures[0], edit(source(0), "prompt 0", 0))
        assert [m["type"] for m in wire.messages[1:]] == ["mask", "chunk"] * 4 + ["closed"]
        order = [type(item).__name__ if not isinstance(item, dict) else item["type"]
                 for item in wire.heard[1:12]]  # fmt: skip
        assert order == ["mask", *["Frame"] * 9, "chunk"]
        assert wire.messages[1] == {
            "type": "mask", "index": 0, "latents": 3, "rows": 1, "columns": 1, "data": "4A==",
        }  # fmt: skip


def test_what_a_client_that_comes_back_has_taken_is_not_waited_for() -> None:
    """Messages are no frames: else who comes back often enough would wait for ever."""
    with World() as world:
        wire = world.connect(OPEN, *frames(0, FIRST + CHUNK))
        wire.disconnect()
        world.settle()
        back = resumed(world, wire, 5)
        (connection,) = back.front.connections
        assert connection.running is not None
        assert indices(back) == list(range(5, FIRST + CHUNK))
        assert connection.running.session.unsent == 0


def test_what_a_client_is_told_when_it_is_let_in() -> None:
    """Of what is not known, and of a prompt whose words are, nothing."""
    with World() as world:
        (opened,) = world.connect(OPEN | {"detail": "off"}).messages
        session, token = opened.pop("session"), opened.pop("resume")
        assert len(session) == 12
        assert len(token) >= 32
        assert opened == {
            "type": "opened", "model": "known", "chunk_frames": CHUNK, "first_chunk_frames": FIRST,
            "width": SIDE, "height": SIDE, "next_frame": 0, "work_size": "48x48", "detail": "off",
        }  # fmt: skip


def test_how_long_a_place_in_the_line_takes_is_said_to_a_tenth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(arithmetic, "Queued", lambda place, _: Queued(place, 12.3456))
    with World() as world:
        world.editors.places = [1, 1]
        wire = world.connect(OPEN | {"queue": True})
        assert wire.messages == [{"type": "queued", "place": 1, "expected_s": 12.3}]

"""How a session ends or goes on when its time, its front or its editor is lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest

from serve.front import front as front_module
from serve.front.socket import Socket
from serve.limits import Limits
from serve.wire.protocol import SPENT, STOPPED
from tests.serve.front.world import OPEN, Inline, StoreLink, Wire, World, frames

LIMITS = Limits()


def ends_with(wire: Wire, code: str, close: int) -> None:
    assert wire.messages[-1]["code"] == code
    assert wire.code == close


def test_the_first_message_is_waited_for_as_long_as_the_limit_says() -> None:
    with World(replace(LIMITS, open_timeout_s=10.0)) as world:
        silent, late = world.connect(), world.connect()
        world.advance(9.9)
        assert silent.code is None
        late.say(OPEN)
        world.advance(0.2)
        ends_with(silent, "bad_request", 1008)
        assert "no open message within 10 s" in silent.messages[-1]["message"]
        assert late.messages[0]["type"] == "opened"


def test_a_session_keeps_its_working_size() -> None:
    with World() as world:
        plain = world.connect(OPEN)
        assert plain.messages[0]["work_size"] == "48x48"  # of a model for 64x48
        assert plain.messages[0]["detail"] == "source"
        wire = world.connect(OPEN | {"work_size": "1/1", "detail": "off"}, *frames(0, 9))
        first = wire.messages[0]
        assert (first["work_size"], first["detail"]) == ("16x16", "off")
        resume = OPEN | {"resume": first["resume"], "received": 9}
        for name, value in (("work_size", "32x32"), ("detail", "source"), ("work_size", "half")):
            wire = world.connect(resume | {name: value})
            ends_with(wire, "bad_request", 1008)
            assert name.replace("_", " ") in wire.messages[-1]["message"].replace("_", " ")
        for same in ({}, {"work_size": "full"}, {"work_size": "16x16", "detail": "off"}):
            back = world.connect(resume | same)
            assert back.messages[0]["work_size"] == "16x16"
            opening = world.editors.openings[-1]
            assert (opening.work_size, opening.detail) == ("16x16", "off")


def test_a_session_without_frames_ends_as_if_it_was_closed() -> None:
    with World(replace(LIMITS, idle_timeout_s=30.0)) as world:
        wire = world.connect(OPEN, *frames(0, 2))
        world.advance(29.0)
        wire.say(frames(2, 1)[0])
        world.advance(29.0)  # since the newest frame, not since the first
        assert wire.code is None
        world.advance(2.0)
        assert wire.messages[-1] == {"type": "closed", "frames": 3, "reason": "idle"}
        assert (len(wire.frames), wire.code) == (3, 1000)
        assert wire.front.open_connections == 0
        assert world.sample("sessions_ended_total", reason="idle") == 1


def test_a_session_that_is_being_edited_is_not_idle() -> None:
    with World(replace(LIMITS, idle_timeout_s=30.0)) as world:
        world.editors.chunk_s = 100.0
        wire = world.connect(OPEN, *frames(0, 9))
        world.advance(99.0)
        assert wire.code is None
        world.editors.chunk_s = 0.0
        world.advance(2.0)
        assert len(wire.frames) == 9
        world.advance(1.0)  # it was quiet for all the time that the chunk took
        assert wire.messages[-1]["reason"] == "idle"


def test_a_client_that_takes_nothing_is_too_slow_and_may_come_back() -> None:
    with World(replace(LIMITS, idle_timeout_s=1e6, stalled_reader_s=20.0)) as world:
        wire = world.connect(OPEN)
        world.advance(50.0)  # nothing was there to be taken
        wire.reading.clear()
        for data in frames(0, 9):
            wire.say(data)
        world.advance(19.0)
        assert not wire.task.done()
        world.advance(3.0)
        assert (wire.task.done(), wire.code) == (True, 1008)
        assert world.sample("sessions_ended_total", reason="too_slow") == 1
        back = world.connect(OPEN | {"resume": wire.messages[0]["resume"], "received": 0})
        assert [frame.index for frame in back.frames] == list(range(9))


def leave(wire: Wire) -> None:
    wire.front.leave()


def supersede(wire: Wire) -> None:
    for connection in wire.front.connections:
        connection.supersede()


@pytest.mark.parametrize(
    ("end", "code", "reason"), [(leave, 1012, "draining"), (supersede, 1001, "superseded")]
)
def test_a_front_lets_go_of_a_session(end: Callable[[Wire], None], code: int, reason: str) -> None:
    with World() as world:
        wire = world.connect(OPEN, *frames(0, 12))
        end(wire)
        end(wire)  # told twice, done once
        world.settle()
        assert wire.code == code
        assert world.sample("sessions_ended_total", reason=reason) == 1
        last = wire.messages[-1]
        assert last["type"] == "chunk" if reason == "superseded" else last["code"] == reason
        resume = OPEN | {"resume": wire.messages[0]["resume"], "received": 9}
        assert world.connect(resume).messages[0]["next_frame"] == 9


@pytest.mark.parametrize("leaving", [True, False])
def test_a_front_takes_so_many_connections_and_none_when_it_leaves(leaving: bool) -> None:
    with World(replace(LIMITS, max_sessions=2)) as world:
        wire = world.connect(OPEN)
        if leaving:
            wire.front.leave()
        front, answers = wire.front, []
        for _ in range(2):
            more = Wire(world, subprotocols=["liveedit.v1"], front=front)
            more.say(OPEN)
            world.settle()
            answers.append(more)
        if leaving:
            ends_with(answers[0], "draining", 1012)
            assert world.sample("sessions_refused_total", code="draining") == 2
        else:
            assert answers[0].messages[0]["type"] == "opened"
            ends_with(answers[1], "at_capacity", 1013)
            assert answers[1].messages[0]["retry_after_s"] == 5.0


def test_who_still_waits_when_the_server_stops_is_told_so_at_once() -> None:
    """There is nothing of it to be finished."""
    with World() as world:
        world.editors.places = [1] * 1000
        wire = world.connect(OPEN | {"queue": True})
        world.advance(1.0)
        wire.front.stop()
        world.settle()
        ends_with(wire, "draining", 1012)
        assert wire.task.done()
        assert world.sample("sessions_refused_total", code="draining") == 1


@pytest.mark.parametrize("why", [STOPPED, SPENT])
def test_what_a_client_says_after_the_stop_is_not_held_against_it(why: str) -> None:
    """It may not have heard of it: neither a frame nor its own close is a mistake."""
    with World() as world:
        world.editors.chunk_s = 1.0
        wire = world.connect(OPEN, *frames(0, 12))
        for connection in wire.front.connections:
            connection.stop(why)
        for data in (*frames(12, 3), {"type": "close"}, {"type": "prompt", "prompt": "prompt 1"}):
            wire.say(data)
        world.advance(5.0)
        assert wire.messages[-1] == {"type": "closed", "frames": 12, "reason": why}
        assert (len(wire.frames), wire.code) == (12, 1000)


def test_who_has_closed_is_not_stopped_as_well() -> None:
    """It hears of its own close, when what it sent is edited."""
    with World() as world:
        world.editors.chunk_s = 10.0
        wire = world.connect(OPEN, *frames(0, 12), {"type": "close"})
        wire.front.stop()
        world.advance(30.0)
        assert wire.messages[-1] == {"type": "closed", "frames": 12, "reason": "close"}
        assert (len(wire.frames), wire.code) == (12, 1000)


class Slow(Inline):
    """Takes a second for an image."""

    def __init__(self, world: World) -> None:
        self.world = world

    def submit(self, function: Callable[..., Any], /, *args: Any, **named: Any) -> Future[Any]:
        done, later = super().submit(function, *args, **named), Future[Any]()
        self.world.clock.loop.call_later(1.0, later.set_result, done.result())
        return later


def test_a_frame_that_was_being_decoded_at_the_stop_is_left_out() -> None:
    with World() as world:
        front = world.front(StoreLink(world.store, world))
        front.services = replace(front.services, codecs=Slow(world))
        wire = Wire(world, subprotocols=["liveedit.v1"], front=front)
        for message in (OPEN, *frames(0, 3)):
            wire.say(message)
        world.advance(2.5)  # in the middle of the third
        front.stop()
        world.advance(10.0)
        assert wire.messages[-1] == {"type": "closed", "frames": 2, "reason": "stopped"}
        assert wire.code == 1000


def test_no_editor_with_room_is_said_at_once_and_no_session_is_kept() -> None:
    with World() as world:
        world.editors.full = True
        wire = world.connect(OPEN)
        ends_with(wire, "at_capacity", 1013)
        assert wire.messages[0]["retry_after_s"] == 5.0
        assert len(world.store) == 0
        assert world.sample("sessions_refused_total", code="at_capacity") == 1
        assert world.sample("sessions_admitted_total") == 0


def test_when_the_last_editor_is_lost_the_session_waits_a_minute() -> None:
    with World() as world:
        wire = world.connect(OPEN, *frames(0, 12))
        world.editors.full = True
        world.editors.die()
        world.advance(59.0)
        assert wire.code is None
        world.advance(4.0)
        ends_with(wire, "internal", 1011)
        assert "no editor could take the session for 60 s" in wire.messages[-1]["message"]
        assert world.sample("sessions_ended_total", reason="internal") == 1


def test_an_editor_that_fails_to_take_a_session_over_ends_it_at_once() -> None:
    with World() as world:
        wire = world.connect(OPEN, *frames(0, 12))
        world.editors.broken = True
        world.editors.die()
        world.advance(1.0)
        ends_with(wire, "internal", 1011)
        assert "its log says why" in wire.messages[-1]["message"]


def test_every_loss_has_a_minute_of_its_own() -> None:
    with World() as world:
        wire = world.connect(OPEN)
        for chunk in range(3):
            for data in frames(max(0, 12 * chunk - 3), 12 if chunk else 9):
                wire.say(data)
            world.editors.full = True
            world.editors.die()
            world.advance(40.0)
            world.editors.full = False
            world.advance(3.0)
        assert [frame.index for frame in wire.frames] == list(range(33))
        assert wire.code is None
        assert world.sample("sessions_moved_total", why="death") == 3


def test_a_lost_editor_is_looked_for_with_growing_pauses() -> None:
    with World() as world:
        world.connect(OPEN, *frames(0, 12))
        world.editors.full = True
        world.editors.die()
        start, asked, now = world.clock.now, len(world.editors.openings), []
        while world.clock.now < start + 12.0:
            world.advance(0.01)
            if len(world.editors.openings) > asked:
                asked = len(world.editors.openings)
                now.append(world.clock.now - start)
        # 0.1, 0.2, 0.4, 0.8, 1.6 and then 2 s between two tries.
        assert now == pytest.approx([0.1, 0.3, 0.7, 1.5, 3.1, 5.1, 7.1, 9.1, 11.1], abs=0.05)


def test_a_drained_editors_stream_goes_on_at_once_and_from_its_exact_state() -> None:
    with World() as world:
        wire = world.connect(OPEN, *frames(0, 13))  # a chunk, and four frames ahead of the next
        world.editors.leave()
        world.settle()
        assert len(world.editors.openings) == 2
        given = world.editors.openings[1].state
        assert given is not None
        assert len(json.loads(given.rest)["pending"]) == 4
        assert world.sample("sessions_moved_total", why="drain") == 1
        for data in frames(13, 8):
            wire.say(data)
        world.settle()
        assert [frame.index for frame in wire.frames] == list(range(21))
        world.editors.die()
        world.advance(1.0)
        assert world.sample("sessions_moved_total", why="death") == 1


def test_nothing_is_left_of_a_socket_whose_client_went_without_a_word(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its link, and who hears it, would be there for every camera that ever was."""
    ended: list[Socket] = []

    class Noted(Socket):
        def end(self) -> None:
            ended.append(self)
            super().end()

    monkeypatch.setattr(front_module, "Socket", Noted)
    with World() as world:
        wire = world.connect(OPEN, *frames(0, 9))
        assert ended == []
        wire.disconnect()
        world.settle()
        assert len(ended) == 1

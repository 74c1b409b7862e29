"""Connections that say nothing: they have no session, and keep nobody from one."""

from __future__ import annotations

from serve.front.front import Front
from serve.limits import Limits
from tests.serve.front.test_front import a_front
from tests.serve.front.world import OPEN, Wire, World

LIMITS = Limits(max_sessions=1, max_silent=2)


def connect(world: World, front: Front, *said: object, address: str = "192.0.2.1") -> Wire:
    wire = Wire(world, subprotocols=["liveedit.v1"], front=front, address=address)
    for message in said:
        wire.say(message)  # type: ignore[arg-type]
    world.settle()
    return wire


def test_the_oldest_that_says_nothing_gives_way() -> None:
    with World(Limits(max_silent=2)) as world:
        front = a_front(world)
        first, second = (connect(world, front) for _ in range(2))
        assert not first.messages
        third = connect(world, front)
        assert first.messages[0]["code"] == "at_capacity"
        assert first.code == 1013
        assert not second.messages
        second.say(OPEN)
        world.settle()
        assert second.messages[0]["type"] == "opened"
        fourth = connect(world, front)  # there is room for it: the second has a session
        assert not third.messages
        assert not fourth.messages


def test_they_do_not_count_as_sessions() -> None:
    with World(LIMITS) as world:
        front = a_front(world)
        connect(world, front)
        assert connect(world, front, OPEN).messages[0]["type"] == "opened"
        assert connect(world, front, OPEN).messages[0]["code"] == "at_capacity"


def test_those_that_came_while_there_was_room_find_none_when_they_open() -> None:
    with World(LIMITS) as world:
        front = a_front(world)
        first, second = (connect(world, front) for _ in range(2))
        first.say(OPEN)
        world.settle()
        assert first.messages[0]["type"] == "opened"
        second.say(OPEN)
        world.settle()
        assert second.messages[0]["code"] == "at_capacity"
        assert second.code == 1013


def test_those_of_the_address_that_has_most_give_way_first() -> None:
    with World(Limits(max_silent=3)) as world:
        front = a_front(world)
        honest = connect(world, front, address="192.0.2.9")
        crowd = [connect(world, front) for _ in range(20)]
        assert not honest.messages
        assert [bool(wire.messages) for wire in crowd] == [True] * 18 + [False] * 2


def test_one_that_was_asked_to_go_does_not_stand_in_for_the_next() -> None:
    """It may take a while to go: a client that reads nothing hears nothing."""
    with World(Limits(max_silent=2)) as world:
        front = a_front(world)
        first, second = (connect(world, front) for _ in range(2))
        (oldest, newer) = front.connections
        oldest.give_way()
        assert [c.silent for c in (oldest, newer)] == [False, True]
        world.settle()
        assert first.code == 1013
        assert not second.messages

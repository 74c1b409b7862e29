"""What the tests of a running session ask of its world."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.serve.front.arithmetic import SIDE
from tests.serve.front.world import OPEN, Wire, World


def resumed(world: World, wire: Wire, received: int, **change: Any) -> Wire:
    token = wire.messages[0]["resume"]
    return world.connect(OPEN | {"resume": token, "received": received} | change)


def say(world: World, wire: Wire, messages: list[Any]) -> None:
    for message in messages:
        wire.say(message)
    world.settle()


def shown(wire: Wire) -> list[np.ndarray]:
    return [np.frombuffer(frame.image, np.uint8).reshape(SIDE, SIDE, 3) for frame in wire.frames]


def indices(wire: Wire) -> list[int]:
    return [frame.index for frame in wire.frames]

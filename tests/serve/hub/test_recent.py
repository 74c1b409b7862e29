"""Many questions within a moment are one."""

from __future__ import annotations

import asyncio

import pytest

from serve.hub.recent import Recent

pytestmark = pytest.mark.anyio


class Hub:
    """Answers when it is told to, with how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.now = 100.0
        self.goes = asyncio.Event()
        self.fails = False

    async def ask(self, name: str) -> str:
        self.asked += 1
        number = self.asked
        await self.goes.wait()
        if self.fails:
            raise ConnectionError(name)
        return f"{name} {number}"


async def test_a_flood_of_questions_is_one_question() -> None:
    hub = Hub()
    recent = Recent(hub.ask, 0.5, lambda: hub.now)
    asking = [asyncio.create_task(recent.get("models")) for _ in range(50)]
    await asyncio.sleep(0)
    asking[0].cancel()  # it gives up, and the others go on
    hub.now += 9.0  # a slow answer is not asked for again
    asking.append(asyncio.create_task(recent.get("models")))
    await asyncio.sleep(0)
    hub.goes.set()
    assert set(await asyncio.gather(*asking[1:])) == {"models 1"}
    assert await recent.get("models") == "models 2"
    hub.now += 0.49
    assert await recent.get("models") == "models 2"
    assert await recent.get("notes") == "notes 3"
    hub.now += 0.02
    assert await recent.get("models") == "models 4"


async def test_a_failure_is_told_and_tried_again() -> None:
    hub = Hub()
    hub.fails = True
    hub.goes.set()
    recent = Recent(hub.ask, 0.5, lambda: hub.now)
    with pytest.raises(ConnectionError):
        await recent.get("models")
    hub.fails = False
    hub.now += 0.5
    assert await recent.get("models") == "models 2"

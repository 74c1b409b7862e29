"""One answer for all who ask within a moment, so that a flood of questions is one question."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any


class Recent:
    """`ask(name)` is called when its last answer is older than `age_s`, counted from when it was
    asked; who comes before the answer waits for the same. A failure is told to all of these."""

    def __init__(
        self,
        ask: Callable[[str], Awaitable[Any]],
        age_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.age_s = age_s
        self._ask, self._clock = ask, clock
        self._asked: dict[str, tuple[float, asyncio.Future[Any]]] = {}

    async def get(self, name: str) -> Any:
        now = self._clock()
        since, answer = self._asked.get(name, (-self.age_s, None))
        if answer is None or (answer.done() and now - since >= self.age_s):
            answer = asyncio.ensure_future(self._ask(name))
            self._asked[name] = (now, answer)
        return await asyncio.shield(answer)  # who gives up waiting stops nobody else

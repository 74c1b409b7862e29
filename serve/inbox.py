"""Where an editor fetches a session's chunks from: an actor of the front, which dies with it."""

from __future__ import annotations

import asyncio
from typing import Any

import ray

LATE_S = 30.0  # that a closed stream is remembered


class Inbox:
    """One slot a stream. Chunks lie in the object store; only references pass through."""

    def __init__(self) -> None:
        self._slots: dict[str, asyncio.Queue[list[Any] | None]] = {}

    def _slot(self, stream: str) -> asyncio.Queue[list[Any] | None]:
        return self._slots.setdefault(stream, asyncio.Queue())

    async def put(self, stream: str, work: list[Any]) -> None:
        """`work` is a list of one reference, which is handed on and not resolved."""
        self._slot(stream).put_nowait(work)

    async def take(self, stream: str) -> list[Any] | None:
        """Waits for the next work; None when the stream was closed."""
        return await self._slot(stream).get()

    async def close(self, stream: str) -> None:
        """Nobody puts any more: who waits, or comes a little late, gets None."""
        self._slot(stream).put_nowait(None)
        asyncio.get_running_loop().call_later(LATE_S, self._slots.pop, stream, None)


def inbox_actor() -> Any:
    """A new inbox, on this node if it can be."""
    node = ray.get_runtime_context().get_node_id()
    near = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(node, soft=True)
    return (
        ray.remote(Inbox)
        .options(num_cpus=0, max_concurrency=1000, scheduling_strategy=near)
        .remote()
    )

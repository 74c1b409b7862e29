"""Streams' states <-> the parts in which they travel (`wire.split_state`)."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from safetensors.torch import load, save
from torch import Tensor

from modeling.streaming.state import StreamState
from serve.wire.split_state import HistoryPart, SplitState

LATENTS = "latents"  # of a chunk, the one tensor of a part


class Splitter:
    """Of one stream, which begins with the state `given` or none: that is what its front has."""

    def __init__(self, given: SplitState | None) -> None:
        self._there: tuple[str, ...] = given.names if given else ()
        self._named: list[tuple[Tensor, str]] = []  # chunks of the newest state

    async def split(self, state: StreamState) -> SplitState:
        """With the parts that the front has not yet; it has to get every state that is split."""
        return await asyncio.to_thread(self._split, state)

    def _split(self, state: StreamState) -> SplitState:
        new: dict[str, HistoryPart] = {}
        named = []
        for chunk in state.history:
            name = self._name(chunk)
            if name is None:
                part = HistoryPart.of(save({LATENTS: chunk.contiguous()}))
                name, new[part.name] = part.name, part
            named.append((chunk, name))
        names = tuple(name for _, name in named)
        rest = replace(state, history=()).to_bytes()
        split = SplitState(rest, names, tuple(new.values())).beyond(self._there)
        self._named, self._there = named, names
        return split

    def _name(self, chunk: Tensor) -> str | None:
        """That it has already: a chunk is one tensor for as long as it is remembered."""
        return next((name for known, name in self._named if known is chunk), None)


def joined(state: SplitState) -> StreamState:
    """What was split. Raises LostPartError for a state that is not whole, ValueError for what is
    no state of this version and for a part that is not what its name says."""
    parts = {part.name: part for part in state.completed(None).parts}
    for part in parts.values():
        if HistoryPart.of(part.data) != part:
            raise ValueError(f"part {part.name} of a stream's state is damaged")
    history = tuple(load(parts[name].data)[LATENTS] for name in state.names)
    return replace(StreamState.from_bytes(state.rest), history=history)

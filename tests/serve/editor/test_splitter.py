from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from modeling.streaming.state import StreamState
from serve.editor import splitter as splitter_module
from serve.editor.splitter import Splitter, joined
from serve.wire.split_state import SplitState

pytestmark = pytest.mark.anyio


def state(chunk: torch.Tensor, kv: dict[str, Any] | None = None) -> StreamState:
    return StreamState(
        prompt="red", height=4, width=4, work_height=4, work_width=4, detail="off", seed=1,
        chunks=1, frames=1, generator=torch.tensor([1]), pending=torch.zeros(0, 4, 4, 3).byte(),
        history=(chunk,), mask_tokens=torch.arange(1), kv=kv,
    )  # fmt: skip


class Watched(Splitter):
    thread = 0

    def _split(self, state: StreamState) -> SplitState:
        self.thread = threading.get_ident()
        return super()._split(state)


@pytest.mark.parametrize("exact", [False, True])
async def test_a_state_is_not_split_on_the_event_loop(exact: bool) -> None:
    """However small: its chunk's frames are sent meanwhile."""
    kv = {"keys": torch.ones(3), "committed": 2} if exact else None
    splitter = Watched(None)
    await splitter.split(state(torch.zeros(2, 3, 1, 4, 4).half(), kv))
    assert splitter.thread not in (0, threading.get_ident())


async def test_a_part_that_had_left_the_state_goes_again_when_it_is_back() -> None:
    """A scene that returns bit by bit, as a black one does: the front has only the state before."""
    black, bright = (torch.full((2, 3, 1, 4, 4), value).half() for value in (0.0, 1.0))
    first = await Splitter(None).split(state(black))
    splitter = Splitter(first)
    there: SplitState | None = first
    for chunk in (bright, black.clone(), bright.clone()):
        there = (await splitter.split(state(chunk))).completed(there)
        assert torch.equal(joined(there).history[0], chunk)


async def test_a_chunk_is_packed_once_while_it_is_remembered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    packed, save = list[float](), splitter_module.save

    def noted(tensors: dict[str, torch.Tensor]) -> bytes:
        packed.append(float(tensors[splitter_module.LATENTS].max()))
        return save(tensors)

    monkeypatch.setattr(splitter_module, "save", noted)
    one, two, three = (torch.full((2, 3, 1, 4, 4), value).half() for value in (1.0, 2.0, 3.0))
    splitter, parts = Splitter(None), []
    for history in ((one,), (one, two), (two, three)):
        made = await splitter.split(replace(state(one), history=history))
        parts.append((len(made.names), len(made.parts)))
    assert packed == [1.0, 2.0, 3.0]
    assert parts == [(1, 1), (2, 1), (2, 1)]

from __future__ import annotations

import threading

import pytest
import torch

from modeling.streaming.state import StreamState
from serve.editor.splitter import Splitter
from serve.wire.split_state import SplitState

pytestmark = pytest.mark.anyio


class Watched(Splitter):
    thread = 0

    def _split(self, state: StreamState) -> SplitState:
        self.thread = threading.get_ident()
        return super()._split(state)


@pytest.mark.parametrize("exact", [False, True])
async def test_a_state_with_its_caches_is_not_split_on_the_event_loop(exact: bool) -> None:
    """However small its history: the caches are hundreds of megabytes and lie beside it."""
    state = StreamState(
        prompt="red", height=4, width=4, work_height=4, work_width=4, detail="off", seed=1,
        chunks=1, frames=1, generator=torch.tensor([1]), pending=torch.zeros(0, 4, 4, 3).byte(),
        history=(torch.zeros(2, 3, 1, 4, 4).half(),), mask_tokens=torch.arange(1),
        kv={"keys": torch.ones(3), "committed": 2} if exact else None,
    )  # fmt: skip
    splitter = Watched(None)
    await splitter.split(state)
    assert (splitter.thread == threading.get_ident()) is not exact

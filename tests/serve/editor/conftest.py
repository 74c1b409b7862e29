"""An engine with a model whose edits are known."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import torch

from serve.editor.engine import Engine
from tests.known_editors import known_editor
from tests.serve.editor.works import standalone


@pytest.fixture
async def engine() -> AsyncIterator[Engine]:
    torch.set_num_threads(1)
    made = standalone(known_editor(), max_sessions=2)
    yield made
    made.on.scheduler.stop()

from __future__ import annotations

import pytest

from serve.front import ray_backend
from serve.wire import conversation


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A front that asks for an editor again without a pause that a test would wait for."""
    monkeypatch.setattr(ray_backend, "ASKS_S", 0.01)
    monkeypatch.setattr(conversation, "LAST_WORDS_S", 0.1)

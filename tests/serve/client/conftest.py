from __future__ import annotations

import pytest

from serve.client import stream


@pytest.fixture
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that comes back without a pause that a test would wait for."""
    monkeypatch.setattr(stream, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(stream, "LONGEST_PAUSE_S", 0.01)

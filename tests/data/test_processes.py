from __future__ import annotations

import os

import pytest

from data.processes import adopt_environment, worker_context


def test_a_worker_has_the_environment_of_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server that workers are forked from is as old as the first of them."""
    context = worker_context()
    assert context.get_start_method() == "forkserver"
    for value in ("first", "second"):
        monkeypatch.setenv("LIVEEDIT_SEEN", value)
        with context.Pool(1, adopt_environment, (dict(os.environ),)) as pool:
            assert pool.apply(os.getenv, ("LIVEEDIT_SEEN",)) == value
    monkeypatch.delenv("LIVEEDIT_SEEN")
    with context.Pool(1, adopt_environment, (dict(os.environ), 0)) as pool:
        assert pool.apply(os.getenv, ("LIVEEDIT_SEEN",)) is None

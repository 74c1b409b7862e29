"""To which replicas Serve may send a call."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from serve.admission.router import PlacedRouter, route

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("editor", "avoid", "chosen"),
    [
        ("b", "", "b"),
        ("b", "b", "b"),  # the hub knows better
        ("", "", "abc"),
        ("", "a", "bc"),
        ("", "ac", "b"),
        ("", "abc", "abc"),  # rather one of these than none
        ("gone", "a", "abc"),
    ],
)
async def test_a_call_goes_where_its_route_says(editor: str, avoid: str, chosen: str) -> None:
    replicas: list[Any] = [
        SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in "abc"
    ]
    asked: Any = SimpleNamespace(metadata=SimpleNamespace(session_id=route(editor, avoid)))
    router = PlacedRouter.__new__(PlacedRouter)
    (found,) = await router.choose_replicas(replicas, asked)
    assert [replica.replica_id.unique_id for replica in found] == list(chosen)

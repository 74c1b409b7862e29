"""An editor's reports to the hub, and what it does as it is told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch

from serve.editor import replica as editor_replica
from serve.editor.accelerator import Accelerator
from serve.editor.replica import EditorReplica
from serve.editor.shelf import Shelf
from serve.hub import hub as hub_module
from serve.hub.hub import Hub
from serve.metrics import EditorMetrics
from serve.settings import ServeSettings
from serve.versions.source import ModelSource, find_models
from tests.known_editors import write_known_model

pytestmark = pytest.mark.anyio


class Link:
    """The replica's way to the hub, without Ray."""

    def __init__(self, hub: Hub) -> None:
        self.hub = hub

    async def call(self, method: str, *args: Any) -> Any:
        return await getattr(self.hub, method)(*args)


@pytest.fixture
async def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Hub]:
    monkeypatch.setattr(hub_module, "serve_replicas", lambda app: [])
    served = str(write_known_model(tmp_path / "m", height=32, width=48))
    settings = ServeSettings(served, link_host="127.0.0.1")
    made = Hub("app", settings, find_models([served]))
    yield made
    made._watching.cancel()
    made._following.cancel()


@pytest.fixture
async def replica(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EditorReplica]:
    """As Serve would have made it."""
    monkeypatch.setattr(editor_replica, "REPORT_S", 0.02)
    torch.set_num_threads(1)
    made = EditorReplica.__new__(EditorReplica)
    made.process, made.hub = "e", Link(hub)  # type: ignore[assignment]
    made.shelf, made.metrics = Shelf(Accelerator()), EditorMetrics()
    made._wanted, made._told_at, made._going = 0, 0.0, False
    for source in hub._follower.sources.values():
        made.shelf.put(source)
    reporting = asyncio.create_task(made._report())
    yield made
    reporting.cancel()
    made.shelf.on.scheduler.stop()


async def test_a_version_that_was_mended_is_tried_again(
    hub: Hub, replica: EditorReplica, tmp_path: Path
) -> None:
    """A failure is told once: said again it would count against the mended files."""
    catalog, (first,) = hub._catalog, hub._follower.sources.values()
    new = ModelSource(str(write_known_model(tmp_path / "new", height=32, width=48)))
    version = new.version()
    hub._follower.sources[new.key] = new
    whole = (tmp_path / "new" / "vae.safetensors").read_bytes()
    (tmp_path / "new" / "vae.safetensors").write_bytes(b"")
    async with asyncio.timeout(60):
        catalog.point("m", version, 1.0, None)
        while new.key not in catalog.failed:
            await asyncio.sleep(0.01)
        (tmp_path / "new" / "vae.safetensors").write_bytes(whole)
        await asyncio.sleep(0.2)  # some reports more
        catalog.point("m", first.version(), 1.0, None)
        assert catalog.failed == {}
        catalog.point("m", version, 1.0, None)
        while new.key not in replica.shelf.engines:
            assert catalog.failed == {}
            await asyncio.sleep(0.01)

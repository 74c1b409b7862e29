"""The whole server in one process, without Ray: for tests and for looking at one model."""

from __future__ import annotations

import asyncio
from typing import Any

from modeling.editor import StreamingEditor
from serve.editor.engine import Engine
from serve.front.door import Door
from serve.front.front import Front
from serve.hub.ledger import Ledger
from serve.hub.records import SessionStore
from serve.metrics import EditorMetrics, Metrics, Snapshot
from serve.settings import ServeSettings
from serve.tenants import Tenants
from serve.work_sizes import WorkSizes


async def local_front(settings: ServeSettings) -> Front:
    """A front whose editor and session store are in this process, warmed up."""
    editor = StreamingEditor.load(settings.model)
    native = editor.settings.height, editor.settings.width
    engine = Engine(
        editor,
        max_sessions=settings.max_sessions,
        measured=settings.measured_capacity,
        degrade=settings.degrade,
    )
    await asyncio.to_thread(engine.warm_up)
    metrics, editors = Metrics(), EditorMetrics()

    async def models() -> list[dict[str, Any]]:
        return [engine.describe()]

    async def snapshots() -> dict[str, Snapshot]:
        engine.gauge(editors)
        return {"front": metrics.snapshot(), "editor": editors.snapshot()}

    return Front(
        backend=engine,
        store=SessionStore(settings.limits.resume_s),
        sizes=WorkSizes(native, settings.limits, settings.work_size, settings.detail),
        metrics=metrics,
        door=Door(Tenants(settings.token_file), settings.allowed_origins),
        ledger=Ledger(),
        models=models,
        snapshots=snapshots,
    )

"""The whole server in one process, without Ray: for tests and for looking at models."""

from __future__ import annotations

import asyncio
from typing import Any

from serve.editor.accelerator import Accelerator
from serve.editor.shelf import Shelf
from serve.front.door import Door
from serve.front.front import Front
from serve.hub.ledger import Ledger
from serve.hub.records import SessionStore
from serve.metrics import EditorMetrics, Metrics, Readings
from serve.settings import ServeSettings
from serve.tenants import Tenants
from serve.versions.source import find_models, menu_of
from serve.work_sizes import WorkSizes


async def local_front(settings: ServeSettings) -> Front:
    """A front whose editor and session store are in this process, warmed up."""
    serves = find_models(settings.references)
    shelf = Shelf(
        Accelerator(
            max_sessions=settings.max_sessions,
            measured=settings.measured_capacity,
            degrade=settings.degrade,
        )
    )
    for named in serves:
        await asyncio.to_thread(shelf.put, named.source)
    metrics, editors, menu = Metrics(settings.gpu_hour_cost), EditorMetrics(), menu_of(serves)

    async def models() -> list[dict[str, Any]]:
        told = shelf.describe()
        return [{"model": offer.name, **told[offer.stable]} for offer in menu.offers]

    async def notes() -> list[str]:
        return []

    async def snapshots() -> dict[str, Readings]:
        shelf.gauge(editors)
        return {"front": metrics.snapshot(), "editor": editors.snapshot()}

    return Front(
        backend=shelf,
        store=SessionStore(settings.limits.resume_s),
        sizes=WorkSizes(settings.limits, settings.work_size, settings.detail),
        metrics=metrics,
        door=Door(Tenants(settings.token_file), settings.allowed_origins),
        ledger=Ledger(),
        traces=settings.traces,
        models=models,
        menu=lambda: menu,
        notes=notes,
        snapshots=snapshots,
    )

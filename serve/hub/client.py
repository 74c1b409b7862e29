"""A process's way to the hub: its own methods, and its parts as if they were here."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, cast

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from serve.hub.hub import NAMESPACE, Hub, hub_name
from serve.hub.ledger import Ledger
from serve.hub.placement import Placed, Places
from serve.hub.records import SessionStore
from serve.hub.remote import AGAIN_S, RemotePart, RemoteRecords
from serve.settings import ServeSettings
from serve.versions.source import ModelSource, Named

log = logging.getLogger(__name__)

ASK_S = 3.0  # for the hub to answer; then nobody waits for it until it does


def hub_actor(app: str, settings: ServeSettings, serves: tuple[Named, ...]) -> Any:
    """The application's hub, started if it is not there."""
    return (
        ray.remote(Hub)
        .options(
            name=hub_name(app),
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=1000,
        )
        .remote(app, settings, serves)
    )


class HubClient:
    """A process's way to the hub: its own methods by `call`, its parts as if they were here.

    While the hub is down or silent sessions go on, and cannot be resumed until it is back.
    """

    store: SessionStore
    ledger: Ledger
    places: Places

    def __init__(self, app: str, settings: ServeSettings, serves: tuple[Named, ...] = ()) -> None:
        self.app, self.settings, self.serves = app, settings, serves
        self.hub = hub_actor(app, settings, serves)
        self._listening: asyncio.Task[None] | None = None
        self._records = RemoteRecords(self)
        self.store = cast(SessionStore, self._records)
        # Nobody is held to a limit that all fronts share.
        free: dict[str, Any] = {"enter": None, "leave": None, "beat": frozenset()}
        self.ledger = cast(Ledger, RemotePart(self, "ledger", free))
        # Any editor will do: it decides itself whether it has room.
        anywhere = {"ask": Placed(""), "released": None}
        self.places = cast(Places, RemotePart(self, "places", anywhere))

    async def call(self, method: str, *args: Any) -> Any:
        """One call, again on a new hub if the old one is gone for good.

        Raises RayActorError while it is being started, and TimeoutError when it is silent, as it is
        when its machine or the way to it is gone, of which Ray hears after a while.
        """
        if self._silent:
            raise TimeoutError("the hub has not answered yet")
        try:
            async with asyncio.timeout(ASK_S):
                try:
                    return await getattr(self.hub, method).remote(*args)
                except RayActorError:
                    self._records.hand_over()
                    await self._find()
                    return await getattr(self.hub, method).remote(*args)
        except TimeoutError:
            self._records.hand_over()
            if not self._silent:  # others were waiting, too
                self._listening = asyncio.ensure_future(self._listen())
            raise TimeoutError(f"the hub does not answer within {ASK_S:g} s") from None

    @property
    def _silent(self) -> bool:
        return self._listening is not None and not self._listening.done()

    async def _listen(self) -> None:
        """Until there is a hub that answers, the same or a new one."""
        while True:
            try:
                await self.hub.pid.remote()
            except RayActorError:
                await asyncio.sleep(AGAIN_S)
                await self._find()
            else:
                return

    async def _find(self) -> None:
        """Not on the event loop: a machine that is cut off waits long for Ray's answer."""
        self.hub = await asyncio.to_thread(hub_actor, self.app, self.settings, self.serves)

    def first(self) -> list[ModelSource]:
        """See `Hub.first`; while the hub is down all that this process was built to serve."""
        try:
            found: list[ModelSource] = ray.get(self.hub.first.remote(self.serves), timeout=ASK_S)
        except (RayActorError, GetTimeoutError) as error:
            log.warning("the hub does not say what to load: %s", error)
            # As many as are sure to fit: one, where there is a bound.
            limit = 1 if self.settings.editor_memory_gb else None
            return [named.source for named in self.serves][:limit]
        return found

    def starting(self, process: str, doing: str) -> None:
        """See `Hub.starting`; nobody waits for it."""
        self.hub.starting.remote(process, doing)

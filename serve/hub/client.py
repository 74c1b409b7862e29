"""A process's way to the hub: its own methods, and its parts as if they were here."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Any, cast

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from serve.hub.commits import Commits
from serve.hub.hub import NAMESPACE, Hub
from serve.hub.ledger import Ledger
from serve.hub.placement import Placed, Places
from serve.hub.records import COMMIT_KINDS, Commit, SessionStore
from serve.settings import ServeSettings
from serve.versions.source import ModelSource, Named
from serve.wire.link import Asker
from serve.wire.protocol import WireError

log = logging.getLogger(__name__)

ASK_S = 3.0  # for the hub to say where a stream goes


def hub_actor(app: str, settings: ServeSettings, serves: tuple[Named, ...]) -> Any:
    """The application's hub, started if it is not there."""
    return (
        ray.remote(Hub)
        .options(
            name=f"hub-{app}",
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

    While the hub is down sessions go on, but cannot be resumed.
    """

    store: SessionStore
    ledger: Ledger
    places: Places

    def __init__(self, app: str, settings: ServeSettings, serves: tuple[Named, ...] = ()) -> None:
        self.app, self.settings, self.serves = app, settings, serves
        self.hub = hub_actor(app, settings, serves)
        kept: dict[str, Any] = {"beat": [], "release": None}
        self.store = cast(SessionStore, _Records(self, "store", kept))
        # Nobody is held to a limit that all fronts share.
        free: dict[str, Any] = {"enter": None, "leave": None, "beat": frozenset()}
        self.ledger = cast(Ledger, _Part(self, "ledger", free))
        # Any editor will do: it decides itself whether it has room.
        anywhere = {"ask": Placed(""), "released": None}
        self.places = cast(Places, _Part(self, "places", anywhere, ASK_S))

    async def call(self, method: str, *args: Any) -> Any:
        """One call, again on a new hub if the old one is gone for good."""
        try:
            return await getattr(self.hub, method).remote(*args)
        except RayActorError:
            self.hub = hub_actor(self.app, self.settings, self.serves)
            return await getattr(self.hub, method).remote(*args)

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


class _Part:
    """Its methods are those of the hub's part called `name`. `down` is what they answer while the
    hub is, where they do."""

    def __init__(
        self, hub: HubClient, name: str, down: dict[str, Any], timeout_s: float | None = None
    ) -> None:
        self._hub, self._name, self._down, self._timeout_s = hub, name, down, timeout_s

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        return partial(self._call, method)

    async def _call(self, method: str, *args: Any, **named: Any) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._hub.call("part", self._name, method, list(args), named)
        except RayTaskError as error:
            if isinstance(error.cause, WireError):
                raise error.cause from None
            raise
        except (RayActorError, TimeoutError) as error:
            if method not in self._down:
                raise
            log.warning("%s.%s without the hub: %s", self._name, method, error)
            return self._down[method]


class _Records(_Part):
    """Commits come over a link, because every chunk waits for its own: through Ray one costs 6 ms
    on a small machine, most of it for the state, and this way it costs one."""

    def __init__(self, hub: HubClient, name: str, down: dict[str, Any]) -> None:
        super().__init__(hub, name, down)
        self._commits = Commits(Asker(partial(hub.call, "commits"), COMMIT_KINDS).ask)

    async def commit(self, commit: Commit) -> bool:
        try:
            return await self._commits.commit(commit)
        except (OSError, RayActorError) as error:
            log.warning("a session's progress could not be kept: %s", error)
            return True

    async def release(self, token: str, epoch: int, *, forget: bool = False) -> None:
        self._commits.forget(token, epoch)
        await self._call("release", token, epoch, forget=forget)

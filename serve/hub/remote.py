"""The hub's parts as a process sees them: their methods, and what holds while the hub is away."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from ray.exceptions import RayActorError, RayTaskError

from serve.hub.commits import Commits
from serve.hub.records import COMMIT_KINDS, Commit, Header, Record, Shape, new_token
from serve.settings import ServeSettings
from serve.wire.link import Asker
from serve.wire.protocol import RETRY_AFTER_S, WireError

log = logging.getLogger(__name__)

AGAIN_S = 1.0  # between two tries to reach the hub


class HubWay(Protocol):
    """`client.HubClient`."""

    settings: ServeSettings

    async def call(self, method: str, *args: Any) -> Any: ...


class RemotePart:
    """Its methods are those of the hub's part called `name`. `down` is what they answer while the
    hub is, where they do."""

    def __init__(self, hub: HubWay, name: str, down: dict[str, Any]) -> None:
        self._hub, self._name, self._down = hub, name, down

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        return partial(self._call, method)

    async def _call(self, method: str, *args: Any, **named: Any) -> Any:
        try:
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


@dataclass
class _Kept:
    """A session's last commits: of one holder, after which it has as many edited frames."""

    commits: list[Commit] = field(default_factory=list)
    handed: int = 0  # number of the last one that a hub which came (back) has
    released: float | None = None  # when its connection was lost

    @property
    def last(self) -> Commit:
        return self.commits[-1]


class RemoteRecords(RemotePart):
    """Commits come over a link, because every chunk waits for its own: through Ray one costs 6 ms
    on a small machine, most of it for the state, and this way it costs one.

    The last ones of every session are kept here, on another machine than the hub's as a rule: a hub
    that was started anew is given them, so that the sessions can be resumed.
    """

    def __init__(self, hub: HubWay) -> None:
        super().__init__(hub, "store", {"beat": [], "release": None})
        self._asker = Asker(partial(hub.call, "commits"), COMMIT_KINDS)
        self._commits = Commits(self._asker.ask)
        self._numbers = itertools.count(1)
        self._kept: dict[str, _Kept] = {}
        self._handing: asyncio.Task[None] | None = None

    async def create(self, header: Header) -> str:
        """See `SessionStore.create`; while the hub is down the first commit makes the record."""
        try:
            return str(await self._call("create", header))
        except (RayActorError, TimeoutError) as error:
            log.warning("a session begins without the hub: %s", error)
            return new_token()

    async def claim(self, token: str, received: int, shape: Shape | None = None) -> Record:
        """See `SessionStore.claim`; whose it is nobody can say while the hub is down."""
        try:
            record: Record = await self._call("claim", token, received, shape)
        except (RayActorError, TimeoutError) as error:
            log.warning("a session cannot be resumed without the hub: %s", error)
            message = "the server's records do not answer yet; come back with your resume token"
            raise WireError("at_capacity", message, RETRY_AFTER_S) from error
        return record

    async def commit(self, commit: Commit) -> bool:
        """See `SessionStore.commit`; nobody waits for a hub that is away."""
        commit = replace(commit, number=next(self._numbers))
        kept = self._kept.get(commit.token)
        if kept is None or (kept.last.epoch, kept.last.progress.edited) != (
            commit.epoch,
            commit.progress.edited,
        ):
            kept = self._kept[commit.token] = _Kept()
        kept.commits.append(commit)
        if self._handing is not None and not self._handing.done():
            return True
        try:
            return await self._commits.commit(commit)
        except (OSError, RayActorError) as error:
            log.warning("a session's progress could not be kept: %s", error)
            self.hand_over()
            return True

    async def release(self, token: str, epoch: int, *, forget: bool = False) -> None:
        """See `SessionStore.release`."""
        self._sweep()
        self._commits.forget(token, epoch)
        kept = self._kept.get(token)
        if kept is not None and kept.last.epoch == epoch:
            kept.released = time.monotonic()
            if forget:
                del self._kept[token]
        await self._call("release", token, epoch, forget=forget)

    def hand_over(self) -> None:
        """Give what is kept to the hub as soon as it answers: it may be another."""
        if self._handing is None or self._handing.done():
            self._handing = asyncio.ensure_future(self._hand_over())

    async def _hand_over(self) -> None:
        for kept in self._kept.values():
            kept.handed = 0
        while True:
            self._sweep()
            try:
                # Others are committed meanwhile, without being sent.
                while late := [t for t, k in self._kept.items() if k.handed < k.last.number]:
                    for token in late:
                        await self._hand(token)
            except (OSError, RayActorError) as error:
                log.warning("the hub is away: %s", error)
                await asyncio.sleep(AGAIN_S)
            else:
                return

    async def _hand(self, token: str) -> None:
        kept = self._kept.get(token)
        if kept is None:
            return
        for commit in list(kept.commits):
            if not await self._commits.commit(commit):  # somebody else holds the session
                self._kept.pop(token, None)
                return
            kept.handed = commit.number
        if kept.released is not None:
            self._commits.forget(token, kept.last.epoch)
            await self._call("release", token, kept.last.epoch)

    def _sweep(self) -> None:
        """Forgets those that cannot be resumed any more."""
        limit = time.monotonic() - self._hub.settings.limits.resume_s
        self._kept = {
            token: kept
            for token, kept in self._kept.items()
            if kept.released is None or kept.released > limit
        }

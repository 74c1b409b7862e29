"""Commits on their way from a front to the hub's store: of a state only what is not there."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

from serve.hub.records import Commit, SessionStore
from serve.wire.split_state import LostPartError

Taken = bool | None


async def take(store: SessionStore, commit: Commit) -> Taken:
    """The hub's side: see `SessionStore.commit`; None where the whole state has to come."""
    try:
        return await store.commit(commit)
    except LostPartError:
        return None


class Commits:
    """A front's side; `ask` brings a commit to `take` and its answer back."""

    def __init__(self, ask: Callable[[Commit], Awaitable[Taken]]) -> None:
        self._ask = ask
        # By token and epoch, the parts of the state that the hub took last.
        self._there: dict[tuple[str, int], tuple[str, ...]] = {}

    async def commit(self, commit: Commit) -> bool:
        """As `SessionStore.commit`, of a commit with its whole state.

        Should the hub not have what was there before (it was started anew, or had no room), it gets
        the whole. Raises what `ask` does.
        """
        holder, progress = (commit.token, commit.epoch), commit.progress
        state = progress.state
        if state is None:
            return bool(await self._ask(commit))
        new = replace(progress, state=state.beyond(self._there.get(holder, ())))
        answer = await self._ask(replace(commit, progress=new))
        if answer is None:
            answer = await self._ask(commit)
        if answer:
            self._there[holder] = state.names
        else:
            self.forget(*holder)
        return bool(answer)

    def forget(self, token: str, epoch: int) -> None:
        """The session is not committed from here any more."""
        self._there.pop((token, epoch), None)

"""`work.Backend` on Ray Serve: one long call to an editor replica is the session's pin.

The hub says to which replica; what is edited goes over a link (`wire.conversation`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve.admission.admission import Request
from serve.admission.router import route
from serve.hub.placement import ASKS_S, Full, Places, Retired, Waiting
from serve.wire.conversation import Conversation
from serve.wire.link import Listener
from serve.wire.protocol import RETRY_AFTER_S, WireError
from serve.wire.work import EditorEvent, EditorLostError, Opening, Queued, Take
from serve.work_sizes import sizes_of

log = logging.getLogger(__name__)

OPEN_S = 5.0  # for a replica to be reached, most of it waiting for a free one
READY_S = 20.0  # and for it to open the stream, maybe with a history to work through
UNREACHED_S = 10.0  # for which an editor that was lost gets streams only where no other has room
TRIES = 4  # editors that are asked which have room by the hub's measure and none by their own


class RayBackend:
    """`listener` is for links of `conversation.KINDS`."""

    def __init__(self, editors: DeploymentHandle, listener: Listener, places: Places) -> None:
        self.editors, self.listener, self.places = editors, listener, places
        self._numbers = itertools.count()
        self._lost: dict[str, float] = {}  # editors, and when they were last not reached

    async def edit(self, opening: Opening, take: Take) -> AsyncGenerator[EditorEvent]:
        """See `work.Backend.edit`."""
        for tries in itertools.count(1):
            stream = f"{opening.session}-{opening.epoch}-{next(self._numbers)}"
            opening = replace(opening, stream=stream)
            request = Request(
                stream, opening.session, sizes_of(opening), opening.fps,
                opening.epoch, opening.waits, opening.again, live=opening.mode == "live",
                name=opening.model, avoid=self._unreached(),
            )  # fmt: skip
            try:
                while isinstance(place := await self.places.ask(request), Waiting):
                    yield Queued(place.place, place.expected_s)
                    await asyncio.sleep(ASKS_S)
                if isinstance(place, Full):
                    raise _no_room("no editor has room")
                if isinstance(place, Retired):
                    opening = replace(opening, version=place.model)
                    continue
                try:
                    where = route(place.editor, request.avoid)
                    async with self._called(where, opening, take) as conversation:
                        async with asyncio.timeout(OPEN_S):
                            await conversation.reached()
                        async with asyncio.timeout(READY_S):
                            event = await conversation.next()
                        while event is not None:
                            yield event
                            event = await conversation.next()
                    return
                except EditorLostError:
                    self._lost[place.editor] = time.monotonic()
                    raise
                except TimeoutError:  # it has as many sessions as Serve lets it, or is gone
                    self._lost[place.editor] = time.monotonic()
                    if place.editor in request.avoid or tries == TRIES:
                        raise _no_room("every editor is busy") from None
                except WireError as error:
                    # An editor that has no room by its own, newer measure: the hub's is the last.
                    if error.code != "at_capacity" or tries == TRIES:
                        raise
                await asyncio.sleep(ASKS_S)
            finally:
                await asyncio.shield(self.places.released(stream))

    def _unreached(self) -> frozenset[str]:
        """Editors lost of late. The hub hears of their end later, and of a way from here to them
        that is broken never."""
        since = time.monotonic() - UNREACHED_S
        self._lost = {editor: at for editor, at in self._lost.items() if editor and at > since}
        return frozenset(self._lost)

    @asynccontextmanager
    async def _called(
        self, where: str, opening: Opening, take: Take
    ) -> AsyncGenerator[Conversation]:
        """The conversation with an editor that is called as long as this lasts."""
        async with Conversation(self.listener, take) as conversation:
            edit = self.editors.options(session_id=where).edit
            try:
                call: Any = edit.remote(opening, conversation.address)
            except (RayServeException, RayError) as error:
                raise EditorLostError(str(error)) from error
            conversation.pin(_pinned(call))
            try:
                yield conversation
            finally:
                call.cancel()


def _no_room(why: str) -> WireError:
    return WireError("at_capacity", f"{why}; try again later", RETRY_AFTER_S)


async def _pinned(call: Awaitable[None]) -> None:
    """Returns when the editor ends the call. Raises WireError and EditorLostError."""
    try:
        await call
    except RayTaskError as error:
        log.error("an editor failed: %s", error)
        raise WireError("internal", "the editor failed; its log says why") from error
    except (RayError, RayServeException) as error:
        raise EditorLostError(str(error).splitlines()[0]) from error

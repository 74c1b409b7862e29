"""`work.Backend` on Ray Serve: one long call to an editor replica is the session's pin.

The hub says to which replica; what is edited goes over a link (`wire.conversation`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve.admission.admission import Request
from serve.hub.placement import ASKS_S, Full, Places, Retired, Waiting
from serve.wire.conversation import Conversation
from serve.wire.link import Listener
from serve.wire.protocol import RETRY_AFTER_S, WireError
from serve.wire.work import EditorEvent, EditorLostError, Opening, Queued, Take
from serve.work_sizes import sizes_of

log = logging.getLogger(__name__)

OPEN_S = 5.0  # for a replica to answer, most of it waiting for a free one
TRIES = 4  # editors that are asked which have room by the hub's measure and none by their own


class RayBackend:
    """`listener` is for links of `conversation.KINDS`."""

    def __init__(self, editors: DeploymentHandle, listener: Listener, places: Places) -> None:
        self.editors, self.listener, self.places = editors, listener, places
        self._numbers = itertools.count()

    async def edit(self, opening: Opening, take: Take) -> AsyncGenerator[EditorEvent]:
        """See `work.Backend.edit`."""
        for tries in itertools.count(1):
            stream = f"{opening.session}-{opening.epoch}-{next(self._numbers)}"
            opening = replace(opening, stream=stream)
            request = Request(
                stream, opening.session, sizes_of(opening), opening.fps,
                opening.epoch, opening.waits, opening.again, live=opening.mode == "live",
                name=opening.model,
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
                    async with self._called(place.editor, opening, take) as conversation:
                        async with asyncio.timeout(OPEN_S):
                            event = await conversation.next()
                        while event is not None:
                            yield event
                            event = await conversation.next()
                    return
                except TimeoutError:  # as many sessions as Serve lets it have
                    raise _no_room("every editor is busy") from None
                except WireError as error:
                    # An editor that has no room by its own, newer measure: the hub's is the last.
                    if error.code != "at_capacity" or tries == TRIES:
                        raise
                await asyncio.sleep(ASKS_S)
            finally:
                await asyncio.shield(self.places.released(stream))

    @asynccontextmanager
    async def _called(
        self, editor: str, opening: Opening, take: Take
    ) -> AsyncGenerator[Conversation]:
        """The conversation with an editor that is called as long as this lasts."""
        async with Conversation(self.listener, take) as conversation:
            edit = self.editors.options(session_id=editor).edit
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

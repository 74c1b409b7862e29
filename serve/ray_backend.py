"""`work.Backend` on Ray Serve: one long streaming call to an editor replica is the session's pin.

The call is the replica's one ongoing request for the session, so Serve's own counting is session
counting. Chunks are fetched by the editor from the front's inbox; results are the call's items.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncGenerator
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from serve.protocol import RETRY_AFTER_S, WireError
from serve.work import EditorLostError, Event, Moved, Opening, Refused, Take, Work

log = logging.getLogger(__name__)

OPEN_S = 5.0  # for a replica to answer, most of it waiting for a free one
TRIES = 4  # replicas that are asked before the answer is at_capacity


class RayBackend:
    def __init__(self, editors: DeploymentHandle, inbox: ActorHandle) -> None:
        self.editors = editors.options(stream=True)
        self.inbox = inbox
        self._numbers = itertools.count()

    async def edit(self, opening: Opening, take: Take) -> AsyncGenerator[Event]:
        """See `work.Backend.edit`."""
        refused: WireError | None = None
        for _ in range(TRIES):
            try:
                async for event in self._edit(opening, take):
                    yield event
                return
            except TimeoutError:  # every editor has as many sessions as Serve lets it have
                message = "every editor is busy; try again later"
                raise WireError("at_capacity", message, RETRY_AFTER_S) from None
            except WireError as error:  # this one has no room by its own measure
                if error.code != "at_capacity":
                    raise
                refused = error
        assert refused is not None
        raise refused

    async def _edit(self, opening: Opening, take: Take) -> AsyncGenerator[Event]:
        stream = f"{opening.session}-{next(self._numbers)}"
        try:
            items = self.editors.edit.remote(opening, stream, self.inbox)
        except (RayServeException, RayError) as error:
            raise EditorLostError(str(error)) from error
        following = asyncio.ensure_future(_item(items))
        taking: asyncio.Future[Work] | None = None
        try:
            async with asyncio.timeout(OPEN_S):
                ready = await following
            yield ready
            last = False
            while not last:
                following = asyncio.ensure_future(_item(items))
                taking = asyncio.ensure_future(take())
                # The editor may also speak first: it dies, or gives the stream back.
                await asyncio.wait({taking, following}, return_when=asyncio.FIRST_COMPLETED)
                if not following.done():
                    work = taking.result()
                    await self._put(stream, work)
                    last = work.last
                event = await following
                yield event
                last = last or isinstance(event, Moved)
        finally:
            following.cancel()
            if taking is not None:
                taking.cancel()
            items.cancel()
            with contextlib.suppress(RayActorError):
                self.inbox.close.remote(stream)

    async def _put(self, stream: str, work: Work) -> None:
        reference = await asyncio.to_thread(ray.put, work)
        await self.inbox.put.remote(stream, [reference])


async def _item(items: Any) -> Event:
    """The editor's next word. Raises WireError and EditorLostError."""
    try:
        item = await anext(items)
    except RayTaskError as error:
        log.error("an editor failed: %s", error)
        raise WireError("internal", "the editor failed; its log says why") from error
    except StopAsyncIteration:
        raise EditorLostError("the editor ended the stream") from None
    except (RayError, RayServeException) as error:
        raise EditorLostError(str(error).splitlines()[0]) from error
    if isinstance(item, Refused):
        raise WireError(item.code, item.message, item.retry_after_s)
    event: Event = item
    return event

"""A session's stream across the deaths and moves of the editors that work for it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from serve.delivery.session import Delivery, Session, State
from serve.metrics import Metrics
from serve.wire.protocol import RETRY_AFTER_S, WireError
from serve.wire.split_state import LostPartError
from serve.wire.work import Backend, Edited, EditorLostError, Frames, Moved, Queued, Ready

log = logging.getLogger(__name__)

RECOVERY_S = 60.0  # an editor is looked for so long
OPENING_S = 10.0  # and so long for a new session whose editors died before they took it
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0
MAX_DEATHS = 2  # of editors over the same chunk, after which the session is taken for the cause


async def drive(
    backend: Backend, session: Session, metrics: Metrics
) -> AsyncGenerator[Queued | Ready | Frames | Delivery]:
    """Yields Ready once, then of every chunk to the last its Frames and its delivery; before it
    Queued, to one that waits. Frames whose editor died before their delivery come again.

    When the editor dies the stream is opened again from the state after the last delivery, when it
    moves from the exact state it gave back; `session` hands out again what was not answered. A
    delivery's state is whole.
    Raises WireError: what an editor refuses at once, no editor after `OPENING_S` or `RECOVERY_S`,
    a chunk that has cost `MAX_DEATHS` editors their lives. Raises SupersededError.
    """
    opening = session.opening
    state, ahead = opening.state, 0
    lost_at: float | None = None
    pause, deaths = FIRST_PAUSE_S, 0
    while True:
        again = opening.again or session.state is not State.NEW
        resumed = replace(opening, state=state, again=again)
        why = ""
        try:
            async with aclosing(backend.edit(resumed, session.take)) as events:
                async for event in events:
                    if isinstance(event, Queued):
                        if session.state is State.NEW and opening.waits:
                            yield event
                            continue
                        lost_at = lost_at or time.monotonic()
                        patience = OPENING_S if session.state is State.NEW else RECOVERY_S
                        if time.monotonic() - lost_at > patience:
                            break
                    elif isinstance(event, Ready):
                        fresh = session.state is State.NEW
                        session.opened(event)
                        if fresh:
                            yield event
                        if lost_at is not None:
                            seconds = time.monotonic() - lost_at
                            log.info("session %s: goes on after %.1f s", session.name, seconds)
                    elif isinstance(event, Frames):
                        yield event
                    elif isinstance(event, Edited):
                        state, ahead = event.state and event.state.completed(state), 0
                        lost_at, pause, deaths = None, FIRST_PAUSE_S, 0
                        delivery = session.deliver(replace(event, state=state))
                        yield delivery
                        if delivery.last:
                            return
                    else:
                        assert isinstance(event, Moved)
                        state, ahead = event.state.completed(state), event.ahead
                        why = event.why
        except (EditorLostError, LostPartError) as error:
            why = "death"
            deaths += session.working
            log.warning("session %s: editor lost: %s", session.name, error)
        except WireError as error:
            if session.state is not State.RECOVERING or error.code != "at_capacity":
                raise
            log.info("session %s: no room yet: %s", session.name, error)
        if deaths >= MAX_DEATHS:
            raise WireError(
                "internal", f"{deaths} editors were lost over one chunk of this session"
            )
        new = session.state is State.NEW
        if not new and session.state is not State.RECOVERING:
            assert why, "an editor ended a stream without saying why"
            session.lost(ahead)
            metrics.moved.labels(why).inc()
        lost_at = lost_at or time.monotonic()
        waited = time.monotonic() - lost_at
        if new and waited > OPENING_S:
            message = "no editor could be reached; try again later"
            raise WireError("at_capacity", message, RETRY_AFTER_S)
        if waited > RECOVERY_S:
            raise WireError("internal", f"no editor could take the session for {RECOVERY_S:g} s")
        # What was given back goes on at once, where there is room.
        if why in ("", "death"):
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

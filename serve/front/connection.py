"""One WebSocket at the front, from its handshake to its close code."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar, cast

from serve.delivery.session import Session, State
from serve.front.account import refused
from serve.front.door import Visitor, client_of
from serve.front.running import TICK_S, RunningSession, Services, opened_message
from serve.front.socket import Disconnected, Socket
from serve.hub.records import Record, Shape
from serve.wire.codes import CODES, Code
from serve.wire.protocol import (
    NORMAL_CLOSE,
    RETRY_AFTER_S,
    STOPPED,
    SUBPROTOCOL,
    Open,
    WireError,
    parse_client,
    to_json,
)
from serve.wire.work import SupersededError

T = TypeVar("T")

log = logging.getLogger(__name__)

GONE = 1001  # close code for a socket whose session another one has taken over


class Connection:
    """`run` serves the socket to its end; `leave` and `supersede` end it early."""

    def __init__(
        self,
        socket: Socket,
        services: Services,
        visitor: Visitor | None,
        *,
        full: Callable[[], WireError | None],
    ) -> None:
        """`visitor` is None for who is not let in; `full` says what speaks against a session more
        here, where silent connections do not count."""
        self.socket, self.services, self.visitor = socket, services, visitor
        self._full = full
        self.running: RunningSession | None = None
        self.client = client_of(socket.scope)
        self._spoken = False
        self._ending: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def held(self) -> tuple[str, int] | None:
        """Token and epoch of the session this connection holds."""
        running = self.running
        return (running.token, running.epoch) if running and running.token else None

    @property
    def silent(self) -> bool:
        """It has not said a word, and may still."""
        return not self._spoken and not self._ending.done()

    def give_way(self) -> None:
        """To other connections: it has said nothing for longest."""
        message = "many connections say nothing here; open again, and send open at once"
        self._end(WireError("at_capacity", message, RETRY_AFTER_S))

    def leave(self) -> None:
        """This front is going away: the client is told to come back with its token."""
        self._end(WireError("draining", "this server is going away; go on with your resume token"))

    def stop(self, reason: str = STOPPED) -> None:
        """The session is finished as if its client had closed it, which hears of the reason."""
        if self.running is not None and self.running.account.admitted:
            self.running.stop(reason)
        else:
            self.leave()

    def revoke(self) -> None:
        """The visitor's token is no longer good."""
        self._end(WireError("unauthorized", "this token is no longer accepted"))

    def supersede(self) -> None:
        """Another socket holds the session now."""
        self._end(SupersededError())

    def _end(self, error: Exception) -> None:
        if not self._ending.done():
            self._ending.set_exception(error)

    async def run(self, *, refusal: WireError | None) -> None:
        """Raises nothing but CancelledError: the client is told what went wrong.

        `refusal` is what already speaks against this client, before it has said a word.
        """
        outcome = "disconnected"
        try:
            await self.socket.accept(SUBPROTOCOL if self._offered() else None)
            await self._serve(refusal)
            assert self.running is not None
            outcome = self.running.reason
            await self.socket.close(NORMAL_CLOSE)
        except Disconnected as error:
            log.info("session %s: connection lost (%d)", self._name, error.code)
        except SupersededError:
            outcome = "superseded"
            await self.socket.close(GONE)
        except WireError as error:
            outcome = error.code
            await self._refuse(error)
        except Exception:
            outcome = "internal"
            log.exception("session %s: failed", self._name)
            await self._refuse(WireError("internal", "the server failed; its log says why"))
        finally:
            if not self._ending.done():
                self._ending.cancel()
            if self.running is not None:
                await self._let_go(outcome)

    @property
    def _name(self) -> str:
        return self.running.session.name if self.running else "-"

    def _offered(self) -> bool:
        return SUBPROTOCOL in self.socket.scope.get("subprotocols", [])

    async def _refuse(self, error: WireError) -> None:
        if self.running is None or not self.running.account.admitted:
            tenant = self.visitor.tenant.name if self.visitor else ""
            metrics = self.services.metrics
            refused(metrics, error.code, error.message, tenant=tenant, client=self.client)
        else:
            log.info("session %s: %s: %s", self._name, error.code, error.message)
        try:
            async with asyncio.timeout(TICK_S):
                await self.socket.send(to_json(error.told))
        except (Disconnected, TimeoutError):
            pass  # nobody reads it
        await self.socket.close(CODES[error.code].close)

    async def _let_go(self, outcome: str) -> None:
        """Shielded: this may run because the connection's task was cancelled."""
        assert self.running is not None
        if self.running.session.state is not State.CLOSED:
            self.running.session.to(State.CLOSED)
        await asyncio.shield(self.running.account.ended(outcome))
        if held := self.held:
            fate = CODES.get(cast(Code, outcome))
            forget = fate is not None and not fate.kept and self.running.account.admitted
            await asyncio.shield(self.services.store.release(*held, forget=forget))

    async def _serve(self, refusal: WireError | None) -> None:
        if refusal is not None:
            raise refusal
        assert self.visitor is not None
        if not self._offered():
            raise WireError(
                "bad_request", f"offer the WebSocket subprotocol {SUBPROTOCOL} and open again"
            )
        message = await self._first_message()
        sizes, limits = self.services.sizes, self.services.limits
        limits.check_open(message)
        await self.socket.expect(limits.max_message(message.width, message.height))
        record = None
        if message.resume is not None:
            menu = self.services.menu()
            trained = menu.versions[menu.offer(message.model).stable].trained
            asked = sizes.of(message, trained)[0]
            # What "native" meant was settled when the session was opened, maybe by another version.
            work_size = asked if message.work_size not in (None, "native") else None
            shape = Shape(
                message.width, message.height, message.mode, message.format,
                work_size, message.detail, self.visitor.tenant.name, message.model,
            )  # fmt: skip
            received = message.received or 0
            record = await self.services.store.claim(message.resume, received, shape)
        if record is None:
            session = Session(self.services.opening(message, self.visitor.tenant.name))
        else:
            session = _resumed(message, record)
        self.running = running = RunningSession(
            self.socket, self.services, session,
            self.services.account(self.visitor, session.opening), message.format, record,
            message.resume or "",
        )  # fmt: skip
        if record is not None and record.progress.finished:
            await self._unless_ended(self._send_rest(record, message.resume or ""))
            return
        await running.account.enter()
        await running.run(self._ending)

    async def _unless_ended(self, doing: Coroutine[Any, Any, T]) -> T:
        """A client that does not read, or says nothing, holds its connection no longer than it is
        its."""
        task = asyncio.ensure_future(doing)
        try:
            waiting: set[asyncio.Future[Any]] = {task, self._ending}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if self._ending.done():
                self._ending.result()
            return task.result()
        finally:
            task.cancel()

    async def _send_rest(self, record: Record, token: str) -> None:
        """The session was over, only the client had not heard all of it."""
        opened = opened_message(record.header, token, record.progress.next_frame)
        await self.socket.send(opened)
        for entry in record.tail:
            await self.socket.send(entry.data)

    async def _first_message(self) -> Open:
        timeout = self.services.limits.open_timeout_s
        try:
            async with asyncio.timeout(timeout):
                first = await self._unless_ended(self.socket.receive())
        except TimeoutError:
            raise WireError("bad_request", f"no open message within {timeout:g} s") from None
        if refusal := self._full():  # others may have opened since this one came, silent as it was
            raise refusal
        self._spoken = True
        if not isinstance(first, str):
            raise WireError("bad_request", "the first message must be open, got a binary one")
        message = parse_client(first)
        if not isinstance(message, Open):
            raise WireError("bad_request", "the first message must be open")
        return message


def _resumed(message: Open, record: Record) -> Session:
    progress, first = record.progress, record.header.opening
    opening = replace(
        first, state=progress.state, epoch=record.epoch, again=True, waits=bool(message.queue)
    )
    # A client that opens with its first prompt means the session as it is; any other is a change.
    prompt = progress.prompt if message.prompt == first.prompt else message.prompt
    return Session(opening, replace(progress, prompt=prompt))

"""Who is let in: from which page, with whose token; and what every HTTP answer says to a browser.

A browser lets any page open a WebSocket anywhere and names the page in `Origin`. So a page is let
in when it came from here, or from one of `allowed_origins`; who is no browser says no origin. A
name that a stranger had pointed at this machine would look like "here": without tokens only
addresses, localhost and this machine's own names are.
"""

from __future__ import annotations

import ipaddress
import logging
import socket
import time
from collections.abc import Collection
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.logs import event, one_line
from serve.tenants import Tenant, Tenants, given_token
from serve.wire.codes import CODES
from serve.wire.protocol import WireError

log = logging.getLogger(__name__)

# The page loads nothing from elsewhere and cannot be put into another page's frame.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
        "media-src 'self' blob:; connect-src 'self' blob:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "camera=(self), display-capture=(self), microphone=(), geolocation=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
UNAUTHORIZED = (
    "no token came, or one that this server does not know; send `Authorization: Bearer TOKEN`, "
    "?token=TOKEN in the address, or with liveedit --token TOKEN"
)


@dataclass(frozen=True)
class Visitor:
    """Who asks: `token` is what was given, `client` the address that it came from."""

    tenant: Tenant
    token: str
    client: str


class Door:
    """Args:
    allowed_origins: Pages from elsewhere that may use the server, as https://HOST[:PORT].
    """

    def __init__(self, tenants: Tenants, allowed_origins: Collection[str] = ()) -> None:
        self.tenants = tenants
        self.allowed_origins = frozenset(origin.rstrip("/").lower() for origin in allowed_origins)
        self._own_names = {"localhost", socket.gethostname().lower(), socket.getfqdn().lower()}

    def enter(self, scope: Scope) -> Visitor:
        """Raises WireError `unauthorized`."""
        headers = Headers(scope=scope)
        self._check_origin(headers)
        query = QueryParams(scope.get("query_string", b""))
        token = given_token(headers, query, scope.get("subprotocols", ()))
        tenant = self.tenants.find(token)
        if tenant is None:
            raise WireError("unauthorized", UNAUTHORIZED)
        return Visitor(tenant, token, client_of(scope))

    def still(self, visitor: Visitor) -> Tenant | None:
        """The visitor's tenant by now; None when its token is no longer good."""
        return self.tenants.find(visitor.token)

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or origin.lower() in self.allowed_origins:
            return
        host = headers.get("host", "")
        if _netloc(origin) == host.lower() and self._ours(host):
            return
        raise WireError(
            "unauthorized",
            f"pages from {origin[:100]} may not use this server; its operator can allow them with "
            "allowed_origins",
        )

    def _ours(self, host: str) -> bool:
        if not self.tenants.open:
            return True  # a page of a stranger's name has no token
        name = urlsplit(f"//{host}").hostname or ""
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return name.lower() in self._own_names
        return True


def _netloc(origin: str) -> str:
    """HOST[:PORT] of an origin; empty for what is none, such as "null" or a broken address."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def client_of(scope: Scope) -> str:
    """The address that a request came from; a proxy's word for it is uvicorn's to judge."""
    client = scope.get("client")
    return str(client[0]) if client else "-"


def refusal(error: WireError, status: int | None = None) -> JSONResponse:
    """The answer that says it, by default with the status of its code."""
    headers = {"Retry-After": f"{error.retry_after_s:.0f}"} if error.retry_after_s else {}
    if error.code == "unauthorized":
        headers["WWW-Authenticate"] = "Bearer"
    content = {"error": {"code": error.code, "message": error.message}}
    return JSONResponse(content, status or CODES[error.code].status, headers=headers)


class Guard:
    """ASGI middleware: the API's HTTP routes are for who is let in, and the WebSocket answers for
    itself. Page, health and metrics are for everybody who can reach the port. Every answer has
    `HEADERS` and leaves a line in the access log. One that cannot be finished is cut, and a line
    says why."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app, self.door = app, door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status, started = time.monotonic(), 500, False

        async def sent(message: Message) -> None:
            nonlocal status, started
            if message["type"] == "http.response.start":
                status, started = message["status"], True
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        try:
            if scope["path"].startswith("/v1/"):
                scope["state"] = {**scope.get("state", {}), "visitor": self.door.enter(scope)}
            await self.app(scope, receive, sent)
        except WireError as error:
            if started:  # a second answer is none: the server cuts one that ends unfinished
                log.warning("an answer is cut: %s: %s", error.code, one_line(error.message))
            else:
                await refusal(error)(scope, receive, sent)
        finally:
            milliseconds = (time.monotonic() - began) * 1000
            # Without the query, which may hold a token, and in one line.
            path = str(scope["path"])[:200].encode("unicode_escape").decode()
            event(
                log, "request", "%s %s %d %.1f ms from %s",
                method=scope["method"], path=path, status=status,
                milliseconds=round(milliseconds, 1), client=client_of(scope),
            )  # fmt: skip

"""What Ray Serve's ingress needs to carry media: loaded by the process that owns the sockets.

Ray reads RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH when it starts; `ENVIRONMENT` holds it.
"""

from __future__ import annotations

import functools
from typing import Any

import uvicorn
from starlette.middleware import Middleware
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from serve.front.socket import FIRST_SIZE, RESIZE, FlowControl

ENVIRONMENT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.ingress.middlewares"}


class SizedSocket(WebSocketsSansIOProtocol):
    """A socket whose largest message can be set while it is open: sessions differ by a factor of
    hundreds, and a message is in memory before anybody can refuse it."""

    async def run_asgi(self) -> None:
        self.scope["extensions"][RESIZE] = self._resize  # type: ignore[assignment]
        await super().run_asgi()

    def _resize(self, size: int) -> None:
        self.conn.max_message_size = size


# Ray 2.60 gives no way to hand these to the uvicorn it starts.
UVICORN: dict[str, Any] = {
    # Compression costs 200 ms a megabyte and gains nothing on images; browsers always offer it.
    "ws_per_message_deflate": False,
    # A lossless session that is behind does not read its socket, so pongs wait there too.
    "ws_ping_timeout": None,
    "ws": SizedSocket,
    "ws_max_size": FIRST_SIZE,
}


def middlewares() -> list[Middleware]:
    """Ray's callback, called before it starts uvicorn."""
    if not isinstance(uvicorn.Config.__init__, functools.partialmethod):
        uvicorn.Config.__init__ = functools.partialmethod(  # type: ignore[method-assign, assignment]
            uvicorn.Config.__init__, **UVICORN
        )
    return [Middleware(FlowControl)]

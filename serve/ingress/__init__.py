"""What Ray Serve's ingress needs to carry media: loaded by the process that owns the sockets.

Ray reads RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH when it starts; `ENVIRONMENT` holds it. That
process is one for everybody: what a stranger may cost it before anything of ours is asked is
bounded here, in `BoundedHttp` and `BoundedSocket`, and by `FlowControl`. May import uvicorn, links
and the names that the front shares with it; knows no Ray.
"""

from __future__ import annotations

import functools
from typing import Any

import uvicorn
from starlette.middleware import Middleware

from serve.front.socket import FIRST_SIZE
from serve.ingress.backpressure import FlowControl
from serve.ingress.http import BoundedHttp
from serve.ingress.websocket import BoundedSocket

ENVIRONMENT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.ingress.middlewares"}

# Ray 2.60 gives no way to hand these to the uvicorn it starts.
UVICORN: dict[str, Any] = {
    # Compression costs 200 ms a megabyte and gains nothing on images; browsers always offer it.
    "ws_per_message_deflate": False,
    # A lossless session that is behind does not read its socket, so pongs wait there too.
    "ws_ping_timeout": None,
    "ws": BoundedSocket,
    "ws_max_size": FIRST_SIZE,
    "http": BoundedHttp,
}


def middlewares() -> list[Middleware]:
    """Ray's callback, called before it starts uvicorn."""
    if not isinstance(uvicorn.Config.__init__, functools.partialmethod):
        uvicorn.Config.__init__ = functools.partialmethod(  # type: ignore[method-assign, assignment]
            uvicorn.Config.__init__, **UVICORN
        )
    return [Middleware(FlowControl)]

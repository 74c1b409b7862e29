"""A client of the wire protocol: async (`connect`) and sync (`edit_frames`).

Light: may import `wire` alone, and neither PyTorch nor Ray.
"""

from serve.client.api import connect, edit_frames, served_model
from serve.client.stream import ConnectError, EditedFrame, Event, Stream
from serve.wire.protocol import WireError

__all__ = [
    "ConnectError",
    "EditedFrame",
    "Event",
    "Stream",
    "WireError",
    "connect",
    "edit_frames",
    "served_model",
]

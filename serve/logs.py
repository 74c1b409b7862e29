"""Our log lines in the log of the Serve replica that writes them."""

from __future__ import annotations

import logging


def join_serve_log() -> None:
    """Ray Serve sets up its own logger only; ours write where it does, from INFO on."""
    ours, theirs = logging.getLogger("serve"), logging.getLogger("ray.serve")
    ours.handlers, ours.propagate = theirs.handlers, False
    ours.setLevel(logging.INFO)

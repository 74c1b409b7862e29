"""Our log lines: in the log of the Serve replica that writes them, with fields that can be found.

As text a line is a sentence; with `log_format=json` (Ray Serve's own encoding) every field has its
name, too.
"""

from __future__ import annotations

import logging
from typing import Any

LONGEST = 500  # characters of one value


def join_serve_log() -> None:
    """Ray Serve sets up its own logger only; ours write where it does, from INFO on."""
    ours, theirs = logging.getLogger("serve"), logging.getLogger("ray.serve")
    ours.handlers, ours.propagate = theirs.handlers, False
    ours.setLevel(logging.INFO)


def event(log: logging.Logger, name: str, text: str, **values: Any) -> None:
    """One line of level INFO: `text` takes all `values`, in their order.

    In JSON they stand beside it under their names, and `name` as `event`. Texts may hold what a
    stranger has sent: they cannot begin a line of their own, colour a terminal or fill a disk.
    """
    values = {k: one_line(v) if isinstance(v, str) else v for k, v in values.items()}
    log.info(text, *values.values(), extra={"event": name, **values})


def one_line(text: str) -> str:
    """With `?` for what is no printable character, and at most `LONGEST` of them."""
    shown = text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
    return "".join(c if c.isprintable() else "?" for c in shown)

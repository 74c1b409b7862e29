"""What becomes of a connection by the code of its error: the one table of it.

The page reads it, too: `python -m serve.wire.codes > serve/web/codes.js` after a change.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Literal

Code = Literal[
    "bad_request",
    "unauthorized",
    "unsupported_size",
    "bad_frame",
    "at_capacity",
    "too_slow",
    "draining",
    "internal",
]


@dataclass(frozen=True)
class Fate:
    close: int  # WebSocket close code (RFC 6455 section 7.4 and the IANA registry)
    status: int  # of an HTTP answer
    kept: bool = False  # a session that it ends can be resumed
    resume: bool = False  # and a client does so by itself
    again: bool = False  # a client also asks for a new session again by itself


CODES: dict[Code, Fate] = {
    "bad_request": Fate(1008, 400),
    "unauthorized": Fate(1008, 401),
    "unsupported_size": Fate(1008, 422),
    "bad_frame": Fate(1007, 400),
    "at_capacity": Fate(1013, 503, kept=True, resume=True),
    "too_slow": Fate(1008, 408, kept=True),
    "draining": Fate(1012, 503, kept=True, resume=True, again=True),
    "internal": Fate(1011, 500, kept=True, resume=True),
}


def javascript() -> str:
    """The table for the page."""
    fates = {code: asdict(fate) for code, fate in CODES.items()}
    lines = ",\n".join(f"  {code}: {json.dumps(fate)}" for code, fate in fates.items())
    made = "// Made by `python -m serve.wire.codes`, whose table this is."
    return f"{made}\nexport const FATES = {{\n{lines},\n}};\n"


if __name__ == "__main__":
    print(javascript(), end="")

"""Editors and requests as the tests of placement make them."""

from __future__ import annotations

from serve.admission.admission import Editor, Request, Seat, Sizes

SIZES = Sizes((128, 192), (128, 192))


def editor(name: str, *shares: float, cost: float = 0.21, **options: int) -> Editor:
    """With sessions of these shares; another one at 16 fps needs 0.21 * 16 / 12 = 0.28."""
    streams = {f"{name}{n}": Seat(f"s{name}{n}", share) for n, share in enumerate(shares)}
    limits = {"max_sessions": 8, **options}
    return Editor(name, 12, limits["max_sessions"], streams, {SIZES: cost})


def request(stream: str, *, waits: bool = True, again: bool = False, fps: float = 16.0) -> Request:
    return Request(stream, f"session-{stream}", SIZES, fps, waits=waits, again=again)

"""Bearer tokens: who may use the server."""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Mapping
from pathlib import Path


def read_tokens(path: str | Path) -> tuple[str, ...]:
    """Tokens of a file, one a line; empty lines and lines that start with # do not count.

    Raises ValueError if the file cannot be read or holds no token: an empty list would let
    everybody in.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except OSError as error:
        raise ValueError(f"the token file {path} cannot be read: {error}") from error
    tokens = tuple(line.strip() for line in lines if line.strip() and not line.startswith("#"))
    if not tokens:
        raise ValueError(f"the token file {path} holds no token; write one a line")
    return tokens


def allowed(tokens: Iterable[str], headers: Mapping[str, str], query: Mapping[str, str]) -> bool:
    """Whether a request carries one of `tokens`; with no tokens everybody is let in."""
    tokens = tuple(tokens)
    if not tokens:
        return True
    scheme, _, given = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = query.get("token", "")
    # Every token is compared, in constant time, so that the time taken says nothing.
    matches = [hmac.compare_digest(given.strip().encode(), token.encode()) for token in tokens]
    return any(matches)

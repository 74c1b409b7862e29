"""Whether a server has its places back: between runs of `liveedit bench serve --attack`.

A client that is killed is one of its server's until that has noticed and its editor has said so:
seconds, on a busy machine. A camera that opens meanwhile hears `at_capacity` of a run that is over.
"""

from __future__ import annotations

import time
import urllib.request
from urllib.parse import urlsplit, urlunsplit

from infra.runtime.errors import UserError
from serve.client.stream import stream_url
from serve.wire.protocol import PATH

HELD = {f"liveedit_{name}" for name in ("sessions", "editor_sessions", "sessions_waiting")}
ROOM_S = 120.0
ASKS_S = 0.5
ANSWER_S = 20.0


def held(url: str) -> int:
    """Sessions that are connected, edited, or in the queue of the server at `url`, by its metrics:
    one that is edited counts twice. Raises OSError when it does not answer."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(_metrics(url), timeout=ANSWER_S) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return round(sum(s.value for family in families for s in family.samples if s.name in HELD))


def until_left(url: str, before: int, *, patience_s: float = ROOM_S) -> None:
    """Waits until the server at `url` holds no more than `before`, which `held` said earlier.

    Raises UserError after `patience_s`.
    """
    deadline, found = time.monotonic() + patience_s, "it does not answer"
    while time.monotonic() < deadline:
        try:
            now = held(url)
            if now <= before:
                return
            found = f"{now} sessions and streams are there and {before} were before"
        except OSError as error:
            found = f"it does not answer ({error})"
        time.sleep(ASKS_S)
    raise UserError(
        f"the places of attackers that were killed were not given back within {patience_s:g} s: "
        f"{found}; see {_metrics(url)}, and measure again where nobody else opens sessions, or "
        "with one --attack at a time"
    )


def _metrics(url: str) -> str:
    parts = urlsplit(stream_url(url))
    scheme = {"ws": "http", "wss": "https"}[parts.scheme]
    return urlunsplit((scheme, parts.netloc, parts.path.removesuffix(PATH) + "/metrics", "", ""))

"""On which of its `rungs` each session of an editor is: down under pressure, up again after it.

Pure functions, as in `decisions`: an editor (`serve.editor.capacity`) and the simulation call them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from serve.admission.admission import HEADROOM

GAIN = 0.02  # of a session's share: a rung that saves less is passed over
HIGH = HEADROOM + 0.05  # load above which somebody goes down, until it is HEADROOM
LOW = HEADROOM - 0.1  # and at which one may be again after one has gone up
UP_S = 10.0  # without a change before one goes up
LONGEST_UP_S = 320.0  # the same, where going up was in vain again and again
OVER_S = 10.0  # above the whole accelerator, with all at the bottom, until one is closed
ALONE = 4.0  # chunk lengths that a chunk may take when there is nobody to make room


@dataclass(frozen=True)
class Held:
    """A session at an editor. `shares` are of the accelerator, at each of its rungs."""

    name: str
    live: bool
    rung: int
    shares: tuple[float, ...]
    since: float = 0.0  # when it came

    @property
    def share(self) -> float:
        return self.shares[self.rung]

    @property
    def lower(self) -> int | None:
        """The next rung down that saves something."""
        enough = self.share * (1 - GAIN)
        below = range(self.rung + 1, len(self.shares))
        return next((rung for rung in below if self.shares[rung] < enough), None)

    @property
    def upper(self) -> int | None:
        """The rung that it came down from."""
        if self.rung == 0:
            return None
        above = range(self.rung - 1, 0, -1)
        useful = (r for r in above if self.shares[r] < self.shares[r - 1] * (1 - GAIN))
        return next(useful, 0)


@dataclass(frozen=True)
class Calm:
    """What is remembered between decisions, so that nothing flaps."""

    since: float = -math.inf  # of the last change
    up_s: float = UP_S  # that nothing must have changed for one to go up
    rose: float = -math.inf  # when one last went up
    over: float | None = None  # since when all at the bottom are too much


@dataclass(frozen=True)
class Decision:
    rungs: Mapping[str, int]  # of every session
    calm: Calm
    close: str | None = None  # the one that cannot be kept: `too_slow`


def load_of(held: Sequence[Held]) -> float:
    return sum(session.share for session in held)


def decide(held: Sequence[Held], calm: Calm, now: float) -> Decision:
    """Everybody's rung from now on.

    Down: at once, and as far as it needs; lossless sessions are slowed first, then of the live ones
    always one that is still edited best. Up: one at a time, live ones first, of these the one that
    is edited worst, when that leaves room and nothing has changed for a while. That while doubles
    when who went up had to come down again, so that a cost which was guessed too low, or one that
    swings, changes nobody's picture all the time.
    """
    sessions = {session.name: session for session in held}
    load = load_of(held)
    if load > HIGH:
        lowered = _lower(sessions)
        if lowered:
            in_vain = now - calm.rose < 2 * calm.up_s
            up_s = min(2 * calm.up_s, LONGEST_UP_S) if in_vain else calm.up_s
            calm = replace(calm, since=now, up_s=up_s)
    elif now - calm.since >= calm.up_s:
        if now - calm.rose > 2 * LONGEST_UP_S:  # what was in vain is long ago
            calm = replace(calm, up_s=UP_S)
        raised = _raised(sessions, load)
        if raised is not None:
            sessions[raised.name] = raised
            calm = replace(calm, since=now, rose=now)
    close, over = _too_much(list(sessions.values()), calm, now)
    chosen = {name: session.rung for name, session in sessions.items()}
    return Decision(chosen, replace(calm, over=over), close)


def _lower(sessions: dict[str, Held]) -> bool:
    changed = False
    while load_of(list(sessions.values())) > HEADROOM:
        able = [session for session in sessions.values() if session.lower is not None]
        if not able:
            break
        # The larger share among equals: fewer are touched.
        worst = min(able, key=lambda s: (s.live, s.rung, -s.share, s.name))
        assert worst.lower is not None
        sessions[worst.name] = replace(worst, rung=worst.lower)
        changed = True
    return changed


def _raised(sessions: Mapping[str, Held], load: float) -> Held | None:
    # Who is alone would be let in as it asked; beside others some air is left for them.
    most = LOW if len(sessions) > 1 else HEADROOM
    for session in sorted(sessions.values(), key=lambda s: (not s.live, -s.rung, s.share, s.name)):
        if session.upper is not None:
            higher = replace(session, rung=session.upper)
            if load - session.share + higher.share <= most:
                return higher
    return None


def _too_much(sessions: Sequence[Held], calm: Calm, now: float) -> tuple[str | None, float | None]:
    """Who is to be closed, and since when it is too much.

    The newest goes, a lossless one before a live one. One that is alone is kept while it is
    something like live: nobody gains from its end.
    """
    limit = 1.0 if len(sessions) > 1 else ALONE
    if load_of(sessions) <= limit or any(session.lower is not None for session in sessions):
        return None, None
    over = now if calm.over is None else calm.over
    if now - over < OVER_S:
        return None, over
    last = max(sessions, key=lambda s: (not s.live, s.since, s.name))
    if len(sessions) == 1 and not last.live:  # it takes as long as it takes
        return None, over
    return last.name, None

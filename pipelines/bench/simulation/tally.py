"""What a simulated day comes to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from rich.table import Table

from pipelines.bench.simulation.day import Day


@dataclass
class Tally:
    asked: int = 0
    refused: int = 0
    left: int = 0  # waited for `PATIENCE_S`
    opened: int = 0
    moved: int = 0  # lost their editor
    waited: list[float] = field(default_factory=list)  # seconds until opened
    gaps: list[float] = field(default_factory=list)  # seconds without an editor, of the moved
    session_s: float = 0.0
    late_s: float = 0.0  # of sessions, in which their chunks come too late
    lowered_s: float = 0.0  # of sessions, in which they are edited less well than they asked
    slowed_s: float = 0.0  # and of lossless ones, in which they wait for live ones
    closed: int = 0  # as too slow
    rolled_s: float = 0.0  # from a moved alias until every editor had the version
    killed: int = 0  # editors, by a version that they loaded
    editor_s: float = 0.0
    most_editors: int = 0
    most_sessions: int = 0

    def to_dict(self) -> dict[str, float]:
        waited, gaps = sorted(self.waited), sorted(self.gaps)
        return {
            "asked": self.asked,
            "refused_share": _share(self.refused, self.asked),
            "left_share": _share(self.left, self.asked),
            "waited_s_p50": _quantile(waited, 0.5),
            "waited_s_p99": _quantile(waited, 0.99),
            "late_share": _share(self.late_s, self.session_s),
            "lowered_share": _share(self.lowered_s, self.session_s),
            "slowed_share": _share(self.slowed_s, self.session_s),
            "closed": self.closed,
            "rolled_s": self.rolled_s,
            "killed": self.killed,
            "moved": self.moved,
            "gap_s_p99": _quantile(gaps, 0.99),
            "editor_hours": self.editor_s / 3600,
            "sessions_per_editor": _share(self.session_s, self.editor_s),
            "most_editors": self.most_editors,
            "most_sessions": self.most_sessions,
        }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _quantile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(share * len(values)))] if values else 0.0


def table(day: Day, results: dict[str, dict[str, float]]) -> Table:
    """One column a way to decide."""
    title = (
        f"{day.hours:g} h, at most about {day.sessions} sessions of {day.fps:g} fps at once, "
        f"{day.cost_s * 1000:.0f} ms a chunk, up to {day.scale.max_editors} editors"
    )
    view = Table(title=title, title_justify="left")
    view.add_column("")
    for name in results:
        view.add_column(name, justify="right")
    for label, cell in _ROWS.items():
        view.add_row(label, *map(cell, results.values()))
    return view


_ROWS: dict[str, Callable[[dict[str, float]], str]] = {
    "sessions asked": lambda f: f"{f['asked']:.0f}",
    "refused": lambda f: f"{f['refused_share']:.2%}",
    "gave up waiting": lambda f: f"{f['left_share']:.2%}",
    "waited P50 / P99 s": lambda f: f"{f['waited_s_p50']:.1f} / {f['waited_s_p99']:.1f}",
    "chunks late": lambda f: f"{f['late_share']:.2%}",
    "edited less well": lambda f: f"{f['lowered_share']:.2%}",
    "lossless slowed": lambda f: f"{f['slowed_share']:.2%}",
    "closed too slow": lambda f: f"{f['closed']:.0f}",
    "version rolled out in s": lambda f: f"{f['rolled_s']:.0f}",
    "editors a version killed": lambda f: f"{f['killed']:.0f}",
    "moved": lambda f: f"{f['moved']:.0f}",
    "gap P99 s": lambda f: f"{f['gap_s_p99']:.1f}",
    "editor hours": lambda f: f"{f['editor_hours']:.0f}",
    "sessions an editor": lambda f: f"{f['sessions_per_editor']:.2f}",
    "editors at most": lambda f: f"{f['most_editors']:.0f}",
}

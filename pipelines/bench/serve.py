"""What `liveedit bench serve` does to an application, and how it shows what cameras got."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

from rich.table import Table

from infra.runtime.errors import UserError

if TYPE_CHECKING:
    from pipelines.bench.simulation.day import Rules
    from serve.client.cameras import CameraLoad
    from serve.run import Running

TAIL_S = 5.0  # that cameras go on after the last kill


FATES = ("sent", "edited", "dropped", "lost", "repeated")
KINDS = ("editor", "front", "hub")


def at_random(seed: int = 0) -> Iterator[str]:
    """Kinds of processes, for ever."""
    draw = random.Random(seed)
    while True:
        yield draw.choice(KINDS)


def killer(
    running: Running, kills: int, kinds: Iterator[str] | None = None
) -> Callable[[], Awaitable[bool]]:
    """Kills one of `kinds` after the other, by default a front and an editor in turn, `kills` in
    all; says whether one died."""
    kinds = kinds or itertools.cycle(("editor", "front"))
    left = kills

    async def kill() -> bool:
        nonlocal left
        if left == 0 or await asyncio.to_thread(running.kill, next(kinds)) is None:
            return False
        left -= 1
        return True

    return kill


def facts(report: dict[str, Any], load: CameraLoad) -> str:
    """What was measured, in a line."""
    model = report["model"]
    machine = report["hardware"]
    return (
        f"{model['name']} on {model['device']}, {load.width}x{load.height} edited at "
        f"{load.work_size or model['work_size']}, {load.fps:g} fps, "
        f"{load.mode}, {load.format}; {machine.get('gpu') or machine['cpu']}"
    )


def table(runs: list[dict[str, Any]]) -> Table:
    """One column a run, times in milliseconds."""
    view = Table(title="cameras over WebSocket, times in ms", title_justify="left")
    view.add_column("")
    for run in runs:
        killed = f", {run['kills']} kills" if run["kills"] else ""
        killed += f", {run['attacks']}" if run.get("attacks") else ""
        sessions = f"{run['sessions']} session{'s' * (run['sessions'] > 1)}"
        view.add_column(sessions + killed, justify="right")
    for label, names in _ROWS.items():
        view.add_row(label, *(" / ".join(_cell(run[name]) for name in names) for run in runs))
    return view


_ROWS: dict[str, tuple[str, ...]] = {
    "sessions held": ("sessions_held",),
    "editors at first / most / last": ("editors_first", "editors_most", "editors_last"),
    "waited to be opened P50 / max": ("waited_ms_p50", "waited_ms_max"),
    "first chunk P50 / max": ("first_chunk_ms_p50", "first_chunk_ms_max"),
    "chunk latency P50 / P95 / P99": tuple(f"chunk_latency_ms_p{p}" for p in (50, 95, 99)),
    "of it compute P50": ("compute_ms_p50",),
    "overhead P50 / P95 / P99": tuple(f"overhead_ms_p{p}" for p in (50, 95, 99)),
    "jitter between frames": ("jitter_ms",),
    "deadline misses of chunks": ("deadline_misses", "chunks"),
    "stalls": ("stalls",),
    "frames sent / edited / dropped": ("frames_sent", "frames_edited", "frames_dropped"),
    "frames lost / repeated": ("frames_lost", "frames_repeated"),
    "reconnects": ("reconnects",),
    "errors": ("errors",),
}


def soak_line(runs: list[dict[str, Any]]) -> str:
    """What became of the frames of all runs of a soak."""
    told = (f"{sum(run[f'frames_{name}'] for run in runs)} {name}" for name in FATES)
    errors = "; ".join(sorted({run["errors"] for run in runs if run["errors"]})) or "none"
    return f"soak: {len(runs)} runs, frames: {', '.join(told)}; errors: {errors}"


def memory_table(rows: list[dict[str, Any]]) -> Table:
    """What each process held early and late in a soak, in MiB."""
    view = Table(title="memory of each process, MiB", title_justify="left")
    for name in ("", "first third", "last third", "grown", "flat"):
        view.add_column(name, justify="right" if name else "left")
    for row in rows:
        first, last = row["first"] / 2**20, row["last"] / 2**20
        grown = f"{100 * (last / first - 1):+.1f} %"
        flat = "yes" if row["flat"] else "no"
        view.add_row(row["process"], f"{first:.0f}", f"{last:.0f}", grown, flat)
    return view


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def parse_attacks(text: str | None) -> list[str]:
    """Names of attacks with commas between them; none for null."""
    from serve.client.attacks import ATTACKS

    names = [name.strip() for name in text.split(",")] if text else []
    if names == ["all"]:
        return list(ATTACKS)
    for name in names:
        if name not in ATTACKS:
            raise UserError(f"--attack {name} is none; there are {', '.join(ATTACKS)}")
    return names


def parse_ways(text: str | None) -> dict[str, Rules]:
    """Ways to decide, of those that the simulation knows, names with commas between; null: all."""
    from pipelines.bench.simulation.day import VARIANTS

    names = [name.strip() for name in text.split(",")] if text else list(VARIANTS)
    for name in names:
        if name not in VARIANTS:
            raise UserError(f"--ways {name} is none; there are {', '.join(VARIANTS)}")
    return {name: VARIANTS[name] for name in names}

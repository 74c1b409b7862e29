"""What a simulated day asks, and the ways to decide that are set beside each other."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

from serve.scaling import decisions
from serve.scaling.decisions import Editor, Rank, Sizes
from serve.scaling.placement import Scale

DAY_S = 86400.0
BUSIEST_S = 20 * 3600.0  # of the day
QUIETEST = 0.15  # share of the busiest hour's sessions


@dataclass(frozen=True)
class Day:
    """What is asked of the application, and what a chunk costs there.

    `cost_s` is seconds of one editor for a chunk of `chunk_frames`, as measured.
    """

    sessions: int  # at once in the busiest hour
    cost_s: float
    chunk_frames: int
    scale: Scale
    sizes: Sizes
    fps: float = 16.0
    max_sessions: int = 16
    start_s: float = 60.0  # of an editor
    lost_machines: int = 4
    hours: float = 24.0
    seed: int = 0


@dataclass(frozen=True)
class Variant:
    """A way to decide: what ships, or one that it was compared with."""

    rank: Rank = decisions.emptiest
    spare: float = 0.0  # editors that stand ready, as a share of the most
    delay_s: float | None = None


def fullest(editor: Editor) -> tuple[Any, ...]:
    """Sessions together, so that other editors become empty soon."""
    return -editor.load, editor.name


def anyone(editor: Editor) -> tuple[Any, ...]:
    """As a load balancer that knows only who has room."""
    said = f"{editor.name} {len(editor.streams)} {editor.load:.3f}"
    return (zlib.crc32(said.encode()),)


VARIANTS = {
    "ships": Variant(),
    "fullest first": Variant(rank=fullest),
    "any with room": Variant(rank=anyone),
    "down after 60 s": Variant(delay_s=60.0),
    "2 % spare": Variant(spare=0.02),
    "5 % spare": Variant(spare=0.05),
}


def busy(second: float) -> float:
    """Share of the busiest hour's demand at this second of the day."""
    swing = (1 + math.cos(2 * math.pi * (second - BUSIEST_S) / DAY_S)) / 2
    return QUIETEST + (1 - QUIETEST) * swing**1.5


def measured(report: dict[str, Any]) -> dict[str, Any]:
    """Of `Day`, what a `liveedit bench stream --json` report says."""
    config, variants = report["config"], report["variants"]
    best = variants.get("mask cache", variants["dense"])
    frame = config["height"], config["width"]
    work = config.get("work_height", frame[0]), config.get("work_width", frame[1])
    return {
        "cost_s": best["V"]["p50_ms"] / 1000,
        "chunk_frames": config["chunk_frames"],
        "sizes": Sizes(frame, work),
        "start_s": report["load_s"] + report["start"]["cold"]["first_chunk_ms"] / 1000,
    }

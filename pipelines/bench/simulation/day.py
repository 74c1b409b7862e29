"""What a simulated day asks, and the ways to decide that are set beside each other."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

from modeling.config import MaskCacheConfig, StreamConfig
from modeling.streaming.quality import Quality, kept_steps, mask_cache_of
from serve.admission.admission import Editor, Sizes
from serve.admission.decisions import Scale
from serve.admission.fleet import Rank, emptiest
from serve.admission.rungs import FEWEST_STEPS, Means, Rung, rungs
from serve.versions import rolling
from serve.versions.rolling import Pace

DAY_S = 86400.0
BUSIEST_S = 20 * 3600.0  # of the day
ALL = 10**9  # editors
QUIETEST = 0.15  # share of the busiest hour's sessions


@dataclass(frozen=True)
class Roll:
    """An alias that moves at `at_s` of the day to a version; one that `kills` ends the process of
    whoever loads it."""

    at_s: float
    kills: bool = False


@dataclass(frozen=True)
class Day:
    """What is asked of the application, and what a chunk costs there.

    `cost_s` is seconds of one editor for a chunk of `chunk_frames`, as measured; `rungs` are its
    parts that are left on each rung of the degrade ladder, the first 1.
    """

    sessions: int  # at once in the busiest hour
    cost_s: float
    chunk_frames: int
    scale: Scale
    sizes: Sizes
    fps: float
    max_sessions: int
    start_s: float  # of an editor
    load_s: float  # of another version, at an editor that runs
    lost_machines: int
    hours: float
    rungs: dict[Rung, float]  # none: nobody is edited less well
    rolls: tuple[Roll, ...]
    seed: int = 0
    lossless: float = 0.2  # share of sessions

    @property
    def means(self) -> Means:
        names = {rung.name for rung in self.rungs}
        return Means(steps=FEWEST_STEPS if "steps" in names else 1, masked="mask" in names)


@dataclass(frozen=True)
class Rules:
    """A way to decide: what ships, or one that it was compared with."""

    rank: Rank = emptiest
    together: bool = True  # who is edited less well is at few editors
    spare: float = 0.0  # editors that stand ready, as a share of the most
    delay_s: float | None = None
    degrade: bool = True
    pace: Pace = rolling.doubling


def fullest(editor: Editor) -> tuple[Any, ...]:
    """Sessions together, so that other editors become empty soon."""
    return -editor.load, editor.name


def anyone(editor: Editor) -> tuple[Any, ...]:
    """As a load balancer that knows only who has room."""
    said = f"{editor.name} {len(editor.streams)} {editor.load:.3f}"
    return (zlib.crc32(said.encode()),)


VARIANTS = {
    "ships": Rules(),
    "refuse at once": Rules(degrade=False),
    "fullest first": Rules(rank=fullest, together=False),
    "lower anywhere": Rules(together=False),
    "any with room": Rules(rank=anyone),
    "down after 60 s": Rules(delay_s=60.0),
    "2 % spare": Rules(spare=0.02),
    "5 % spare": Rules(spare=0.05),
    "roll one by one": Rules(pace=lambda having: 1),
    "roll all at once": Rules(pace=lambda having: ALL),
}


def usual_rolls(hours: float) -> tuple[Roll, ...]:
    """At noon a version that kills who loads it, and before the busiest hour one that works; as
    much earlier as the day is shorter."""
    return Roll(12 * hours / 24 * 3600, kills=True), Roll(19 * hours / 24 * 3600)


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
    start_s = report["load_s"] + report["start"]["cold"]["first_chunk_ms"] / 1000
    return {
        "cost_s": best["V"]["p50_ms"] / 1000,
        "chunk_frames": config["chunk_frames"],
        "sizes": Sizes(frame, work),
        "start_s": start_s,
        "load_s": start_s,
        "rungs": _rungs(report, work),
    }


def _rungs(report: dict[str, Any], work: tuple[int, int]) -> dict[Rung, float]:
    """By the work that a rung leaves out, of which two are measured: with all tokens and with those
    that the mask cache keeps. Nothing where a report has no mask cache to tell that from."""
    variants, masked = report["variants"], report["config"].get("mask_cache")
    if not masked or "mask cache" not in variants:
        return {}
    dense, usual = variants["dense"], variants["mask cache"]
    steps, pruned = report["config"]["steps"], tuple(masked["pruned_steps"])
    stream = StreamConfig(
        height=report["config"]["height"], width=report["config"]["width"],
        timesteps=tuple(range(1000, 1000 - steps, -1)),
    )  # fmt: skip
    config = MaskCacheConfig(keep_ratio=masked["keep_ratio"], pruned_steps=pruned)
    whole = dense["D"]["p50_ms"] - usual["D"]["p50_ms"]
    token_ms = whole / (dense["recomputed"] - usual["recomputed"])
    means = Means(steps=steps, masked=True)
    found: dict[Rung, float] = {}
    for rung in rungs(means, work, work, live=True):
        quality = Quality(work, rung.sparing, rung.halved)
        kept = mask_cache_of(config, stream, quality)
        assert kept is not None
        forwards = len(kept_steps(stream, quality)) + 1 - len(kept.pruned_steps)
        share = (forwards + len(kept.pruned_steps) * kept.keep_ratio) / (steps + 1)
        saved_ms = token_ms * (usual["recomputed"] - share)
        found[rung] = 1 - saved_ms / usual["V"]["p50_ms"]
    return found

"""A measurement as one picture: where a chunk's time goes, every chunk timed, and the sessions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PARTS = {"encode": "#74add1", "D": "#4575b4", "decode": "#fdae61", "other": "#bebebe"}
LATE = "#d73027"
NARROW = 0.03  # of the longest bar, below which a part has no room for its figure


def plot(report: dict[str, Any], path: Path) -> None:
    """Write `path`; its ending decides the format."""
    draw(report).savefig(path)


def draw(report: dict[str, Any]) -> Figure:
    config, machine = report["config"], report["hardware"]
    variants, sessions = report["variants"], report["sessions"]
    inches = [0.6 + 0.6 * len(variants), 3.0]
    if sessions["tried"]:
        inches.append(0.6 + 0.4 * len(sessions["tried"]))
    figure = Figure(figsize=(11, 1 + sum(inches)), dpi=110, layout="constrained")
    axes = figure.subplots(len(inches), height_ratios=inches)
    _bars(axes[0], variants)
    _chunks(axes[1], variants)
    if sessions["tried"]:
        _sessions(axes[2], sessions)
    figure.suptitle(
        f"{config['model']}, {config['vae']} VAE, {config['width']}x{config['height']}, "
        f"{machine.get('gpu') or machine['cpu']}"
    )
    return figure


def _bars(axes: Axes, variants: dict[str, Any]) -> None:
    """Median of each part of a chunk, one bar a variant."""
    whole = np.array([entry["V"]["p50_ms"] for entry in variants.values()])
    rest = whole.copy()
    for part, colour in PARTS.items():
        known = [entry[part]["p50_ms"] for entry in variants.values()] if part != "other" else rest
        ms = np.maximum(known, 0)
        bars = axes.barh(list(variants), ms, left=whole - rest, color=colour, label=part)
        room = NARROW * whole.max()
        axes.bar_label(bars, [f"{v:.0f}" if v > room else "" for v in ms], label_type="center")
        rest = rest - ms
    said = [f"{e['V']['p50_ms']:.0f} ms, {e['V']['fps']:.1f} FPS" for e in variants.values()]
    axes.bar_label(bars, said, padding=4)
    axes.set_xlim(0, 1.2 * whole.max())
    axes.set_title("median of a chunk, ms", loc="left")
    axes.legend(ncols=len(PARTS), loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
    axes.invert_yaxis()


def _chunks(axes: Axes, variants: dict[str, Any]) -> None:
    """V of each timed chunk, in order."""
    for name, entry in variants.items():
        axes.plot([chunk["V"] for chunk in entry["chunks"]], marker="o", label=name)
    axes.set_ylim(0, 1.1 * axes.dataLim.y1)
    axes.set_title("V of each timed chunk, ms", loc="left")
    axes.legend()


def _sessions(axes: Axes, sessions: dict[str, Any]) -> None:
    """P99 latency of concurrent sessions beside their deadline."""
    deadline, tried = sessions["deadline_ms"], sessions["tried"]
    out = [bool(entry.get("out_of_memory")) for entry in tried]
    ms = [0.0 if o else entry["p99_ms"] for o, entry in zip(out, tried, strict=True)]
    colours = [PARTS["D"] if entry.get("holds") else LATE for entry in tried]
    bars = axes.barh([f"{entry['sessions']} sessions" for entry in tried], ms, color=colours)
    said = ["out of memory" if o else f"{v:.0f} ms" for o, v in zip(out, ms, strict=True)]
    axes.bar_label(bars, said, padding=4)
    axes.axvline(deadline, color="#282c34")
    axes.set_xlim(0, 1.15 * max([deadline, *ms]))
    axes.set_title(f"P99 of concurrent sessions, deadline {deadline:.0f} ms", loc="left")
    axes.invert_yaxis()

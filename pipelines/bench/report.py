"""A measurement for people: the table on the terminal, and the check against an earlier one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from pipelines.bench import SCHEMA

_LABEL = "model"  # the only key of `config` that does not decide the work


def table(report: dict[str, Any]) -> Table:
    """One column a variant, milliseconds of a chunk; `facts` says what concerns all of them."""
    variants = report["variants"]
    view = Table(title="ms per chunk, median / P99, and FPS", title_justify="left")
    view.add_column("")
    for name in variants:
        view.add_column(name, justify="right")
    for key, label in _ROWS.items():
        view.add_row(label, *(_cell(entry[key]) for entry in variants.values()))
    view.add_row("last frame in to edit out", *(_cell(v["last_frame"]) for v in variants.values()))
    view.add_row("tokens recomputed", *(f"{v['recomputed']:.0%}" for v in variants.values()))
    view.add_row(
        "spread of D, of V",
        *(f"{v['D']['spread']:.1%}, {v['V']['spread']:.1%}" for v in variants.values()),
    )
    return view


def facts(report: dict[str, Any]) -> list[str]:
    """What was measured, and the figures that are no times of a chunk, a line each."""
    config, machine = report["config"], report["hardware"]
    start, memory, sessions = report["start"], report["memory"], report["sessions"]
    lines = [
        f"{config['model']}, {config['vae']} VAE, {config['width']}x{config['height']}, "
        f"{config['dtype']}, {config['steps']} steps, chunks of {config['chunk_frames']} frames",
        f"{machine.get('gpu') or machine['cpu']}, torch {machine['torch']}",
    ]
    lines += [
        f"first chunk of a {when} stream after {start[when]['first_chunk_ms'] / 1000:.2f} s, "
        f"no chunk after it above {start[when]['slowest_next_ms'] / 1000:.2f} s"
        for when in ("cold", "warm")
    ]
    lines.append(
        f"memory ({memory['measure']}): weights {memory['weights_gib']:.2f} GiB, "
        f"with one stream {memory['one_stream_gib']:.2f} GiB"
    )
    if sessions["tried"]:
        lines.append(
            f"{sessions['held']} live sessions ({sessions['variant']}) keep P99 within "
            f"{sessions['deadline_ms']:.0f} ms; " + ", ".join(map(_session, sessions["tried"]))
        )
    return lines


@dataclass(frozen=True)
class Comparison:
    """One ratio of this run beside the stored one; smaller is better."""

    name: str
    stored: float
    now: float
    tolerance: float

    @property
    def regressed(self) -> bool:
        return self.now > self.stored * (1 + self.tolerance)

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.stored:.3f} -> {self.now:.3f} "
            f"({self.now / self.stored - 1:+.0%}, allowed +{self.tolerance:.0%})"
        )


def read_report(path: Path) -> dict[str, Any]:
    """A report that `--json` wrote; ValueError if it is none of this version."""
    try:
        report = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ValueError(f"{path} does not exist; write it with --json {path}") from error
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON: {error}") from error
    schema = report.get("schema") if isinstance(report, dict) else None
    if schema != SCHEMA:
        raise ValueError(
            f"{path} has schema {schema}, this version reads {SCHEMA}; write it again with --json"
        )
    return dict(report)


def compare(report: dict[str, Any], stored: dict[str, Any]) -> list[Comparison]:
    """Ratios of two runs of the same work, perhaps on different machines of one kind.

    ValueError if they are not of the same work: then no ratio means anything.
    """
    now, then = _work(report), _work(stored)
    if different := sorted(key for key in now | then if now.get(key) != then.get(key)):
        told = ", ".join(f"{key} {then.get(key)} there, {now.get(key)} here" for key in different)
        raise ValueError(f"the stored report measured other work ({told}); measure the same")
    return [
        Comparison(name, entry["value"], report["ratios"][name]["value"], entry["tolerance"])
        for name, entry in stored["ratios"].items()
    ]


_ROWS = {
    "D": "D transformer",
    "E": "E D + VAE decode",
    "V": "V video to video",
    "encode": "VAE encode",
    "decode": "VAE decode",
}


def _cell(entry: dict[str, float]) -> str:
    fps = f" {entry['fps']:6.1f}" if "fps" in entry else " " * 7
    return f"{entry['p50_ms']:.1f} / {entry['p99_ms']:.1f}{fps}"


def _session(entry: dict[str, Any]) -> str:
    if entry.get("out_of_memory"):
        return f"{entry['sessions']}: out of memory"
    return f"{entry['sessions']}: {entry['p99_ms']:.0f} ms, {entry['memory_gib']:.1f} GiB"


def _work(report: dict[str, Any]) -> dict[str, Any]:
    work = {key: value for key, value in report["config"].items() if key != _LABEL}
    return work | {"device": report["hardware"]["device"]}

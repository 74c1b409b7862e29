"""A measurement for the person at the terminal: a table, and a few lines below it."""

from __future__ import annotations

from typing import Any

from rich.table import Table


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
        f"{config['model']}, {config['vae']} VAE, {config['width']}x{config['height']}"
        f"{_work(config)}, "
        f"{config['dtype']}, {config['steps']} steps, chunks of {config['chunk_frames']} frames",
        f"{machine.get('gpu') or machine['cpu']}, torch {machine['torch']}, "
        f"model built in {report['load_s']:.1f} s",
    ]
    lines += [
        f"first chunk of a {when} stream after {start[when]['first_chunk_ms'] / 1000:.2f} s, "
        f"no chunk after it above {start[when]['slowest_next_ms'] / 1000:.2f} s"
        for when in ("cold", "warm")
    ]
    lines.append(
        f"memory ({memory['measure']}): weights {memory['weights_gib']:.2f} GiB, "
        f"with one stream {memory['one_stream_gib']:.2f} GiB"
        + (f", {memory['held_gib']:.2f} GiB between its chunks" if memory["held_gib"] else "")
    )
    if plain := report["plain"]:
        lines.append(
            f"plain path (eager, no graphs), dense: D {plain['D']['p50_ms']:.1f}, "
            f"encode {plain['encode']['p50_ms']:.1f}, decode {plain['decode']['p50_ms']:.1f} ms"
        )
    if sessions["tried"]:
        lines.append(
            f"{sessions['held']} live sessions ({sessions['variant']}) keep P99 within "
            f"{sessions['deadline_ms']:.0f} ms; " + ", ".join(map(_session, sessions["tried"]))
        )
    return lines


_ROWS = {
    "D": "D transformer",
    "E": "E D + VAE decode",
    "V": "V video to video",
    "encode": "VAE encode",
    "decode": "VAE decode",
    "detail": "detail",
}


def _cell(entry: dict[str, float]) -> str:
    fps = f" {entry['fps']:6.1f}" if "fps" in entry else " " * 7
    return f"{entry['p50_ms']:.1f} / {entry['p99_ms']:.1f}{fps}"


def _work(config: dict[str, Any]) -> str:
    if "detail" not in config:
        return ""
    beside = " with the source's detail" if config["detail"] == "source" else ""
    if "guide_blur" in config:
        beside += f", its guide blurred by {config['guide_blur']} pixels"
    return f" edited at {config['work_width']}x{config['work_height']}{beside}"


def _session(entry: dict[str, Any]) -> str:
    if entry.get("out_of_memory"):
        return f"{entry['sessions']}: out of memory"
    return f"{entry['sessions']}: {entry['p99_ms']:.0f} ms, {entry['memory_gib']:.1f} GiB"

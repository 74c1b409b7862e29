"""The benchmark's sources as files, for systems that edit files (`data make --bench`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.bench.cases import FPS, VERSION
from data.video import VideoWriter
from infra.runtime.errors import UserError
from pipelines.config.benchmark import BenchConfig
from pipelines.evaluation.bench.run import checksum_line, clips

INDEX = "bench.json"


def write_bench(
    folder: Path,
    config: BenchConfig,
    *,
    overwrite: bool = False,
    on_clip: Callable[[], None] = lambda: None,
) -> str:
    """Write NAME.mp4 of every chosen clip (H.264 4:4:4 without loss but of colour conversion) and
    `bench.json`, a list of name, instruction and shape; says what the checksums say.

    Raises UserError if the folder holds a benchmark already and `overwrite` is not set.
    """
    index = folder / INDEX
    if index.exists() and not overwrite:
        raise UserError(f"{index} is there already; choose another folder or add --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    height, width = config.shape
    for clip in clips(config):
        name = clip.case.name
        with VideoWriter(folder / f"{name}.mp4", width, height, FPS, crf=0,
                         pixel_format="yuv444p") as writer:  # fmt: skip
            writer.write(clip.source)
        entries.append(
            {
                "name": name,
                "source_path": f"{name}.mp4",
                "instruction": clip.instruction,
                "frames": len(clip.source),
                "height": height,
                "width": width,
                "fps": FPS,
                "checksum": clip.checksum(),
            }
        )
        on_clip()
    made = checksum_line({entry["name"]: entry["checksum"] for entry in entries}, config)
    about = {"benchmark": "LiveEdit-Bench", "version": VERSION, "made": made, "clips": entries}
    index.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return made

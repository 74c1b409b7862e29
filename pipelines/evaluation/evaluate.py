"""Judge a model on held-out pairs, through the editor that serves it, chunk by chunk."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data.loader import Split, loader
from data.manifest import dataset_hash, read_dataset_info
from pipelines.config.merge import ConfigError
from pipelines.config.pipeline import EvaluateConfig

if TYPE_CHECKING:
    from modeling.editor import StreamingEditor
    from modeling.streaming.stream import EditedChunk

PUSH_FRAMES = 5  # as a live source does, frames arrive in groups that are no chunks


@dataclass(frozen=True)
class EditedClip:
    """One held-out pair and what the model made of it; clips are uint8 [F, H, W, 3]."""

    instruction: str
    source: np.ndarray
    truth: np.ndarray
    edit: np.ndarray
    mask: np.ndarray  # bool [F, H, W], the edited region
    recomputed: np.ndarray  # bool [F, H, W], pixels whose tokens were computed anew
    metrics: dict[str, float]


def load_editor(model: str | Path, mask_cache: bool | None = None) -> StreamingEditor:
    """The editor of a model directory on the GPU if there is one; `mask_cache` null leaves it."""
    import torch

    from modeling.editor import StreamingEditor
    from modeling.model_dir import read_config

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if mask_cache is None:
        return StreamingEditor.load(model, device=device)
    stream = read_config(Path(model)).stream
    chosen = stream.usual_mask_cache if mask_cache else None
    return StreamingEditor.load(model, device=device, mask_cache=chosen)


def evaluate(
    editor: StreamingEditor,
    dataset: str,
    config: EvaluateConfig,
    *,
    on_clip: Callable[[EditedClip], None] = lambda clip: None,
    **options: Any,
) -> dict[str, Any]:
    """Edit the pairs of `dataset` and compare; returns the report as JSON values.

    `on_clip` sees every edited clip, one at a time, in the dataset's order; `options` are those of
    `edit_clip`.
    """
    info = read_dataset_info(dataset)
    if info.kind != "pairs":
        raise ConfigError(
            f"{dataset} holds {info.kind} samples; evaluation needs the videos, a dataset of pairs"
        )
    from pipelines.evaluation.scores import summary  # torchmetrics takes seconds to import

    clips: list[dict[str, Any]] = []
    for batch in _pairs(dataset):
        clip = edit_pair(editor, batch, config, **options)
        clips.append({"instruction": clip.instruction, **clip.metrics})
        on_clip(clip)
        if len(clips) == config.clips:
            break
    cache = editor.mask_cache
    steps = list(cache.pruned_steps) if cache else []
    numbers = [{k: v for k, v in clip.items() if k != "instruction"} for clip in clips]
    return {
        "model": editor.name,
        "dataset": dataset,
        "dataset_hash": dataset_hash(info),
        "mask_cache": None if cache is None else {**asdict(cache), "pruned_steps": steps},
        "settings": asdict(config),
        "mean": summary(numbers, config.success_db),
        "clips": clips,
    }


def edit_again(
    editor: StreamingEditor, dataset: str, config: EvaluateConfig, places: Collection[int]
) -> list[EditedClip]:
    """The clips at these places of a report, in the order of `places`: edited once more, because
    nobody keeps every frame of every clip."""
    batches = islice(enumerate(_pairs(dataset)), max(places) + 1)
    edited = {n: edit_pair(editor, batch, config) for n, batch in batches if n in places}
    return [edited[place] for place in places]


def _pairs(dataset: str) -> Iterator[dict[str, Any]]:
    """The pairs of a dataset, one a batch, in its order."""
    yield from loader(
        dataset, Split(batch_size=1, rank=0, world_size=1, seed=0, shuffle=False, epochs=1)
    )


def edit_pair(
    editor: StreamingEditor, batch: dict[str, Any], config: EvaluateConfig, **options: Any
) -> EditedClip:
    """Stream the one pair of `batch` through the editor and measure the result."""
    from pipelines.evaluation.scores import clip_metrics

    source, truth, mask = (np.asarray(batch[name][0]) for name in ("source", "target", "mask"))
    instruction = str(batch["instruction"][0])
    frames, height, width, _ = source.shape
    chunks, seconds = edit_clip(editor, source, instruction, config.seed, truth=truth, **options)
    edit = np.concatenate([chunk.frames for chunk in chunks])
    recomputed = np.concatenate(
        [
            spread_mask(chunk.mask, chunk.first_frame, len(chunk.frames), height, width)
            for chunk in chunks
        ]
    )
    numbers = clip_metrics(source, edit, truth, mask, dilate=config.dilate)
    numbers["recomputed"] = float(np.mean([chunk.recomputed for chunk in chunks]))
    numbers["fps"] = frames / seconds
    return EditedClip(instruction, source, truth, edit, mask, recomputed, numbers)


def edit_clip(
    editor: StreamingEditor,
    source: np.ndarray,
    instruction: str,
    seed: int,
    *,
    truth: np.ndarray | None = None,
    **options: Any,
) -> tuple[list[EditedChunk], float]:
    """The chunks of uint8 [F, H, W, 3] streamed through the editor, and the seconds it took;
    `options` are `work_size` and `detail` of `StreamingEditor.open`. The right edit, `truth`, is
    seen by a `TrueHistory` alone."""
    from pipelines.evaluation.true_history import TrueHistory  # with torch, which takes seconds

    height, width = source.shape[1:3]
    if isinstance(editor, TrueHistory):
        options["truth"] = truth
    started = time.monotonic()
    stream = editor.open(instruction, height=height, width=width, seed=seed, **options)
    chunks: list[EditedChunk] = []
    for first in range(0, len(source), PUSH_FRAMES):
        chunks += stream.push(source[first : first + PUSH_FRAMES])
    last = stream.flush()
    chunks += [last] if last is not None else []
    return chunks, time.monotonic() - started


def spread_mask(
    mask: np.ndarray, first_frame: int, frames: int, height: int, width: int
) -> np.ndarray:
    """A chunk's token mask [latents, h, w] as pixels [frames, height, width]; a token is 16x16."""
    counts = [1 if first_frame == 0 and n == 0 else 4 for n in range(len(mask))]
    pixels = np.repeat(mask, counts, axis=0)[:frames]
    return pixels.repeat(16, axis=1).repeat(16, axis=2)[:, :height, :width]


def shortfalls(mean: dict[str, float], config: EvaluateConfig) -> list[str]:
    """Why a model with these means should not be promoted; empty if it may be."""
    wanted = {"gain": config.min_gain_db, "background_psnr": config.min_background_db}
    return [
        f"{name} {mean.get(name, float('nan')):.1f} dB is below {minimum:g} dB"
        for name, minimum in wanted.items()
        if not mean.get(name, float("-inf")) >= minimum
    ]


TABLE = (  # metric, unit, what it says
    ("gain", "dB", "edited region: how much closer to the truth than the source"),
    ("success", "", "share of clips whose gain reaches the goal"),
    ("edited_psnr", "dB", "edited region, edit against truth"),
    ("edited_ssim", "", "edited region, edit against truth"),
    ("source_psnr", "dB", "edited region, source against truth: doing nothing"),
    ("background_psnr", "dB", "outside the edit, edit against source"),
    ("background_ssim", "", "outside the edit, edit against source"),
    ("temporal_inside", "levels", "flicker against truth, edited region"),
    ("temporal_outside", "levels", "flicker against source, background"),
    ("recomputed", "", "share of tokens computed anew"),
    ("fps", "", "frames a second on this machine"),
)


def table_rows(mean: dict[str, float]) -> list[tuple[str, str, str]]:
    """(metric, value with unit, meaning) of every metric that there is."""
    return [
        (name, f"{mean[name]:.{1 if unit == 'dB' else 2}f} {unit}".strip(), meaning)
        for name, unit, meaning in TABLE
        if name in mean
    ]


def markdown_table(mean: dict[str, float]) -> str:
    lines = ["| metric | value | what it says |", "| --- | --- | --- |"]
    lines += [f"| {name} | {value} | {meaning} |" for name, value, meaning in table_rows(mean)]
    return "\n".join(lines) + "\n"

"""One model in many variants on the same clips: what each costs against the first, clip by clip."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from infra.runtime.errors import UserError
from infra.runtime.registry import resolve_uri
from modeling.config import ModelConfig
from modeling.editor import StreamingEditor
from modeling.geometry import TOKEN_PIXELS
from modeling.model_dir import load_model, read_config
from pipelines.config.ablation import Grid, Variant, label, stream_of
from pipelines.config.merge import ConfigError
from pipelines.evaluation.bench.intervals import mean_with_interval
from pipelines.evaluation.bench.printed import lines_of, markdown_of
from pipelines.evaluation.bench.tracked import EXPERIMENT, figures
from pipelines.evaluation.judges import Judge
from pipelines.evaluation.true_history import TrueHistory
from pipelines.evaluation.whole import WholeEditor
from pipelines.tracking.tracker import NOTE, Tracker, check_reachable

COLUMNS = (  # metric, heading, decimals, with interval
    ("gain", "gain dB", 2, True),
    ("loss", "loss dB", 2, True),
    ("success", "success", 2, False),
    ("background_psnr", "outside dB", 1, False),
    ("kept_psnr", "kept dB", 1, False),
    ("temporal_outside", "flicker out", 2, False),
    ("sharpness", "sharp", 2, False),
    ("drift", "drift dB", 2, False),
    ("skipped", "tokens not computed", 2, False),
    ("saved", "work not done", 2, False),
    ("fps", "FPS", 1, False),
)


def variant_editor(model: Path, variant: Variant) -> StreamingEditor:
    """The model at `model` (with `stages`, the one of that name in it) as `variant` wants it."""
    place = place_of(model, variant)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    loaded = load_model(place, device=device, dtype=dtype)
    stream = stream_of(loaded.config.stream, variant)
    config = replace(loaded.config, stream=stream)
    if variant.get("whole"):
        return WholeEditor(
            replace(loaded, config=config),
            mask_cache=None,
            steps=variant["whole"],
            scale=variant.get("guidance", 1.0),
        )
    streaming = TrueHistory if variant.get("history") == "truth" else StreamingEditor
    return streaming(replace(loaded, config=config), mask_cache=stream.mask_cache)


def place_of(model: Path, variant: Variant) -> Path:
    """Raises ConfigError for a stage that is not in `model`."""
    if "stages" not in variant:
        return model
    place = model / str(variant["stages"])
    if not (place / "config.json").is_file():
        there = sorted(file.parent.name for file in model.glob("*/config.json"))
        raise ConfigError(
            f"stages={variant['stages']}: no model is in {place}; there are "
            f"{', '.join(there) or 'none, so give a folder such as runs/demo/models'}"
        )
    return place


def check(model: Path, variant: Variant) -> None:
    """Raises UserError for a variant that cannot be measured; nothing is loaded."""
    config = read_config(place_of(model, variant))
    replace(config, stream=stream_of(config.stream, variant))


def fitting(model: Path, variants: Sequence[Variant]) -> tuple[tuple[Variant, ...], list[str]]:
    """The variants that can be measured, and a line about every other: of window=6,3 and sinks=3,0
    the window of 3 holds no sinks beside a chunk. Nothing is loaded.

    Raises UserError for a value that fits beside no other value of the grid.
    """
    fit: list[Variant] = []
    refused: list[tuple[Variant, UserError]] = []
    for variant in variants:
        try:
            check(model, variant)
            fit.append(variant)
        except UserError as error:
            refused.append((variant, error))
    for variant, reason in refused:
        if any(all(other.get(axis) != value for other in fit) for axis, value in variant.items()):
            raise reason
    return tuple(fit), [f"left out: {label(variant)}: {reason}" for variant, reason in refused]


def ablate(
    model: Path,
    grid: Grid,
    judge: Judge,
    *,
    on_clip: Callable[[str], None] = lambda variant: None,
    on_variant: Callable[[dict[str, Any]], None] = lambda report: None,
) -> list[dict[str, Any]]:
    """A report for each variant, with its name (`variant`) and, in `against`, what it loses and
    spares against the first on the same clips."""
    reports: list[dict[str, Any]] = []
    for variant in grid.variants:
        editor = variant_editor(model, variant)
        name = label(variant)
        report = judge.judge(editor, variant, partial(on_clip, name))
        report["variant"] = name
        report["forwards"] = forwards(editor)
        baseline = reports[0] if reports else report
        share = skipped_work(editor.config)
        report["against"] = compare(baseline, report, share, judge.resamples)
        reports.append(report)
        on_variant(report)
    return reports


def forwards(editor: StreamingEditor) -> int:
    """Forwards of the transformer that a chunk takes: the steps and the refresh."""
    return editor.forwards if isinstance(editor, WholeEditor) else len(editor.timesteps) + 1


def compare(
    baseline: dict[str, Any], report: dict[str, Any], share: float, resamples: int
) -> dict[str, dict[str, float]]:
    """Mean loss of gain over the same clips, tokens not computed, and work not done (of the
    baseline's, were it dense); `share` is what a pruned token is spared of a forward."""
    gains = {row["name"]: row["gain"] for row in baseline["clips"] if "gain" in row}
    loss = [gains[row["name"]] - row["gain"] for row in report["clips"] if row["name"] in gains]
    skipped = [1 - row["recomputed"] for row in report["clips"]]
    as_many = report["forwards"] / baseline["forwards"]
    saved = [1 - as_many * (1 - share * value) for value in skipped]
    values = {"loss": loss, "skipped": skipped, "saved": saved}
    return {name: mean_with_interval(of, resamples) for name, of in values.items() if of}


def skipped_work(config: ModelConfig) -> float:
    """Share of a token's multiplications in a forward that a pruned token is spared.

    With scope "attention" its projections and attention over the full window, with "feedforward"
    those two layers; the rest runs for every token.
    """
    cache, sizes, stream = config.stream.mask_cache, config.transformer, config.stream
    if cache is None or cache.scope == "block":
        return 1.0
    dim = sizes.dim
    keys = stream.window_latents * (stream.height // TOKEN_PIXELS) * (stream.width // TOKEN_PIXELS)
    text = 2 * dim * dim + 2 * sizes.text_tokens * dim
    layers = {
        "attention": 4 * dim * dim + 2 * keys * dim,
        "feedforward": 2 * dim * sizes.ffn_dim,
    }
    return layers[cache.scope] / (sum(layers.values()) + text)


def log_reports(command: str, reports: list[dict[str, Any]], files: list[Path]) -> str:
    """Log to MLflow: a parent run and a child for each variant; says where."""
    uri = resolve_uri(None)
    check_reachable(uri)
    about = {"command": command, "made": reports[0]["made"], **reports[0]["settings"]}
    tags = {NOTE: "One model under several settings: each is a child run, `variant` says which."}
    parent = Tracker.start_pipeline(uri, EXPERIMENT, "ablation", about, tags)
    for report in reports:
        child = parent.start_stage(report["variant"], {"variant": report["variant"]})
        against = {name: value["mean"] for name, value in report["against"].items()}
        child.log_metrics(figures(report) | against)
        child.finish()
    for file in files:
        parent.log_artifact(file)
    parent.finish()
    return parent.page()


def table(reports: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and a line for each variant."""
    return lines_of([(r["variant"], _all(r) | r["against"]) for r in reports], COLUMNS)


def markdown(reports: list[dict[str, Any]]) -> str:
    return markdown_of(*table(reports))


def plot(reports: list[dict[str, Any]], path: Path) -> None:
    """Write `path`: what each variant loses for the work that it does not do."""
    figure = Figure(figsize=(9, 5), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for report in reports:
        loss, saved = (report["against"].get(name) for name in ("loss", "saved"))
        if loss is None or saved is None:
            continue
        steps = {"y": loss["mean"], "x": saved["mean"]}
        error = [[max(0, loss["mean"] - loss["low"])], [max(0, loss["high"] - loss["mean"])]]
        axes.errorbar(**steps, yerr=error, fmt="o", capsize=2, label=report["variant"])
    axes.set_xlabel("share of the denoising work that is not done")
    axes.set_ylabel("gain lost against the first variant, dB (95 %)")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path)


def _all(report: dict[str, Any]) -> dict[str, dict[str, float]]:
    overall: dict[str, Any] = report["overall"]
    return dict(overall["all"] if "all" in overall else next(iter(overall.values())))

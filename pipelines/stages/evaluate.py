"""Held-out pairs through the streaming editor: a report, a table and a picture."""

from __future__ import annotations

from pathlib import Path

from data.manifest import read_dataset_info
from pipelines.config.load import section_plain
from pipelines.evaluation import evaluate as evaluation
from pipelines.evaluation.evaluate import EditedClip, load_editor, markdown_table
from pipelines.evaluation.picture import side_by_side
from pipelines.stages.chain import Chain
from pipelines.tracking.outbox import Run
from pipelines.tracking.records import StageRecord, fingerprint_of, write_json

SHOWN_CLIPS = 3  # held-out clips in the side-by-side picture
TABLE, PICTURE = "metrics.md", "side_by_side.png"
HELDOUT = "heldout"  # the dataset, as MLflow's pages name it


def evaluate(chain: Chain, model: Path, heldout: str) -> StageRecord:
    """How well `model` edits the pairs of `heldout`."""
    settings, output = chain.config.evaluate, chain.output
    target = output / "evaluation.json"

    def make(run: Run, key: str) -> dict[str, float]:
        run.log_input(HELDOUT, heldout, "evaluation")
        editor = load_editor(model, settings.mask_cache)
        samples = read_dataset_info(heldout).samples
        total = min(settings.clips or samples, samples)
        shown: list[EditedClip] = []
        gains: list[float] = []

        def on_clip(clip: EditedClip) -> None:
            if len(shown) < SHOWN_CLIPS:
                shown.append(clip)
            gains.append(clip.metrics.get("gain", 0.0))
            note = f"{len(gains)}/{total} clips  gain {gains[-1]:+.1f} dB"
            chain.view.update("evaluate", len(gains), total, note)

        report = evaluation.evaluate(editor, heldout, settings, on_clip=on_clip)
        side_by_side(shown).save(output / PICTURE)
        mean: dict[str, float] = report["mean"]
        (output / TABLE).write_text(markdown_table(mean))
        write_json(target, report)
        for path in (target, output / TABLE, output / PICTURE):
            run.log_artifact(path)
        return mean

    inputs = {
        "model": fingerprint_of(model),
        "dataset": fingerprint_of(heldout),
        "config": section_plain(settings),
    }
    return chain.run("evaluate", inputs, target, make)

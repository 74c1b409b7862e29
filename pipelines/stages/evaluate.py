"""Held-out pairs through the streaming editor: a report, a table, a picture and a video."""

from __future__ import annotations

from pathlib import Path

from data.manifest import read_dataset_info
from pipelines.config.load import section_plain
from pipelines.evaluation import evaluate as evaluation
from pipelines.evaluation.contact_sheet import chosen, film, side_by_side
from pipelines.evaluation.evaluate import EditedClip, edit_again, load_editor, markdown_table
from pipelines.stages.chain import Chain
from pipelines.tracking.outbox import Run
from pipelines.tracking.records import StageRecord, fingerprint_of, write_json

TABLE, PICTURE, SAMPLE = "metrics.md", "side_by_side.png", "sample.mp4"
HELDOUT = "heldout"  # the dataset, as MLflow's pages name it


def evaluate(chain: Chain, model: Path, heldout: str) -> StageRecord:
    """How well `model` edits the pairs of `heldout`."""
    settings, output = chain.config.evaluate, chain.output
    target = output / "evaluation.json"

    def make(run: Run, key: str) -> dict[str, float]:
        for reader in (run, chain.parent):
            reader.log_input(HELDOUT, heldout, "evaluation")
        run.used({"model": model})
        editor = load_editor(model, settings.mask_cache)
        samples = read_dataset_info(heldout).samples
        total = min(settings.clips or samples, samples)
        gains: list[float] = []

        def on_clip(clip: EditedClip) -> None:
            gains.append(clip.metrics.get("gain", 0.0))
            note = f"{len(gains)}/{total} clips  gain {gains[-1]:+.1f} dB"
            chain.view.update("evaluate", len(gains), total, note)

        report = evaluation.evaluate(editor, heldout, settings, on_clip=on_clip)
        names = chosen(report["clips"], settings.success_db)
        shown = edit_again(editor, heldout, settings, names)
        side_by_side(shown, list(names.values())).save(output / PICTURE)
        film(output / SAMPLE, shown[0], editor.settings.fps)  # the typical one
        mean: dict[str, float] = report["mean"]
        (output / TABLE).write_text(markdown_table(mean))
        write_json(target, report)
        for path in (target, output / TABLE, output / PICTURE, output / SAMPLE):
            run.log_artifact(path)
        return mean

    inputs = {
        "model": fingerprint_of(model),
        "dataset": fingerprint_of(heldout),
        "config": section_plain(settings),
    }
    return chain.run("evaluate", inputs, target, make)

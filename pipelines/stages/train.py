"""One trained stage, on Ray."""

from __future__ import annotations

from pathlib import Path

from pipelines.config.load import section_plain
from pipelines.config.rules import CHOOSING, WATCHING, training_key
from pipelines.stages.chain import VERSIONS, Chain
from pipelines.stages.evaluate import HELDOUT
from pipelines.tracking.outbox import Run
from pipelines.tracking.records import fingerprint_of
from pipelines.training.run_folder import TrainingReport


def train(
    chain: Chain, stage: str, start: Path, dataset: str, heldout: str, **models: Path
) -> Path:
    """The model that `stage` makes of `start`; `models` are what it needs besides."""
    config, section = chain.config, getattr(chain.config, stage)
    if section.steps == 0:
        chain.runner.pass_over(stage, f"{stage}.steps=0")
        return start
    target = chain.output / "models" / stage

    def make(run: Run, key: str) -> dict[str, float]:
        from pipelines.training.job import make_job
        from pipelines.training.trainer import train_stage  # Ray Train takes seconds to import

        chain.start_ray()
        for reader in (run, chain.parent):
            reader.log_input("train", str(dataset), "training")
        if section.validate_every:
            run.log_input(HELDOUT, str(heldout), "validation")
        run.used({"start": start, **models})

        def on_progress(report: TrainingReport) -> None:
            if metrics := {**report.metrics, **report.system}:
                run.log_metrics(metrics, report.step)
            for file, place in report.files.items():
                run.log_artifact(Path(file), place)
            chain.view.update(stage, report.step, report.steps, report.line())

        job = make_job(
            stage, config, start=start, dataset=dataset, output=target, models=models,
            heldout=heldout, key=key, same=same,
        )  # fmt: skip
        outcome = train_stage(job, on_progress=on_progress, say=chain.view.warn)
        run.log_artifact(target / "card.json")
        run.made(stage, target, outcome.steps)
        return dict(outcome.metrics)

    values = section_plain(section)
    given = {
        "seed": config.seed,
        "start": fingerprint_of(start),
        "dataset": fingerprint_of(dataset),
        **{name: fingerprint_of(path) for name, path in models.items()},
    }
    same = training_key(stage, values, version=VERSIONS[stage], **given)
    chooses = {name: values[name] for name in CHOOSING if values[name]}
    if chooses:  # the pairs that choose, and how often, decide the result
        given["heldout"] = fingerprint_of(heldout)
        chooses |= {name: values[name] for name in ("validate_every", "validate_clips")}
    sharing = config.compute.sharing(stage)
    shared = {"sequence_parallel": sharing} if sharing > 1 else {}
    inputs = {
        "config": {k: v for k, v in values.items() if k not in (*WATCHING, *CHOOSING)} | chooses,
        "workers": config.compute.workers,
        **shared,
        "precision": config.compute.precision,
        **given,
    }
    return Path(chain.run(stage, inputs, target, make, same=same, gate=section.gate).output)

"""From pairs to a registered model: the stages in order, finished ones not run again.

data, heldout, start, vae, encode, foundation, causal, distill, evaluate, register
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data import synthetic
from data.manifest import read_dataset_info
from modeling.model_dir import read_config
from pipelines.config.load import section_plain, to_plain, to_yaml
from pipelines.config.pipeline import PipelineConfig
from pipelines.evaluation.evaluate import (
    EditedClip,
    evaluate,
    load_editor,
    markdown_table,
    shortfalls,
)
from pipelines.evaluation.picture import side_by_side
from pipelines.stages import preflight
from pipelines.stages.data import make_synthetic
from pipelines.stages.encode import encode_dataset
from pipelines.stages.progress import StageView
from pipelines.stages.runner import StageRunner, Work, locked
from pipelines.stages.start import start_model
from pipelines.tracking import registry
from pipelines.tracking.outbox import Outbox, Run
from pipelines.tracking.records import (
    WATCHING,
    StageRecord,
    fingerprint_of,
    training_key,
    write_json,
)
from pipelines.tracking.versions import publish
from pipelines.training.run_folder import Progress
from pipelines.training.session import ray_session

STAGES = (
    "data",
    "heldout",
    "start",
    "vae",
    "encode",
    "foundation",
    "causal",
    "distill",
    "evaluate",
    "register",
)
# Raise a stage's number when its code gives another result for the same inputs.
VERSIONS = dict.fromkeys(STAGES, 1) | {"register": 2}
SHOWN_CLIPS = 3  # held-out clips in the side-by-side picture


@dataclass
class PipelineResult:
    """Where everything is."""

    output: Path
    model: Path  # the registered version's folder
    version: str | None  # in the registry; None as long as MLflow does not take it
    aliases: list[str]
    shortfalls: list[str]  # why it was not promoted
    metrics: dict[str, float]  # means over the held-out clips
    report: Path
    table: Path
    picture: Path
    run_id: str


def run_pipeline(
    config: PipelineConfig,
    view: StageView,
    *,
    then: Callable[[StageRunner, PipelineResult], None] | None = None,
) -> PipelineResult:
    """Run every stage of `config` that is not finished, and then what the caller adds.

    Raises ValueError for what the user can mend, before anything starts wherever that can be known.
    """
    source = preflight.check(config)
    output = Path(config.output).absolute()
    assert config.tracking.uri is not None
    with locked(output), ExitStack() as tracked, ExitStack() as resources:
        (output / "config.yaml").write_text(to_yaml(config))
        tracking = config.tracking
        outbox = Outbox(output, config.tracking.uri, tracking.experiment, view.warn)
        tracked.enter_context(outbox)
        parent = outbox.start_pipeline(config.name, to_plain(config))
        parent.log_artifact(output / "config.yaml")
        runner = StageRunner(output, parent, view)
        try:
            result = _Pipeline(config, output, source, runner, resources).run()
            resources.close()  # of this process's Rays there is one at a time
            if then:
                then(runner, result)
        except BaseException as error:
            parent.stop(error)
            raise
        parent.log_metrics(result.metrics)
        parent.finish()
        return result


class _Pipeline:
    def __init__(
        self,
        config: PipelineConfig,
        output: Path,
        source: Path | None,
        runner: StageRunner,
        resources: ExitStack,
    ) -> None:
        assert config.tracking.uri is not None
        self.config, self.output, self.source = config, output, source
        self.uri = config.tracking.uri
        self.model = config.model.resolve()
        self.runner, self.view = runner, runner.view
        self.outbox = runner.parent.outbox
        self._resources = resources
        self._ray = False

    def run(self) -> PipelineResult:
        data = self.config.data
        pairs = self.pairs("data", "train", data.train, data.pairs)
        heldout = self.pairs("heldout", "heldout", data.heldout, data.heldout_pairs)
        start = self.start()
        with_vae = self.train("vae", start, pairs)
        encoded = self.encode(with_vae, pairs) if self.trains_on_latents() else ""
        foundation = self.train("foundation", with_vae, encoded)
        causal = self.train("causal", foundation, encoded)
        final = self.train("distill", causal, encoded, teacher=foundation)
        evaluation = self.evaluate(final, heldout)
        return self.register(final, evaluation)

    def pairs(self, stage: str, split: str, given: str | None, count: int) -> str:
        """The dataset that the user gave, or a synthetic one."""
        if given is not None:
            info = read_dataset_info(given)
            self.runner.pass_over(stage, f"{given}, {info.samples} pairs")
            return given
        data, stream = self.config.data, self.model.stream
        target = str(self.output / "data" / split)

        def make(run: Run, key: str) -> dict[str, float]:
            make_synthetic(
                target,
                pairs=count,
                height=stream.height,
                width=stream.width,
                frames=data.frames,
                fps=stream.fps,
                seed=data.seed,
                split=split,
                samples_per_shard=data.samples_per_shard,
                workers=data.workers,
                overwrite=True,
                on_pair=lambda done: self.view.update(stage, done, count, f"{done}/{count} pairs"),
            )
            return {"pairs": float(count)}

        inputs = {
            "generator": synthetic.VERSION,
            "pairs": count,
            "size": [stream.height, stream.width, data.frames, stream.fps],
            "seed": data.seed,
            "split": split,
            "samples_per_shard": data.samples_per_shard,
        }
        return self.stage(stage, inputs, target, make).output

    def start(self) -> Path:
        """The model directory that the first trained stage starts from."""
        if self.source is not None and read_config(self.source).stream == self.model.stream:
            self.runner.pass_over("start", str(self.config.model.start))
            return self.source
        target = self.output / "models" / "start"

        def make(run: Run, key: str) -> dict[str, float]:
            start_model(self.model, self.source, target, seed=self.config.seed)
            return {}

        inputs = {
            "model": section_plain(self.model),
            "seed": self.config.seed,
            "source": fingerprint_of(self.source) if self.source else None,
        }
        return Path(self.stage("start", inputs, target, make).output)

    def train(self, stage: str, start: Path, dataset: str, **models: Path) -> Path:
        """One trained stage, on Ray; `models` are what it needs besides its start."""
        section = getattr(self.config, stage)
        if section.steps == 0:
            self.runner.pass_over(stage, f"{stage}.steps=0")
            return start
        target = self.output / "models" / stage

        def make(run: Run, key: str) -> dict[str, float]:
            from pipelines.training.trainer import train_stage  # Ray Train takes seconds to import

            self.start_ray()

            def on_progress(report: Progress) -> None:
                run.log_metrics(report.metrics, report.step)
                self.view.update(stage, report.step, report.steps, report.line())

            extra = {"key": key, "same": same} | {name: str(p) for name, p in models.items()}
            outcome = train_stage(
                stage,
                self.config,
                start=start,
                dataset=dataset,
                output=target,
                extra=extra,
                on_progress=on_progress,
                say=self.view.warn,
            )
            run.log_artifact(target / "card.json")
            return dict(outcome.metrics)

        values = section_plain(section)
        given = {
            "seed": self.config.seed,
            "start": fingerprint_of(start),
            "dataset": fingerprint_of(dataset),
            **{name: fingerprint_of(path) for name, path in models.items()},
        }
        inputs = {
            "config": {k: v for k, v in values.items() if k not in WATCHING},
            "workers": self.config.compute.workers,
            "precision": self.config.compute.precision,
            **given,
        }
        same = training_key(stage, values, version=VERSIONS[stage], **given)
        record = self.runner.run(stage, VERSIONS[stage], inputs, target, make, same=same)
        return Path(record.output)

    def trains_on_latents(self) -> bool:
        """Whether any stage will read the encoded pairs; making them can take longer than a VAE."""
        trains = any(getattr(self.config, s).steps for s in ("foundation", "causal", "distill"))
        if not trains:
            self.runner.pass_over("encode", "no stage trains on latents")
        return trains

    def encode(self, model: Path, pairs: str) -> str:
        """The training pairs as latents and text embeddings."""
        data = self.config.data
        target = str(self.output / "data" / "encoded")

        def make(run: Run, key: str) -> dict[str, float]:
            info = encode_dataset(
                pairs,
                target,
                model,
                batch_size=data.encode_batch,
                samples_per_shard=data.samples_per_shard,
                threads=max(1, self.config.compute.loader_workers),
                tasks=self.encode_tasks(),
                gpus=self.config.compute.gpus,
                on_sample=lambda n, of: self.view.update("encode", n, of, f"{n}/{of} pairs"),
            )
            return {"pairs": float(info.samples)}

        inputs = {
            "model": fingerprint_of(model),
            "pairs": fingerprint_of(pairs),
            "samples_per_shard": data.samples_per_shard,
        }
        return self.stage("encode", inputs, target, make).output

    def evaluate(self, model: Path, heldout: str) -> StageRecord:
        """Held-out pairs through the streaming editor; report and picture."""
        settings = self.config.evaluate
        target = self.output / "evaluation.json"

        def make(run: Run, key: str) -> dict[str, float]:
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
                self.view.update("evaluate", len(gains), total, note)

            report = evaluate(editor, heldout, settings, on_clip=on_clip)
            side_by_side(shown).save(self.picture)
            mean: dict[str, float] = report["mean"]
            self.table.write_text(markdown_table(mean))
            write_json(target, report)
            for path in (target, self.table, self.picture):
                run.log_artifact(path)
            return mean

        inputs = {
            "model": fingerprint_of(model),
            "dataset": fingerprint_of(heldout),
            "config": section_plain(settings),
        }
        return self.stage("evaluate", inputs, target, make)

    def register(self, model: Path, evaluation: StageRecord) -> PipelineResult:
        """The model in the registry, as candidate, and as production if it is good enough."""
        tracking = self.config.tracking
        missing = shortfalls(evaluation.metrics, self.config.evaluate)
        aliases = [tracking.alias]
        if tracking.promote and not missing:
            aliases.append("production")

        fingerprint = str(fingerprint_of(model))
        place = self.output / "versions" / fingerprint[:16]

        def make(run: Run, key: str) -> dict[str, float]:
            publish(model, place)
            self.runner.parent.register(
                tracking.model_name,
                place,
                fingerprint=fingerprint,
                metrics=evaluation.metrics,
                aliases=aliases,
            )
            return {}

        def still_there(record: StageRecord) -> bool:
            number = self.outbox.version(tracking.model_name, fingerprint)
            # MLflow will be told of a version that it does not know yet.
            return not number or registry.holds(self.uri, tracking.model_name, number, place)

        inputs = {
            "model": fingerprint,
            "location": str(place),
            "registry": self.uri,
            "name": tracking.model_name,
            "aliases": aliases,
        }
        self.runner.run(
            "register", VERSIONS["register"], inputs, place, make, still_there=still_there
        )
        self.outbox.flush()
        return PipelineResult(
            output=self.output,
            model=place,
            version=self.outbox.version(tracking.model_name, fingerprint),
            aliases=aliases,
            shortfalls=missing,
            metrics=evaluation.metrics,
            report=Path(evaluation.output),
            table=self.table,
            picture=self.picture,
            run_id=self.runner.parent.run_id,
        )

    @property
    def table(self) -> Path:
        return self.output / "metrics.md"

    @property
    def picture(self) -> Path:
        return self.output / "side_by_side.png"

    def stage(
        self, stage: str, inputs: Mapping[str, Any], output: str | Path, work: Work
    ) -> StageRecord:
        return self.runner.run(stage, VERSIONS[stage], inputs, output, work)

    def encode_tasks(self) -> int:
        """A task a GPU of the cluster or of this machine; 0, none on Ray, if there are not two."""
        compute = self.config.compute
        if compute.gpus is False or (compute.address is None and torch.cuda.device_count() < 2):
            return 0
        self.start_ray()
        import ray

        gpus = int(ray.cluster_resources().get("GPU", 0))
        return min(gpus, compute.workers or gpus)

    def start_ray(self) -> None:
        """One Ray for all stages that train, started when the first of them needs it."""
        if not self._ray:
            self._resources.enter_context(ray_session(self.config.compute))
            self._ray = True

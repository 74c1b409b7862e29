"""A pipeline that runs in a second: everything in it is real but the training.

A trained stage leaves a model whose weights are a function of all that it was told.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, field
from functools import partial
from io import StringIO
from pathlib import Path

from rich.console import Console
from safetensors.torch import load_file, save_file

from data.manifest import dataset_hash, read_dataset_info
from data.shards import write_dataset
from data.synthetic import make_pair
from infra.runtime.registry import client_for
from modeling.fingerprint import model_fingerprint
from pipelines.config.load import load_config
from pipelines.config.pipeline import PipelineConfig
from pipelines.pipeline import plan_pipeline, run_pipeline
from pipelines.stages.chain import STAGES
from pipelines.stages.register import PipelineResult
from pipelines.stages.running.choice import Choice
from pipelines.stages.running.progress import StageView
from pipelines.tracking.records import fingerprint_of
from pipelines.training.job import Job
from pipelines.training.trainer import StageOutcome
from tests.pipelines.sizes import HEIGHT, WIDTH

CONFIG = f"""
name: tiny
data: {{pairs: 2, heldout_pairs: 2, frames: 9, samples_per_shard: 1, workers: 0}}
model:
  transformer: {{dim: 24, ffn_dim: 48, num_heads: 2, num_layers: 1}}
  vae: {{widths: [8, 8, 8, 8]}}
  stream: {{height: {HEIGHT}, width: {WIDTH}, window_latents: 6, mask_cache: null}}
compute: {{workers: 1, gpus: false}}
vae: {{steps: 1, batch_size: 1, clip_frames: 5}}
foundation: {{steps: 1}}
causal: {{steps: 1}}
distill: {{steps: 1}}
evaluate: {{clips: 2, min_gain_db: -100, min_background_db: -100}}
"""


@dataclass
class Training:
    """Stands for `train_stage`, and remembers what it was told."""

    told: dict[str, Job] = field(default_factory=dict)
    deaf: str = ""  # a stage that makes the same model whatever it is told

    def __call__(
        self,
        job: Job,
        *,
        on_progress: object = None,
        say: object = None,
    ) -> StageOutcome:
        stage, start, output, teacher = job.stage, job.start, job.output, job.models.get("teacher")
        self.told[stage] = job
        decides = {
            "key": job.card["key"],
            "start": model_fingerprint(start),
            "dataset": dataset_hash(read_dataset_info(job.dataset)),
            "teacher": fingerprint_of(teacher) if teacher else None,
        }
        seed = stage if stage == self.deaf else stage + json.dumps(decides, sort_keys=True)
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(start, output)
        file = output / f"{'vae' if stage == 'vae' else 'transformer'}.safetensors"
        weights = load_file(file)
        name = min(weights)
        shift = hashlib.sha256(seed.encode()).digest()[0] + 1
        source = load_file(start / file.name)[name] if stage != self.deaf else weights[name] * 0
        weights[name] = source + 1e-6 * shift
        save_file(weights, file)
        return StageOutcome(output, {"loss": 1.0}, 1, 0.0)


@dataclass
class Place:
    """A pipeline's output and database, which can be put back to how they were."""

    folder: Path
    uri: str
    training: Training

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def configured(self, *overrides: str) -> PipelineConfig:
        places = [f"output={self.out}", f"tracking.uri={self.uri}"]
        return load_config(self.folder / "tiny.yaml", [*places, *overrides])

    def planned(self, *overrides: str) -> set[str]:
        """The stages that the plan says would run; test_choosing.py holds it to what then runs."""
        view = StageView(Console(file=StringIO()), STAGES)
        lines = plan_pipeline(self.configured(*overrides), view, Choice(STAGES))
        return {line.stage for line in lines if line.does == "runs"}

    def run(self, *overrides: str) -> tuple[PipelineResult, list[str]]:
        """The result and the stages that were not reused or passed over."""
        config = self.configured(*overrides)
        self.training.told.clear()
        said = StringIO()
        with StageView(Console(file=said, width=200), STAGES) as view:
            result = run_pipeline(config, view)
        assert view.finished == list(STAGES)
        return result, [
            line.split()[0] for line in said.getvalue().splitlines() if "started" in line
        ]

    def keep(self) -> None:
        shutil.copytree(self.out, self.folder / "kept")

    def put_back(self) -> None:
        shutil.rmtree(self.out)
        shutil.copytree(self.folder / "kept", self.out)

    def aliases(self, name: str) -> dict[str, str]:
        found = client_for(self.uri).get_registered_model(name).aliases
        return {alias: str(version) for alias, version in found.items()}

    def hash_of(self, name: str) -> str:
        found = fingerprint_of(self.out / name)
        assert found is not None
        return found

    def version_of(self, name: str) -> Path:
        """Where a version with the files of the model `name` lies."""
        return self.out / "versions" / self.hash_of(f"models/{name}")[:16]


def dataset(uri: Path, first: int) -> str:
    """Two pairs of the shape of `CONFIG`."""
    recipe = partial(make_pair, height=HEIGHT, width=WIDTH, frames=9)
    samples = [partial(recipe, n) for n in (first, first + 1)]
    write_dataset(uri, samples, made_by={}, samples_per_shard=1, overwrite=True)
    return str(uri)

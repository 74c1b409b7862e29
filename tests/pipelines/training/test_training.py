"""All stages one after the other on two ranks, and the last as a real Ray Train job on two workers,
interrupted, told to end and resumed: it must equal the unbroken one."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import distributed

from data.loader import Split, loader
from data.shards import write_dataset
from data.synthetic import make_pair
from modeling.model_dir import load_model, read_card, read_config
from pipelines.bench.kills import worker_processes
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.stages import ComputeConfig
from pipelines.exits import TRY_AGAIN
from pipelines.stages.encode import encode_dataset
from pipelines.stages.encoding.job import to_pixels
from pipelines.training import checkpoint
from pipelines.training.checkpoint import CheckpointError
from pipelines.training.cluster import ray_session
from pipelines.training.job import make_job
from pipelines.training.loop import Training
from pipelines.training.methods.base import Setting
from pipelines.training.run_folder import RunFolder, TrainingError, TrainingReport
from pipelines.training.trainer import train_stage
from pipelines.training.watch.watchdog import COMPUTES, READS, Watchdog
from tests.pipelines.sizes import FRAMES, HEIGHT, WIDTH
from tests.pipelines.training.ranks import on_ranks

ROOT = Path(__file__).parents[3]
FROZEN_SECONDS = 1.5
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def config_in(folder: Path) -> PipelineConfig:
    config = PipelineConfig(output=str(folder))
    config.compute.workers = 2
    for name, steps in (("vae", 60), ("foundation", 60), ("causal", 6), ("distill", 30)):
        stage = getattr(config, name)
        stage.steps, stage.log_every, stage.warmup_steps = steps, max(1, steps // 20), 2
    config.vae = replace(config.vae, learning_rate=1e-3, batch_size=2, clip_frames=9, crop=32)
    config.foundation = replace(config.foundation, learning_rate=3e-3, batch_size=2)
    config.causal = replace(config.causal, grad_accumulation=2, weighting="published")
    config.distill = replace(
        config.distill,
        log_every=1,
        checkpoint_every=3,
        generator_every=2,
        learning_rate=1e-3,
        critic_learning_rate=1e-3,
    )
    return config


class Follow:
    """Keeps every report; after the third it tells the worker that does not report to end."""

    def __init__(self) -> None:
        self.reports: list[TrainingReport] = []
        self.told = False

    def __call__(self, report: TrainingReport) -> None:
        self.reports.append(report)
        if len(self.reports) < 3 or self.told:
            return
        self.told = True
        workers = worker_processes(report.pid)
        assert len(workers) == 2
        (other,) = set(workers) - {report.pid}
        os.kill(other, signal.SIGTERM)


@dataclass(frozen=True)
class Trained:
    """What `chain` made."""

    folder: Path

    @property
    def encoded(self) -> str:
        return str(self.folder / "encoded")

    def model(self, stage: str) -> Path:
        return self.folder / "models" / stage

    def reports(self, stage: str) -> list[TrainingReport]:
        return RunFolder(self.folder / stage).reports(0)[0]

    def losses(self, stage: str) -> list[float]:
        return [report.metrics["loss"] for report in self.reports(stage)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    uri = str(tmp_path_factory.mktemp("training") / "pairs")
    samples = [
        partial(make_pair, seed, height=HEIGHT, width=WIDTH, frames=FRAMES) for seed in range(8)
    ]
    write_dataset(uri, samples, made_by={}, samples_per_shard=4)
    return uri


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, pairs: str) -> Trained:
    folder = tmp_path_factory.mktemp("training")
    on_ranks(2, partial(chain, start=tiny_model, pairs=pairs), folder)
    return Trained(folder)


def chain(rank: int, folder: Path, *, start: Path, pairs: str) -> None:
    """Each stage goes on from the one before, without Ray and without a pause; then two ways to
    fail."""
    config, made = config_in(folder), Trained(folder)

    def prepared(
        name: str, start: Path, dataset: str, *, stage: str | None = None, **models: Path
    ) -> Training:
        job = make_job(
            stage or name, config, start=start, dataset=dataset, output=made.model(name),
            models=models,
        )  # fmt: skip
        here = RunFolder(folder / name)
        if rank == 0:
            here.open()
        distributed.barrier()
        return Training(Setting(job, rank, 2, torch.device("cpu")), here)

    def train(stage: str, start: Path, dataset: str, **models: Path) -> Training:
        training = prepared(stage, start, dataset, **models)
        training.run(lambda write, step: write(folder / "kept"))
        distributed.barrier()
        return training

    train("vae", start, pairs)
    if rank == 0:
        encode_dataset(pairs, made.encoded, made.model("vae"), batch_size=4, samples_per_shard=4)
    distributed.barrier()
    train("foundation", made.model("vae"), made.encoded)
    train("causal", made.model("foundation"), made.encoded)
    teacher = made.model("foundation")
    distill = train("distill", made.model("causal"), made.encoded, teacher=teacher)

    full = folder / f"full-{rank}"
    full.mkdir()
    (full / f"worker-{rank}.pt").symlink_to("/dev/full")
    of = (distill.setting, distill.stage, 9, {}, 0.0, {})
    taken = checkpoint.take(full, *of, copy=lambda state: state)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"stage distill .* step 9 .* No space left"):
        taken.write(folder / "kept")

    freeze(rank, prepared("frozen", made.model("vae"), made.encoded, stage="foundation"))

    config.foundation.learning_rate = 1e30
    training = prepared("never", made.model("vae"), made.encoded, stage="foundation")
    with pytest.raises(TrainingError, match=r"stage foundation: .* not finite at step \d+ "):
        training.run(lambda write, step: write(folder / "kept"))
    assert not made.model("never").exists()


def freeze(rank: int, training: Training) -> None:
    """The second worker is stopped in a step, as by a debugger or a broken driver. The first one's
    watchdog names it, and instead of ending this process has the other go on."""
    other: list[Any] = [None, None]
    distributed.all_gather_object(other, os.getpid())

    def go_on(code: int) -> None:
        assert code == TRY_AGAIN
        process = psutil.Process(other[1])
        while process.status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        process.resume()

    watchdog = Watchdog(training.folder, rank, 2, FROZEN_SECONDS * (1 - rank), go_on)

    def note(step: int, doing: int, batch: int) -> None:
        watchdog.at(step, doing, batch)
        if (step, doing) == (5, READS):
            watchdog.__enter__()
        if (rank, step, doing) == (1, 5, COMPUTES):
            os.kill(os.getpid(), signal.SIGSTOP)

    training.note = note
    training.setting.section.steps = 7
    training.run(lambda write, step: None)
    watchdog.__exit__()
    distributed.barrier()


def test_a_frozen_worker_is_named_and_where_the_others_wait_for_it(trained: Trained) -> None:
    hang = str(RunFolder(trained.folder / "frozen").hang())
    assert hang.startswith("worker 1 of 2 hangs and says nothing, as of a process that was stopped")
    where = r"worker 0 has been computing after step 5 for \d+ s \(process \d+ on .* all_reduce$"
    assert re.search(where, hang), hang
    assert trained.reports("frozen")[-1].step == 7


def test_the_vae_learns_and_its_model_standardises_latents(
    trained: Trained, pairs: str, tiny_model: Path
) -> None:
    assert [report.step for report in trained.reports("vae")] == list(range(3, 61, 3))
    assert torch.isfinite(torch.tensor(trained.losses("vae"))).all()

    start, model = load_model(tiny_model), load_model(trained.model("vae"))
    batch = next(iter(loader(pairs, Split(batch_size=8, shuffle=False, epochs=1))))
    clips = to_pixels(torch.cat([batch["source"], batch["target"]]), "cpu")
    assert reconstruction_db(model.vae, clips) > reconstruction_db(start.vae, clips) + 0.5

    with torch.no_grad():
        latents, _ = model.vae.encode(clips)  # type: ignore[union-attr, operator]
    mean, std = latents.mean(dim=(0, 1, 3, 4)), latents.std(dim=(0, 1, 3, 4))
    torch.testing.assert_close(mean, torch.zeros(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(std, torch.ones(16), atol=1e-3, rtol=0)

    before, after = start.transformer, model.transformer
    assert before is not None
    assert after is not None
    for name, value in before.state_dict().items():
        assert torch.equal(value, after.state_dict()[name]), f"the vae stage changed {name}"
    card = read_card(trained.model("vae"))
    assert card["stage"] == "vae"
    assert card["dataset"]["hash"]
    assert card["parent"]["fingerprint"]


@torch.no_grad()
def reconstruction_db(vae: Any, clips: torch.Tensor) -> float:
    decoded, _ = vae.decode(vae.encode(clips)[0])
    return float(10 * torch.log10(4 / (decoded - clips).square().mean()))


def test_the_foundation_learns(trained: Trained) -> None:
    losses = trained.losses("foundation")
    assert losses[-1] < 0.8 * losses[0]


def test_the_causal_stage_goes_on_from_the_foundation(trained: Trained) -> None:
    assert len(trained.losses("causal")) == 6
    assert torch.isfinite(torch.tensor(trained.losses("causal"))).all()
    assert read_config(trained.model("causal")) == read_config(trained.model("foundation"))


def test_distill_interrupted_told_to_end_and_resumed_equals_an_unbroken_run(
    trained: Trained, tmp_path: Path
) -> None:
    start, teacher = trained.model("causal"), trained.model("foundation")
    expected = trained.reports("distill")
    assert [report.step for report in expected] == list(range(1, 31))

    kept = interrupted(tmp_path, start, teacher, trained.encoded)
    assert 3 < kept < 20  # some steps after it was told to stop

    follow = Follow()
    with ray_session(ComputeConfig()):
        job = make_job(
            "distill", config_in(tmp_path), start=start, dataset=trained.encoded,
            output=tmp_path / "models" / "distill", models={"teacher": teacher},
        )  # fmt: skip
        outcome = train_stage(job, on_progress=follow)
    steps = [report.step for report in follow.reports]
    again = [report.step for report in follow.reports if report.resumed]
    assert again[0] == kept + 1
    assert steps == list(range(kept + 1, 31))  # who was told to end had saved its last step
    assert len(again) == 2
    assert again[1] > again[0] + 2
    assert outcome.metrics["loss"] == follow.reports[-1].metrics["loss"]
    assert not list((tmp_path / "checkpoints").glob("*")), "a finished stage leaves its checkpoints"

    losses = {report.step: report.metrics for report in expected}
    for report in follow.reports:
        for name in ("loss", "dmd_loss", "regression_loss", "critic_loss"):
            # A metric of generator steps is reported once the resumed run has seen one.
            if name in report.metrics:
                assert report.metrics[name] == losses[report.step][name], (report.step, name)
    made, wanted = load_model(outcome.model_dir), load_model(trained.model("distill"))
    assert made.transformer is not None
    assert wanted.transformer is not None
    for name, value in wanted.transformer.state_dict().items():
        assert torch.equal(made.transformer.state_dict()[name], value), name


SCRIPT = """
import sys
from pathlib import Path
from tests.pipelines.training.test_training import config_in
from pipelines.training.job import make_job
from pipelines.training.trainer import train_stage
folder, start, teacher, encoded = sys.argv[1:]
train_stage(make_job(
    "distill", config_in(Path(folder)), start=Path(start), dataset=encoded,
    output=Path(folder) / "models" / "distill", models={"teacher": Path(teacher)},
))
"""


def interrupted(folder: Path, start: Path, teacher: Path, encoded: str) -> int:
    """Ctrl-C after step 3 of the same stage, in a process with a Ray of its own; the step whose
    state it saved, by its own words."""
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), str(start), str(teacher), encoded],
        cwd=ROOT,
        env={**os.environ, "LIVEEDIT_TEST_MARK": mark},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "step 3/30" in line:
            process.send_signal(signal.SIGINT)
    process.wait()
    text = "".join(lines)
    kept = re.search(r"the same command goes on from its checkpoint at step (\d+)$", text, re.M)
    assert kept, text
    deadline = time.monotonic() + 30
    while left := marked(mark):
        assert time.monotonic() < deadline, f"processes left behind: {left}"
        time.sleep(0.2)
    return int(kept[1])


def marked(mark: str) -> list[str]:
    """Command lines of all processes that were started under `mark`."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (place / "environ").read_bytes():
                found.append((place / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except (OSError, PermissionError):
            continue
    return found

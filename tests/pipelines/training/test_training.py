"""All stages as real Ray Train jobs on two workers, chained, interrupted, killed and resumed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from data.loader import loader
from data.shards import write_dataset
from data.synthetic import make_pair
from modeling.model_dir import load_model, read_card, read_config
from pipelines.config.pipeline import PipelineConfig
from pipelines.config.stages import ComputeConfig
from pipelines.stages.encode import encode_dataset, to_pixels
from pipelines.training import checkpoint
from pipelines.training.checkpoint import CheckpointError
from pipelines.training.loop import Training, make_setting
from pipelines.training.run_folder import Progress, RunFolder, TrainingError
from pipelines.training.session import ray_session
from pipelines.training.trainer import StageOutcome, make_job, train_stage
from tests.pipelines.conftest import FRAMES, HEIGHT, WIDTH
from tests.pipelines.training.test_engines import on_two_ranks

ROOT = Path(__file__).parents[3]


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
        checkpoint_every=3,
        generator_every=2,
        learning_rate=1e-3,
        critic_learning_rate=1e-3,
    )
    return config


class Follow:
    """Keeps every report; may kill the reporting worker once."""

    def __init__(self, kill_after: int | None = None) -> None:
        self.reports: list[Progress] = []
        self.kill_after = kill_after

    def __call__(self, report: Progress) -> None:
        self.reports.append(report)
        if self.kill_after is not None and report.step >= self.kill_after:
            os.kill(report.pid, signal.SIGKILL)
            self.kill_after = None

    def losses(self, name: str = "loss") -> list[float]:
        return [report.metrics[name] for report in self.reports]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def pairs(folder: Path) -> str:
    uri = str(folder / "pairs")
    samples = [
        partial(make_pair, seed, height=HEIGHT, width=WIDTH, frames=FRAMES) for seed in range(8)
    ]
    write_dataset(uri, samples, made_by={}, samples_per_shard=4)
    return uri


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with ray_session(ComputeConfig()):
        yield


def run(
    stage: str, folder: Path, start: Path, dataset: str, follow: Follow, **extra: Any
) -> StageOutcome:
    return train_stage(
        stage,
        config_in(folder),
        start=start,
        dataset=dataset,
        output=folder / "models" / stage,
        extra=extra,
        on_progress=follow,
    )


@pytest.fixture(scope="module")
def vae(ray: None, folder: Path, tiny_model: Path, pairs: str) -> tuple[StageOutcome, Follow]:
    follow = Follow()
    return run("vae", folder, tiny_model, pairs, follow), follow


@pytest.fixture(scope="module")
def encoded(folder: Path, pairs: str, vae: tuple[StageOutcome, Follow]) -> str:
    uri = str(folder / "encoded")
    encode_dataset(pairs, uri, vae[0].model_dir, batch_size=4, samples_per_shard=4)
    return uri


@pytest.fixture(scope="module")
def foundation(
    folder: Path, encoded: str, vae: tuple[StageOutcome, Follow]
) -> tuple[StageOutcome, Follow]:
    follow = Follow()
    return run("foundation", folder, vae[0].model_dir, encoded, follow), follow


@pytest.fixture(scope="module")
def causal(
    folder: Path, encoded: str, foundation: tuple[StageOutcome, Follow]
) -> tuple[StageOutcome, Follow]:
    follow = Follow()
    return run("causal", folder, foundation[0].model_dir, encoded, follow), follow


def test_the_vae_learns_and_its_model_standardises_latents(
    vae: tuple[StageOutcome, Follow], pairs: str, tiny_model: Path
) -> None:
    outcome, follow = vae
    assert [report.step for report in follow.reports] == list(range(3, 61, 3))
    assert torch.isfinite(torch.tensor(follow.losses())).all()

    start, model = load_model(tiny_model), load_model(outcome.model_dir)
    batch = next(iter(loader(pairs, batch_size=8, shuffle=False, epochs=1)))
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
    card = read_card(outcome.model_dir)
    assert card["stage"] == "vae"
    assert card["dataset"]["hash"]
    assert card["parent"]["fingerprint"]


@torch.no_grad()
def reconstruction_db(vae: Any, clips: torch.Tensor) -> float:
    decoded, _ = vae.decode(vae.encode(clips)[0])
    return float(10 * torch.log10(4 / (decoded - clips).square().mean()))


def test_the_foundation_learns(foundation: tuple[StageOutcome, Follow]) -> None:
    outcome, follow = foundation
    losses = follow.losses()
    assert losses[-1] < 0.8 * losses[0]
    assert outcome.metrics["loss"] == losses[-1]
    checkpoints = outcome.model_dir.parent.parent / "checkpoints"
    assert not list(checkpoints.glob("foundation-*")), "a finished stage leaves its checkpoints"


def test_the_causal_stage_goes_on_from_the_foundation(
    causal: tuple[StageOutcome, Follow], foundation: tuple[StageOutcome, Follow]
) -> None:
    outcome, follow = causal
    assert torch.isfinite(torch.tensor(follow.losses())).all()
    assert read_config(outcome.model_dir) == read_config(foundation[0].model_dir)


def test_distill_interrupted_killed_and_resumed_equals_an_unbroken_run(
    folder: Path,
    encoded: str,
    foundation: tuple[StageOutcome, Follow],
    causal: tuple[StageOutcome, Follow],
    tmp_path: Path,
) -> None:
    start, teacher = causal[0].model_dir, foundation[0].model_dir

    on_two_ranks(partial(unbroken, start=start, teacher=teacher, encoded=encoded), tmp_path)
    expected, _ = RunFolder(tmp_path).reports(0)
    assert [report.step for report in expected] == list(range(1, 31))

    kept = interrupted(folder, start, teacher, encoded)
    assert 3 < kept < 20  # some steps after it was told to stop

    follow = Follow(kill_after=23)
    outcome = run("distill", folder, start, encoded, follow, teacher=teacher)
    steps = [report.step for report in follow.reports]
    again = [report.step for report in follow.reports if report.resumed]
    assert again[0] == kept + 1
    assert again[1] in (22, 25)  # after it was killed, from the last third step that was saved
    assert steps[-3:] == [28, 29, 30]

    losses = {report.step: report.metrics for report in expected}
    for report in follow.reports:
        for name in ("loss", "dmd_loss", "regression_loss", "critic_loss"):
            # A metric of generator steps is reported once the resumed run has seen one.
            if name in report.metrics:
                assert report.metrics[name] == losses[report.step][name], (report.step, name)
    made, wanted = load_model(outcome.model_dir), load_model(tmp_path / "model")
    assert made.transformer is not None
    assert wanted.transformer is not None
    for name, value in wanted.transformer.state_dict().items():
        assert torch.equal(made.transformer.state_dict()[name], value), name


def unbroken(rank: int, folder: Path, *, start: Path, teacher: Path, encoded: str) -> None:
    """The distill stage without Ray, without a pause; then two ways to fail."""
    config = config_in(folder)
    extra = {"teacher": teacher}
    job = make_job("distill", config, start, encoded, folder / "model", extra)
    here = RunFolder(folder)
    training = Training(setting(job, rank), here)
    training.run(job, lambda part, step: None)

    full = folder / f"full-{rank}"
    full.mkdir()
    (full / f"worker-{rank}.pt").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"stage distill .* step 9 .* No space left"):
        checkpoint.save(full, training.setting, training.stage, 9, {}, 0.0)

    config.foundation.learning_rate = 1e30
    job = make_job("foundation", config, start, encoded, folder / "never", {})
    training = Training(setting(job, rank), RunFolder(folder / "nan"))
    (folder / "nan").mkdir(exist_ok=True)
    with pytest.raises(TrainingError, match=r"stage foundation: .* not finite at step \d+ "):
        training.run(job, lambda part, step: None)
    assert not (folder / "never").exists()


def setting(job: dict[str, Any], rank: int) -> Any:
    return make_setting(job, rank, 2, torch.device("cpu"))


SCRIPT = """
import sys
from pathlib import Path
from tests.pipelines.training.test_training import config_in
from pipelines.training.trainer import train_stage
folder, start, teacher, encoded = sys.argv[1:]
train_stage(
    "distill", config_in(Path(folder)), start=Path(start), dataset=encoded,
    output=Path(folder) / "models" / "distill", extra={"teacher": Path(teacher)},
)
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

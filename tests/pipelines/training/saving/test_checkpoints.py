"""Checkpoints of the real stages on gloo ranks, without Ray: damaged, on other numbers of workers,
with other settings, by the clock and when the driver is stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, distributed

from data.shards import write_dataset
from data.synthetic import make_pair
from modeling.model_dir import load_model
from pipelines.config.pipeline import PipelineConfig
from pipelines.stages.encode import encode_dataset
from pipelines.training import checkpoint
from pipelines.training.checkpoint import CheckpointError
from pipelines.training.job import make_job
from pipelines.training.loop import Training
from pipelines.training.methods.base import Setting
from pipelines.training.run_folder import RunFolder
from pipelines.training.saver import Write
from pipelines.training.zero.inside import full_weights, import_deepspeed
from tests.pipelines.sizes import FRAMES, HEIGHT, WIDTH
from tests.pipelines.training.ranks import on_ranks

pytestmark = pytest.mark.slow

import_deepspeed()  # once for all ranks
Change = Callable[[PipelineConfig], None]


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> str:
    folder = tmp_path_factory.mktemp("encoded")
    samples = [
        partial(make_pair, seed, height=HEIGHT, width=WIDTH, frames=FRAMES) for seed in range(12)
    ]
    write_dataset(str(folder / "pairs"), samples, made_by={}, samples_per_shard=4)
    uri = str(folder / "encoded")
    encode_dataset(str(folder / "pairs"), uri, tiny_model, batch_size=4, samples_per_shard=4)
    return uri


def config_in(folder: Path, world: int) -> PipelineConfig:
    config = PipelineConfig(output=str(folder))
    config.compute.workers = world
    stage = config.distill
    stage.steps, stage.log_every, stage.checkpoint_every, stage.warmup_steps = 4, 1, 1, 0
    stage.batch_size = 6 // world  # the same clips together
    stage.generator_every, stage.learning_rate, stage.critic_learning_rate = 2, 1e-3, 1e-3
    return config


class Place:
    """A folder of checkpoints of the distill stage, and what every rank needs."""

    def __init__(self, folder: Path, model: Path, encoded: str) -> None:
        self.folder, self.model, self.encoded = folder, model, encoded

    def setting(self, rank: int, change: Change | None = None) -> Setting:
        world = distributed.get_world_size()
        config = config_in(self.folder, world)
        if change is not None:
            change(config)
        job = make_job(
            "distill", config, start=self.model, dataset=self.encoded,
            output=self.folder / "model", models={"teacher": self.model},
        )  # fmt: skip
        return Setting(job, rank, world, torch.device("cpu"))

    def training(self, rank: int, change: Change | None = None) -> Training:
        return Training(self.setting(rank, change), RunFolder(self.folder))

    def run(self, rank: int, folder: Path, change: Change | None = None) -> None:
        """Train to the end, keeping every checkpoint as Ray does."""
        self.training(rank, change).run(self.keep)

    def keep(self, write: Write, step: int) -> None:
        write(self.folder / f"checkpoint_{step:06}")
        distributed.barrier()


@pytest.fixture
def place(tmp_path: Path, tiny_model: Path, encoded: str) -> Place:
    for name in ("said.txt", "progress.jsonl"):
        (tmp_path / name).touch()
    return Place(tmp_path, tiny_model, encoded)


def state_of(training: Training) -> dict[str, Tensor]:
    """All weights and averages, whole; a collective."""
    state = {
        f"{name}.{key}": value
        for name, engine in training.stage.engines.items()
        for key, value in full_weights(engine).items()
    }
    assert training.stage.ema is not None
    average = training.stage.ema.full_weights()
    return state | {f"ema.{key}": value for key, value in average.items()}


def look(rank: int, folder: Path, *, place: Place, name: str, change: Change | None = None) -> None:
    """Leave the state that a training would go on from."""
    training = place.training(rank, change)
    state = state_of(training) | {
        "done": torch.tensor(training.done),
        "epochs": torch.tensor(training.epochs),
    }
    if rank == 0:
        torch.save(state, folder / f"{name}.pt")


def steps_on(
    rank: int, folder: Path, *, place: Place, name: str, change: Change | None = None
) -> None:
    """Look, and take the critic's next steps, on batches that do not depend on the workers."""
    look(rank, folder, place=place, name=f"at-{name}", change=change)
    training = place.training(rank, change)
    world, critic = distributed.get_world_size(), training.stage.engines["critic"]
    for step in range(2):
        draw = torch.Generator().manual_seed(step)
        whole = [torch.randn(6, *shape, generator=draw) for shape in SHAPES]
        noisy, source, text, wanted = (value.chunk(world)[rank] for value in whole)
        timestep = torch.full((len(noisy),), 500.0)
        from modeling.diffusion.attention import bidirectional
        from pipelines.training.zero.engines import set_learning_rate, update

        set_learning_rate(critic, 1e-3)
        made = critic(noisy, source, timestep, text, bidirectional(noisy.shape[1]))
        update(critic, (made - wanted).square().mean())
    weights = full_weights(critic)
    if rank == 0:
        torch.save(weights, folder / f"on-{name}.pt")


SHAPES = ((6, 16, 4, 6), (6, 16, 4, 6), (8, 64), (6, 16, 4, 6))


def zero(stage: int, config: PipelineConfig) -> None:
    config.compute.zero_stage = stage


def rounded(stage: int, config: PipelineConfig) -> None:
    config.compute.zero_stage, config.compute.precision = stage, "bf16"
    config.compute.offload = "weights"


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("stage", "other"), [(0, 2), (2, 3), (3, 0)])
def test_any_workers_and_zero_stage_go_on_with_the_same_networks_averages_and_moments(
    place: Place, tmp_path: Path, stage: int, other: int
) -> None:
    change = partial(zero, stage)
    on_ranks(2, partial(place.run, change=change), tmp_path)
    for world in (2, 1, 3):
        change = partial(zero, other if world == 1 else stage)
        on_ranks(world, partial(steps_on, place=place, name=str(world), change=change), tmp_path)
    same, moved = torch.load(tmp_path / "at-2.pt"), torch.load(tmp_path / "on-2.pt")
    assert int(same["done"]) == 3
    assert float(same["epochs"]) == pytest.approx(1.5)
    for world in (1, 3):
        state = torch.load(tmp_path / f"at-{world}.pt")
        for name, value in same.items():
            assert torch.equal(state[name], value), (world, name)
        for name, value in torch.load(tmp_path / f"on-{world}.pt").items():
            torch.testing.assert_close(value, moved[name], atol=1e-6, rtol=1e-5, msg=name)
    assert not list(tmp_path.glob(".universal"))
    if stage == 2:  # float32 masters are the same in the other precision
        change = partial(rounded, other)
        on_ranks(2, partial(look, place=place, name="rounded", change=change), tmp_path)
        for name, value in torch.load(tmp_path / "rounded.pt").items():
            assert torch.equal(same[name], value), name
        said = (tmp_path / "said.txt").read_text().splitlines()[-1]
        assert said.endswith(
            "compute.zero_stage 2 -> 3, compute.precision fp32 -> bf16, "
            "compute.offload nothing -> weights"
        ), said


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    place: Place, tmp_path: Path
) -> None:
    on_ranks(2, place.run, tmp_path)
    newest, middle, oldest = RunFolder(tmp_path).checkpoints()
    on_ranks(2, partial(look, place=place, name="good"), tmp_path)
    weights = sorted(newest.rglob("*optim_states.pt"))[-1]  # of the second rank
    weights.write_bytes(weights.read_bytes()[:-100])
    on_ranks(2, partial(look, place=place, name="before"), tmp_path)
    assert int(torch.load(tmp_path / "good.pt")["done"]) == 3
    assert int(torch.load(tmp_path / "before.pt")["done"]) == 2
    said = (tmp_path / "said.txt").read_text()
    assert f"damaged and passed over: {newest.name}: {weights.relative_to(newest)}" in said
    assert said.endswith("goes on from its checkpoint at step 2\n")

    (middle / "manifest-1.json").unlink()  # the upload of one rank never came
    on_ranks(2, partial(look, place=place, name="oldest"), tmp_path)
    assert int(torch.load(tmp_path / "oldest.pt")["done"]) == 1
    assert (newest.exists(), middle.exists()) == (True, False)  # of no use to anybody
    damage(oldest / "worker-0.pt")
    on_ranks(2, partial(refuses, place=place, match=r"no checkpoint in .* is whole"), tmp_path)


def refuses(
    rank: int, folder: Path, *, place: Place, match: str, change: Change | None = None
) -> None:
    with pytest.raises(CheckpointError, match=match):
        place.training(rank, change)


def other_rates(config: PipelineConfig) -> None:
    config.distill.steps, config.distill.learning_rate = 9, 5e-4
    config.distill.weight_decay = 0.25
    config.compute.sequence_parallel = 2


def fewer_steps(config: PipelineConfig) -> None:
    config.distill.steps = 2


def check_rates(rank: int, folder: Path, *, place: Place) -> None:
    training = place.training(rank, other_rates)
    assert training.done == 3
    network = training.stage.engines["generator"].module
    assert (network.sequence.rank, network.sequence.size) == (rank, 2)
    for engine in training.stage.engines.values():
        decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
        assert decays == [0.25, 0.0]


def test_other_settings_go_on_and_are_named_and_what_cannot_be_meant_is_refused(
    place: Place, tmp_path: Path
) -> None:
    on_ranks(2, place.run, tmp_path)
    on_ranks(2, partial(check_rates, place=place), tmp_path)
    said = (tmp_path / "said.txt").read_text()
    assert said.count("goes on from its checkpoint at step 3, with other settings: ") == 1
    for text in ("distill.steps 4 -> 9", "learning_rate 0.001 -> 0.0005", "decay 0.01 -> 0.25"):
        assert text in said
    assert "compute.sequence_parallel 1 -> 2" in said
    assert "compute.workers" not in said
    match = r"taken after 3 steps and distill.steps is 2"
    on_ranks(2, partial(refuses, place=place, match=match, change=fewer_steps), tmp_path)
    files = sorted(path.name for path in tmp_path.glob("checkpoint_*"))
    assert files == ["checkpoint_000001", "checkpoint_000002", "checkpoint_000003"]


def by_the_clock(config: PipelineConfig) -> None:
    config.distill.checkpoint_every, config.distill.checkpoint_minutes = 100, 1e-9


def seldom(config: PipelineConfig) -> None:
    config.distill.checkpoint_every = 100


def stopped(rank: int, folder: Path, *, place: Place) -> None:
    setting = place.setting(rank, seldom)
    if rank == 0:
        RunFolder(folder).ask_to_stop()
    distributed.barrier()
    done = Training(setting, RunFolder(folder)).run(place.keep)
    assert done == {"stopped": 2}  # a step after the first that could know
    assert checkpoint.choose(RunFolder(folder), setting)[0] == folder / "checkpoint_000002"


def test_the_state_is_saved_by_the_clock_and_when_the_driver_is_stopped(
    place: Place, tmp_path: Path
) -> None:
    on_ranks(2, partial(place.run, change=seldom), tmp_path)
    assert not RunFolder(tmp_path).checkpoints()
    assert load_model(tmp_path / "model").transformer is not None
    shutil.rmtree(tmp_path / "model")
    on_ranks(2, partial(stopped, place=place), tmp_path)
    assert not (tmp_path / "model").exists()
    (tmp_path / "stop").unlink()
    shutil.rmtree(tmp_path / "checkpoint_000002")
    on_ranks(2, partial(place.run, change=by_the_clock), tmp_path)
    assert [path.name for path in RunFolder(tmp_path).checkpoints()] == ["checkpoint_000002"]


def test_checkpoints_of_another_training_of_the_stage_are_known(tmp_path: Path) -> None:
    ours = RunFolder(tmp_path / "distill-a")
    for name in ("distill-a", "distill-b", "causal-b"):
        (tmp_path / name / "checkpoint_1").mkdir(parents=True)
    (tmp_path / "distill-empty").mkdir()
    assert ours.others() == [tmp_path / "distill-b"]
    (tmp_path / "distill-a" / "checkpoint_manager_snapshot.json").touch()  # Ray's list of them
    assert ours.checkpoints() == [tmp_path / "distill-a" / "checkpoint_1"]
    assert ours.saved_step() == 0  # of one without a manifest
    (tmp_path / "distill-a" / "checkpoint_1" / "manifest-0.json").write_text('{"step": 7}')
    assert ours.saved_step() == 7

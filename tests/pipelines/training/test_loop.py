"""The training loop in the test's own process, with plain PyTorch in DeepSpeed's place.

Once over a stage that does as it is told, for what the loop counts, logs, saves and refuses; once
over the real stages, for what a checkpoint has to hold.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import ray.train
import ray.train.torch
import torch
from torch import Tensor, nn

from data.loader import Loader, loader
from data.sample import EncodedPair
from data.shards import write_dataset
from infra.runtime.errors import UserError
from modeling.model_dir import load_model, read_card, read_config
from pipelines.config.load import to_plain
from pipelines.config.pipeline import PipelineConfig
from pipelines.training import loop
from pipelines.training.engines import learning_rate_at
from pipelines.training.loop import Training, make_setting, train_loop
from pipelines.training.methods.base import Draw, Exported, Setting
from pipelines.training.methods.causal import CausalTraining
from pipelines.training.methods.distill import DistillTraining
from pipelines.training.methods.foundation import FoundationTraining
from pipelines.training.methods.table import build_stage
from pipelines.training.methods.vae import VaeTraining
from pipelines.training.run_folder import Progress, RunFolder, TrainingError
from pipelines.training.watch.meter import Meter
from tests.pipelines.training.plain import PlainEngine, use_plain_engines

pytestmark = pytest.mark.usefixtures("alone")
STAGES = ("vae", "foundation", "causal", "distill")
PAIRS = 6
TIMES = ("seconds_per_step", "data_seconds_per_step", "tflops")


def encoded_pair(seed: int) -> EncodedPair:
    rng = np.random.default_rng(seed)
    clip = (6, 16, 4, 6)
    return EncodedPair(
        source=rng.standard_normal(clip, np.float32),
        target=rng.standard_normal(clip, np.float32),
        text=rng.standard_normal((24, 64), np.float32),
        mask=np.zeros((6, 4, 6), np.float32),
        instruction=str(seed),
        fps=16.0,
        video_shape=(21, 32, 48),
    )


def write(uri: Path, first: int = 0) -> str:
    samples = [partial(encoded_pair, seed) for seed in range(first, first + PAIRS)]
    write_dataset(str(uri), samples, made_by={}, samples_per_shard=2)
    return str(uri)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("loop") / "encoded")


@pytest.fixture(autouse=True)
def _engines(monkeypatch: pytest.MonkeyPatch) -> None:
    use_plain_engines(monkeypatch)


@dataclass
class Bench:
    """One stage's training in a folder of its own."""

    stage: str
    dataset: str
    start: Path
    folder: Path
    config: PipelineConfig = field(default_factory=PipelineConfig)
    saved: list[tuple[int, Path]] = field(default_factory=list)  # (steps done, copy)
    heldout: str | None = None

    def set(self, **section: Any) -> Bench:
        for name, value in section.items():
            assert hasattr(getattr(self.config, self.stage), name), name
            setattr(getattr(self.config, self.stage), name, value)
        return self

    def job(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "config": to_plain(self.config),
            "start": str(self.start),
            "dataset": self.dataset,
            "output": str(self.folder / "model"),
            "models": {"teacher": str(self.start)},
            "heldout": self.heldout,
            "folder": str(self.folder),
            "card": {"stage": self.stage},
        }

    def setting(self, rank: int = 0, world_size: int = 1) -> Setting:
        return make_setting(self.job(), rank, world_size, torch.device("cpu"))

    def training(self, saved: Path | None = None, rank: int = 0, world_size: int = 1) -> Training:
        folder = RunFolder(self.folder)
        folder.open()
        if saved is not None:
            shutil.copytree(saved, self.folder / "checkpoint_000000")
        return Training(self.setting(rank, world_size), folder)

    def run(self, saved: Path | None = None) -> dict[str, Any]:
        return self.training(saved).run(self.job(), self.keep)

    def keep(self, part: Path, step: int) -> None:
        copy = self.folder / f"saved-{step}"
        shutil.copytree(part, copy)
        self.saved.append((step, copy))

    @property
    def reports(self) -> list[Progress]:
        return RunFolder(self.folder).reports(0)[0]

    @property
    def said(self) -> list[str]:
        return RunFolder(self.folder).said(0)[0]


@pytest.fixture
def bench(tiny_model: Path, encoded: str, heldout: str, tmp_path: Path) -> Callable[..., Bench]:
    def make(stage: str = "foundation", name: str = "run") -> Bench:
        dataset = heldout if stage == "vae" else encoded
        made = Bench(stage, dataset, tiny_model, tmp_path / name)
        if stage == "vae":
            made.set(batch_size=1, crop=16, statistics_clips=1)
        return made

    return make


@dataclass
class Scripted:
    """A stage that gives back what `script(step, micro)` says, and notes what it is asked."""

    script: Callable[[int, int], dict[str, float]]
    exported: Exported = field(default_factory=Exported)
    asked: list[tuple[int, int]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    rates: list[tuple[float, float]] = field(default_factory=list)
    ema: None = None

    def build(self, setting: Setting, model: Any) -> Scripted:
        self.setting, section = setting, setting.section
        self.engines = {
            name: PlainEngine(nn.Linear(1, 1), setting.config.compute, section, 9.0)
            for name in ("one", "two")
        }
        self.learning_rates = {"one": section.learning_rate, "two": 3 * section.learning_rate}
        return self

    def step(self, batch: dict[str, Any], draw: Draw) -> dict[str, Tensor]:
        number = torch.rand(1, generator=draw.own).item()
        drawn = [
            torch.rand(1, generator=self.setting.draw(draw.step, micro).own).item()
            for micro in range(self.setting.section.grad_accumulation)
        ]
        micro = drawn.index(number)
        self.asked.append((draw.step, micro))
        self.keys += batch["key"]
        one, two = (e.optimizer.param_groups[0]["lr"] for e in self.engines.values())
        self.rates.append((one, two))
        return {k: torch.tensor(v) for k, v in self.script(draw.step, micro).items()}

    def flops(self, batch: dict[str, Any], step: int) -> float:
        return 1e12 * (step + 1)

    def export(self) -> Exported:
        return self.exported


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scripted]:
    def use(script: Callable[[int, int], dict[str, float]], *exported: Exported) -> Scripted:
        stage = Scripted(script, *exported)
        monkeypatch.setattr(loop, "build_stage", stage.build)
        return stage

    return use


def test_steps_accumulation_batches_and_learning_rates(
    bench: Callable[..., Bench], scripted: Callable[..., Scripted]
) -> None:
    run = bench().set(
        steps=5, grad_accumulation=2, warmup_steps=2, learning_rate=0.1, final_learning_rate=0.2
    )
    run.config.seed = 3
    stage = scripted(lambda step, micro: {"loss": 1.0})
    made = run.run()
    assert made["steps"] == 5
    assert stage.asked == [(step, micro) for step in range(5) for micro in range(2)]
    batches = iter(loader(run.dataset, batch_size=1, seed=3))
    assert stage.keys == [next(batches)["key"][0] for _ in range(10)]
    section = run.config.foundation
    wanted = [learning_rate_at(step, section, 0.1) for step in range(5) for _ in range(2)]
    assert [one for one, _ in stage.rates] == wanted
    assert [two for _, two in stage.rates] == pytest.approx([3 * rate for rate in wanted])


@pytest.mark.parametrize("rank", [0, 1])
def test_every_worker_reads_its_own_part(
    bench: Callable[..., Bench], scripted: Callable[..., Scripted], rank: int
) -> None:
    stage = scripted(lambda step, micro: {"loss": 1.0})
    run = bench().set(steps=4, batch_size=2)
    run.training(rank=rank, world_size=2).run(run.job(), run.keep)
    batches = iter(loader(run.dataset, batch_size=2, rank=rank, world_size=2))
    assert stage.keys == [key for _ in range(4) for key in next(batches)["key"]]


@pytest.mark.parametrize(
    ("steps", "log", "save", "reported", "saved"),
    [
        (7, 3, 100, [3, 6, 7], []),
        (6, 3, 2, [2, 3, 4, 6], [2, 4]),  # reported, and so checked, before every checkpoint
        (6, 100, 3, [3, 6], [3]),  # the end is exported, not saved
        (1, 1, 1, [1], []),
    ],
)
def test_when_it_reports_and_saves(
    bench: Callable[..., Bench],
    scripted: Callable[..., Scripted],
    steps: int,
    log: int,
    save: int,
    reported: list[int],
    saved: list[int],
) -> None:
    scripted(lambda step, micro: {"loss": 1.0})
    run = bench().set(steps=steps, log_every=log, checkpoint_every=save)
    run.run()
    assert [report.step for report in run.reports] == reported
    assert {report.steps for report in run.reports} == {steps}
    assert [step for step, _ in run.saved] == saved
    assert not any(run.folder.glob(".part*"))


def test_what_is_logged_under_which_name(
    bench: Callable[..., Bench], scripted: Callable[..., Scripted], monkeypatch: Any
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def script(step: int, micro: int) -> dict[str, float]:
        clock[0] += 0.25
        metrics = {"loss": 10.0 * step + micro}
        return metrics | ({"norm": 7.0 + step} if step in (1, 4) and micro else {})

    scripted(script)
    run = bench().set(steps=6, grad_accumulation=2, log_every=2, warmup_steps=3, learning_rate=0.1)
    made = run.run()
    first, second, third = run.reports
    assert first.metrics["loss"] == pytest.approx(5.5)  # the mean of 0, 1, 10, 11
    assert second.metrics["loss"] == pytest.approx(25.5)
    assert third.metrics["loss"] == pytest.approx(45.5)
    assert [r.metrics["norm"] for r in run.reports] == [8.0, 8.0, 11.0]  # kept until there is more
    assert [r.metrics["learning_rate"] for r in run.reports] == pytest.approx([0.05, 0.1, 0.1])
    rates = [(r.metrics["learning_rate_one"], r.metrics["learning_rate_two"]) for r in run.reports]
    assert rates == [pytest.approx((r, 3 * r)) for r in (0.05, 0.1, 0.1)]
    assert [r.seconds_per_step for r in run.reports] == pytest.approx([0.5] * 3)  # not per batch
    assert [r.metrics["seconds_per_step"] for r in run.reports] == pytest.approx([0.5] * 3)
    # Two batches a step of 1, 2, ... TFLOP each, in half a second.
    assert [r.metrics["tflops"] for r in run.reports] == pytest.approx([6.0, 14.0, 22.0])
    assert {r.metrics["data_seconds_per_step"] for r in run.reports} == {0.0}
    assert made["metrics"] == {"loss": 45.5, "norm": 11.0}
    assert read_card(run.folder / "model")["metrics"] == made["metrics"]
    assert {r.resumed for r in run.reports} == {False}
    for report in run.reports:
        memory = psutil.virtual_memory().total / 1e6
        assert 0 < report.system["system/system_memory_usage_megabytes"] < memory
        assert 0 <= report.system["system/cpu_utilization_percentage"] <= 100
        assert report.system["system/disk_available_megabytes"] > 0


def test_waiting_for_data_is_told_apart(
    bench: Callable[..., Bench], scripted: Callable[..., Scripted], monkeypatch: Any
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def slowly(batches: Any) -> Any:
        for batch in loader_iter(batches):
            clock[0] += 3.0
            yield batch

    def script(step: int, micro: int) -> dict[str, float]:
        clock[0] += 1.0
        return {"loss": 1.0}

    scripted(script)
    run = bench().set(steps=4, grad_accumulation=2, log_every=2)
    loader_iter = Loader.__iter__
    monkeypatch.setattr(Loader, "__iter__", slowly)
    run.run()
    assert [r.metrics["data_seconds_per_step"] for r in run.reports] == [6.0, 6.0]
    assert [r.seconds_per_step for r in run.reports] == [8.0, 8.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_what_is_not_finite_is_never_saved(
    bench: Callable[..., Bench], scripted: Callable[..., Scripted], name: str, value: float
) -> None:
    def script(step: int, micro: int) -> dict[str, float]:
        bad = (step, micro) in ((2, 0), (3, 1))
        return {"loss": 1.0, "grad_norm": 1.0} | ({name: value} if bad else {})

    stage = scripted(script)
    run = bench().set(steps=20, grad_accumulation=2, log_every=10, checkpoint_every=2)
    with pytest.raises(TrainingError) as refused:
        run.run()
    message = str(refused.value)
    assert message.startswith(
        "stage foundation: the loss or gradient norm is not finite at step 3 "
    )
    assert "lower foundation.learning_rate or foundation.grad_clip" in message
    assert stage.asked[-1] == (3, 1)
    assert [step for step, _ in run.saved] == [2]
    assert [report.step for report in run.reports] == [2]
    assert not (run.folder / "model").exists()


def test_the_very_first_step_is_guarded_too(
    bench: Callable[..., Bench], scripted: Callable[..., Scripted]
) -> None:
    scripted(lambda step, micro: {"loss": math.nan if step == 0 else 1.0})
    with pytest.raises(TrainingError, match="not finite at step 1 on at least one worker"):
        bench().set(steps=2, log_every=2).run()


class OtherRank:
    """The other one of two workers, in a collective's place."""

    def __init__(self, bad_step: int, means: list[float]) -> None:
        self.bad_step, self.means = bad_step, means

    def __call__(self, tensor: Tensor, op: Any = torch.distributed.ReduceOp.SUM) -> None:
        if op == torch.distributed.ReduceOp.MAX:
            # First bad step, seconds of waiting, GiB held.
            tensor.copy_(torch.maximum(tensor, torch.tensor([self.bad_step, 2.5, 60.0])))
        else:
            assert op == torch.distributed.ReduceOp.SUM
            tensor += torch.tensor(self.means)


@pytest.mark.parametrize("rank", [0, 1])
def test_means_are_over_all_workers_and_the_first_reports(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    run = bench()
    folder = RunFolder(run.folder)
    folder.open()
    meter = Meter(run.setting(rank, 2), folder, resumed=True)
    monkeypatch.setattr(torch.distributed, "all_reduce", OtherRank(-1, [6.0, 1.0]))
    meter.add({"loss": torch.tensor(1.0), "psnr": torch.tensor(20.0)}, 0)
    meter.add({"loss": torch.tensor(3.0), "psnr": torch.tensor(22.0)}, 1)
    meter.report(2, 0.5)
    assert meter.last == {"loss": 4.0, "psnr": 11.0}
    reports = run.reports
    assert len(reports) == (rank == 0)
    for report in reports:
        assert report.resumed
        assert report.pid > 0
        assert report.metrics["learning_rate"] == 0.5
        assert report.metrics["data_seconds_per_step"] == 2.5  # the slowest worker's
        assert report.metrics["gpu_memory_gib"] == 60.0
    meter.add({"loss": torch.tensor(1.0), "psnr": torch.tensor(20.0)}, 2)
    meter.report(3, 0.5)
    assert [report.resumed for report in run.reports] == [True, False][: len(run.reports)]

    monkeypatch.setattr(torch.distributed, "all_reduce", OtherRank(4, [1.0, 1.0]))
    meter.add({"loss": torch.tensor(1.0), "psnr": torch.tensor(20.0)}, 5)
    with pytest.raises(TrainingError, match="not finite at step 5 on at least one worker"):
        meter.report(6, 0.5)


def weights(folder: Path) -> dict[str, Tensor]:
    model = load_model(folder)
    assert model.transformer is not None
    assert model.vae is not None
    parts = {"transformer": model.transformer, "vae": model.vae}
    return {f"{n}.{k}": v for n, part in parts.items() for k, v in part.state_dict().items()}


@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_training_equals_an_unbroken_one(bench: Callable[..., Bench], stage: str) -> None:
    """Bit for bit: weights, average, optimizer, place in the data and in the schedule."""
    given: dict[str, Any] = {
        "steps": 6,
        "checkpoint_every": 2,
        "log_every": 1,
        "grad_accumulation": 2,
        "learning_rate": 1e-2,
        "final_learning_rate": 0.1,
        "warmup_steps": 3,
    }
    if stage == "distill":
        given |= {"generator_every": 2, "critic_learning_rate": 1e-2, "ema_decay": 0.3}
    whole = bench(stage, "whole").set(**given)
    whole.run()
    assert [step for step, _ in whole.saved] == [2, 4]
    assert whole.said == []
    for done, saved in whole.saved:
        rest = bench(stage, f"rest-{done}").set(**given)
        rest.run(saved)
        assert [report.step for report in rest.reports] == list(range(done + 1, 7))
        assert [report.resumed for report in rest.reports] == [True] + [False] * (5 - done)
        assert rest.said == [f"goes on from its checkpoint at step {done}"]  # nothing else changed
        for mine, right in zip(rest.reports, whole.reports[done:], strict=True):
            for name, value in mine.metrics.items():
                assert name in TIMES or value == right.metrics[name], name
        found, wanted = weights(rest.folder / "model"), weights(whole.folder / "model")
        assert all(torch.equal(found[name], value) for name, value in wanted.items())
        assert read_config(rest.folder / "model") == read_config(whole.folder / "model")
    trained = weights(whole.start)
    part = "vae" if stage == "vae" else "transformer"
    changed = {
        name.split(".")[0] for name in trained if not torch.equal(trained[name], wanted[name])
    }
    assert changed == {part}


def test_a_checkpoint_of_something_else_is_refused(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    first = bench().set(steps=3, checkpoint_every=2)
    first.run()
    ((_, saved),) = first.saved

    def other(name: str) -> Bench:
        return bench("foundation", name).set(steps=3)

    same = other("same").training(saved)
    assert (same.done, same.epochs) == (2, pytest.approx(2 / PAIRS))
    run = other("zero")
    run.config.compute.zero_stage = 1
    with pytest.raises(ValueError, match=r"compute.zero_stage was 2 and is 1; set .*, or move"):
        run.training(saved)
    run = other("bf16")
    run.config.compute.precision = "bf16"
    with pytest.raises(ValueError, match=r"compute.precision was 'fp32' and is 'bf16'"):
        run.training(saved)
    run = bench("distill", "networks").set(steps=3)
    with pytest.raises(ValueError, match=r"networks was \['transformer'\] and is \['critic', 'gen"):
        run.training(saved)
    run = other("steps").set(steps=1)
    with pytest.raises(ValueError, match=r"taken after 2 steps and foundation.steps is 1; set it"):
        run.training(saved)
    run = other("data")
    run.dataset = write(tmp_path / "other content", first=50)  # of the same size
    with pytest.raises(ValueError, match="saved with dataset"):
        run.training(saved)
    run = other("seed")
    run.config.seed = 1
    with pytest.raises(ValueError, match="saved with seed 0, now it is 1"):
        run.training(saved)


def test_a_full_disk_is_named_and_leaves_no_part(
    bench: Callable[..., Bench], scripted: Callable[..., Scripted]
) -> None:
    def full(part: Path, step: int) -> None:
        raise OSError(28, "No space left on device")

    scripted(lambda step, micro: {"loss": 1.0})
    run = bench().set(steps=5, checkpoint_every=2)
    with pytest.raises(ValueError, match=r"stage foundation .* at step 2 .*No space left"):
        run.training().run(run.job(), full)
    assert not any(run.folder.glob(".part*"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_model_is_what_was_made_and_for_the_rest_the_start(
    bench: Callable[..., Bench], scripted: Callable[..., Scripted], precision: str
) -> None:
    run = bench().set(steps=4)
    start = load_model(run.start)
    assert start.transformer is not None
    made = {name: value + 1 for name, value in start.transformer.state_dict().items()}
    config = replace(start.config.vae, mean=(0.5,) * 16)
    run.config.compute.precision = precision  # type: ignore[assignment]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    script = lambda step, micro: {"loss": 2.0}  # noqa: E731

    scripted(script, Exported(transformer=made, vae_config=config, card={"weights": "average"}))
    run.run()
    model = load_model(run.folder / "model")
    assert model.transformer is not None
    assert model.vae is not None
    for name, value in model.transformer.state_dict().items():
        assert value.dtype == dtype
        assert torch.equal(value, made[name].to(dtype))
    for name, value in model.vae.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, start.vae.state_dict()[name])  # type: ignore[union-attr]
    assert model.config == replace(start.config, vae=config)
    metrics = {"loss": 2.0}
    card = {"stage": "foundation", "weights": "average", "steps": 4, "metrics": metrics}
    assert model.card == card

    vae = {name: value * 2 for name, value in start.vae.state_dict().items()}  # type: ignore
    scripted(script, Exported(vae=vae))
    again = bench(name="vae").set(steps=1)
    again.config.compute.precision = precision  # type: ignore[assignment]
    again.run()
    model = load_model(again.folder / "model")
    assert model.config == start.config
    for name, value in model.vae.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(value, vae[name])
    for name, value in model.transformer.state_dict().items():  # type: ignore[union-attr]
        assert torch.equal(value, start.transformer.state_dict()[name].to(dtype))


def test_a_text_encoder_of_the_start_goes_along(
    bench: Callable[..., Bench], scripted: Callable[..., Scripted], tmp_path: Path
) -> None:
    scripted(lambda step, micro: {"loss": 1.0})
    run = bench().set(steps=1)
    run.start = Path(shutil.copytree(run.start, tmp_path / "start"))
    (run.start / "text").mkdir()
    (run.start / "text" / "words").write_text("some")
    run.run()
    assert (run.folder / "model" / "text" / "words").read_text() == "some"


def test_only_the_first_worker_writes_the_model(
    bench: Callable[..., Bench], scripted: Callable[..., Scripted]
) -> None:
    scripted(lambda step, micro: {"loss": 1.0})
    run = bench().set(steps=1)
    run.training(rank=1, world_size=2).run(run.job(), run.keep)
    assert not (run.folder / "model").exists()


def test_stages_by_name(bench: Callable[..., Bench]) -> None:
    kinds = {
        "vae": VaeTraining,
        "foundation": FoundationTraining,
        "causal": CausalTraining,
        "distill": DistillTraining,
    }
    for name, kind in kinds.items():
        run = bench(name)
        model = load_model(run.start)
        assert type(build_stage(run.setting(), model)) is kind
        without = replace(model, transformer=None)
        if name == "vae":
            build_stage(run.setting(), without)
            continue
        with pytest.raises(
            TrainingError, match=rf"stage {name} starts from .* no transformer; give"
        ):
            build_stage(run.setting(), without)
    with pytest.raises(
        UserError, match=r"method .paint.; there are causal, distill, foundation, vae"
    ):
        build_stage(run.set(method="paint").setting(), model)


def test_a_setting_is_the_job(bench: Callable[..., Bench]) -> None:
    run = bench().set(learning_rate=0.5)
    here = make_setting(run.job(), 3, 4, torch.device("cpu"))
    assert here.config == run.config
    assert here.section.learning_rate == 0.5
    assert (here.stage, here.start, here.dataset) == ("foundation", run.start, run.dataset)
    assert here.models == {"teacher": run.start}
    assert (here.rank, here.world_size, here.device.type) == (3, 4, "cpu")


@pytest.fixture
def ray_worker(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What Ray Train tells a worker; it keeps checkpoints in the folder `keep`."""
    told = SimpleNamespace(reported=[], waited=0)

    def wait(mode: Any) -> None:
        assert mode == ray.train.CheckpointConsistencyMode.COMMITTED
        told.waited += 1

    def report(metrics: dict[str, Any], checkpoint: Any) -> None:
        told.reported.append(metrics)
        shutil.copytree(checkpoint.path, told.keep / f"checkpoint_{metrics['step']:06}")

    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", wait)
    monkeypatch.setattr(ray.train, "report", report)
    return told


def test_a_worker_of_ray_goes_on_from_its_checkpoint(
    bench: Callable[..., Bench],
    scripted: Callable[..., Scripted],
    ray_worker: SimpleNamespace,
) -> None:
    stage = scripted(lambda step, micro: {"loss": 1.0})
    run = bench().set(steps=3, checkpoint_every=2)
    RunFolder(run.folder).open()
    (run.folder / ".part-0").mkdir()  # of a worker that was killed
    ray_worker.keep = run.folder
    assert train_loop(run.job()) == {"metrics": {"loss": 1.0}, "steps": 3}
    assert ray_worker.reported == [{"step": 2}]
    assert ray_worker.waited == 1  # until the checkpoint is safe
    assert [step for step, _ in stage.asked] == [0, 1, 2]

    again = scripted(lambda step, micro: {"loss": 1.0})
    train_loop(run.job())
    assert [step for step, _ in again.asked] == [2]
    assert again.keys == stage.keys[2:]
    assert run.said == ["goes on from its checkpoint at step 2"]


def test_a_worker_of_ray_that_is_to_stop_saves_first_and_writes_no_model(
    bench: Callable[..., Bench],
    scripted: Callable[..., Scripted],
    ray_worker: SimpleNamespace,
) -> None:
    run = bench().set(steps=9, log_every=9, checkpoint_every=9)
    folder = RunFolder(run.folder)
    folder.open()
    ray_worker.keep = run.folder

    def script(step: int, micro: int) -> dict[str, float]:
        if step == 3:
            folder.ask_to_stop()
        return {"loss": 1.0}

    scripted(script)
    # Known after step 4, and saved after the next one: see `Calls`.
    assert train_loop(run.job()) == {"stopped": 5}
    assert ray_worker.reported == [{"step": 5}]
    assert folder.saved_step() == 5
    assert [report.step for report in run.reports] == [5]
    assert not (run.folder / "model").exists()
    assert folder.refusal() is None

    folder.open()  # the next start is not to stop
    again = scripted(lambda step, micro: {"loss": 1.0})
    assert train_loop(run.job()) == {"metrics": {"loss": 1.0}, "steps": 9}
    assert [step for step, _ in again.asked] == [5, 6, 7, 8]


def test_a_machine_that_is_about_to_leave_is_saved_for_once(
    bench: Callable[..., Bench], scripted: Callable[..., Scripted], monkeypatch: Any
) -> None:
    clock, asked = [100.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def script(step: int, micro: int) -> dict[str, float]:
        clock[0] += 4
        return {"loss": 1.0}

    def leaving() -> bool:
        asked.append(clock[0])
        return len(asked) >= 2  # not yet when first asked

    scripted(script)
    run = bench().set(steps=20, checkpoint_every=100, checkpoint_minutes=0)
    run.training().run(run.job(), run.keep, leaving)
    assert asked == [116, 128]  # no more often than every ten seconds, known one step later
    assert [step for step, _ in run.saved] == [7]  # and no longer when it is known

    asked.clear()
    alone = bench("foundation", "alone").set(steps=20, checkpoint_every=100)
    alone.run()  # nobody can say
    assert (asked, alone.saved) == ([], [])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("mend me"), "mend me"),
        (
            torch.OutOfMemoryError("out of memory: 3 GiB\nand a long table"),
            r"stage foundation ran out of GPU memory \(out of memory: 3 GiB\); lower foundation."
            r"batch_size, set compute.activation_checkpointing=true, or raise compute.zero_stage",
        ),
    ],
)
def test_what_would_fail_again_is_not_tried_again(
    bench: Callable[..., Bench],
    scripted: Callable[..., Scripted],
    ray_worker: SimpleNamespace,
    error: Exception,
    words: str,
) -> None:
    def script(step: int, micro: int) -> dict[str, float]:
        raise error

    stage = scripted(script)
    run = bench()
    RunFolder(run.folder).open()
    with pytest.raises(ValueError, match=words) as raised:
        train_loop(run.job())
    assert len(stage.asked) == 1
    assert train_loop(run.job()) == {"refused": str(raised.value)}
    assert len(stage.asked) == 1  # the restarted worker does not repeat it
    RunFolder(run.folder).open()  # a new start forgets
    with pytest.raises(ValueError, match=words):
        train_loop(run.job())


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])  # PyTorch raises both
def test_any_other_error_may_be_tried_again(
    bench: Callable[..., Bench],
    scripted: Callable[..., Scripted],
    ray_worker: SimpleNamespace,
    kind: type[Exception],
) -> None:
    def script(step: int, micro: int) -> dict[str, float]:
        raise kind("a network that stalls")

    stage = scripted(script)
    run = bench()
    RunFolder(run.folder).open()
    for _ in range(2):
        with pytest.raises(kind, match="stalls"):
            train_loop(run.job())
    assert len(stage.asked) == 2

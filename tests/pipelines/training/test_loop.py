"""What the loop counts, logs, saves and refuses, over a stage that does as it is told."""

from __future__ import annotations

import gzip
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor

from data.loader import Loader, Split, loader
from modeling.model_dir import read_card
from pipelines.training import loop
from pipelines.training.run_folder import RunFolder, TrainingError, TrainingReport
from pipelines.training.watch.meter import Meter
from pipelines.training.watch.profiler import Profiler
from pipelines.training.zero.engines import learning_rate_at
from tests.pipelines.training.benches import PAIRS, Bench, Scripted
from tests.pipelines.training.plain import setting

pytestmark = pytest.mark.usefixtures("alone", "plain_engines")


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
    batches = iter(loader(run.dataset, Split(batch_size=1, seed=3)))
    assert stage.keys == [next(batches)["key"][0] for _ in range(10)]
    section = run.config.foundation
    wanted = [learning_rate_at(step, section, 0.1) for step in range(5) for _ in range(2)]
    assert [one for one, _ in stage.rates] == wanted
    assert [two for _, two in stage.rates] == pytest.approx([3 * rate for rate in wanted])


@pytest.mark.parametrize(("stage", "frames"), [("foundation", None), ("vae", 9)])
def test_how_batches_are_read_is_as_compute_says(
    bench: Callable[..., Bench],
    scripted: Callable[..., Scripted],
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    frames: int | None,
) -> None:
    seen: list[tuple[Split, dict[str, Any]]] = []

    def read(uri: str, split: Split, **named: Any) -> Loader:
        seen.append((split, named))
        return loader(uri, replace(split, workers=0), **named)

    monkeypatch.setattr("pipelines.training.loop.loader", read)
    scripted(lambda step, micro: {"loss": 1.0})
    run = bench(stage).set(steps=1, batch_size=1, seed=4)
    if frames:
        run.set(clip_frames=frames)
    run.config.compute.loader_workers = 3
    run.config.compute.shard_cache = str(run.folder / "cache")
    run.run()
    ((split, named),) = seen
    assert split == Split(batch_size=1, seed=4, workers=3)  # the stage's own seed
    assert named == {"cache": str(run.folder / "cache"), "clip_frames": frames}
    assert list((run.folder / "cache").iterdir()) == []  # of a dataset on this disk nothing is


@pytest.mark.parametrize("rank", [0, 1])
def test_every_worker_reads_its_own_part(
    bench: Callable[..., Bench], scripted: Callable[..., Scripted], rank: int
) -> None:
    stage = scripted(lambda step, micro: {"loss": 1.0})
    run = bench().set(steps=4, batch_size=2)
    training = run.training(rank=rank, world_size=2)
    training.run(run.keep)
    assert training.epochs == pytest.approx(8 / (PAIRS / 2)), "of this worker's part"
    batches = iter(loader(run.dataset, Split(batch_size=2, rank=rank, world_size=2)))
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
    # Two clips a step of 6 latents of 2 x 3 tokens, in half a second.
    assert {r.metrics["tokens_per_second"] for r in run.reports} == {144.0}
    # Two batches a step of 1, 2, ... TFLOP each, in half a second.
    assert [r.metrics["tflops"] for r in run.reports] == pytest.approx([6.0, 14.0, 22.0])
    for name in ("data", "save"):
        assert {r.metrics[f"{name}_seconds_per_step"] for r in run.reports} == {0.0}
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


def test_what_a_save_holds_up_is_told_of_a_step(
    bench: Callable[..., Bench], scripted: Callable[..., Scripted], monkeypatch: Any
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    def script(step: int, micro: int) -> dict[str, float]:
        clock[0] += 1.0
        return {"loss": 1.0}

    def keep(write: Any, step: int) -> None:
        clock[0] += 6.0
        run.keep(write, step)

    scripted(script)
    run = bench().set(steps=6, log_every=2, checkpoint_every=2)
    run.training().run(keep)
    saved = [r.metrics["save_seconds_per_step"] for r in run.reports]
    assert saved == [0.0, 3.0, 3.0]  # of the save before, over two steps
    assert [r.seconds_per_step for r in run.reports] == [1.0, 4.0, 4.0]
    assert {r.metrics["data_seconds_per_step"] for r in run.reports} == {0.0}


@pytest.mark.parametrize(
    ("sharing", "reader", "epochs"), [(1, (1, 2), 1.0), (2, (0, 1), 0.5), (4, (0, 1), 0.5)]
)
def test_workers_that_share_their_clips_read_the_same_and_are_one_in_an_epoch(
    sharing: int,
    reader: tuple[int, int],
    epochs: float,
    bench: Callable[..., Bench],
    scripted: Callable[..., Scripted],
) -> None:
    """The second worker of two, or of four, in three steps of one clip, of a dataset of six."""
    stage = scripted(lambda step, micro: {"loss": 1.0})
    run = bench().set(steps=3)
    run.config.compute.sequence_parallel = sharing
    training = run.training(rank=1, world_size=max(2, sharing))
    training.train(run.keep)
    read = iter(loader(run.dataset, Split(1, *reader, seed=training.setting.seed)))
    assert stage.keys == [next(read)["key"][0] for _ in range(3)]
    assert training.epochs == pytest.approx(epochs)


def profiled(trace: TrainingReport) -> list[str]:
    """The steps in a trace."""
    ((file, place),) = trace.files.items()
    assert place == "profile"
    with gzip.open(file, "rt") as text:
        names = {str(event.get("name")) for event in json.load(text)["traceEvents"]}
    return sorted(name for name in names if name.startswith("this is"))


@pytest.mark.parametrize(
    "kept", [None, {"validation_loss": 0.25, "loss": 9.0}, {"validation_loss": 0.25}]
)
@pytest.mark.parametrize("rank", [0, 1])
def test_what_was_validated_is_in_the_result_and_the_bests_figures_where_it_is_taken(
    bench: Callable[..., Bench],
    scripted: Callable[..., Scripted],
    rank: int,
    kept: dict[str, float] | None,
) -> None:
    scripted(lambda step, micro: {"loss": 1.0})
    run = bench().set(steps=1)
    training: Any = run.training(rank=rank, world_size=2)
    validation = SimpleNamespace(
        last={"validation_loss": 0.5}, is_due=lambda done: False,
        take_best=lambda output: kept and {"metrics": kept},
    )  # fmt: skip
    training._validation = lambda: validation
    found = training.run(run.keep)["metrics"]
    loss = 1.0 / 2  # the other worker's is not added here
    last = {"loss": loss, "validation_loss": 0.5}
    assert found == last | (kept or {} if rank == 0 else {})
    if rank == 0:
        assert read_card(run.folder / "model")["metrics"] == last


def test_a_profile_of_a_training_that_goes_on_counts_its_steps_from_the_beginning(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path)
    folder.open()
    profiler = Profiler(setting("foundation", profile=1, steps=30), folder, 7)
    for _ in range(4):
        profiler.step()
    profiler.close()
    ((report,), _) = folder.reports(0)
    file = str(tmp_path / "profile" / "to-step-000011.json.gz")
    assert (report.step, report.steps, report.files) == (11, 30, {file: "profile"})


def test_a_training_that_goes_on_is_profiled_from_there(
    bench: Callable[..., Bench], scripted: Callable[..., Scripted], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []

    class Noting(Profiler):
        def __init__(self, setting: Any, folder: RunFolder, done: int) -> None:
            begun.append(done)
            super().__init__(setting, folder, done)

    monkeypatch.setattr(loop, "Profiler", Noting)
    scripted(lambda step, micro: {"loss": 1.0})
    run = bench().set(steps=3)
    training = run.training()
    training.done = 2  # as its checkpoint says
    training.train(run.keep)
    assert begun == [2]


def test_a_profile_of_some_steps_goes_to_the_run(
    bench: Callable[..., Bench], scripted: Callable[..., Scripted]
) -> None:
    """Of those until it was stopped, where that comes first."""
    stopped = bench(name="stopped").set(steps=9, log_every=9, profile=6)

    def script(step: int, micro: int) -> dict[str, float]:
        if step == 3:
            RunFolder(stopped.folder).ask_to_stop()
        with torch.profiler.record_function(f"this is step {step}"):
            return {"loss": 1.0}

    scripted(script)
    assert stopped.run() == {"stopped": 5}
    assert profiled(stopped.reports[-1]) == ["this is step 3", "this is step 4"]
    run = bench().set(steps=9, log_every=9, profile=2)
    run.run()
    other = bench(name="other").set(steps=9, log_every=9, profile=2)
    other.training(rank=1, world_size=2).run(other.keep)
    assert not (other.folder / "profile").exists(), "one worker's trace says enough"
    trace, last = run.reports
    assert (trace.step, last.files) == (5, {})
    assert profiled(trace) == ["this is step 3", "this is step 4"]


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
            # First bad step, seconds of waiting for data and for a save, GiB held.
            tensor.copy_(torch.maximum(tensor, torch.tensor([self.bad_step, 2.5, 0.5, 60.0])))
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
        assert report.metrics["save_seconds_per_step"] == 0.5
        assert report.metrics["gpu_memory_gib"] == 60.0
    meter.add({"loss": torch.tensor(1.0), "psnr": torch.tensor(20.0)}, 2)
    meter.report(3, 0.5)
    assert [report.resumed for report in run.reports] == [True, False][: len(run.reports)]

    monkeypatch.setattr(torch.distributed, "all_reduce", OtherRank(4, [1.0, 1.0]))
    meter.add({"loss": torch.tensor(1.0), "psnr": torch.tensor(20.0)}, 5)
    with pytest.raises(TrainingError, match="not finite at step 5 on at least one worker"):
        meter.report(6, 0.5)

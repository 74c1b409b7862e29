"""The loop as Ray Train runs it: going on, leaving, and what is tried again."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import ray.train
import ray.train.torch
import torch

from infra.runtime.errors import UserError
from pipelines.exits import TryAgainError
from pipelines.training import loop, told
from pipelines.training.loop import train_loop
from pipelines.training.methods.base import Setting
from pipelines.training.run_folder import RunFolder
from pipelines.training.watch.watchdog import (
    COMPUTES,
    EXPORTS,
    READS,
    REPORTS,
    SAVES,
    VALIDATES,
    Watchdog,
)
from tests.pipelines.training.benches import Bench, Scripted

pytestmark = pytest.mark.usefixtures("alone", "plain_engines")


@pytest.fixture
def ray_worker(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What Ray Train tells a worker, whose checkpoints come into the folder `keep`."""
    told = SimpleNamespace(reported=[], waited=0)

    def wait(mode: Any) -> None:
        assert mode == ray.train.CheckpointConsistencyMode.COMMITTED
        told.waited += 1

    def report(
        metrics: dict[str, Any],
        checkpoint: Any,
        checkpoint_upload_mode: Any,
        delete_local_checkpoint_after_upload: bool,
        checkpoint_upload_fn: Callable[[Any, str], Any],
    ) -> None:
        assert checkpoint_upload_mode == ray.train.CheckpointUploadMode.ASYNC
        assert not delete_local_checkpoint_after_upload
        told.reported.append(metrics)
        name = f"checkpoint_{metrics['step']:06}"
        assert checkpoint_upload_fn(checkpoint, name).path == str(told.keep / name)

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
    assert train_loop({"job": run.job()}) == {"metrics": {"loss": 1.0}, "steps": 3}
    assert ray_worker.reported == [{"step": 2}]
    assert ray_worker.waited == 1  # until the checkpoint is safe
    assert [step for step, _ in stage.asked] == [0, 1, 2]

    again = scripted(lambda step, micro: {"loss": 1.0})
    train_loop({"job": run.job()})
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
    assert train_loop({"job": run.job()}) == {"stopped": 5}
    assert ray_worker.reported == [{"step": 5}]
    assert folder.saved_step() == 5
    assert [report.step for report in run.reports] == [5]
    assert not (run.folder / "model").exists()
    assert folder.refusal() is None

    folder.open()  # the next start is not to stop
    again = scripted(lambda step, micro: {"loss": 1.0})
    assert train_loop({"job": run.job()}) == {"metrics": {"loss": 1.0}, "steps": 9}
    assert [step for step, _ in again.asked] == [5, 6, 7, 8]


@pytest.mark.parametrize(("address", "minutes"), [(None, 0.0), ("ray://h:1", 7.0)])
def test_a_worker_is_watched_for_as_long_as_is_asked_and_asks_a_cluster_alone_who_leaves(
    bench: Callable[..., Bench],
    ray_worker: SimpleNamespace,
    address: str | None,
    minutes: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Any] = []

    class Watching(Watchdog):
        def __init__(self, *given: Any) -> None:
            seen.append(given[1:])
            super().__init__(*given)

    class Notes:
        def __init__(self, setting: Setting, folder: RunFolder, note: Any) -> None:
            seen.append((setting.rank, folder.path, note.__self__.seconds))

        def run(self, keep: Any, leaving: Any, told: Any) -> dict[str, Any]:
            seen.append((leaving and leaving(), told()))
            return {"steps": 3}

    monkeypatch.setattr(loop, "Watchdog", Watching)
    monkeypatch.setattr(loop, "Training", Notes)
    monkeypatch.setattr(ray.train, "get_preemption_info", lambda: "soon")
    run = bench()
    RunFolder(run.folder).open()
    run.config.compute.address, run.config.compute.hang_minutes = address, minutes
    assert train_loop({"job": run.job()}) == {"steps": 3}
    seconds = 60 * minutes
    leaves = True if address else None
    assert seen == [(0, 1, seconds), (0, run.folder, seconds), (leaves, False)]


@pytest.mark.parametrize("enough", [False, True])
def test_where_a_worker_stands_is_noted_before_all_that_may_hang(
    enough: bool, bench: Callable[..., Bench], scripted: Callable[..., Scripted]
) -> None:
    """To the last step, or until a validation has enough. Each place comes after the one before, as
    `Place.progress` compares those of two workers."""

    class Validation:
        last: ClassVar[dict[str, float]] = {}

        def is_due(self, done: int) -> bool:
            return done == 2

        def __call__(self, done: int) -> bool:
            return enough

        def take_best(self, output: Path) -> None:
            return None

    scripted(lambda step, micro: {"loss": 1.0})
    training: Any = (
        bench().set(steps=4 if enough else 2, grad_accumulation=2, checkpoint_every=1).training()
    )
    noted: list[tuple[int, int, int]] = []
    training.note = lambda step, doing, batch: noted.append((step, batch, doing))
    training._validation = Validation
    training.run(lambda write, step: write(training.folder.path / f"saved-{step}"))
    step = [(0, READS), (0, COMPUTES), (1, READS), (1, COMPUTES), (2, REPORTS)]
    wanted = [(0, *place) for place in [*step, (2, SAVES)]]
    wanted += [
        (1, *place) for place in [*step, *([(2, SAVES)] if enough else []), (2, VALIDATES)]
    ]  # of the last step nothing is saved
    assert noted == [*wanted, (2, 0, EXPORTS)] == sorted(noted)


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
    run.training().run(run.keep, leaving)
    assert asked == [116, 128]  # no more often than every ten seconds, known one step later
    assert [step for step, _ in run.saved] == [7]  # and no longer when it is known

    asked.clear()
    alone = bench("foundation", "alone").set(steps=20, checkpoint_every=100)
    alone.run()  # nobody can say
    assert (asked, alone.saved) == ([], [])


def test_a_worker_that_is_told_to_end_saves_first_and_is_tried_again(
    bench: Callable[..., Bench],
    scripted: Callable[..., Scripted],
    ray_worker: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = bench().set(steps=9, log_every=9, checkpoint_every=9)
    folder = RunFolder(run.folder)
    folder.open()
    ray_worker.keep = run.folder
    monkeypatch.setattr(told, "_told", threading.Event())
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
    told.listen()
    try:

        def script(step: int, micro: int) -> dict[str, float]:
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return {"loss": 1.0}

        scripted(script)
        with pytest.raises(TryAgainError, match=r"worker 0 \(told to end .* step 5 was saved\)"):
            train_loop({"job": run.job()})
        assert ray_worker.reported == [{"step": 5}]
        assert ray_worker.waited == 1  # until the checkpoint is safe
        assert (folder.saved_step(), folder.refusal()) == (5, None)
        with pytest.raises(SystemExit):  # a second one is Ray's, here the test's
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_all_workers_listen_once_torch_is_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[Any] = []
    monkeypatch.setattr(told._Backend, "on_start", lambda self, *given: done.append(given))
    group, config = SimpleNamespace(execute=done.append), told.ListeningTorch()
    config.backend_cls().on_start(group, config)
    assert done == [(group, config), told.listen]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (UserError("mend me"), "mend me"),
        (
            torch.OutOfMemoryError("out of memory: 3 GiB\nand a long table"),
            r"stage foundation ran out of GPU memory \(out of memory: 3 GiB\); lower foundation."
            r"batch_size, set compute.activation_checkpointing=true, raise compute.zero_stage, "
            r"or set compute.offload=optimizer",
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
        train_loop({"job": run.job()})
    assert len(stage.asked) == 1
    assert train_loop({"job": run.job()}) == {"refused": str(raised.value)}
    assert len(stage.asked) == 1  # the restarted worker does not repeat it
    RunFolder(run.folder).open()  # a new start forgets
    with pytest.raises(ValueError, match=words):
        train_loop({"job": run.job()})


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
            train_loop({"job": run.job()})
    assert len(stage.asked) == 2

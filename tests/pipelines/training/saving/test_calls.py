"""What interrupts the steps, with a clock and other workers that do as they are told."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from pipelines.exits import TryAgainError
from pipelines.training.calls import ASK, ASK_SECONDS, LEAVE, SAVE, STOP, Calls
from pipelines.training.run_folder import RunFolder
from pipelines.training.saver import Write
from tests.pipelines.training.benches import Bench, Scripted
from tests.pipelines.training.plain import setting

pytestmark = pytest.mark.usefixtures("alone", "plain_engines")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("minutes", "saved"),
    [(0.2, [4, 8]), (0.1, [3, 6, 9]), (0.0, [])],
)
def test_the_state_is_saved_again_so_many_minutes_after_the_last_save(
    minutes: float,
    saved: list[int],
    bench: Callable[..., Bench],
    scripted: Callable[..., Scripted],
    clock: list[float],
) -> None:
    """A step takes 4 s; it is known a step later that the time is over."""

    def script(step: int, micro: int) -> dict[str, float]:
        clock[0] += 4.0
        return {"loss": 1.0}

    scripted(script)
    run = bench().set(steps=11, checkpoint_every=100, checkpoint_minutes=minutes)
    run.run()
    assert [step for step, _ in run.saved] == saved


def test_a_save_by_the_steps_puts_off_the_one_by_the_clock(
    bench: Callable[..., Bench], scripted: Callable[..., Scripted], clock: list[float]
) -> None:
    def script(step: int, micro: int) -> dict[str, float]:
        clock[0] += 4.0
        return {"loss": 1.0}

    scripted(script)
    run = bench().set(steps=9, checkpoint_every=3, checkpoint_minutes=0.2)
    run.run()
    assert [step for step, _ in run.saved] == [3, 6]


def test_calls_are_bits_the_more_urgent_the_larger() -> None:
    calls = [SAVE, STOP, ASK, LEAVE]
    assert [call.bit_count() for call in calls] == [1] * 4
    assert calls == sorted(set(calls))


@pytest.mark.parametrize(
    ("rank", "own", "other", "answer"),
    [
        (0, LEAVE, LEAVE, LEAVE), (1, LEAVE, LEAVE, LEAVE), (0, LEAVE, 0, LEAVE),
        (1, LEAVE, STOP, LEAVE), (0, LEAVE, SAVE, LEAVE),
        (0, 0, LEAVE, LEAVE), (1, 0, STOP, STOP), (1, 0, SAVE, SAVE),
    ],
)  # fmt: skip
def test_of_two_workers_calls_one_is_answered(
    rank: int, own: int, other: int, answer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_both(tensor: Tensor, op: Any) -> None:
        assert op == distributed.ReduceOp.MAX
        tensor.copy_(torch.maximum(tensor, torch.tensor(other)))

    monkeypatch.setattr(distributed, "all_reduce", of_both)
    calls = Calls(setting("foundation", rank, 2), RunFolder(tmp_path), told=lambda: own == LEAVE)
    assert calls.after_step() == 0
    assert calls.after_step() == answer
    calls.saved()
    calls.told = lambda: False
    other = 0
    assert [calls.after_step() for _ in range(2)] == [0, 0], "it was answered"


def test_whether_a_machine_leaves_is_asked_seldom_and_by_all(
    tmp_path: Path, clock: list[float]
) -> None:
    asked: list[float] = []

    def leaving() -> bool:
        asked.append(clock[0] - 100)
        return len(asked) == 3

    calls = Calls(setting("foundation"), RunFolder(tmp_path), leaving)
    answers = []
    for _ in range(50):
        clock[0] += 1.0
        answers.append(calls.after_step())
    assert asked == [ASK_SECONDS + 1, 2 * ASK_SECONDS + 1, 3 * ASK_SECONDS + 1]
    assert [n for n, answer in enumerate(answers, 1) if answer] == [3 * ASK_SECONDS + 1]
    assert set(answers) == {0, LEAVE}


@pytest.mark.parametrize("leaves", ["told", "asked"])
def test_a_stop_is_heard_beside_a_machine_that_leaves(
    leaves: str, tmp_path: Path, clock: list[float]
) -> None:
    """Or the worker would be tried again, though the driver ends."""
    folder = RunFolder(tmp_path)
    folder.ask_to_stop()
    calls = Calls(
        setting("foundation"), folder, told=lambda: leaves == "told",
        leaving=(lambda: True) if leaves == "asked" else None,
    )  # fmt: skip
    clock[0] += ASK_SECONDS
    assert [calls.after_step() for _ in range(2)] == [0, STOP | LEAVE]


@pytest.mark.parametrize("leaves", [False, True])
def test_a_training_that_is_stopped_or_leaves_ends_when_its_state_is_on_the_disk(
    leaves: bool, bench: Callable[..., Bench], scripted: Callable[..., Scripted]
) -> None:
    scripted(lambda step, micro: {"loss": 1.0})
    run = bench().set(steps=9, checkpoint_every=100)
    training = run.training()
    if not leaves:
        RunFolder(run.folder).ask_to_stop()
    threads: list[Thread] = []

    def keep(write: Write, step: int) -> None:
        def behind() -> None:
            time.sleep(0.1)
            run.keep(write, step)

        threads.append(Thread(target=behind))
        threads[-1].start()

    if leaves:
        with pytest.raises(TryAgainError, match="the state after step 2 was saved"):
            training.run(keep, told=lambda: True)
    else:
        assert training.run(keep) == {"stopped": 2}
    there = (run.folder / "saved-2" / "manifest-0.json").is_file()
    threads[0].join()
    assert there


def test_validation_is_not_counted_as_the_steps_time(
    bench: Callable[..., Bench], scripted: Callable[..., Scripted], clock: list[float]
) -> None:
    def script(step: int, micro: int) -> dict[str, float]:
        clock[0] += 0.5
        return {"loss": 1.0}

    class Slow:
        def is_due(self, done: int) -> bool:
            return done % 2 == 0

        def __call__(self, done: int) -> bool:
            clock[0] += 60.0
            return False

    scripted(script)
    run = bench().set(steps=6, log_every=3)
    slow: Any = Slow()
    run.training().train(run.keep, slow)
    assert [report.seconds_per_step for report in run.reports] == pytest.approx([0.5, 0.5])

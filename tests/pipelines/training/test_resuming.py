"""What a checkpoint has to hold, over the real stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling.model_dir import load_model, read_config
from tests.pipelines.training.benches import PAIRS, STAGES, TIMES, Bench, Scripted, write

pytestmark = pytest.mark.usefixtures("alone", "plain_engines")


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

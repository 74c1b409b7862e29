"""What a training makes lies where what it is given does, which a CPU alone would not show: here
whatever is made without a word about the place lies nowhere, and mixes with nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling.diffusion.flow import FlowSchedule
from modeling.streaming.forward import PlainForward
from pipelines.training.calls import SAVE, Calls
from pipelines.training.methods.base import FixedDraw, draw_timesteps
from pipelines.training.methods.causal import CausalTraining
from pipelines.training.methods.foundation import FoundationTraining
from pipelines.training.methods.rollout import rollout
from pipelines.training.methods.vae import crop
from pipelines.training.run_folder import RunFolder
from tests.modeling.networks import random_transformer
from tests.pipelines.training.methods import factors, test_rollout, test_vae
from tests.pipelines.training.plain import PlainNetwork, batch, model, setting

pytestmark = pytest.mark.usefixtures("alone", "distill_networks")


def made_nowhere_else(make: Callable[[], Any]) -> None:
    """`make` gives the same, from the same beginning, where there is no place by default."""
    wanted = make()
    with torch.device("meta"):
        found = make()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("mask", "fast"), [(None, False), (None, True), ("published", False), ("budget, block", True)]
)
def test_of_a_rollout(mask: str | None, fast: bool) -> None:
    network = random_transformer(test_rollout.CONFIG, std=0.2)
    source, text = test_rollout.source_of(4), torch.ones(1, 4, 8)
    schedule = FlowSchedule(5.0)
    chosen = test_rollout.MASKS[mask] if mask else None
    stream = replace(test_rollout.STREAM, mask_cache=chosen)

    def make() -> Tensor:
        return rollout(
            network, network, test_rollout.CONFIG, stream, schedule, source=source, text=text,
            last_step=1, generator=torch.Generator("cpu").manual_seed(1),
            forwards=(lambda cache: PlainForward(network, cache)) if fast else None,
        )  # fmt: skip

    made_nowhere_else(make)


def test_of_a_draw() -> None:
    here, schedule = setting("foundation", 1, 2), FlowSchedule(5.0)

    def make() -> list[Tensor]:
        return [
            number
            for draw in (here.draw(3, 1), FixedDraw(here, 2, 5))
            for number in (
                draw.normal_like(batch_[:1]), draw.spread(2, 3), draw.keep(2, 0.5),
                draw_timesteps(draw, schedule, 2, 3),
            )
        ]  # fmt: skip

    batch_ = torch.zeros(2, 3)
    made_nowhere_else(make)


@pytest.mark.parametrize("stage", ["foundation", "causal", "distill"])
def test_of_a_step_and_a_judgement(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the optimizer's own."""
    here, given = setting(stage, grad_accumulation=9), batch()
    if stage == "distill":
        training: Any = factors.make(here)
        monkeypatch.setattr(training, "last_step", lambda step: 1)  # drawn where the host is
    else:
        kind = FoundationTraining if stage == "foundation" else CausalTraining
        training = kind(here, model(PlainNetwork(0.5, 0.25, 0.1, 0.3)))
    made_nowhere_else(lambda: training.step(given, here.draw(0, 1)))
    made_nowhere_else(lambda: training.judge(given, FixedDraw(here, 1, 2)))


def test_of_crops() -> None:
    here, clips = setting("vae", crop=16, motion=1.0, mirror=True), test_vae.clips()["clip"]
    made_nowhere_else(lambda: crop(clips, here.section, here.draw(0, 0)))


def test_of_calls(tmp_path: Path) -> None:
    here = setting("foundation", checkpoint_minutes=1e-9)

    def make() -> list[int]:
        calls = Calls(here, RunFolder(tmp_path))
        return [calls.after_step(), calls.after_step()]

    made_nowhere_else(make)
    assert make() == [0, SAVE]

"""What is done around DeepSpeed's own saving and loading, with a plain engine in its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipelines.training.zero.inside import load_engine, save_engine
from tests.pipelines.training.plain import PlainEngine, setting


def engine(**section: Any) -> PlainEngine:
    here = setting("foundation", **section)
    made = PlainEngine(nn.Linear(3, 2), here.config.compute, here.section, 0.5)
    for group in made.optimizer.param_groups:
        group["weight_decay"] = here.section.weight_decay
    return made


def stepped(made: PlainEngine, loss: float = 1.0) -> PlainEngine:
    made.backward(loss * made(torch.ones(4, 3)).sum())
    made.step()
    return made


def test_its_files_are_given_to_us_and_written_again_afterwards(tmp_path: Path) -> None:
    made = stepped(engine())
    given: list[str] = []
    save_engine(made, tmp_path / "one", "tag", lambda state, path: given.append(path))
    assert given == [str(tmp_path / "one" / "tag" / "engine.pt")]
    assert not Path(given[0]).exists()

    def full(state: Any, path: str) -> None:
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        save_engine(made, tmp_path / "two", "tag", full)
    made.save_checkpoint(str(tmp_path / "three"), "tag", False)
    assert (tmp_path / "three" / "tag" / "engine.pt").is_file()


def test_a_loaded_engine_keeps_its_own_rates_betas_and_decay(tmp_path: Path) -> None:
    before = stepped(engine(betas=(0.8, 0.9), weight_decay=0.1))
    before.save_checkpoint(str(tmp_path), "tag", False)
    now = engine(betas=(0.5, 0.6), weight_decay=0.3)
    now.optimizer.param_groups[0]["lr"] = 0.125
    load_engine(now, tmp_path, "tag")
    (group,) = now.optimizer.param_groups
    assert (group["lr"], group["betas"], group["weight_decay"]) == (0.125, (0.5, 0.6), 0.3)
    for mine, theirs in zip(now.module.parameters(), before.module.parameters(), strict=True):
        assert mine.equal(theirs)
        state, was = now.optimizer.state[mine], before.optimizer.state[theirs]
        assert state["step"] == was["step"] == 1
        assert torch.equal(state["exp_avg_sq"], was["exp_avg_sq"])

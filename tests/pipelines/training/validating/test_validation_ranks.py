"""Validation shared out to ranks gives what one alone gives."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipelines.config.pipeline import PipelineConfig
from pipelines.training.job import Job
from pipelines.training.methods.base import Draw, Setting
from pipelines.training.run_folder import RunFolder
from pipelines.training.validation import Validation
from tests.pipelines.training.ranks import on_ranks


class Places:
    """A stage whose loss says which clip it was, and with which noise."""

    def judge(self, batch: dict[str, Any], draw: Draw) -> dict[str, Tensor]:
        clip = torch.as_tensor(batch["clip"]).float().mean()
        return {"loss": clip + torch.rand((), generator=draw.own), "place": torch.tensor(draw.rank)}


def measure(rank: int, folder: Path, *, world: int) -> None:
    given = json.loads((folder.parent / "given.json").read_text())
    config = PipelineConfig()
    config.vae.validate_clips, config.vae.clip_frames = given["clips"], 5
    place = Path(given["heldout"])
    job = Job("vae", config, place, "", folder, folder, heldout=given["heldout"])
    setting = Setting(job, rank, world, torch.device("cpu"))
    config.vae.sample_clips, config.vae.patience = 0, 1
    config.vae.keep_best = "validation_loss"

    def export(model: Path) -> None:
        if rank == 0:
            model.mkdir(parents=True)

    validation = Validation(setting, Places(), None, RunFolder(folder / str(world)), export)  # type: ignore[arg-type]
    (folder / str(world)).mkdir(exist_ok=True)
    found = validation.losses() | {"enough": [validation(step) for step in (1, 2)]}
    (folder / f"{world}-{rank}.json").write_text(json.dumps(found))


@pytest.mark.parametrize("clips", [1, 2, 8])
def test_two_ranks_share_the_clips_and_give_what_one_gives(
    heldout: str, tmp_path: Path, clips: int
) -> None:
    (tmp_path / "given.json").write_text(json.dumps({"heldout": heldout, "clips": clips}))
    for world in (1, 2):
        on_ranks(world, partial(measure, world=world), tmp_path / "ranks")
    files = [tmp_path / "ranks" / f"{name}.json" for name in ("1-0", "2-0", "2-1")]
    one, *two = [json.loads(file.read_text()) for file in files]
    assert one.pop("enough") == [False, True]
    assert [rank.pop("enough") for rank in two] == [[False, True]] * 2  # each ends by itself
    assert two == [pytest.approx(one)] * 2
    assert one["validation_place"] == (0 if clips == 1 else 0.5)  # there are two pairs

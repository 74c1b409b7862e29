"""What a worker reads of the held-out pairs, and makes of them, before a loss is taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from data.loader import Split, loader
from modeling.pixels import from_uint8
from pipelines.training import validation as module
from pipelines.training.run_folder import RunFolder
from pipelines.training.validation import Validation
from tests.pipelines.training.plain import setting

pytestmark = pytest.mark.usefixtures("alone")


class Text:
    """Remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.released = 0

    def to(self, device: torch.device) -> Text:
        return self

    def encode(self, prompts: list[str]) -> Tensor:
        self.asked += prompts
        return torch.full((len(prompts), 2, 3), 1 / 3)

    def release(self) -> None:
        self.released += 1


class Judge:
    """A stage that keeps what it is to judge; the loss is the clip's place."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []

    def judge(self, batch: dict[str, Any], draw: Any) -> dict[str, Tensor]:
        self.seen.append(batch)
        return {"loss": torch.tensor(draw.rank + 1.0)}


@pytest.mark.parametrize(
    ("rank", "world", "sharing", "samples", "asked", "loss"),
    [
        (0, 1, 1, 0, [0, 1], (1 + 2) / 2),
        (0, 1, 1, 1, [0, 0, 1], (1 + 2) / 2),  # of the sample that is edited as well
        (0, 1, 1, 2, [0, 1, 0, 1], (1 + 2) / 2),
        (0, 2, 1, 1, [0, 0], 1 / 2),
        (1, 2, 1, 1, [0, 1], 2 / 2),  # encodes one to have something, should another have more
        (2, 3, 1, 0, [0, 1], 0.0),  # has none: as many forwards, which do not count
        (1, 2, 2, 0, [0, 1], (1 + 2) / 2 / 2),  # the other, which shares the clips, has the rest
    ],
)
def test_clips_are_encoded_once_and_as_shards_keep_them(
    rank: int,
    world: int,
    sharing: int,
    samples: int,
    asked: list[int],
    loss: float,
    heldout: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = setting("foundation", rank, world, sample_clips=samples)
    here = replace(here, job=replace(here.job, heldout=heldout))
    here.config.compute.sequence_parallel = sharing
    text, stage = Text(), Judge()
    monkeypatch.setattr(module, "build_text_encoder", lambda config: text)
    vae = SimpleNamespace(encode=lambda pixels: (pixels / 3, None))
    model: Any = SimpleNamespace(vae=vae, config=SimpleNamespace(text=None))
    nobody: Any = None
    told = Validation(here, stage, model, RunFolder(tmp_path), nobody)  # type: ignore[arg-type]
    for _ in range(2):
        assert told.losses() == {"validation_loss": pytest.approx(loss)}
    assert len(stage.seen) == 2 * -(-2 // (world // sharing)), "as many as any rank's"
    pairs = list(loader(heldout, Split(batch_size=1, shuffle=False, epochs=1)))
    assert text.asked == [pairs[place]["instruction"][0] for place in asked]
    assert text.released == 1
    place = asked[-1]
    judged = stage.seen[-1]
    for name in ("source", "target"):
        pixels = from_uint8(torch.as_tensor(pairs[place][name]).permute(0, 1, 4, 2, 3))
        assert torch.equal(judged[name], (pixels / 3).half().float())
    assert torch.equal(judged["text"], torch.full((1, 2, 3), 1 / 3).half().float())


def test_a_vae_reads_no_more_of_a_clip_than_it_is_trained_on(heldout: str, tmp_path: Path) -> None:
    here = setting("vae", clip_frames=5, validate_clips=1)
    here = replace(here, job=replace(here.job, heldout=heldout))
    nobody: Any = None
    stage = Judge()
    told = Validation(here, stage, nobody, RunFolder(tmp_path), nobody)  # type: ignore[arg-type]
    assert told.losses() == {"validation_loss": 1.0}
    (batch,) = stage.seen
    assert torch.as_tensor(batch["clip"]).shape[1] == 5

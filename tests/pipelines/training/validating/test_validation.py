"""Validation in the loop, with plain PyTorch in DeepSpeed's place."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from data.loader import Split, loader
from data.video import probe
from modeling.diffusion.attention import bidirectional
from modeling.diffusion.flow import FlowSchedule
from modeling.model_dir import load_model, read_card, read_config
from modeling.text.build import build_text_encoder
from modeling.text.words import WordsEncoder
from pipelines.evaluation.evaluate import evaluate, load_editor
from pipelines.stages.encode import encode_dataset
from pipelines.training import validation
from pipelines.training.export import Exported
from pipelines.training.methods.base import Draw, FixedDraw
from tests.pipelines.sizes import FRAMES, HEIGHT, WIDTH
from tests.pipelines.training.benches import STAGES, Bench, Scripted

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("alone", "plain_engines")]
STILL = {"learning_rate": 1e-30, "weight_decay": 0.0}  # nothing is learned


@pytest.fixture
def validated(bench: Callable[..., Bench], heldout: str) -> Callable[..., Bench]:
    def make(stage: str = "foundation", name: str = "run", **section: Any) -> Bench:
        made = bench(stage, name).set(validate_every=2, **section)
        made.heldout = heldout
        return made

    return make


@dataclass
class Encodings:
    """What text encoders were asked for, and how many prompts had been when one was let go of."""

    prompts: list[str] = field(default_factory=list)
    released: list[int] = field(default_factory=list)


@pytest.fixture
def encodings(monkeypatch: pytest.MonkeyPatch) -> Encodings:
    noted = Encodings()
    embed, release = WordsEncoder._embed, WordsEncoder.release

    def note(encoder: WordsEncoder, prompts: list[str]) -> list[Tensor]:
        noted.prompts.extend(prompts)
        return embed(encoder, prompts)

    def let_go(encoder: WordsEncoder) -> None:
        noted.released.append(len(noted.prompts))
        release(encoder)

    monkeypatch.setattr(WordsEncoder, "_embed", note)
    monkeypatch.setattr(WordsEncoder, "release", let_go)
    return noted


def validations(run: Bench) -> dict[int, dict[str, float]]:
    return {r.step: r.metrics for r in run.reports if "validation_loss" in r.metrics}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_is_judged_with_the_same_noise_and_shown(
    validated: Callable[..., Bench], encodings: Encodings, stage: str
) -> None:
    run = validated(stage, steps=5, sample_clips=1, checkpoint_every=100, **STILL)
    made = run.run()
    # Prompts are encoded for the first validation alone, and no encoder is held while steps run.
    wanted = 1 if stage == "vae" else 2  # the samples'; others are judged by all pairs' text
    assert len(encodings.prompts) == len(set(encodings.prompts)) == wanted
    # Each time that one was asked: to read the pairs, and for each of three edits.
    assert encodings.released == [wanted] * (3 if stage == "vae" else 4)
    found = validations(run)
    assert list(found) == [2, 4, 5]  # and at the end
    names = {"validation_loss", "validation_gain", "validation_background_psnr"}
    names |= {"validation_psnr"} if stage == "vae" else set()
    for metrics in found.values():
        assert metrics.keys() == names
        assert metrics["validation_loss"] == pytest.approx(found[2]["validation_loss"], rel=1e-6)
    assert made["metrics"].items() >= found[5].items()
    assert read_card(run.folder / "model")["metrics"] == made["metrics"]
    for report in run.reports:
        if report.step in found and report.files:
            video, picture = report.files
            assert set(report.files.values()) == {f"validation/step-{report.step:06d}"}
            assert Path(video).name == "sample-0.mp4"
            info = probe(video)
            assert (info.width, info.height, info.frames) == (3 * WIDTH, HEIGHT, FRAMES)
            assert Image.open(picture).format == "PNG"
    assert sum(bool(report.files) for report in run.reports) == 3
    assert not (run.folder / "validation" / "model").exists()

    other = validated(stage, "other", steps=2, sample_clips=0, **STILL)
    other.config.seed = 7  # other draws in training
    other.run()
    assert validations(other)[2]["validation_loss"] == pytest.approx(
        found[2]["validation_loss"], rel=1e-6
    )


def test_samples_are_what_the_exported_model_gives(
    validated: Callable[..., Bench], heldout: str
) -> None:
    run = validated(steps=2, sample_clips=2, learning_rate=1e-2)
    made = run.run()
    settings = run.config.evaluate
    mean = evaluate(load_editor(run.folder / "model"), heldout, settings)["mean"]
    for name in ("gain", "background_psnr"):
        assert made["metrics"][f"validation_{name}"] == pytest.approx(mean[name], rel=1e-4)


def test_the_loss_is_the_training_s_own_on_held_out_latents(
    validated: Callable[..., Bench], heldout: str, tmp_path: Path, monkeypatch: Any
) -> None:
    built: list[Any] = []  # text encoders: UMT5 takes minutes to load
    monkeypatch.setattr(
        validation,
        "build_text_encoder",
        lambda config: built.append(config) or build_text_encoder(config),
    )
    run = validated(steps=2, sample_clips=0, validate_clips=8, **STILL)
    run.run()
    assert len(built) == 1  # for two clips
    encode_dataset(heldout, str(tmp_path / "latents"), run.start, batch_size=1, samples_per_shard=2)
    model = load_model(run.start)
    assert model.transformer is not None
    schedule = FlowSchedule(run.config.foundation.shift, torch.device("cpu"))
    losses = []
    batches = loader(str(tmp_path / "latents"), Split(batch_size=1, shuffle=False, epochs=1))
    levels = []
    for place, batch in enumerate(batches):
        draw = FixedDraw(run.setting(), place, 2)
        source, target, text = (batch[name].float() for name in ("source", "target", "text"))
        level = draw.spread(1)
        levels.append(level.item())
        timestep = schedule.timesteps[(level[:, 0] * 1000).long()]
        noise = draw.normal_like(target)
        noisy = schedule.add_noise(target, noise, timestep)
        with torch.no_grad():
            guess = model.transformer(noisy, source, timestep, text, bidirectional(6))
        losses.append((guess - (noise - target)).square().mean().item())
    assert abs(levels[0] - levels[1]) == pytest.approx(0.5)  # spread over the clips
    assert validations(run)[2]["validation_loss"] == pytest.approx(sum(losses) / 2, rel=1e-3)


@dataclass
class Judged(Scripted):
    """Its n-th validation gives the n-th of `losses`; its model says after which it was taken."""

    losses: list[float] = field(default_factory=list)
    judged: int = 0

    def judge(self, batch: dict[str, Any], draw: Draw) -> dict[str, Tensor]:
        self.judged += 1
        return {"loss": torch.tensor(self.losses[self.judged - 1])}

    def export(self) -> Exported:
        return Exported(card={"judged": self.judged})


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Judged]:
    def use(*losses: float) -> Judged:
        stage = Judged(lambda step, micro: {"loss": 9.0}, losses=list(losses))
        monkeypatch.setattr("pipelines.training.loop.build_stage", stage.build)
        return stage

    return use


BEST = {"validate_clips": 1, "sample_clips": 0, "keep_best": "validation_loss"}


def test_text_weights_are_copied_once_into_the_best_model(
    validated: Callable[..., Bench], judged: Callable[..., Judged], tmp_path: Path
) -> None:
    judged(3, 1, 2)
    run = validated(steps=6, **BEST)
    start = tmp_path / "start"
    shutil.copytree(run.start, start)
    (start / "text").mkdir()
    (start / "text" / "weights").write_text("11 GB")
    config = json.loads((start / "config.json").read_text())
    config["text"]["path"] = "text"
    (start / "config.json").write_text(json.dumps(config))
    run.start = start
    run.run()
    assert not (run.folder / "validation" / "best" / "text").exists()
    assert read_config(run.folder / "validation" / "best").text.path == str(start / "text")
    made = run.folder / "model"
    assert (made / "text" / "weights").read_text() == "11 GB"
    assert read_config(made).text.path == str(made / "text")
    assert read_card(made)["judged"] == 2
    best, taken = (load_model(path) for path in (run.folder / "validation" / "best", made))
    for name in ("transformer", "vae"):
        kept = getattr(taken, name).state_dict()
        assert all(
            value.equal(kept[key]) for key, value in getattr(best, name).state_dict().items()
        )


def test_the_best_model_is_the_result(
    validated: Callable[..., Bench], judged: Callable[..., Judged]
) -> None:
    """Which one that is, and when there is enough: test_best.py."""
    judged(3, 1, 2)
    run = validated(steps=6, **BEST)
    made = run.run()
    assert made["steps"] == 6
    assert made["metrics"]["validation_loss"] == 1
    card = read_card(run.folder / "model")
    assert (card["judged"], card["steps"]) == (2, 4)


def test_without_keep_best_the_last_model_is_the_result(
    validated: Callable[..., Bench], judged: Callable[..., Judged]
) -> None:
    judged(3, 1, 2)
    run = validated(steps=6, validate_clips=1, sample_clips=0)
    assert run.run()["metrics"]["validation_loss"] == 2
    assert read_card(run.folder / "model")["steps"] == 6


def test_a_stage_that_gets_no_better_ends_early(
    validated: Callable[..., Bench], judged: Callable[..., Judged]
) -> None:
    judged(3, 1, 2, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1)
    made = validated(steps=20, patience=2, **BEST).run()
    assert (made["steps"], made["metrics"]["validation_loss"]) == (12, 0.5)


def test_what_was_best_is_known_after_a_restart_and_nothing_counts_twice(
    validated: Callable[..., Bench], judged: Callable[..., Judged]
) -> None:
    judged(1, 5, 6, 7)
    run = validated(steps=20, patience=3, checkpoint_every=4, **BEST)
    assert run.run()["steps"] == 8
    (_, saved) = run.saved[0]  # after 4 steps, so that 6 and 8 are judged again
    judged(6, 7, 8)
    rest = validated("foundation", "run", steps=20, patience=3, **BEST)
    made = rest.run(saved)
    assert (made["steps"], made["metrics"]["validation_loss"]) == (8, 1)
    state = json.loads((run.folder / "validation" / "best.json").read_text())
    assert state["history"] == [[2, 1.0], [4, 5.0], [6, 6.0], [8, 7.0]]

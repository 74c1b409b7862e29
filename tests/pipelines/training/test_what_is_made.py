"""The model directory that a training leaves, and what its job says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from infra.runtime.errors import UserError
from modeling.model_dir import load_model, set_guide
from pipelines.config.rules import CHOOSING, WATCHING
from pipelines.training.export import Exported, copy_model
from pipelines.training.methods.base import Setting
from pipelines.training.methods.causal import CausalTraining
from pipelines.training.methods.distill import DistillTraining
from pipelines.training.methods.foundation import FoundationTraining
from pipelines.training.methods.table import build_stage
from pipelines.training.methods.vae import VaeTraining
from pipelines.training.run_folder import TrainingError
from tests.pipelines.training.benches import Bench, Scripted

pytestmark = pytest.mark.usefixtures("alone", "plain_engines")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_model_is_what_was_made_and_for_the_rest_the_start(
    bench: Callable[..., Bench], scripted: Callable[..., Scripted], precision: str
) -> None:
    run = bench().set(steps=4)
    run.start = Path(shutil.copytree(run.start, run.folder / "start"))
    set_guide(run.start, 0.5, {})  # which a new VAE forgets
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
    again.start = run.start
    again.config.compute.precision = precision  # type: ignore[assignment]
    again.run()
    model = load_model(again.folder / "model")
    stream = replace(start.config.stream, guide_blur=None)
    assert model.config == replace(start.config, stream=stream) != start.config
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


def test_a_draft_is_without_text_and_what_is_kept_of_it_has_it_as_well(
    bench: Callable[..., Bench], scripted: Callable[..., Scripted], tmp_path: Path
) -> None:
    """A validation writes many drafts, and a text encoder has 11 GB."""
    run = bench().set(steps=1)
    start = load_model(run.start)
    made = {name: value + 1 for name, value in start.transformer.state_dict().items()}  # type: ignore[union-attr]
    scripted(lambda step, micro: {"loss": 1.0}, Exported(transformer=made, card={"weights": "w"}))
    run.start = Path(shutil.copytree(run.start, tmp_path / "start"))
    (run.start / "text").mkdir()
    (run.start / "text" / "words").write_text("some")
    draft, kept = tmp_path / "draft", tmp_path / "kept"
    run.training()._validation().export(draft)
    copy_model(draft, kept, run.start / "text")
    assert not (draft / "text").exists()
    assert (kept / "text" / "words").read_text() == "some"
    one, other = load_model(draft), load_model(kept)
    assert one.config == replace(other.config, text=one.config.text) == start.config
    assert one.card == other.card
    assert (one.card["weights"], one.card["steps"], one.card["metrics"]) == ("w", 0, {})
    for part in ("transformer", "vae"):
        weights = [getattr(each, part).state_dict() for each in (one, other)]
        assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    copy_model(draft, tmp_path / "without", tmp_path / "no text")
    assert not (tmp_path / "without" / "text").exists()


def test_only_the_first_worker_writes_the_model(
    bench: Callable[..., Bench], scripted: Callable[..., Scripted]
) -> None:
    scripted(lambda step, micro: {"loss": 1.0})
    run = bench().set(steps=1)
    run.training(rank=1, world_size=2).run(run.keep)
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


def test_all_that_changes_a_training_is_plain_in_its_checkpoints(
    bench: Callable[..., Bench],
) -> None:
    """Every setting of the stage by name, but those that watch it or choose of its models."""
    run = bench("distill").set(betas=(0.2, 0.3))
    run.config.compute = replace(
        run.config.compute, workers=4, zero_stage=3, precision="bf16", offload="weights",
        sequence_parallel=2,
    )  # fmt: skip
    plain = Setting(run.job(), 1, 4, torch.device("cpu")).plain()
    values = {
        f"distill.{name}": value
        for name, value in asdict(run.config.distill).items()
        if name not in (*WATCHING, *CHOOSING)
    }
    assert plain == values | {
        "distill.betas": [0.2, 0.3],
        "compute.workers": 4,
        "compute.sequence_parallel": 2,
        "compute.zero_stage": 3,
        "compute.precision": "bf16",
        "compute.offload": "weights",
    }
    for name in ("log_every", "keep_best", "patience", "validate_every"):
        assert f"distill.{name}" not in plain


def test_a_setting_is_the_job(bench: Callable[..., Bench]) -> None:
    run = bench().set(learning_rate=0.5)
    here = Setting(run.job(), 3, 4, torch.device("cpu"))
    assert here.config == run.config
    assert here.section.learning_rate == 0.5
    assert here.stage == "foundation"

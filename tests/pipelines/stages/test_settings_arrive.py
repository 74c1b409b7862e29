"""Every setting of a stage reaches the work that it is for, and what came out reaches MLflow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from infra.runtime.paths import ROOT
from pipelines.config.pipeline import PipelineConfig
from pipelines.stages import chain as chains
from pipelines.stages import data, encode, evaluate
from pipelines.stages.chain import Chain
from pipelines.stages.live import served_reference
from pipelines.stages.train import train
from pipelines.tracking.records import StageRecord
from pipelines.training.trainer import StageOutcome
from tests.pipelines.stages.told import Told, heard


def test_of_a_stage_s_run(chain: Chain, tmp_path: Path) -> None:
    def work(run: Any, key: str) -> dict[str, float]:
        return {}

    calls: list[Any] = []
    runner: Any = SimpleNamespace(run=lambda *given, **named: calls.append((given, named)))
    chain.runner = runner
    named: dict[str, Any] = {"same": "s", "gate": {"max_loss": 1.0}, "still_there": bool}
    chain.run("vae", {"a": 1}, tmp_path, work, **named)
    assert calls == [(("vae", chains.VERSIONS["vae"], {"a": 1}, tmp_path, work), named)]


@pytest.mark.parametrize(("split", "pairs"), [("train", 5), ("heldout", 3)])
@pytest.mark.parametrize("footage", [None, "assets/footage"])
def test_of_the_pairs_that_are_made(
    split: str, pairs: int, footage: str | None, chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = heard(data, "make_synthetic", monkeypatch)
    filmed = heard(data, "make_from_footage", monkeypatch)
    monkeypatch.setattr(data, "footage_hash", str)
    settings = chain.config.data
    settings.pairs, settings.heldout_pairs, settings.frames = 5, 3, 21
    settings.samples_per_shard, settings.workers, settings.seed = 7, 4, 11
    settings.footage = footage
    stream = chain.model.stream
    target = data.pairs(chain, split)
    recipe = data.PairRecipe(
        pairs, stream.height, stream.width, 21, stream.fps, seed=11, split=split,
        samples_per_shard=7, workers=4, overwrite=True,
    )  # fmt: skip
    (given, named), *more = drawn + filmed
    assert not more
    named["on_pair"](2)
    assert chain.view.of("update")[0][1:3] == (2, pairs)  # type: ignore[attr-defined]
    assert given == ((target, recipe) if footage is None else (target, ROOT / footage, recipe))


def test_what_is_held_out_later_is_in_no_pair_that_was_made_before(
    chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are made again, as where a file is another; a name that no file has changes nothing."""
    heard(data, "make_from_footage", monkeypatch)
    monkeypatch.setattr(data, "FOOTAGE_VERSION", 99)
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"photo")
    chain.config.data.footage = str(tmp_path)
    seen = []
    for listed in ("", "gone.png", "b.png"):
        (tmp_path / "heldout.txt").write_text(listed)
        data.pairs(chain, "train")
        seen.append(cast(Any, chain.runner).inputs)
    assert seen[0] == seen[1] != seen[2]
    assert seen[0]["generator"] == 99
    (tmp_path / "a.png").write_bytes(b"other")
    data.pairs(chain, "train")
    assert cast(Any, chain.runner).inputs != seen[2]


@pytest.mark.parametrize(("split", "stage"), [("train", "data"), ("heldout", "heldout")])
def test_of_pairs_that_were_given(split: str, stage: str, chain: Chain, heldout: str) -> None:
    chain.config.data.train = heldout if split == "train" else "elsewhere"
    chain.config.data.heldout = heldout if split == "heldout" else "elsewhere"
    assert data.pairs(chain, split) == heldout
    runner: Any = chain.runner
    assert runner.of("pass_over") == [(stage, f"{heldout}, 2 pairs")]


def test_of_encoding(chain: Chain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = SimpleNamespace(samples=2, made_by={"precision": "fp16", "fp16_error": 0.25})
    calls = heard(encode, "encode_dataset", monkeypatch, info)
    settings = chain.config
    settings.data.encode_batch, settings.data.samples_per_shard = 5, 7
    settings.data.encode_precision, settings.compute.loader_workers = "fp32", 3
    encode.encode(chain, tmp_path, "pairs")
    ((given, named),) = calls
    assert given == ("pairs", str(tmp_path / "data" / "encoded"), tmp_path)
    named.pop("on_sample")
    named.pop("say")("taken")
    assert chain.view.of("warn") == [("encode: taken",)]
    assert named == {
        "batch_size": 5, "samples_per_shard": 7, "threads": 3, "tasks": 0, "gpus": False,
        "precision": "fp32",
    }  # fmt: skip


@pytest.mark.parametrize("validate_every", [0, 2])
def test_of_training(
    validate_every: int,
    chain: Chain,
    tiny_model: Path,
    heldout: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    early = StageOutcome(tiny_model, {"loss": 0.5}, steps=3, seconds=1.0)
    calls: list[Any] = []

    def stand_in(job: Any, **named: Any) -> StageOutcome:
        calls.append(job)
        return early

    monkeypatch.setattr("pipelines.training.trainer.train_stage", stand_in)
    sessions = heard(chains, "ray_session", monkeypatch, contextlib.nullcontext())
    chain.config.causal.steps = chain.config.foundation.steps = 9
    chain.config.causal.validate_every = validate_every
    for stage in ("foundation", "causal"):
        made = train(chain, stage, tiny_model, heldout, "held out", teacher=tiny_model)
        assert made == chain.output / "models" / stage
    assert len(sessions) == 1, "one Ray for all stages"
    runner: Any = chain.runner
    job = calls[1]
    assert (job.stage, job.start, job.dataset) == ("causal", tiny_model, heldout)
    assert (job.heldout, job.models) == (str(Path("held out").absolute()), {"teacher": tiny_model})
    assert (job.card["key"], job.card["same"]) == ("key", runner.same)
    validation = [("heldout", "held out", "validation")] if validate_every else []
    inputs = [("train", heldout, "training")]
    assert runner.mlflow.of("log_input") == [*inputs, *inputs, *validation]
    assert runner.parent.of("log_input") == inputs * 2
    assert runner.mlflow.of("made")[1] == ("causal", made, early.steps)


@pytest.mark.parametrize(("clips", "total"), [(1, 1), (9, 2), (None, 2)])
@pytest.mark.parametrize("mask_cache", [None, True, False])
def test_of_evaluation(
    clips: int | None,
    total: int,
    mask_cache: bool | None,
    chain: Chain,
    tiny_model: Path,
    heldout: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    editor = SimpleNamespace(settings=SimpleNamespace(fps=12))
    loads = heard(evaluate, "load_editor", monkeypatch, editor)

    def judge(editor: Any, dataset: str, settings: Any, *, on_clip: Any) -> dict[str, Any]:
        assert (dataset, settings) == (heldout, chain.config.evaluate)
        on_clip(SimpleNamespace(metrics={"gain": 2.0}))
        return {"clips": [{"gain": 2.0}], "mean": {"gain": 2.0}}

    monkeypatch.setattr(evaluate.evaluation, "evaluate", judge)
    names = heard(evaluate, "chosen", monkeypatch, {"name": "a"})
    again = heard(evaluate, "edit_again", monkeypatch, ["clip"])
    sheets = heard(evaluate, "side_by_side", monkeypatch, Told())
    films = heard(evaluate, "film", monkeypatch)
    settings = chain.config.evaluate
    settings.clips, settings.mask_cache, settings.success_db = clips, mask_cache, 6.5
    record = evaluate.evaluate(chain, tiny_model, heldout)
    assert record.metrics == {"gain": 2.0}
    assert loads == [((tiny_model, mask_cache), {})]
    view: Any = chain.view
    assert view.of("update") == [("evaluate", 1, total, f"1/{total} clips  gain +2.0 dB")]
    assert names == [(([{"gain": 2.0}], 6.5), {})]
    assert again == [((editor, heldout, settings, {"name": "a"}), {})]
    assert sheets == [((["clip"], ["a"]), {})]
    assert films == [((chain.output / evaluate.SAMPLE, "clip", 12), {})]


@pytest.mark.parametrize(
    ("version", "aliases", "reference"),
    [
        ("4", ["candidate"], "models:/mine@candidate"),
        ("4", ["candidate", "production"], "models:/mine@production"),
        (None, ["candidate", "production"], "folder"),
    ],
)
def test_the_demo_serves_the_best_alias_that_it_gave(
    version: str | None, aliases: list[str], reference: str, config: PipelineConfig
) -> None:
    config.tracking.model_name = "mine"
    result: Any = SimpleNamespace(version=version, aliases=aliases, model=Path("folder"))
    assert served_reference(config, result) == reference


@pytest.fixture
def keyed(chain: Chain, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """The inputs of a stage's key, for files that each have a text of their own."""
    given: list[Any] = []
    runner: Any = SimpleNamespace(
        run=lambda stage, version, inputs, output, work, **more: (
            given.append(inputs) or StageRecord(stage, "", None, str(output), "")
        )
    )
    chain.runner = runner
    for name in ("start", "pairs", "heldout", "teacher", "other"):
        (tmp_path / name).write_text(name)

    def inputs(stage: str, **files: str) -> dict[str, Any]:
        named = {"start": "start", "dataset": "pairs", "heldout": "heldout", "teacher": "teacher"}
        places = {name: tmp_path / file for name, file in (named | files).items()}
        train(
            chain, stage, places["start"], str(places["dataset"]), str(places["heldout"]),
            teacher=places["teacher"],
        )  # fmt: skip
        return cast(dict[str, Any], given[-1])

    return inputs


WATCHING = {"log_every", "checkpoint_every", "checkpoint_minutes", "gate", "validate_every",
            "validate_clips", "sample_clips", "profile"}  # fmt: skip
IDLE = {  # of each stage, what decides nothing of what it makes
    "vae": WATCHING,
    "foundation": WATCHING | {"keep_products"},
    "causal": WATCHING | {"keep_products"},
    "distill": WATCHING | {"keep_products", "rollout_copy"},
}


@pytest.mark.parametrize("stage", IDLE)
def test_every_setting_of_a_training_is_in_its_key_or_known_to_decide_nothing(
    stage: str, chain: Chain, keyed: Callable[..., dict[str, Any]]
) -> None:
    section, before = getattr(chain.config, stage), keyed(stage)
    idle = set()
    for entry in fields(section):
        value = getattr(section, entry.name)
        setattr(section, entry.name, "another")
        if keyed(stage) == before:
            idle.add(entry.name)
        setattr(section, entry.name, value)
    assert idle == IDLE[stage]


@pytest.mark.parametrize("stage", ["vae", "causal"])
def test_what_a_training_runs_on_and_learns_from_is_in_its_key(
    stage: str, chain: Chain, keyed: Callable[..., dict[str, Any]]
) -> None:
    """Held-out pairs only where they choose, groups of ranks only where there are tokens."""
    before = keyed(stage)
    for file in ("start", "dataset", "teacher"):
        assert keyed(stage, **{file: "other"}) != before, file
    assert keyed(stage, heldout="other") == before
    config = chain.config
    for owner, name, value in (
        (config, "seed", 7), (config.compute, "workers", 4), (config.compute, "precision", "bf16"),
    ):  # fmt: skip
        was = getattr(owner, name)
        setattr(owner, name, value)
        assert keyed(stage) != before, name
        setattr(owner, name, was)
    config.compute.sequence_parallel = 2
    assert (keyed(stage) == before) is (stage == "vae")
    config.compute.sequence_parallel = 1
    assert keyed(stage) == before
    section = getattr(config, stage)
    section.keep_best = "validation_loss"
    chosen = keyed(stage)
    assert keyed(stage, heldout="other") != chosen != before
    for name, chooses in (("validate_every", True), ("validate_clips", True), ("profile", False)):
        setattr(section, name, 77)
        assert (keyed(stage) != chosen) is chooses, name
        chosen = keyed(stage)

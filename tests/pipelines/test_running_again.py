"""What the pipeline runs again, and who learns from whom and from what, by names and hashes."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from data import synthetic
from data.manifest import read_dataset_info
from data.synthetic import make_pair
from infra.runtime.registry import FINGERPRINT, client_for
from modeling.config import MaskCacheConfig
from modeling.model_dir import read_config
from pipelines.config.stages import TRAINED_STAGES
from pipelines.stages.chain import STAGES, VERSIONS
from pipelines.tracking.records import Records, fingerprint_of
from pipelines.tracking.registry import resolve
from tests.pipelines.place import Place, dataset
from tests.pipelines.sizes import HEIGHT, WIDTH

pytestmark = pytest.mark.slow


def after(stage: str) -> set[str]:
    """The stage and all that come after it and learn from it."""
    return set(STAGES[STAGES.index(stage) :])


DATA = after("data") - {"start"}
LEARNED: dict[str, set[str]] = {
    # pairs
    "data.seed=1": DATA,
    "data.frames=21": DATA,
    "data.samples_per_shard=2": DATA,
    "data.pairs=3": DATA - {"heldout"},
    "data.encode_precision=fp32": after("encode"),
    # the model
    "seed=1": after("start"),
    "model.transformer.num_layers=2": after("start"),
    "model.vae.widths=[8, 8, 8, 12]": after("start"),
    "model.stream.window_latents=9": after("start"),
    "model.stream.width=64": set(STAGES),
    "model.stream.fps=8": set(STAGES),
    # training
    "compute.workers=2": after("vae"),
    "compute.precision=bf16": after("vae"),
    "vae.learning_rate=1": after("vae"),
    "vae.seed=5": after("vae"),
    "vae.steps=0": after("encode"),
    "foundation.steps=2": after("foundation"),
    "foundation.text_dropout=0.5": after("foundation"),
    "foundation.seed=5": after("foundation"),
    "causal.shift=3": after("causal"),
    "causal.steps=0": {"distill", "evaluate", "register"},
    "distill.guidance=2": after("distill"),
    "distill.ema_decay=0.5": after("distill"),
    "distill.steps=0": after("evaluate"),
}
JUDGED: dict[str, set[str]] = {
    "data.heldout_pairs=3": {"heldout", "evaluate"},
    "evaluate.clips=1": {"evaluate"},
    "evaluate.seed=1": {"evaluate"},
    "evaluate.dilate=1": {"evaluate"},
    "evaluate.mask_cache=true": {"evaluate"},
    "evaluate.min_gain_db=1000": {"evaluate", "register"},
    "tracking.alias=canary": {"register"},
    "tracking.promote=false": {"register"},
    "tracking.model_name=other": {"register"},
}


@pytest.mark.parametrize("change", LEARNED)
def test_what_a_setting_changes_is_to_run_again_and_nothing_else(first: Place, change: str) -> None:
    assert first.planned(change) == LEARNED[change]


@pytest.mark.parametrize("change", JUDGED)
def test_what_judges_runs_again_and_nothing_else(first: Place, change: str) -> None:
    assert set(first.run(change)[1]) == JUDGED[change]


def test_what_ran_again_is_kept_and_what_decides_nothing_runs_nothing(first: Place) -> None:
    first.run("data.seed=1")
    nothing = ("name=other", "data.workers=1", "data.encode_batch=2", "compute.max_failures=3")
    quiet = ("vae.log_every=3", "causal.checkpoint_every=3", "compute.keep_checkpoints=2")
    assert first.run("data.seed=1", *nothing, *quiet)[1] == []
    assert set(first.run()[1]) == DATA


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_s_other_code_runs_it_and_what_learns_from_it(
    first: Place, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    monkeypatch.setitem(VERSIONS, stage, 99)
    again = {stage}
    if stage in TRAINED_STAGES:  # the others come out the same, so nothing after them changes
        again = after(stage) - ({"encode"} if stage != "vae" else set())
    assert set(first.run()[1]) == again


@pytest.mark.parametrize(
    ("output", "again"),
    [
        ("data/train", {"data"}),
        ("data/heldout", {"heldout"}),
        ("data/encoded", {"encode"}),
        ("models/causal", {"causal"}),
        ("evaluation.json", {"evaluate"}),
        ("versions", {"register"}),
    ],
)
def test_an_output_that_is_gone_is_made_again(first: Place, output: str, again: set[str]) -> None:
    lost = first.out / output
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    assert set(first.run()[1]) == again  # and comes out the same, so nothing after it runs


def test_each_learns_from_the_one_before_and_distillation_from_two(first: Place) -> None:
    first.run("vae.steps=2")
    models, told = first.out / "models", first.training.told
    before = {"vae": "start", "foundation": "vae", "causal": "foundation", "distill": "causal"}
    assert {stage: job.start for stage, job in told.items()} == {
        stage: models / start for stage, start in before.items()
    }
    sets = {stage: job.dataset for stage, job in told.items()}
    assert sets == {
        "vae": str(first.out / "data" / "train"),
        **dict.fromkeys(("foundation", "causal", "distill"), str(first.out / "data" / "encoded")),
    }
    assert {stage: job.models for stage, job in told.items() if job.models} == {
        "distill": {"teacher": models / "foundation"}
    }
    client = client_for(first.uri)
    records = {stage: Records(first.out).read(stage) for stage in before}
    for (stage, start), record in zip(before.items(), records.values(), strict=True):
        assert record is not None
        used = client.get_run(record.run_id).inputs.model_inputs
        learned = {start, "foundation"} if stage == "distill" else {start}
        assert {client.get_logged_model(model.model_id).tags[FINGERPRINT] for model in used} == {
            first.hash_of(f"models/{name}") for name in learned
        }
    assert {job.card["key"] for job in told.values()} == {r.key for r in records.values() if r}


def test_a_teacher_alone_makes_distillation_run_again(first: Place) -> None:
    first.training.deaf = "causal"
    first.run("foundation.steps=2")
    causal = first.hash_of("models/causal")
    _, ran = first.run("foundation.steps=3")
    assert first.hash_of("models/causal") == causal
    assert set(ran) == after("foundation")


@pytest.mark.parametrize(
    ("passed", "model", "start", "teacher"),
    [
        ("distill.steps=0", "causal", None, None),
        ("causal.steps=0", "distill", "foundation", "foundation"),
        ("foundation.steps=0", "distill", "causal", "vae"),
    ],
)
def test_a_stage_without_steps_hands_on_what_it_was_given(
    first: Place, passed: str, model: str, start: str | None, teacher: str | None
) -> None:
    result, _ = first.run(passed)
    models = first.out / "models"
    assert result.model == first.version_of(model)
    assert resolve("models:/liveedit@candidate", first.uri) == first.version_of(model)
    told = first.training.told.get("distill")
    assert (told is None) == (start is None)
    if told is not None and start is not None and teacher is not None:
        assert told.start == models / start
        assert told.models["teacher"] == models / teacher


def test_without_training_nothing_is_encoded_and_the_start_is_judged(first: Place) -> None:
    off = [f"{stage}.steps=0" for stage in ("vae", "foundation", "causal", "distill")]
    result, ran = first.run(*off)
    assert set(ran) == {"evaluate", "register"}
    assert result.model == first.version_of("start")
    result, ran = first.run(*off[1:])
    assert "encode" not in ran
    assert result.model == first.version_of("vae")
    for stage in ("foundation", "causal", "distill"):
        first.put_back()
        shutil.rmtree(first.out / "data" / "encoded")
        steps = [text for text in off if not text.startswith(stage)]
        assert "encode" in first.run(*steps)[1], stage


def test_latents_are_of_the_training_pairs_by_the_trained_vae(first: Place) -> None:
    first.run()
    made_by = read_dataset_info(first.out / "data" / "encoded").made_by
    assert made_by["pairs_hash"] == first.hash_of("data/train")
    assert made_by["model_hash"] == first.hash_of("models/vae")
    assert first.hash_of("models/vae") != first.hash_of("models/start")


def test_the_last_model_is_judged_on_the_held_out_pairs(first: Place) -> None:
    first.run()
    report = json.loads((first.out / "evaluation.json").read_text())
    assert report["dataset_hash"] == first.hash_of("data/heldout") != first.hash_of("data/train")
    splits = [
        read_dataset_info(first.out / "data" / name).made_by["split"]
        for name in ("train", "heldout")
    ]
    assert splits == ["train", "heldout"]
    recipe = partial(make_pair, height=HEIGHT, width=WIDTH, frames=9, split="heldout")
    instructions = [recipe(n).instruction for n in range(2)]
    assert [clip["instruction"] for clip in report["clips"]] == instructions
    record = Records(first.out).read("evaluate")
    assert record is not None
    params = client_for(first.uri).get_run(record.run_id).data.params
    assert params["model"] == first.hash_of("models/distill")
    assert report["mask_cache"] is None  # as the model has it
    first.run("evaluate.mask_cache=true")
    report = json.loads((first.out / "evaluation.json").read_text())
    assert report["mask_cache"]["policy"] == MaskCacheConfig().policy


def test_given_pairs_are_used_as_they_are_and_known_by_their_content(
    first: Place, tmp_path: Path
) -> None:
    train, heldout = dataset(tmp_path / "train", 50), dataset(tmp_path / "heldout", 10)
    given = [f"data.train={train}", f"data.heldout={heldout}"]
    assert set(first.run(*given)[1]) == after("vae")
    assert first.training.told["vae"].dataset == train
    report = json.loads((first.out / "evaluation.json").read_text())
    assert report["dataset"] == heldout
    assert report["dataset_hash"] == fingerprint_of(heldout)
    assert first.run(*given)[1] == []
    dataset(tmp_path / "heldout", 20)  # as many, as long, as large, but other pairs
    assert set(first.run(*given)[1]) == {"evaluate"}
    dataset(tmp_path / "train", 20)
    assert set(first.run(*given)[1]) == after("vae")


def test_pairs_are_made_of_the_footage_that_is_given_and_known_by_its_content(
    first: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for name in ("a.png", "kept.png"):
        Image.fromarray(rng.integers(0, 256, (96, 144, 3), np.uint8)).save(tmp_path / name)
    (tmp_path / "heldout.txt").write_text("kept.png\n")
    given = f"data.footage={tmp_path}"
    assert set(first.run(given)[1]) == DATA
    for split, file in (("train", "a.png"), ("heldout", "kept.png")):
        made_by = read_dataset_info(first.out / "data" / split).made_by
        assert made_by["generator"] == "footage"
        assert (made_by["split"], made_by["files"]) == (split, [file])
    assert first.run(given)[1] == []
    with monkeypatch.context() as other:  # of what makes pairs of footage
        other.setattr("pipelines.stages.data.FOOTAGE_VERSION", 99)
        assert first.planned(given) == DATA
    with monkeypatch.context() as other:  # of what draws scenes
        other.setattr(synthetic, "VERSION", 99)
        assert first.planned(given) == set()
    Image.fromarray(rng.integers(0, 256, (96, 144, 3), np.uint8)).save(tmp_path / "a.png")
    assert set(first.run(given)[1]) == DATA


def test_a_given_start_is_known_by_its_content(first: Place, tmp_path: Path) -> None:
    given = tmp_path / "given"
    shutil.copytree(first.out / "models" / "start", given)
    _, ran = first.run(f"model.start={given}")
    assert ran == []  # the very weights that the first start was made of
    weights = load_file(given / "vae.safetensors")
    weights[min(weights)] += 1
    save_file(weights, given / "vae.safetensors")
    assert set(first.run(f"model.start={given}")[1]) == after("vae")
    assert first.training.told["vae"].start == given
    # With another stream the networks are kept and the directory is made anew.
    changed = [f"model.start={given}", "model.stream.window_latents=9"]
    assert set(first.run(*changed)[1]) == after("start")
    start = first.out / "models" / "start"
    assert first.training.told["vae"].start == start
    assert read_config(start).stream.window_latents == 9
    weights[min(weights)] += 1
    save_file(weights, given / "vae.safetensors")
    assert set(first.run(*changed)[1]) == after("start")

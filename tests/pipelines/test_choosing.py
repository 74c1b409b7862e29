"""`--plan`, `--from`, `--only` and gates, on the pipeline whose trainings take milliseconds."""

from __future__ import annotations

from dataclasses import asdict
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from pipelines.config.merge import ConfigError
from pipelines.config.rules import CHOOSING
from pipelines.config.stages import TRAINED_STAGES
from pipelines.pipeline import plan_pipeline, run_pipeline
from pipelines.stages.chain import STAGES
from pipelines.stages.register import PipelineResult
from pipelines.stages.running import choice
from pipelines.stages.running.choice import Choice
from pipelines.stages.running.gate import GateMissedError
from pipelines.stages.running.plan import Planned
from pipelines.stages.running.progress import StageView
from pipelines.tracking.records import Records
from pipelines.tracking.tracker import client_for
from tests.pipelines.place import Place

pytestmark = pytest.mark.slow


def go(
    place: Place,
    *overrides: str,
    **choice: str,
) -> tuple[PipelineResult | None, list[str], str]:
    """The result, the stages that ran, and all that was said."""
    said = StringIO()
    with StageView(Console(file=said, width=200), STAGES) as view:
        result = run_pipeline(place.configured(*overrides), view, choice=Choice(STAGES, **choice))
    lines = said.getvalue().splitlines()
    return result, [line.split()[0] for line in lines if "started" in line], said.getvalue()


def plan(place: Place, *overrides: str, **choice: str) -> dict[str, Planned]:
    view = StageView(Console(file=StringIO()), STAGES)
    lines = plan_pipeline(place.configured(*overrides), view, Choice(STAGES, **choice))
    return {line.stage: line for line in lines}


def running(lines: dict[str, Planned]) -> set[str]:
    return {stage for stage, line in lines.items() if line.does == "runs"}


@pytest.mark.parametrize(
    "change",
    ["seed=0", "vae.steps=2", "data.samples_per_shard=2", "causal.steps=0", "distill.guidance=2"],
)
def test_a_plan_is_what_then_happens_and_writes_nothing(first: Place, change: str) -> None:
    before = {file: file.stat().st_mtime_ns for file in first.out.rglob("*")}
    planned = plan(first, change)
    assert {file: file.stat().st_mtime_ns for file in first.out.rglob("*")} == before
    assert list(planned) == list(STAGES)
    assert running(planned) == set(go(first, change)[1])


def test_ranks_that_share_clips_are_another_training(first: Place) -> None:
    first.run("compute.workers=2")
    assert running(plan(first, "compute.workers=2", "compute.sequence_parallel=2")) == set(
        STAGES[STAGES.index("foundation") :]
    )


def test_a_version_that_waits_for_mlflow_is_not_registered_again(first: Place) -> None:
    down = "tracking.uri=http://127.0.0.1:9"
    assert go(first, down)[1] == ["register"]  # at another address
    assert go(first, down)[1] == []


# What changes nothing of what is made; every other setting is in a stage's key.
NOTHING = (
    *("name=other", "data.workers=1", "data.encode_batch=2", "tracking.experiment=other"),
    *("compute.cpus_per_worker=0.5", "compute.threads_per_worker=2", "compute.zero_stage=1"),
    *("compute.activation_checkpointing=true", "compute.loader_workers=1"),
    *("compute.shard_cache=shards", "compute.max_failures=7"),
    *("compute.hang_minutes=7", "compute.keep_checkpoints=7", "compute.keep_finished=true"),
    "compute.deterministic=false",
    *(
        f"{stage}.{setting}"
        for stage in TRAINED_STAGES
        for setting in (
            *("log_every=7", "checkpoint_every=7", "checkpoint_minutes=7", "profile=1"),
            *("validate_every=7", "validate_clips=7", "sample_clips=0", "gate={max_loss: 2}"),
        )
    ),
    "distill.rollout_copy=false",
)
# The same of two that exclude each other.
RECOMPUTED = ("compute.recompute_attention=true",)
KEPT = tuple(f"{stage}.keep_products=3" for stage in ("foundation", "causal", "distill"))
# In keys, and seen there by tests of their own: paths, and what chooses a model.
ELSEWHERE = ("output", "data.train", "data.heldout", "data.footage", "model.preset", "model.start")
ELSEWHERE += ("tracking.uri", "compute.address", "compute.gpus", "distill.teacher")
ELSEWHERE += tuple(f"{stage}.{name}" for stage in TRAINED_STAGES for name in CHOOSING)
OTHER = {  # of settings whose other value is not simply the next number
    "betas": "[0.5, 0.5]", "lora_targets": "[q]", "weighting": "published",
    "causal.history": "full", "distill.history": "truth",
    "method": "foundation", "clip_frames": "1", "crop": "16", "gradient_chunks": "1",
    "scored_chunks": "1", "max_timestep": "900", "train_encoder": "false", "mirror": "true",
    "mask_cache": "false", "seed": "5", "noise_warmup": "0.25",
}  # fmt: skip


def test_every_setting_of_a_training_decides_it_or_is_known_to_decide_nothing(
    first: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for further in (RECOMPUTED, KEPT):
        assert running(plan(first, *NOTHING, *further)) == set()
    monkeypatch.setattr(choice, "_SHOWN", 100)
    monkeypatch.setattr(choice, "_change", lambda name, old, new: name.removeprefix("config."))
    nothing = {word.partition("=")[0] for word in (*NOTHING, *RECOMPUTED, *KEPT)} | set(ELSEWHERE)
    for stage in TRAINED_STAGES:
        section = asdict(getattr(first.configured(), stage))
        names = {name for name in section if f"{stage}.{name}" not in nothing}
        others = {name: OTHER.get(name) or OTHER.get(f"{stage}.{name}") for name in names}
        words = [f"{stage}.{n}={value or other(section[n])}" for n, value in others.items()]
        assert set(plan(first, *words)[stage].why.split(", ")) == names, stage


def other(value: Any) -> Any:
    return value + 1 if isinstance(value, int) else value / 2 + 0.25


def test_a_plan_of_a_new_output_runs_all_and_makes_no_folder(first: Place) -> None:
    nowhere = first.folder / "nowhere"
    assert running(plan(first, f"output={nowhere}")) == set(STAGES)
    assert not nowhere.exists()


def test_a_plan_says_why_with_what_and_how_long(first: Place) -> None:
    took = Records(first.out).read("causal")
    assert took is not None
    changed = ("causal.steps=3", "causal.batch_size=2", "causal.grad_accumulation=2")
    planned = plan(first, "compute.workers=1", *changed, "vae.steps=0")
    causal = planned["causal"]
    assert causal.why == "steps 1 -> 3, batch_size 1 -> 2, grad_accumulation 1 -> 2 and 2 more"
    assert (causal.workers, causal.batch) == (1, 4)
    assert causal.seconds == pytest.approx(took.seconds * 3 * 4)
    assert causal.states is not None
    assert planned["vae"] == Planned("vae", "passed over", "vae.steps=0")
    assert planned["data"] == Planned("data", "finished")
    idle = [stage for stage, line in planned.items() if not line.runs]
    assert idle == ["data", "heldout", "start", "vae"]
    assert planned["distill"].why == "another start, another dataset, another teacher"


def test_one_stage_alone_runs_when_what_comes_before_is_finished(first: Place) -> None:
    result, ran, _ = go(first, "causal.steps=2", only="causal")
    assert (result, ran) == (None, ["causal"])
    assert go(first, "causal.steps=2", only="causal")[1] == []  # a scheduler that tries again
    with pytest.raises(ConfigError, match=r"^--only distill needs stage causal, .*steps 2 -> 3.*"):
        go(first, "causal.steps=3", only="distill")
    assert go(first, "causal.steps=2", only="distill")[1] == ["distill"]
    done, ran, _ = go(first, "causal.steps=2")
    assert done is not None
    assert ran == ["evaluate", "register"]


def test_a_stage_without_steps_is_alone_and_done(first: Place) -> None:
    assert go(first, "causal.steps=0", only="causal")[:2] == (None, [])


def test_from_a_stage_on_what_comes_before_is_taken_as_it_lies(first: Place) -> None:
    result, ran, said = go(first, "vae.steps=2", first="distill")
    assert result is not None
    assert ran == []
    assert "vae: taken as it is, although it would run now: steps 1 -> 2" in said
    assert go(first, "vae.steps=2", "distill.steps=2", first="causal")[1] == [
        "distill", "evaluate", "register",
    ]  # fmt: skip
    (first.out / "models" / "vae" / "vae.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"--from distill needs stage vae, which has to run"):
        go(first, first="distill")


def test_a_missed_gate_stops_the_pipeline_until_it_is_kept(first: Place) -> None:
    gate = ("causal.steps=2", "causal.gate.max_loss=0.5")  # the loss is 1
    with pytest.raises(GateMissedError, match=r"loss 1 is above causal.gate.max_loss=0.5"):
        go(first, *gate)
    record = Records(first.out).read("causal")
    assert record is not None  # finished and kept
    assert client_for(first.uri).get_run(record.run_id).info.status == "FINISHED"
    with pytest.raises(GateMissedError):  # nor is it forgotten
        go(first, *gate)
    with pytest.raises(GateMissedError):  # by a scheduler neither, which runs one stage at a time
        go(first, *gate, only="causal")
    planned = plan(first, *gate)
    assert list(planned)[-1] == "causal"
    assert planned["causal"].why == "missed: loss 1 is above causal.gate.max_loss=0.5"
    moved = ("causal.steps=2", "causal.gate.max_loss=1")
    assert go(first, *moved)[1] == ["distill", "evaluate", "register"]  # not trained again


def test_held_out_pairs_decide_a_training_only_if_they_choose_its_model(first: Place) -> None:
    watching = ("causal.validate_every=1", "causal.validate_clips=2", "causal.sample_clips=0")
    assert running(plan(first, *watching)) == set()
    assert running(plan(first, *watching, "data.heldout_pairs=3")) == {"heldout", "evaluate"}
    best = (*watching, "causal.keep_best=validation_loss")
    assert "causal" in running(plan(first, *best))
    assert go(first, *best)[1] == ["causal", "distill", "evaluate", "register"]
    assert first.training.told["causal"].heldout == str(first.out / "data" / "heldout")
    assert running(plan(first, *best)) == set()
    assert "causal" in running(plan(first, "data.heldout_pairs=3", *best))
    assert "causal" in running(plan(first, *best, "causal.validate_clips=1"))

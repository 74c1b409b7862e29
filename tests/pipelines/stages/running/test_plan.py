from __future__ import annotations

import re
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from infra.runtime.paths import ROOT
from modeling.geometry import latents_of
from modeling.presets import PRESETS
from pipelines.config.load import load_config
from pipelines.config.stages import CausalStage, ComputeConfig, DistillStage, VaeStage
from pipelines.stages.running import expect
from pipelines.stages.running.choice import Choice, key_for
from pipelines.stages.running.plan import Planned, Planner, duration, million
from pipelines.stages.running.runner import EVERYTHING, Enough
from pipelines.tracking.records import Records, StageRecord, fingerprint_of
from pipelines.training.methods.distill import step_flops
from tests.pipelines.commands.entry import Liveedit

GIB = 2**30
SHIPPED = ROOT / "pipelines" / "start" / "demo"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "1 s"), (59, "59 s"), (60, "1 min"), (3540, "59 min"), (3600, "1 h"),
        (47 * 3600, "47 h"), (48 * 3600, "2 d 0 h"), (75 * 3600, "3 d 3 h"),
    ],
)  # fmt: skip
def test_how_long_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_time_is_by_the_work_that_the_same_stage_did_before() -> None:
    before = StageRecord("vae", "", None, "", "", seconds=30.0)
    assert expect.seconds_from(before, 200, 100) == 60
    assert expect.seconds_from(before, 200, 0) is None
    assert expect.seconds_from(None, 200, 100) is None
    section = {"steps": 10, "batch_size": 3, "grad_accumulation": 2}
    assert expect.clips_trained(section) == 60
    assert expect.clips_trained(section, 4) == 24
    assert expect.clips_trained({"steps": 10}) == 10  # of an older record, which says no more
    assert expect.clips_trained({}) == 0


def test_a_stage_that_goes_on_is_given_the_time_of_what_is_left(tmp_path: Path) -> None:
    config = load_config("demo", ["causal.steps=20", "compute.workers=2"])
    inputs = {"config": {"steps": 10, "batch_size": config.causal.batch_size}}
    before = StageRecord("causal", "", None, "", "", seconds=30.0, inputs=inputs)
    nobody: Any = None
    planner = Planner(config, tmp_path, nobody, nobody, EVERYTHING)
    anew = planner._trained("causal", "same", "why", before)
    assert (anew.does, anew.seconds) == ("runs", 60.0)
    config.causal.batch_size, config.causal.grad_accumulation, config.causal.lora_rank = 3, 5, 2
    config.compute.workers, config.compute.sequence_parallel = 4, 2
    large = planner._trained("causal", "same", "why", before)
    count, trained = expect.parameters("causal", config.causal, config.model.resolve())
    assert (large.workers, large.batch, large.trained) == (4, 4 // 2 * 3 * 5, trained)
    assert trained < count / 2  # adapters alone
    config = planner.config = load_config("demo", ["causal.steps=20", "compute.workers=2"])
    saved = tmp_path / "checkpoints" / "causal-same" / "checkpoint_1"
    saved.mkdir(parents=True)
    (saved / "manifest-0.json").write_text('{"step": 15}')
    rest = planner._trained("causal", "same", "why", before)
    assert (rest.does, rest.seconds, rest.counted) == ("goes on at 15", 15.0, False)


def never(run: Any, key: str) -> dict[str, float]:
    raise AssertionError("a plan does no work")


PAIRS = {"pairs": 4}


def planner_of(folder: Path, **chosen: str) -> Planner:
    nobody: Any = None
    stages = ("data", "start", "vae", "evaluate", "register")
    return Planner(nobody, folder, nobody, nobody, Choice(stages, **chosen))


def finished(folder: Path, stage: str, **metrics: float) -> Path:
    """The record of a stage that is finished, of `PAIRS`; what it left."""
    output = folder / stage
    output.write_text(stage)
    key, left = key_for(stage, 1, PAIRS), fingerprint_of(output)
    Records(folder).write(
        StageRecord(stage, key, left, str(output), "run", metrics, seconds=9.0, inputs=PAIRS)
    )
    return output


def test_a_plan_walks_to_its_end_and_says_what_each_stage_would_do(tmp_path: Path) -> None:
    """What a stage would make anew is nowhere, and the metrics known of it are yesterday's."""
    data, start = (finished(tmp_path, name, loss=0.25) for name in ("data", "start"))
    plan = planner_of(tmp_path)
    assert plan.run("data", 1, PAIRS, data, never).fingerprint == fingerprint_of(data)
    anew = plan.run(
        "start", 1, {"pairs": 8}, start, never, gate={"max_loss": 0.1}
    )  # it may be better then
    assert (anew.fingerprint, anew.metrics) == (None, {"loss": 0.25})
    assert not Path(anew.output).exists()
    plan.pass_over("vae", "vae.steps=0")
    with pytest.raises(Enough):  # what comes after would ask the registry
        plan.run("register", 1, PAIRS, tmp_path / "register", never)
    assert plan.lines == [
        Planned("data", "finished"),
        Planned("start", "runs", "pairs 4 -> 8", seconds=18.0),
        Planned("vae", "passed over", "vae.steps=0"),
        Planned("register", "runs", "not done yet"),
    ]
    with pytest.raises(Enough):  # nor does it where that is finished
        planner_of(tmp_path).run("register", 1, PAIRS, finished(tmp_path, "register"), never)


def test_a_plan_ends_where_the_pipeline_would(tmp_path: Path) -> None:
    """At the stage that was chosen, and at one that is finished and misses its gate."""
    data = finished(tmp_path, "data", loss=0.25)
    for stage, passed in (("data", False), ("vae", True)):
        plan = planner_of(tmp_path, only=stage)
        plan.run("data", 1, PAIRS, data, never) if passed else None
        with pytest.raises(Enough):
            plan.pass_over(stage, "") if passed else plan.run(stage, 1, PAIRS, data, never)
        planner_of(tmp_path, first="data").pass_over(stage, "")
    plan = planner_of(tmp_path)
    plan.run("data", 1, PAIRS, data, never, gate={"max_loss": 0.25})
    with pytest.raises(Enough):
        plan.run("data", 1, PAIRS, data, never, gate={"max_loss": 0.2})
    missed = "missed: loss 0.25 is above data.gate.max_loss=0.2"
    assert plan.lines == [Planned("data", "finished"), Planned("data", "finished", missed)]


# Bytes a parameter on four workers, from DeepSpeed's definition of the stages: weights, gradients,
# float32 masters (where there are any beside the weights) and Adam's two moments.
BYTES = [
    ("fp32", 0, 4 + 4 + 8),
    ("fp32", 1, 4 + 4 + 12 / 4),
    ("fp32", 2, 4 + 4 / 4 + 12 / 4),
    ("fp32", 3, (4 + 4 + 12) / 4),
    ("bf16", 1, 2 + 2 + 12 / 4),
    ("bf16", 2, 2 + 2 / 4 + 12 / 4),
    ("bf16", 3, (2 + 2 + 12) / 4),
]


def states(stage: str, section: Any, compute: ComputeConfig, workers: int) -> float:
    """GiB of a worker of the demo's; without offloading none are the host's."""
    found = expect.states_gib(stage, section, PRESETS["demo"], compute, workers)
    assert found.host == 0
    return found.device


@pytest.mark.parametrize(("precision", "zero", "size"), BYTES)
def test_states_of_a_worker(precision: str, zero: int, size: float) -> None:
    compute = ComputeConfig(precision=precision, zero_stage=zero)  # type: ignore[arg-type]
    count = states("causal", CausalStage(), ComputeConfig(zero_stage=0), 1) * GIB / 16
    shipped = load_file(SHIPPED / "transformer.safetensors").values()
    assert count == sum(weights.numel() for weights in shipped)
    assert states("causal", CausalStage(), compute, 4) * GIB == pytest.approx(count * size)
    distill = states("distill", DistillStage(), compute, 4) * GIB / count
    average = 4 / (4 if zero else 1)
    both = states("distill", DistillStage(betas=(0.9, 0.99)), compute, 4) * GIB / count
    assert both - distill == pytest.approx(2 * average)  # the first moments, of as many bytes
    size -= average
    teacher = (2 if precision == "bf16" else 4) / (4 if zero == 3 else 1)
    whole = (2 if precision == "bf16" else 4) * (zero == 3)  # the copy
    assert distill == pytest.approx(2 * size + average + teacher + whole)
    lean = DistillStage(rollout_copy=False)
    assert distill - states("distill", lean, compute, 4) * GIB / count == pytest.approx(whole)
    free = DistillStage(dmd_weight=0)
    alone = states("distill", free, compute, 4) * GIB / count
    assert alone == pytest.approx(size + average + whole)  # neither critic nor teacher
    causal = states("causal", CausalStage(), compute, 4)
    assert states("vae", VaeStage(), compute, 4) < causal


# Bytes a parameter on four workers in bf16, on the device and on the host, where DeepSpeed sums
# gradients up in float32 beside masters and moments, which with ZeRO-3 they reach through a buffer
# of their own precision.
OFFLOADED = [
    (1, "optimizer", 2 + 2, 16 / 4),
    (2, "optimizer", 2, 16 / 4),
    (3, "optimizer", 2 / 4, (16 + 2) / 4),
    (3, "weights", 0, (16 + 2 + 2) / 4),
]


@pytest.mark.parametrize(("zero", "offload", "device", "host"), OFFLOADED)
def test_offloaded_states_are_the_host_s(
    zero: int, offload: Any, device: float, host: float
) -> None:
    compute = ComputeConfig(precision="bf16", zero_stage=zero, offload=offload)
    demo = PRESETS["demo"]
    count = expect.parameters("causal", CausalStage(), demo)[0] / GIB
    found = expect.states_gib("causal", CausalStage(), demo, compute, 4)
    assert (found.device, found.host) == pytest.approx((count * device, count * host))
    found = expect.states_gib("distill", DistillStage(), demo, compute, 4)
    frozen = (2 / 4 if zero == 3 else 2) * (offload != "weights")  # the teacher's
    frozen += 2 * (zero == 3)  # a copy of the generator
    assert found.device == pytest.approx(count * (2 * device + frozen))
    average = 4 / 4
    frozen = 2 / 4 * (offload == "weights")
    moment = 4 / 4  # the first, which distill has none of
    assert found.host == pytest.approx(count * (2 * (host - moment) + average + frozen))


# What `liveedit bench train wan-1.3b` measured, see docs/training.md: seconds a step, peak GiB.
MEASURED = [
    ("foundation", 1, 2, 2.20, 37.7),
    ("foundation", 4, 2, 2.29, 16.9),
    ("foundation", 4, 3, 2.47, 19.6),
    ("causal", 1, 2, 3.28, 39.2),
    ("distill", 1, 2, 3.93, 58.0),
    ("distill", 4, 2, 4.96, 42.8),
]


@pytest.mark.parametrize(("stage", "workers", "zero", "seconds", "peak"), MEASURED)
def test_what_is_counted_is_near_what_was_measured(
    stage: str, workers: int, zero: int, seconds: float, peak: float
) -> None:
    changes = [f"compute.zero_stage={zero}", "foundation.keep_products=0"]
    config = load_config("wan-1.3b", changes)
    counted = expect.counted_seconds(stage, config, 10, "NVIDIA H100 80GB HBM3")
    assert counted == pytest.approx(10 * seconds, rel=0.15)
    section, model = getattr(config, stage), config.model.resolve()
    held = expect.states_gib(stage, section, model, config.compute, workers).device
    activations = expect.activations_gib(stage, config)
    assert activations is not None
    assert held + activations == pytest.approx(peak, rel=0.25)


def test_time_is_counted_by_the_work_and_the_card() -> None:
    def counted(*changes: str, stage: str = "causal", card: str = "H100") -> float | None:
        return expect.counted_seconds(stage, load_config("wan-1.3b", changes), 7, card)

    plain = counted()
    assert plain is not None
    assert counted("causal.batch_size=2", "causal.grad_accumulation=3") == pytest.approx(6 * plain)
    assert counted("compute.sequence_parallel=4") == pytest.approx(plain / 4)
    assert counted("compute.deterministic=true") == pytest.approx(plain * 0.36 / 0.25)
    assert counted(card="NVIDIA A100-SXM4-80GB") == pytest.approx(plain * 989.4 / 312)
    full = counted("causal.history=full")
    assert full is not None
    assert full > plain
    assert counted(card="TPU v6") is None
    assert counted(stage="vae") is None
    assert counted("causal.method=mine") is None  # which no one can count


@pytest.mark.parametrize("pruned", [True, False])
def test_a_distillation_s_step_is_counted_over_all_ends_of_its_rollouts(pruned: bool) -> None:
    """On the stream's mask cache, if its rollouts have it; only some steps teach the generator."""
    changes = ["distill.generator_every=3", f"distill.mask_cache={str(pruned).lower()}"]
    config = load_config("wan-1.3b", changes)
    size, stream = config.model.resolve().transformer, config.model.resolve().stream
    assert stream.mask_cache is not None
    stream = stream if pruned else replace(stream, mask_cache=None)
    clip = (config.distill.batch_size, latents_of(config.data.frames), 16, 60, 104)
    one = partial(step_flops, config.distill, size, size, stream, clip)
    flops = [one(step, end) for step in range(3) for end in range(len(stream.timesteps))]
    assert len(set(flops)) > len(stream.timesteps)
    assert expect.step_flops("distill", config) == pytest.approx(np.mean(flops))


def test_activations_are_less_where_they_are_recomputed_or_shared() -> None:
    @cache
    def gib(*changes: str, stage: str = "foundation") -> float:
        plain = "foundation.keep_products=0"
        found = expect.activations_gib(stage, load_config("wan-1.3b", [plain, *changes]))
        assert found is not None
        return found

    layers, result = 30, 21 * 1560 * 1536 * 2 / GIB
    kept = gib() - gib("compute.recompute_attention=true")
    assert kept == pytest.approx(layers * 2 * result)  # 100 MB each: attention's, feed-forward's
    more = gib("foundation.keep_products=30")
    assert more - gib() == pytest.approx(layers * 6 * result)
    assert gib("foundation.keep_products=10") - gib() == pytest.approx(10 * 6 * result)
    assert gib("foundation.keep_products=31") == more
    assert gib("compute.activation_checkpointing=false") > 2.5 * more
    buffers = 2e9 / GIB
    shared = gib("compute.sequence_parallel=2", "compute.workers=2")
    assert shared - buffers == pytest.approx((gib() - buffers) / 2)
    history = gib(stage="distill") - gib()
    latent = layers * 2 * 1560 * 1536 * 2 / GIB
    assert history == pytest.approx((18 + 12) * latent)  # and the stream's own cache
    both = gib("compute.sequence_parallel=2", "compute.workers=2", stage="distill")
    assert both - shared == pytest.approx((18 / 2 + 12) * latent)
    # Of more clips each has a history, and one after another runs on the stream's cache.
    clips = gib("foundation.batch_size=3") - buffers
    assert clips == pytest.approx(3 * (gib() - buffers))
    rollouts = gib("distill.batch_size=3", stage="distill") - buffers - clips
    assert rollouts == pytest.approx((3 * 18 + 12) * latent)
    # Teacher forcing puts the clean latents beside the noisy ones.
    assert gib(stage="causal") - buffers == pytest.approx(2 * (gib() - buffers))
    # A number of 4 bytes for one of 2, in every row and in DeepSpeed's buffers, if it has any.
    assert gib("compute.precision=fp32") == pytest.approx(2 * gib())
    alone = gib("compute.precision=fp32", "compute.zero_stage=0")
    assert alone == pytest.approx(2 * (gib() - buffers))
    assert expect.activations_gib("vae", load_config("demo")) is None


def test_the_plan_says_by_what_it_counted(
    liveedit: Liveedit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    ours = ["demo", "compute.workers=2", "tracking.uri=sqlite:///mlflow.db", "output=out"]
    said = liveedit("train", *ours, "--plan")
    assert said.returncode == 0
    assert "say --card H100, or another, for the time of stages that never ran here" in said.stdout
    said = liveedit("train", *ours, "--plan", "--card", "H100")
    (foundation,) = (line for line in said.stdout.splitlines() if line.startswith("foundation"))
    assert re.search(r" ~\d+ (s|min) .* \S+ \+ \S+ *$", foundation), foundation
    assert "model FLOPs at 25% of H100's 989.4 TFLOP/s" in " ".join(said.stdout.split())
    refused = liveedit("train", *ours, "--plan", "--card", "abacus")
    assert refused.returncode == 1
    assert "--card abacus: the peaks known are of H100 PCIe, " in " ".join(refused.stderr.split())


def test_adapters_leave_little_to_train() -> None:
    demo, compute = PRESETS["demo"], ComputeConfig(precision="bf16", zero_stage=2)
    stage = CausalStage(lora_rank=4, lora_targets=("self_attn.q", "ffn.0"))
    sizes, channels = demo.transformer, 32
    count, trained = expect.parameters("causal", stage, demo)
    layer = 4 * (2 * sizes.dim) + 4 * (sizes.dim + sizes.ffn_dim)
    adapters = sizes.num_layers * layer
    assert count == expect.parameters("causal", CausalStage(), demo)[0] + adapters
    assert trained == adapters + sizes.dim * (4 * channels + 1)  # and the patches
    assert states("causal", stage, compute, 4) * GIB == pytest.approx(
        2 * count + trained * (2 + 12) / 4
    )
    assert (million(12_345_678), million(1_419_000_000)) == ("12.3 M", "1.42 B")


@pytest.mark.parametrize(("cards", "workers"), [(0, 2), (1, 1), (4, 4)])
def test_workers_are_known_where_the_machine_is_this_one(
    cards: int, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: cards)
    assert expect.workers_of(ComputeConfig(workers=3, address="auto")) == 3
    assert expect.workers_of(ComputeConfig(address="auto")) is None
    assert expect.workers_of(ComputeConfig()) == workers
    assert expect.workers_of(ComputeConfig(gpus=False)) == 2

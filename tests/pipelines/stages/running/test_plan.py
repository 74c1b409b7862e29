from __future__ import annotations

import pytest
from safetensors.torch import load_file

from infra.runtime.paths import ROOT
from modeling.presets import PRESETS
from pipelines.config.stages import CausalStage, ComputeConfig, DistillStage, VaeStage
from pipelines.stages.running import expect
from pipelines.stages.running.plan import duration, million
from pipelines.tracking.records import StageRecord

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


@pytest.mark.parametrize(("precision", "zero", "size"), BYTES)
def test_states_of_a_worker(precision: str, zero: int, size: float) -> None:
    compute = ComputeConfig(precision=precision, zero_stage=zero)  # type: ignore[arg-type]
    demo = PRESETS["demo"]
    count = (
        expect.states_gib("causal", CausalStage(), demo, ComputeConfig(zero_stage=0), 1) * GIB / 16
    )
    shipped = load_file(SHIPPED / "transformer.safetensors").values()
    assert count == sum(weights.numel() for weights in shipped)
    assert expect.states_gib("causal", CausalStage(), demo, compute, 4) * GIB == pytest.approx(
        count * size
    )
    distill = expect.states_gib("distill", DistillStage(), demo, compute, 4) * GIB / count
    average = 4 / (4 if zero else 1)
    teacher = (2 if precision == "bf16" else 4) / (4 if zero == 3 else 1)
    assert distill == pytest.approx(2 * size + average + teacher)
    free = DistillStage(dmd_weight=0)
    alone = expect.states_gib("distill", free, demo, compute, 4) * GIB / count
    assert alone == pytest.approx(size + average)  # neither critic nor teacher
    causal = expect.states_gib("causal", CausalStage(), demo, compute, 4)
    assert expect.states_gib("vae", VaeStage(), demo, compute, 4) < causal


def test_adapters_leave_little_to_train() -> None:
    demo, compute = PRESETS["demo"], ComputeConfig(precision="bf16", zero_stage=2)
    stage = CausalStage(lora_rank=4, lora_targets=("self_attn.q", "ffn.0"))
    sizes, channels = demo.transformer, 32
    count, trained = expect.parameters("causal", stage, demo)
    layer = 4 * (2 * sizes.dim) + 4 * (sizes.dim + sizes.ffn_dim)
    adapters = sizes.num_layers * layer
    assert count == expect.parameters("causal", CausalStage(), demo)[0] + adapters
    assert trained == adapters + sizes.dim * (4 * channels + 1)  # and the patches
    states = expect.states_gib("causal", stage, demo, compute, 4) * GIB
    assert states == pytest.approx(2 * count + trained * (2 + 12) / 4)
    assert (million(12_345_678), million(1_419_000_000)) == ("12.3 M", "1.42 B")


def test_workers_are_known_where_the_machine_is_this_one() -> None:
    assert expect.workers_of(ComputeConfig(workers=3, address="auto")) == 3
    assert expect.workers_of(ComputeConfig(address="auto")) is None
    assert expect.workers_of(ComputeConfig(gpus=False)) == 2

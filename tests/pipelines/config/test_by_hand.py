"""What settings mean beside their limits: which may differ, what a grid makes of words, what a
recipe says it is for."""

from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from modeling.config import MaskCacheConfig, StreamConfig
from pipelines.config import load
from pipelines.config.ablation import ALSO_SETTINGS, label, parse_grid, stream_of
from pipelines.config.benchmark import NAMES, BenchConfig
from pipelines.config.load import from_plain, load_config, load_section, recipes, to_plain
from pipelines.config.merge import ConfigError
from pipelines.config.pipeline import EvaluateConfig, PipelineConfig
from pipelines.config.rules import check_gate, training_key
from pipelines.config.stages import (
    CausalStage,
    ComputeConfig,
    DistillStage,
    FoundationStage,
    TrainedStage,
    VaeStage,
)

ALL = ("steps", "learning_rate", "final_learning_rate", "warmup_steps", "batch_size",
       "grad_accumulation", "weight_decay", "betas", "grad_clip", "keep_best", "patience",
       "log_every", "checkpoint_every", "checkpoint_minutes", "gate", "validate_every",
       "validate_clips", "sample_clips", "profile")  # fmt: skip
MAY_DIFFER = {
    VaeStage: set(ALL),
    FoundationStage: {*ALL, "keep_products"},
    CausalStage: {*ALL, "keep_products"},
    DistillStage: {*ALL, "critic_learning_rate", "rollout_copy", "keep_products"},
}


@pytest.mark.parametrize("kind", MAY_DIFFER)
def test_settings_with_which_a_training_goes_on(kind: type[TrainedStage]) -> None:
    section = asdict(kind())
    same = training_key("x", section)
    found = {
        entry.name
        for entry in fields(kind)
        if training_key("x", {**section, entry.name: "another"}) == same
    }
    assert found == MAY_DIFFER[kind]


@pytest.mark.parametrize(
    ("section", "metrics"),
    [
        (FoundationStage(), ()),
        (FoundationStage(validate_every=1, sample_clips=0), ("validation_loss",)),
        (FoundationStage(validate_every=1, sample_clips=1),
         ("validation_loss", "validation_gain", "validation_background_psnr")),
        (VaeStage(validate_every=1, sample_clips=0), ("validation_loss", "validation_psnr")),
    ],
)  # fmt: skip
def test_metrics_of_a_validation(section: TrainedStage, metrics: tuple[str, ...]) -> None:
    assert section.validated == metrics
    for metric in metrics:  # by which a gate may ask, and a model be chosen
        replace(section, gate={f"max_{metric}": 1.0}, keep_best=metric)
    for named in ({"gate": {"max_validation_x": 1.0}}, {"keep_best": "loss"}):
        with pytest.raises(ConfigError, match=rf"{section.SECTION}\.(gate|keep_best)"):
            replace(section, **named)


@pytest.mark.parametrize("side", ["max", "min"])
@pytest.mark.parametrize("metric", ["loss", "dmd_loss", "regression_loss", "critic_loss"])
def test_gates_of_every_metric_on_both_sides(side: str, metric: str) -> None:
    DistillStage(gate={f"{side}_{metric}": 1.0})
    for wrong, told in ((float("inf"), "lets nothing pass"), (float("nan"), "lets nothing pass")):
        with pytest.raises(ConfigError, match=rf"^distill.gate.{side}_{metric}={wrong} {told}"):
            check_gate(DistillStage(), {f"{side}_{metric}": wrong}, DistillStage.METRICS)
    with pytest.raises(ConfigError, match=rf"distill.gate.{side}_psnr asks for no metric of that"):
        DistillStage(gate={f"{side}_psnr": 1.0})


def test_adapters_need_layers_to_go_beside() -> None:
    assert FoundationStage(lora_targets=()).lora_rank == 0  # where there are none
    CausalStage(lora_rank=4, lora_targets=("q",))
    told = r"causal.lora_targets is empty, and causal.lora_rank=4 has .*name layers"
    with pytest.raises(ConfigError, match=told):
        CausalStage(lora_rank=4, lora_targets=())


@pytest.mark.parametrize(("stage", "sharing"), [("vae", 1), ("foundation", 2), ("distill", 2)])
def test_ranks_share_clips_of_what_has_tokens(stage: str, sharing: int) -> None:
    compute = ComputeConfig(workers=4, sequence_parallel=2)
    assert compute.sharing(stage) == sharing
    compute.check_sharing(None)
    compute.check_sharing(2)
    with pytest.raises(ConfigError, match=r"sequence_parallel=2 does not divide .*workers=3 into"):
        compute.check_sharing(3)


@pytest.mark.parametrize(
    ("words", "variants", "settings"),
    [
        (["steps=1,2"], ["steps=1", "steps=2"], ()),
        (["steps=2", "seed=5"], ["steps=2"], ("seed=5",)),
        (["seed=5,6", "clips=3"], ["seed=5", "seed=6"], ("clips=3",)),
        (["steps=2", "work_size=1/2"], ["steps=2"], ("work_size=1/2",)),
        (["work_size=1/2,full"], ["work_size=1/2", "work_size=full"], ()),
        (["detail=true,false"], ["detail=True", "detail=False"], ()),
        (["window=6,9", "sinks=0"], ["window=6 sinks=0", "window=9 sinks=0"], ()),
        (["history=own,truth"], ["history=own", "history=truth"], ()),
        (["whole=0,50", "guidance=1,2"],
         ["whole=0", "whole=50 guidance=1.0", "whole=50 guidance=2.0"], ()),
        (["whole=0,50", "steps=1,2"], ["steps=1 whole=0", "whole=50", "steps=2 whole=0"], ()),
        (["whole=50", "window=6,9", "sinks=0,3", "history=own,truth"], ["whole=50"], ()),
        (["cache=none,follow", "dilate=1,2"],
         ["cache=none", "cache=follow dilate=1", "cache=follow dilate=2"], ()),
        (["cache=none,settled", "dilate=1"], ["cache=none", "cache=settled dilate=1"], ()),
        (["cache=attention,block", "threshold=1,2", "dilate=1,2"],
         ["cache=attention", "cache=block"], ()),
        (["cache=none", "pruned=1+2,3", "keep=0.5"], ["cache=none"], ()),
        (["cache=follow", "keep=0.5,1", "pruned=1"], ["cache=follow pruned=1"], ()),
    ],
)  # fmt: skip
def test_words_of_a_grid(words: list[str], variants: list[str], settings: tuple[str, ...]) -> None:
    grid = parse_grid(words)
    assert ([label(variant) for variant in grid.variants], grid.settings) == (variants, settings)


def test_what_a_dataset_of_pairs_has_no_setting_for_is_varied() -> None:
    assert ALSO_SETTINGS == ("seed", "work_size", "detail")
    grid = parse_grid(["work_size=1/2", "detail=false", "seed=5"], ("seed",))
    assert [label(variant) for variant in grid.variants] == ["work_size=1/2 detail=False"]
    assert grid.settings == ("seed=5",)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("steps=1,x", "steps=1,x: every value is a whole number"),
        ("keep=x", "keep=x: every value is a number"),
        ("pruned=1+x", r"pruned=1\+x: every value is whole numbers, as in 1\+2"),
        ("detail=yes,no", "detail=yes,no: yes is neither true nor false"),
        ("history=mine", "history=mine: mine is neither own nor truth"),
        ("stesp=1,2", "nothing of that name is varied; did you mean steps"),
        ("clips=3", "nothing is varied; give one of stages, cache, keep"),
        ("cache=fast", "cache=fast is none of none, published, attention, feedforward, block"),
        ("guidance=2", "guidance= is of clips that are sampled whole; give whole=50 too"),
    ],
)
def test_words_that_no_grid_knows(word: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse_grid([word])


STREAM = StreamConfig(32, 48, mask_cache=MaskCacheConfig())


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ({"steps": 1}, {"timesteps": (1000,)}),
        ({"steps": 3}, {"timesteps": (1000, 667, 333)}),
        ({"window": 9, "sinks": 0}, {"window_latents": 9, "sink_latents": 0}),
        ({"cache": "none"}, {"mask_cache": None}),
    ],
)
def test_a_variant_of_a_stream(variant: dict[str, Any], changes: dict[str, Any]) -> None:
    found = stream_of(STREAM, variant)
    assert {name: getattr(found, name) for name in changes} == changes


def test_a_variant_of_a_cache() -> None:
    variant = {"cache": "follow", "threshold": 0.5, "dilate": 3, "steps": 3}
    cache = stream_of(STREAM, variant).mask_cache
    assert cache is not None
    assert (cache.policy, cache.scope, cache.threshold, cache.dilate, cache.pruned_steps) == (
        "follow", "block", 0.5, 3, (1, 2),
    )  # fmt: skip
    cache = stream_of(STREAM, {"cache": "block", "keep": 0.25, "pruned": (2,)}).mask_cache
    assert cache is not None
    assert (cache.policy, cache.scope, cache.keep_ratio, cache.pruned_steps) == (
        "budget", "block", 0.25, (2,),
    )  # fmt: skip
    for wrong, told in (({"steps": 0}, "steps=0 must be at least 1 and at most 1000"),
                        ({"steps": 1001}, "steps=1001 must be"),
                        ({"whole": -1}, "whole=-1 must be at least 0 and at most 1000"),
                        ({"whole": 1001}, "whole=1001 must be")):  # fmt: skip
        with pytest.raises(ConfigError, match=told):
            stream_of(STREAM, wrong)
    stream_of(STREAM, {"whole": 1000})
    stream_of(StreamConfig(32, 48), {"steps": 1000})


def test_a_recipe_says_in_a_sentence_what_it_is_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "RECIPES", tmp_path)
    (tmp_path / "b.yaml").write_text("# For one\n# card. And more.\n#\n# Not this\nname: b\n")
    (tmp_path / "a.yaml").write_text("# For two:\nname: a  # x\n# later\n")
    assert recipes() == {"a": "For two.", "b": "For one card."}
    assert list(recipes()) == ["a", "b"]


def test_what_was_given_last_holds(tmp_path: Path) -> None:
    file = tmp_path / "mine.yml"
    file.write_text("name: mine\nseed: 3\nvae: {steps: 7}\n")
    config = load_config(file, ["seed=4", "data.footage=null"])
    assert (config.name, config.seed, config.vae.steps) == ("mine", 4, 7)
    assert from_plain(to_plain(config)) == config
    section = load_section(EvaluateConfig, ["clips=null", "dilate=0"])
    assert section == EvaluateConfig(clips=None, dilate=0)
    file.write_text("- a\n")
    with pytest.raises(ConfigError, match=r"mine.yml is a list; give keys with values"):
        load_config(file)
    file.write_text("a: [\n")
    with pytest.raises(ConfigError, match=r"mine.yml cannot be read as YAML"):
        load_config(file)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"half": "left"}, "half=left is none of both, natural, drawn"),
        ({"only": "sharp"}, "only=sharp is none of "),
        ({"size": "224"}, "size=224 must be width x height in multiples of 16"),
        ({"size": "224x120"}, "size=224x120 must be"),
        ({"size": "216x128"}, "size=216x128 must be"),
        ({"size": "224x128x16"}, "size=224x128x16 must be"),
        ({"size": "0x128"}, "size=0x128 must be"),
        ({"every": 0}, "bench.every=0 is too small; use 1 or more"),
        ({"dilate": -1}, "bench.dilate=-1 is too small; use 0 or more"),
        ({"resamples": 0}, "bench.resamples=0 is too small; use 1 or more"),
    ],
)
def test_clips_of_the_benchmark_that_there_are_none_of(given: Any, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        BenchConfig(**given)


def test_clips_of_the_benchmark() -> None:
    assert BenchConfig(size="64x32").shape == (32, 64)
    for name in NAMES:
        assert BenchConfig(only=name).only == name
    assert len(set(NAMES)) == len(NAMES)
    assert {"hue", "fast", "occluded", "scene cut", "60 s"} <= set(NAMES)


@pytest.mark.parametrize(
    ("workers", "parallel", "pairs", "fits"),
    [(None, 1, 2, True), (None, 1, 1, False), (3, 1, 3, True), (3, 1, 2, False),
     (4, 2, 2, True), (4, 2, 1, False), (4, 4, 1, True)],
)  # fmt: skip
def test_a_batch_is_of_all_groups_together(
    workers: int | None, parallel: int, pairs: int, fits: bool
) -> None:
    config = PipelineConfig()
    config.compute.workers, config.compute.sequence_parallel = workers, parallel
    config.foundation.batch_size = 1
    if fits:
        config.check_batch("foundation", pairs)
        return
    groups = pairs + 1
    told = rf"asks for {groups} samples at once, and the dataset has {pairs}; lower .* to 1 or"
    with pytest.raises(ConfigError, match=told):
        config.check_batch("foundation", pairs)

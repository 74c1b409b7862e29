"""What no single number is wrong in: settings that do not go together, words, sizes, files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data.manifest import DatasetInfo
from pipelines.config.load import load_config
from pipelines.config.merge import ConfigError
from pipelines.config.pipeline import PipelineConfig
from pipelines.stages.preflight import _check_clips
from tests.pipelines.config.passing import BASE, STAGES, accept


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("key", "value"), [("steps", -1), ("batch_size", 0), ("grad_clip", -1.0)])
def test_a_stage_without_steps_is_checked_too(
    demo: PipelineConfig, stage: str, key: str, value: float
) -> None:
    with pytest.raises(ConfigError, match=rf"{stage}.{key}={value}"):
        accept(demo, **{f"{stage}__steps": 0, f"{stage}__{key}": value})


@pytest.mark.parametrize("chunk", [2, 3])
def test_frames_are_whole_chunks_and_the_nearest_are_named(
    demo: PipelineConfig, chunk: int
) -> None:
    stream = {"chunk_latents": chunk, "window_latents": 12, "sink_latents": chunk}
    whole = [4 * chunk * n - 3 for n in range(1, 5)]
    for frames in (-3, 0, 1, 2, *range(3, whole[2] + 2)):
        given = {"model__stream": stream, "vae__clip_frames": 1, "data__frames": frames}
        if frames in whole:
            accept(demo, **given)
            continue
        first = max([n for n, size in enumerate(whole) if size < frames], default=0)
        near = f"use {whole[first]} or {whole[first + 1]}"
        expected = f"data.frames={frames} is not 4n-3 frames of whole chunks of {chunk} latents"
        with pytest.raises(ConfigError, match=re.escape(f"{expected}; {near}")):
            accept(demo, **given)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("workers", [1, 2, 3, None])
def test_a_batch_is_no_larger_than_the_dataset(
    demo: PipelineConfig, stage: str, workers: int | None
) -> None:
    count = workers or 2
    config = accept(demo, compute__workers=workers, **{f"{stage}__batch_size": 4})
    config.check_batch(stage, 4 * count)
    with pytest.raises(ConfigError) as refused:
        config.check_batch(stage, 4 * count - 1)
    message = str(refused.value)
    assert message.startswith(f"{stage}.batch_size=4 on compute.workers={count} asks for ")
    assert f"{4 * count} samples at once, and the dataset has {4 * count - 1}; " in message
    assert f"lower {stage}.batch_size to {(4 * count - 1) // count} or give more data" in message
    with pytest.raises(ConfigError, match="batch_size to 1 or give"):
        config.check_batch(stage, 0)


@pytest.mark.parametrize("stage", STAGES)
def test_synthetic_pairs_are_counted_for_the_stages_that_run(
    demo: PipelineConfig, stage: str
) -> None:
    batches = {f"{name}__batch_size": 5 for name in STAGES}
    config = accept(demo, data__train=None, data__pairs=10, **batches)
    more = {f"{stage}__batch_size": 6}
    with pytest.raises(ConfigError, match=rf"{stage}.batch_size=6 .* dataset has 10"):
        accept(config, **more)
    accept(config, **more, **{f"{stage}__steps": 0})
    accept(config, **more, data__train="elsewhere")  # counted where it can be read


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("offload", ["nothing", "optimizer", "weights"])
def test_offloading_needs_sharding(demo: PipelineConfig, zero_stage: int, offload: str) -> None:
    given = {"compute__zero_stage": zero_stage, "compute__offload": offload}
    if offload == "nothing" or zero_stage == 3 or (offload, zero_stage > 0) == ("optimizer", True):
        accept(demo, **given)
        return
    remedy = "zero_stage=3, or compute.offload=optimizer" if zero_stage else "zero_stage=2, or"
    with pytest.raises(ConfigError, match=rf"compute.offload={offload} .*set compute.{remedy}"):
        accept(demo, **given)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_bf16_needs_sharding(demo: PipelineConfig, zero_stage: int) -> None:
    given = {"compute__zero_stage": zero_stage, "compute__precision": "bf16"}
    if zero_stage:
        accept(demo, **given)
        return
    message = r"compute.zero_stage=0 .*compute.precision=bf16; set compute.zero_stage to 1, 2 or 3"
    with pytest.raises(ConfigError, match=message):
        accept(demo, **given)


def test_products_are_kept_only_where_recomputed_blocks_keep_anything(
    demo: PipelineConfig,
) -> None:
    kept = {f"{stage}__keep_products": 2 for stage in STAGES if stage != "vae"}
    config = accept(demo, **kept, compute__activation_checkpointing=True, distill__batch_size=3)
    for stage in STAGES[1:]:
        others = {f"{other}__keep_products": 0 for other in STAGES[1:] if other != stage}
        with pytest.raises(ConfigError, match=rf"{stage}.keep_products=2 keeps what compute.rec"):
            accept(config, **others, compute__recompute_attention=True)
    accept(config, compute__recompute_attention=True, compute__activation_checkpointing=False)
    sharded = {"compute__zero_stage": 3, "distill__grad_accumulation": 2}
    for size, micro in ((2, 4), (3, 6)):  # 1 is just right, see below
        message = (
            rf"distill.keep_products=2 .*distill.batch_size={size}.* .*accumulation={micro}, or"
        )
        with pytest.raises(ConfigError, match=message):
            accept(config, **sharded, distill__batch_size=size)
    for mended in ("batch_size=1", "keep_products=0", "steps=0"):
        name, _, value = mended.partition("=")
        accept(config, **sharded, **{f"distill__{name}": int(value)})


@pytest.mark.parametrize(("height", "width"), [(64, 192), (192, 64)])
def test_crops_fit_the_shorter_side_and_only_where_the_vae_trains(
    demo: PipelineConfig, height: int, width: int
) -> None:
    config = accept(demo, model__stream={"height": height, "width": width}, vae__crop=64)
    with pytest.raises(ConfigError, match=r"vae.crop=72 must be .* at most 64; null takes all"):
        accept(config, vae__crop=72)
    accept(config, vae__crop=72, vae__clip_frames=2, vae__steps=0)


WEIGHTS = [
    # preset wan's VAE is not trained, and its weights have to come from somewhere
    ("wan-1.3b", ["vae.steps=1"], r"vae.steps=1, but preset wan-1.3b uses .*; set vae.steps=0"),
    ("wan-1.3b", ["model.start=null"], r"model.start=null, but preset wan-1.3b .* set model.start"),
    ("wan-1.3b", [], None),
    ("demo", ["model.text.kind=umt5"], None),  # the start has its own
    ("demo", ["model.text.kind=umt5", "model.start=null"], r"model.text.path=null, but a umt5"),
    ("demo", ["model.text={kind: umt5, path: here}", "model.start=null"], None),
    ("demo", ["model.start=null"], None),
]


@pytest.mark.parametrize(("name", "given", "message"), WEIGHTS)
def test_weights_that_nobody_gives(name: str, given: list[str], message: str | None) -> None:
    if message is None:
        load_config(name, [*BASE, *given])
        return
    with pytest.raises(ConfigError, match=message):
        load_config(name, [*BASE, *given])


WORDS = [
    ("foundation.stesp=1", "unknown key 'foundation.stesp'; did you mean foundation.steps"),
    ("vae.weight=1", "did you mean vae.edge_weight or vae.weight_decay?"),
    ("foundatoin.steps=1", "unknown key 'foundatoin.steps'; did you mean foundation.steps?"),
    ("model.mask_cahe=1", "did you mean distill.mask_cache or evaluate.mask_cache?"),
    ("mask_cache.policy=x", "did you mean distill.mask_cache or evaluate.mask_cache?"),
    ("foundation.lr=1", "unknown key 'foundation.lr'; there are foundation.steps, "),
    (
        "foundation=3",
        "foundation is a section; give one of its keys a value, as in foundation.",
    ),
    ("causal.gate.max_psnr=1", "causal.gate.max_psnr asks for no metric of that stage; there are "),
    (
        "vae.keep_best=validation_loss",
        "is no metric of its validation; there are none: set",
    ),
    (
        "causal.patience=1",
        "causal.patience=1 waits for a better model; say by which metric",
    ),
    ("causal.gate.min_validation_gain=1", "causal.gate.min_validation_gain asks for no metric of"),
    ("vae.gate.psnr=1", "vae.gate.psnr asks for no metric of that stage; there are max_loss, min"),
    ("vae.gate.min_psnr=nan", "vae.gate.min_psnr=nan lets nothing pass; use a number"),
    ("vae.gate.min_psnr=inf", "vae.gate.min_psnr=inf lets nothing pass; use a number"),
    ("vae.gate.min_psnr=x", "vae.gate.min_psnr: Value 'x'"),
    (
        "learning_rate=1",
        "unknown key 'learning_rate'; did you mean vae.learning_rate or foundation.learning_",
    ),
    (
        "zzz=1",
        "unknown key 'zzz'; there are causal, compute, data, distill, evaluate, ",
    ),
    ("model.stream.zzz=1", "unknown key 'model.stream.zzz'; "),
    ("model.zzz=1", "unknown key 'model.zzz'; "),
    ("foundation.steps=many", "command line: foundation.steps=many must be a whole number"),
    ("foundation.steps=1.5", "foundation.steps=1.5 must be a whole number"),
    ("foundation.steps=null", "foundation.steps= must be a whole number"),
    ("foundation.seed=x", "foundation.seed=x must be a whole number"),
    ("foundation.learning_rate=fast", "foundation.learning_rate=fast must be a number"),
    ("output=", "output= must be text"),
    ("compute.deterministic=perhaps", "compute.deterministic=perhaps must be true or false"),
    ("compute.precision=fp17", "compute.precision=fp17 must be one of fp32, bf16"),
    ("vae.betas=0.9", "vae.betas=0.9 must be a list of 2, as in vae.betas=[0.9,0.999]"),
    (
        "causal.lora_targets=q",
        "causal.lora_targets=q must be a list, as in causal.lora_targets=[q,k,v,o,ffn.0,ffn.2]",
    ),
    ("vae.gate=3", "vae.gate=3 must be keys with values, as in vae.gate.NAME=1"),
    ("distill.guidance=nan", "distill.guidance=nan is nothing to work with; use a number"),
    ("model.stream.shift=inf", "model.stream.shift=inf is nothing to work with; use a number"),
    ("foundation.weighting=none", "foundation.weighting: "),
    ("causal.weighting=none", "causal.weighting: "),
    ("vae=null", "command line: vae is a section; "),
    ("vae=3", "command line: vae is a section; "),
    ("vae.betas=[0.5]", "command line: vae.betas=[0.5] must be a list of 2"),
    ("vae={betas: [0.5]}", "command line: vae.betas=[0.5] must be a list of 2"),
    ("model.transformer=[1]", "command line: model.transformer=[1] must be keys with values"),
    ("foundation.steps", "'foundation.steps' is not key=value; write for example "),
    ("=3", "'=3' is not key=value"),
    (" =3", "' =3' is not key=value"),
    (
        "model.preset=wan-2b",
        "model.preset: unknown preset 'wan-2b'; there are demo, natural, wan-1.3b",
    ),
    ("model.transformer.dim=wide", "model.transformer.dim=wide must be a whole number"),
    ("model.transformer.dim=190", "model.dim 190 over num_heads 7 gives no even head size; choose"),
    ("model.vae.mean=[0.0]", "model.vae.mean has 1 values for 16 latent channels; give one"),
    ("model.text.dim=32", "model.text.dim 32 does not fit transformer.text_dim 64; set both"),
    ("model.stream.height=100", "stream size 224x100 is not a multiple of 16 pixels; set stream."),
    ("model.stream.shift=0", "model.stream.sink_latents 3 must be 0 or more, stream.shift 0.0"),
    ("model.stream.sink_latents=-3", "model.stream.sink_latents -3 must be 0 or more"),
    ("model.stream.window_latents=13", "window_latents 13 and stream.sink_latents 3 must be"),
    ("model.stream.timesteps=[250,750]", "timesteps (250, 750) must fall from at most 1000 to"),
    ("model.stream.mask_cache={keep_ratio: 0}", "mask_cache.keep_ratio 0.0 is outside (0, 1]"),
    ("model.stream.mask_cache={pruned_steps: [4]}", "pruned_steps (4,) names a step beyond the 4"),
]


@pytest.mark.parametrize(("override", "message"), WORDS)
def test_words_and_sizes(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config("demo", [*BASE, override])
    assert message in str(refused.value)


FILES = [
    ("vae: {steps: 1, crop: x}", "mine.yaml: vae.crop=x must be a whole number"),
    ("vae: 3", "mine.yaml: vae is a section; "),
    (
        "data: {train: s3://x, frames: 33}\nvae: {steps: 1, betas: [1]}",
        "mine.yaml: vae.betas=[1] must be a list of 2",
    ),
    ("model: {vae: [1]}", "mine.yaml: model.vae=[1] must be keys with values"),
    ("- data\n- vae", "mine.yaml is a list; give keys with values, as in foundation: {steps"),
    ("just words", "mine.yaml: unknown key 'just words'; there are causal, "),
    ("3", "mine.yaml cannot be read as YAML"),
    ("a: b: c", "mine.yaml cannot be read as YAML"),
]


@pytest.mark.parametrize(("text", "message"), FILES)
def test_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError) as refused:
        load_config(tmp_path / "mine.yaml")
    assert message in str(refused.value)


def info(kind: str = "pairs", frames: int = 21, height: int = 32, width: int = 48) -> DatasetInfo:
    return DatasetInfo(1, kind, 4, 16.0, frames, height, width, (), {})


@pytest.mark.parametrize(
    ("found", "chunk", "passes"),
    [
        (info(), 3, True),
        (info(frames=9), 3, True),
        (info(frames=13), 3, False),
        (info(frames=13), 2, True),
        (info(frames=20), 3, False),
        (info(frames=22), 3, False),
        (info(height=40), 3, False),
        (info(width=40), 3, False),
        (info(height=16, width=16), 3, True),
        (info(kind="encoded"), 3, False),
    ],
)
def test_clips_of_a_dataset_fit_the_model(found: DatasetInfo, chunk: int, passes: bool) -> None:
    if passes:
        _check_clips("data.train=x", found, chunk)
        return
    with pytest.raises(ConfigError) as refused:
        _check_clips("data.train=x", found, chunk)
    message = str(refused.value)
    assert message.startswith("data.train=x holds ")
    if found.kind != "pairs":
        assert message.endswith("holds encoded samples; give a dataset of pairs")
    else:
        assert f"{found.frames} frames at {found.width}x{found.height}; training needs" in message
        assert f"multiple of {chunk}, and sizes that are multiples of 16: ingest it" in message

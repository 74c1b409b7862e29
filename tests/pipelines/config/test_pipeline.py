from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from omegaconf import OmegaConf

from pipelines.config.load import from_plain, load_config, load_section, to_plain, to_yaml
from pipelines.config.merge import ConfigError
from pipelines.config.pipeline import EvaluateConfig, PipelineConfig

DB = "tracking.uri=sqlite:////tmp/liveedit-test.db"


@pytest.mark.parametrize("name", ["demo", "natural", "wan-1.3b", "wan-14b"])
def test_shipped_configurations_are_valid(name: str) -> None:
    config = load_config(name)
    assert config.name == name
    assert config.output == f"runs/{name}"
    assert config.model.resolve().stream.chunk_latents == 3


def test_yaml_over_defaults_and_command_line_over_yaml(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("foundation: {steps: 7, batch_size: 3}\ndata: {pairs: 40}\n")
    config = load_config(file, ["foundation.steps=9", DB])
    assert (config.foundation.steps, config.foundation.batch_size) == (9, 3)
    assert config.causal.steps == PipelineConfig().causal.steps


def words_to_choose_from() -> list[tuple[str, str]]:
    """Every setting of a few words, with each of them."""
    found = []
    for section in fields(PipelineConfig):
        owner = section.default_factory
        kinds = get_type_hints(owner) if isinstance(owner, type) else {}
        for name, kind in kinds.items():
            options = [kind, *get_args(kind)]  # of `X | None`, X too
            words = [
                word for one in options if get_origin(one) is Literal for word in get_args(one)
            ]
            found += [(f"{section.name}.{name}", word) for word in words if isinstance(word, str)]
    return found


@pytest.mark.parametrize(("key", "word"), words_to_choose_from())
def test_a_word_to_choose_is_no_word_of_yaml_s(key: str, word: str) -> None:
    """`true`, `on` or `null` would arrive as something else."""
    section, name = key.split(".")
    given = OmegaConf.to_container(OmegaConf.from_dotlist([f"{key}={word}"]))
    assert given == {section: {name: word}}


def test_changes_to_the_preset_reach_the_model() -> None:
    config = load_config("demo", ["model.transformer.num_layers=2", "model.stream.height=64"])
    model = config.model.resolve()
    assert model.transformer.num_layers == 2
    assert (model.stream.height, model.stream.width) == (64, 224)


def test_plain_values_and_yaml_carry_everything(tmp_path: Path) -> None:
    config = load_config("demo", ["vae.betas=[0.5,0.6]", "data.train=s3://bucket/pairs", DB])
    assert from_plain(to_plain(config)) == config
    file = tmp_path / "resolved.yaml"
    file.write_text(to_yaml(config))
    assert load_config(file) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("foundation.stesp=1", r"unknown key 'foundation.stesp'; did you mean foundation.steps"),
        ("foundatoin.steps=1", r"unknown key 'foundatoin.steps'; did you mean foundation.steps\?"),
        ("learning_rate=1", r"did you mean vae.learning_rate"),
        ("model.transformer.dmi=3", r"'model.transformer.dmi'; did you mean model.transformer.dim"),
        ("foundation.steps=many", r"foundation.steps=many must be a whole number"),
        ("model.transformer.dim=wide", r"model.transformer.dim=wide must be a whole"),
        ("compute.precision=fp17", r"compute.precision=fp17 must be one of"),
        ("vae=null", r"vae"),
        ("foundation.steps", r"'foundation.steps' is not key=value"),
        (
            "model.preset=wan-2b",
            r"unknown preset 'wan-2b'; there are demo, natural, wan-1.3b, wan-14b",
        ),
        ("data.frames=32", r"data.frames=32 is not 4n-3 .* use 21 or 33"),
        ("data.frames=25", r"data.frames=25 .* use 21 or 33"),
        ("data.pairs=0", r"data.pairs=0 is too small; use 1 or more"),
        ("compute.zero_stage=4", r"compute.zero_stage=4 does not exist; use 0 to 3"),
        ("compute.workers=0", r"compute.workers=0 is too small"),
        ("model.stream.window_latents=3", r"window_latents 3 does not hold 3 sink .* to 6"),
        ("model.stream.height=100", r"224x100 is not a multiple of 16 .* stream.height=96 and"),
        ("foundation.batch_size=90", r"asks for 180 samples at once, and the dataset has \d+"),
        ("vae.clip_frames=11", r"vae.clip_frames=11 must be 4n-3 frames, at most data.frames=33"),
        ("vae.clip_frames=37", r"vae.clip_frames=37 must be"),
        ("vae.crop=60", r"vae.crop=60 must be a multiple of 8 pixels, at most 128"),
        ("vae.crop=136", r"vae.crop=136 must be"),
        ("compute.cpus_per_worker=0", r"compute.cpus_per_worker=0.0 is too small"),
        ("foundation.learning_rate=-1", r"foundation.learning_rate=-1.0 is too small; .* above 0"),
        ("foundation.learning_rate=nan", r"foundation.learning_rate=nan is too small"),
        ("causal.text_dropout=3", r"causal.text_dropout=3.0 is a share; use 0 to 1"),
        ("vae.betas=[0.9,1]", r"vae.betas=\[0.9, 1.0\] must both be from 0 to below 1"),
        ("distill.generator_every=0", r"distill.generator_every=0 is too small"),
        ("distill.min_timestep=990", r"distill.min_timestep=990 and .*max_timestep=980 must rise"),
        ("distill.ema_decay=2", r"distill.ema_decay=2.0 is a share"),
        ("model.transformer.num_heads=0", r"model.transformer.num_heads 0 is too small"),
        ("model.transformer.num_layers=0", r"model.transformer.num_layers 0 is too small"),
        ("model.vae.widths=[8]", r"must be two widths and four depths"),
        ("model.stream.chunk_latents=0", r"model.stream.chunk_latents 0 is too small"),
        ("model.stream.timesteps=[2000,1]", r"model.stream.timesteps .* from at most 1000"),
        ("foundation.grad_accumulation=0", r"foundation.grad_accumulation=0 is too small"),
    ],
)
def test_mistakes_name_key_value_and_remedy(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("demo", ["vae.steps=9", override, DB])


def test_workers_that_share_a_clip_ask_for_one_batch_together() -> None:
    config = PipelineConfig()
    config.compute.workers, config.compute.sequence_parallel = 4, 2
    config.foundation.batch_size, config.vae.batch_size = 4, 2
    config.check_batch("foundation", 8)
    config.check_batch("vae", 8)  # of whose workers each has clips of its own
    for stage, asked, most in (("foundation", 8, 3), ("vae", 8, 1)):
        with pytest.raises(ConfigError, match=rf"for {asked} samples .* has 7; .* to {most} or"):
            config.check_batch(stage, 7)


def test_bf16_needs_sharding() -> None:
    given = ["compute.precision=bf16", "compute.zero_stage=0", DB]
    with pytest.raises(ConfigError, match=r"compute.zero_stage=0 .* set compute.zero_stage to 1"):
        load_config("demo", given)


def test_wan_needs_its_weights_and_keeps_its_vae() -> None:
    with pytest.raises(ConfigError, match=r"model.start=null, but .*`liveedit import --help`"):
        load_config("wan-1.3b", ["model.start=null"])
    with pytest.raises(ConfigError, match=r"vae.steps=5, .* set vae.steps=0"):
        load_config("wan-1.3b", ["vae.steps=5"])


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config 'demmo'; .* one of demo, .*wan-14b"):
        load_config("demmo")
    with pytest.raises(
        ConfigError, match=r"no config file .*nothing.yaml; check the path, or .* demo"
    ):
        load_config(tmp_path / "nothing.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("data: [1, 2")
    with pytest.raises(ConfigError, match=r"broken.yaml cannot be read as YAML"):
        load_config(broken)
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("data: {piars: 3}\n")
    with pytest.raises(ConfigError, match=r"wrong.yaml: unknown key 'data.piars'; .*data.pairs"):
        load_config(wrong)


def test_one_section_by_itself() -> None:
    assert load_section(EvaluateConfig, ["clips=3", "mask_cache=true"]).clips == 3
    with pytest.raises(ConfigError, match=r"unknown key 'clip'; did you mean clips"):
        load_section(EvaluateConfig, ["clip=3"])


def test_an_output_that_is_no_folder_is_refused_in_words() -> None:
    with pytest.raises(
        ConfigError, match=r"output=s3://bucket/run is no folder: .* mounted bucket"
    ):
        load_config("demo", [DB, "output=s3://bucket/run"])

"""What a pipeline does, as dataclasses: defaults, a YAML file over them, `key=value` over that.

`load_config` is the only place that sees OmegaConf; everything else gets plain dataclasses. An
unknown key, a wrong type or an impossible combination is a ConfigError that names the key, the
value and the remedy, before anything starts.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError
from yaml import YAMLError

from modeling.presets import ModelConfig, preset
from pipelines.stage_config import (
    CausalStage,
    ComputeConfig,
    DistillStage,
    FoundationStage,
    VaeStage,
)
from pipelines.tracking import resolve_uri

CONFIGS = Path(__file__).parent / "configs"
ROOT = Path(__file__).parent.parent
T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration that cannot run; the message names the key, the value and the remedy."""


@dataclass
class DataConfig:
    """The pairs to learn from and to be judged on; a null dataset is made synthetically."""

    train: str | None = None  # dataset of pairs, a folder or s3://bucket/prefix
    heldout: str | None = None  # likewise, for evaluation; never trained on
    pairs: int = 96  # synthetic training pairs
    heldout_pairs: int = 8  # synthetic held-out pairs
    frames: int = 33  # frames a clip, 4n - 3 with n a multiple of the model's chunk
    samples_per_shard: int = 8
    workers: int = 2  # processes that make synthetic pairs; 0 makes them here
    seed: int = 0
    encode_batch: int = 1  # clips encoded at once


@dataclass
class ModelSection:
    """The model to train: a preset, changes to its sizes, and weights to start from."""

    preset: str = "demo"
    start: str | None = None  # model directory or models:/NAME@ALIAS; null starts from scratch
    transformer: dict[str, Any] = field(default_factory=dict)  # changes to the preset's sizes
    vae: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)
    stream: dict[str, Any] = field(default_factory=dict)

    def resolve(self) -> ModelConfig:
        """The preset with the changes applied."""
        changes = {name: getattr(self, name) for name in ("transformer", "vae", "text", "stream")}
        try:
            base = preset(self.preset)
        except ValueError as error:
            raise ConfigError(f"model.preset: {error}") from error
        return _merge(base, [("model", {k: v for k, v in changes.items() if v})], prefix="model.")


@dataclass
class TrackingConfig:
    """Where runs and models are recorded."""

    uri: str | None = None  # null: MLFLOW_TRACKING_URI, or sqlite in runs/mlflow.db
    experiment: str = "liveedit"
    model_name: str = "liveedit"  # name in the model registry
    alias: str = "candidate"  # given to every model that a pipeline finishes
    promote: bool = True  # also make it `production` if it passes evaluate.min_*


@dataclass
class EvaluateConfig:
    """How a model is judged on held-out pairs."""

    clips: int | None = 8  # pairs to edit; null takes all
    seed: int = 0
    mask_cache: bool | None = None  # null: as the model directory says; true, false: on, off
    dilate: int = 8  # pixels around the edited region that count neither as edit nor background
    success_db: float = 4.0  # a clip whose gain reaches this is a successful edit
    min_gain_db: float = 4.0  # mean gain that promotion asks for
    min_background_db: float = 28.0  # mean background PSNR that promotion asks for


@dataclass
class PipelineConfig:
    """Everything one pipeline run needs; see configs/*.yaml."""

    name: str = "demo"
    seed: int = 0
    output: str = "runs/demo"  # folder for data, models, stage records and results
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelSection = field(default_factory=ModelSection)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    vae: VaeStage = field(default_factory=VaeStage)
    foundation: FoundationStage = field(default_factory=FoundationStage)
    causal: CausalStage = field(default_factory=CausalStage)
    distill: DistillStage = field(default_factory=DistillStage)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


TRAINED_STAGES = ("vae", "foundation", "causal", "distill")


def load_config(source: str | Path = "demo", overrides: Iterable[str] = ()) -> PipelineConfig:
    """The validated configuration of `source` (a file, or a name in pipelines/configs).

    Raises ConfigError.
    """
    path = _find(source)
    try:
        layer = OmegaConf.load(path)
    except (OSError, YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    config = _merge(
        PipelineConfig(), [(str(path), layer), ("command line", parse_overrides(overrides))]
    )
    config.tracking.uri = resolve_uri(config.tracking.uri)
    validate(config)
    return config


def load_section(kind: type[T], overrides: Iterable[str]) -> T:
    """One section's dataclass with `key=value` over its defaults."""
    return _merge(kind(), [("command line", parse_overrides(overrides))])


def to_plain(config: PipelineConfig) -> dict[str, Any]:
    """Plain JSON values, fit for Ray's train_loop_config and for MLflow."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))


def from_plain(plain: dict[str, Any]) -> PipelineConfig:
    """The inverse of `to_plain`; no second validation."""
    return _merge(PipelineConfig(), [("train_loop_config", plain)])


def to_yaml(config: PipelineConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def parse_overrides(overrides: Iterable[str]) -> Any:
    """`["data.pairs=4"]` as a config; what has no `=` is a ConfigError."""
    entries = list(overrides)
    for entry in entries:
        key, equals, _ = entry.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{entry!r} is not key=value; write for example foundation.steps=100")
    return OmegaConf.from_dotlist(entries)


def validate(config: PipelineConfig) -> None:
    """Raise a ConfigError for what cannot work, as far as the configuration alone shows it."""
    model = config.model.resolve()
    data, compute = config.data, config.compute
    chunk = model.stream.chunk_latents
    _at_least("data", data, pairs=1, heldout_pairs=1, samples_per_shard=1, workers=0)
    _at_least("data", data, encode_batch=1)
    _at_least("evaluate", config.evaluate, clips=1, dilate=0)
    _at_least("compute", compute, workers=1, threads_per_worker=1, loader_workers=0)
    _at_least("compute", compute, max_failures=0, keep_checkpoints=1)
    if (data.frames + 3) % 4 or ((data.frames + 3) // 4) % chunk or data.frames < 1:
        below = max(1, (data.frames + 3) // (4 * chunk))
        choices = [4 * chunk * n - 3 for n in (below, below + 1)]
        raise ConfigError(
            f"data.frames={data.frames} is not 4n-3 frames of whole chunks of {chunk} latents; "
            f"use {choices[0]} or {choices[1]}"
        )
    if compute.zero_stage not in range(4):
        raise ConfigError(f"compute.zero_stage={compute.zero_stage} does not exist; use 0 to 3")
    for name in TRAINED_STAGES:
        stage = getattr(config, name)
        _at_least(name, stage, steps=0, batch_size=1, grad_accumulation=1, warmup_steps=0)
        _at_least(name, stage, log_every=1, checkpoint_every=1)
        if data.train is None and stage.steps:
            check_batch(config, name, data.pairs)
    if config.vae.steps:
        _check_vae_crops(config, min(model.stream.height, model.stream.width))
    if model.vae.kind == "wan" and config.vae.steps:
        raise ConfigError(
            f"vae.steps={config.vae.steps}, but preset {config.model.preset} uses Wan's own VAE, "
            "which is not trained; set vae.steps=0"
        )
    if model.vae.kind == "wan" and config.model.start is None:
        raise ConfigError(
            f"model.start=null, but preset {config.model.preset} needs Wan's weights; run "
            "`liveedit import --help`, then set model.start to the model directory it writes"
        )
    if model.text.kind == "umt5" and model.text.path is None and config.model.start is None:
        raise ConfigError(
            "model.text.path=null, but a umt5 text encoder needs a folder of weights and tokenizer"
        )


def _check_vae_crops(config: PipelineConfig, side: int) -> None:
    frames, crop = config.vae.clip_frames, config.vae.crop
    if frames % 4 != 1 or frames > config.data.frames:
        raise ConfigError(
            f"vae.clip_frames={frames} must be 4n-3 frames, at most "
            f"data.frames={config.data.frames}"
        )
    if crop is not None and (crop % 8 or not 8 <= crop <= side):
        raise ConfigError(
            f"vae.crop={crop} must be a multiple of 8 pixels, at most {side}; null takes all"
        )


def check_batch(config: PipelineConfig, stage: str, samples: int) -> None:
    """Raise when the workers together ask for more samples at once than the dataset has."""
    workers = config.compute.workers or 2  # null: two, or more on more GPUs
    batch = getattr(config, stage).batch_size
    if workers * batch > samples:
        raise ConfigError(
            f"{stage}.batch_size={batch} on compute.workers={workers} asks for {workers * batch} "
            f"samples at once, and the dataset has {samples}; lower {stage}.batch_size to "
            f"{max(1, samples // workers)} or give more data (data.pairs, data.train)"
        )


def check_machine(config: PipelineConfig) -> None:
    """Raise when this machine lacks what `compute` asks for."""
    import torch

    available = torch.cuda.is_available()
    if config.compute.gpus and not available:
        raise ConfigError("compute.gpus=true, but torch sees no GPU here; set compute.gpus=null")
    on_gpu = available and config.compute.gpus is not False
    if config.compute.precision == "bf16" and on_gpu and not torch.cuda.is_bf16_supported(False):
        raise ConfigError(
            f"compute.precision=bf16, which {torch.cuda.get_device_name()} does not support; "
            "set compute.precision=fp32"
        )


def _at_least(section: str, owner: object, **minima: int) -> None:
    for name, minimum in minima.items():
        value = getattr(owner, name)
        if value is not None and value < minimum:
            raise ConfigError(f"{section}.{name}={value} is too small; use {minimum} or more")


def _find(source: str | Path) -> Path:
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"there is no config file {path}")
        return path
    named = CONFIGS / f"{source}.yaml"
    if not named.is_file():
        names = sorted(p.stem for p in CONFIGS.glob("*.yaml"))
        raise ConfigError(
            f"there is no config {str(source)!r}; give a .yaml file or one of {', '.join(names)}"
        )
    return named


def _merge(base: T, layers: list[tuple[str, Any]], prefix: str = "") -> T:
    """`base` (a dataclass) with the layers over it; errors name the layer and the full key."""
    config = OmegaConf.structured(base)
    OmegaConf.set_readonly(config, False)  # a frozen dataclass is read-only, also for merging
    for origin, layer in layers:
        try:
            config = OmegaConf.merge(config, layer)
        except OmegaConfBaseException as error:
            raise ConfigError(f"{origin}: {_explain(error, base, prefix)}") from error
    try:
        return cast(T, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, base, prefix)) from error
    except ValueError as error:  # a dataclass's own __post_init__
        raise ConfigError(f"{prefix}{error}") from error


def _explain(error: OmegaConfBaseException, base: object, prefix: str) -> str:
    key = f"{prefix}{error.full_key or ''}"
    first_line = str(error).splitlines()[0]
    if isinstance(error, ConfigKeyError):
        known = [prefix + name for name in _dotted(base)]
        close = difflib.get_close_matches(key, known, n=2, cutoff=0.6) or [
            name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]
        ]
        level = sorted({name.split(".")[0] for name in known} if not prefix else known)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(level)}"
        return f"unknown key {key!r}; {hint}"
    if isinstance(error, ValidationError):
        return f"{key or 'section'}: {first_line}"
    return first_line


def _dotted(owner: object, prefix: str = "") -> list[str]:
    names: list[str] = []
    for entry in fields(cast(Any, owner)):
        value = getattr(owner, entry.name)
        name = prefix + entry.name
        names += _dotted(value, f"{name}.") if is_dataclass(value) else [name]
    return names


def section_plain(section: object) -> dict[str, Any]:
    """One section as plain values, for hashing."""
    return asdict(cast(Any, section))

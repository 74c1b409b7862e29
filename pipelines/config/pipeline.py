"""What a pipeline does, as dataclasses: defaults, a YAML file over them, `key=value` over that.

OmegaConf is seen here and in `pipelines.config.merge` alone; everything else gets plain dataclasses. An
unknown key, a wrong type or an impossible combination is a ConfigError that names the key, the
value and the remedy, before anything starts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import OmegaConf
from yaml import YAMLError

from modeling.presets import ModelConfig, preset
from pipelines.config.check import check_config
from pipelines.config.merge import ConfigError, merge, parse_overrides
from pipelines.config.stages import (
    CausalStage,
    ComputeConfig,
    DistillStage,
    FoundationStage,
    VaeStage,
)
from pipelines.tracking.tracker import resolve_uri

CONFIGS = Path(__file__).parent.parent / "recipes"
ROOT = Path(__file__).parent.parent.parent
T = TypeVar("T")


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
        return merge(base, [("model", {k: v for k, v in changes.items() if v})], prefix="model.")


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


def load_config(source: str | Path = "demo", overrides: Iterable[str] = ()) -> PipelineConfig:
    """The validated configuration of `source` (a file, or a name in pipelines/recipes).

    Raises ConfigError.
    """
    path = _find(source)
    try:
        layer = OmegaConf.load(path)
    except (OSError, YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {error}") from error
    config = merge(
        PipelineConfig(), [(str(path), layer), ("command line", parse_overrides(overrides))]
    )
    config.tracking.uri = resolve_uri(config.tracking.uri)
    check_config(config)
    return config


def load_section(kind: type[T], overrides: Iterable[str]) -> T:
    """One section's dataclass with `key=value` over its defaults."""
    return merge(kind(), [("command line", parse_overrides(overrides))])


def to_plain(config: PipelineConfig) -> dict[str, Any]:
    """Plain JSON values, fit for Ray's train_loop_config and for MLflow."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(config)))


def from_plain(plain: dict[str, Any]) -> PipelineConfig:
    """The inverse of `to_plain`; no second validation."""
    return merge(PipelineConfig(), [("train_loop_config", plain)])


def to_yaml(config: PipelineConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config))


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


def section_plain(section: object) -> dict[str, Any]:
    """One section as plain values, for hashing."""
    return asdict(cast(Any, section))

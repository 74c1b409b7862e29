"""What a pipeline does, as dataclasses with defaults and units; each checks itself when it is made.

An impossible value or combination is a ConfigError that names the key, the value and the remedy.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Literal

from modeling.config import ModelConfig
from modeling.geometry import SPATIAL_STRIDE, TOKEN_PIXELS, frames_of, latents_of
from modeling.presets import PRESETS
from pipelines.config.merge import ConfigError, merge
from pipelines.config.rules import at_least
from pipelines.config.stages import (
    TRAINED_STAGES,
    CausalStage,
    ComputeConfig,
    DistillStage,
    FoundationStage,
    VaeStage,
)


@dataclass
class DataConfig:
    """The pairs to learn from and to be judged on; what is null is drawn or made of `footage`."""

    SECTION: ClassVar[str] = "data"

    train: str | None = None  # dataset of pairs, a folder or s3://bucket/prefix
    heldout: str | None = None  # likewise, for evaluation; never trained on
    footage: str | None = None  # folder of photos and clips that pairs are made of; null draws them
    pairs: int = 96  # training pairs that are made
    heldout_pairs: int = 8  # held-out pairs that are made
    frames: int = 33  # frames a clip, 4n - 3 with n a multiple of the model's chunk
    samples_per_shard: int = 8  # pairs a tar file
    workers: int = 2  # processes that make pairs; 0 makes them here
    seed: int = 0  # another gives other pairs
    encode_batch: int = 1  # clips encoded at once
    encode_precision: Literal["fp16", "fp32"] = "fp16"  # of the VAE on a GPU, if as good as storage

    def __post_init__(self) -> None:
        at_least(self, pairs=1, heldout_pairs=1, samples_per_shard=1, workers=0, encode_batch=1)


@dataclass
class ModelSection:
    """The model to train: a preset, changes to its sizes, and weights to start from."""

    preset: str = "demo"  # sizes of all networks
    start: str | None = None  # model directory or models:/NAME@ALIAS; null starts from scratch
    transformer: dict[str, Any] = field(default_factory=dict)  # changes to the preset's sizes
    vae: dict[str, Any] = field(default_factory=dict)  # the same of the VAE: kind, widths ...
    text: dict[str, Any] = field(default_factory=dict)  # of the text encoder: kind, path ...
    stream: dict[str, Any] = field(default_factory=dict)  # of the stream: height, window ...

    def resolve(self) -> ModelConfig:
        """The preset with the changes applied."""
        sections = {name: getattr(self, name) for name in ("transformer", "vae", "text", "stream")}
        changes = {name: section for name, section in sections.items() if section}
        try:
            base = PRESETS[self.preset]
        except ValueError as error:
            raise ConfigError(f"model.preset: {error}") from error
        return _changed(base, json.dumps(changes, default=str))


@lru_cache(maxsize=16)  # a plan asks for the same one dozens of times
def _changed(base: ModelConfig, changes: str) -> ModelConfig:
    return merge(base, [("model", json.loads(changes))], prefix="model.")


@dataclass
class TrackingConfig:
    """Where runs and models are recorded."""

    uri: str | None = None  # null: MLFLOW_TRACKING_URI, or sqlite in runs/mlflow.db
    experiment: str = "liveedit"  # MLflow's, in which the runs are
    model_name: str = "liveedit"  # name in the model registry
    alias: str = "candidate"  # given to every model that a pipeline finishes
    promote: bool = True  # also make it `production` if it passes evaluate.min_*


@dataclass
class EvaluateConfig:
    """How a model is judged on held-out pairs."""

    SECTION: ClassVar[str] = "evaluate"

    clips: int | None = 8  # pairs to edit; null takes all
    seed: int = 0  # of the streams' noise
    mask_cache: bool | None = None  # null: as the model directory says; true, false: on, off
    dilate: int = 8  # pixels around the edited region that count neither as edit nor background
    success_db: float = 4.0  # a clip whose gain reaches this is a successful edit
    min_gain_db: float = 4.0  # mean gain that promotion asks for
    min_background_db: float = 28.0  # mean background PSNR that promotion asks for

    def __post_init__(self) -> None:
        at_least(self, clips=1, dilate=0)


@dataclass
class PipelineConfig:
    """Everything one pipeline run needs; see recipes/*.yaml."""

    name: str = "demo"  # of the pipeline's run
    seed: int = 0  # of everything that is drawn
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

    def __post_init__(self) -> None:
        """What sections cannot ask for together, as far as they alone show it."""
        if "://" in self.output:
            raise ConfigError(
                f"output={self.output} is no folder: models, records and checkpoints need one "
                "that all nodes see, such as a shared disk or a mounted bucket (datasets may lie "
                "on s3://)"
            )
        model = self.model.resolve()
        self._check_frames(model.stream.chunk_latents)
        self._check_sequence(model)
        self._check_kept()
        for name in TRAINED_STAGES:
            if self.data.train is None and getattr(self, name).steps:
                self.check_batch(name, self.data.pairs)
        if self.vae.steps:
            self._check_vae_crops(min(model.stream.height, model.stream.width))
        if model.vae.kind == "wan" and self.vae.steps:
            raise ConfigError(
                f"vae.steps={self.vae.steps}, but preset {self.model.preset} uses Wan's own VAE, "
                "which is not trained; set vae.steps=0"
            )
        if model.vae.kind == "wan" and self.model.start is None:
            raise ConfigError(
                f"model.start=null, but preset {self.model.preset} needs Wan's weights; run "
                "`liveedit import --help`, then set model.start to the model directory it writes"
            )
        if model.text.kind == "umt5" and model.text.path is None and self.model.start is None:
            raise ConfigError(
                "model.text.path=null, but a umt5 text encoder needs a folder of weights and "
                "tokenizer"
            )

    def check_batch(self, stage: str, samples: int) -> None:
        """Raise when the workers together ask for more samples at once than the dataset has."""
        workers = self.compute.workers or 2  # null: two, or more on more GPUs
        groups = max(1, workers // self.compute.sharing(stage))
        batch = getattr(self, stage).batch_size
        if groups * batch > samples:
            raise ConfigError(
                f"{stage}.batch_size={batch} on compute.workers={workers} asks for "
                f"{groups * batch} samples at once, and the dataset has {samples}; lower "
                f"{stage}.batch_size to {max(1, samples // groups)} or give more data "
                "(data.pairs, data.train)"
            )

    def _check_sequence(self, model: ModelConfig) -> None:
        size, heads = self.compute.sequence_parallel, model.transformer.num_heads
        stream = model.stream
        tokens = stream.height * stream.width // TOKEN_PIXELS**2
        for count, what in ((heads, "heads"), (tokens, "tokens of a latent")):
            if count % size:
                raise ConfigError(
                    f"compute.sequence_parallel={size} does not divide the model's {count} {what}; "
                    f"use a divisor, such as {math.gcd(heads, tokens, size)}"
                )

    def _check_kept(self) -> None:
        """Recomputed blocks keep products only where they keep anything."""
        compute = self.compute
        if not compute.activation_checkpointing:
            return  # all is kept
        for name in TRAINED_STAGES:
            section = getattr(self, name)
            kept = getattr(section, "keep_products", 0)
            if not (section.steps and kept):
                continue
            asked = f"{name}.keep_products={kept}"
            if compute.recompute_attention:
                raise ConfigError(
                    f"{asked} keeps what compute.recompute_attention=true recomputes; set "
                    f"{name}.keep_products=0, or compute.recompute_attention=false"
                )
            if name == "distill" and compute.zero_stage == 3 and section.batch_size > 1:
                raise ConfigError(
                    f"{asked} cannot be with compute.zero_stage=3 and distill.batch_size="
                    f"{section.batch_size}: a generator that learns clip by clip gathers its "
                    "weights anew for each, and recomputes all; set distill.batch_size=1 and "
                    f"distill.grad_accumulation={section.batch_size * section.grad_accumulation}, "
                    "or distill.keep_products=0"
                )

    def _check_frames(self, chunk: int) -> None:
        frames, latents = self.data.frames, latents_of(self.data.frames)
        if frames < 1 or frames != frames_of(latents) or latents % chunk:
            below = max(1, latents // chunk)
            choices = [frames_of(chunk * n) for n in (below, below + 1)]
            raise ConfigError(
                f"data.frames={frames} is not 4n-3 frames of whole chunks of {chunk} latents; "
                f"use {choices[0]} or {choices[1]}"
            )

    def _check_vae_crops(self, side: int) -> None:
        frames, crop = self.vae.clip_frames, self.vae.crop
        if frames != frames_of(latents_of(frames)) or not 1 <= frames <= self.data.frames:
            raise ConfigError(
                f"vae.clip_frames={frames} must be 4n-3 frames, at most "
                f"data.frames={self.data.frames}"
            )
        if crop is not None and (crop % SPATIAL_STRIDE or not SPATIAL_STRIDE <= crop <= side):
            raise ConfigError(
                f"vae.crop={crop} must be a multiple of {SPATIAL_STRIDE} pixels, at most {side}; "
                "null takes all"
            )

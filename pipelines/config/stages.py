"""What each trained stage can be told, and what it runs on.

A step is one optimizer update: `batch_size` clips on every worker, `grad_accumulation` times.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pipelines.config.merge import ConfigError
from pipelines.config.rules import above_0, at_least, check_gate, shares

TRAINED_STAGES = ("vae", "foundation", "causal", "distill")


@dataclass
class ComputeConfig:
    """What a stage runs on."""

    SECTION: ClassVar[str] = "compute"

    address: str | None = None  # Ray cluster (ray://HOST:10001, auto); null: a private Ray here
    workers: int | None = None  # null: one a GPU of the Ray cluster, or 2 without GPUs
    gpus: bool | None = None  # null: if the Ray cluster has any
    cpus_per_worker: float = 1.0  # what Ray reserves
    threads_per_worker: int = 1  # OMP and torch threads of a worker without a GPU
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 keeps fp32 master weights; slow on a CPU
    sequence_parallel: int = 1  # workers that share every clip, each with a part of its tokens
    zero_stage: int = 2  # DeepSpeed ZeRO: 0 nothing, 1 optimizer, 2 gradients, 3 weights sharded
    offload: Literal["nothing", "optimizer", "weights"] = "nothing"  # moved to the host's memory
    activation_checkpointing: bool = False  # recompute blocks in the backward pass to save memory
    recompute_attention: bool = False  # and all within them: less memory still, slower
    loader_workers: int = 0  # processes a worker that read and decode data
    shard_cache: str | None = None  # local folder that keeps shards read from S3; null: re-read
    max_failures: int = 2  # restarts of a stage after a worker died, before it gives up
    hang_minutes: float = 20.0  # a worker that takes longer over one part of a step hangs; 0: never
    keep_checkpoints: int = 2  # newest checkpoints of a running stage: one, should another be bad
    keep_finished: bool = False  # keep a finished stage's last state, so that more steps can follow
    deterministic: bool = True  # same losses in every run; a GPU then trains half as slow again

    def __post_init__(self) -> None:
        at_least(self, workers=1, threads_per_worker=1, loader_workers=0, sequence_parallel=1)
        at_least(self, max_failures=0, keep_checkpoints=1, hang_minutes=0)
        above_0(self, "cpus_per_worker")
        self.check_sharing(self.workers)
        if self.zero_stage not in range(4):
            raise ConfigError(f"compute.zero_stage={self.zero_stage} does not exist; use 0 to 3")
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ConfigError(
                "compute.zero_stage=0 keeps no float32 master weights for compute.precision=bf16; "
                "set compute.zero_stage to 1, 2 or 3, or compute.precision=fp32"
            )

        self._check_offload()

    def _check_offload(self) -> None:
        if self.offload != "nothing" and self.zero_stage == 0:
            raise ConfigError(
                f"compute.offload={self.offload} moves what ZeRO shards, and compute.zero_stage=0 "
                "shards nothing; set compute.zero_stage=2, or compute.offload=nothing"
            )
        if self.offload == "weights" and self.zero_stage < 3:
            raise ConfigError(
                "compute.offload=weights needs compute.zero_stage=3, here it is "
                f"{self.zero_stage}, where every GPU has weights of its own; set "
                "compute.zero_stage=3, or compute.offload=optimizer"
            )

    def check_sharing(self, workers: int | None) -> None:
        """ConfigError unless so many workers (None: not known yet) make whole groups."""
        if workers is not None and workers % self.sequence_parallel:
            raise ConfigError(
                f"compute.sequence_parallel={self.sequence_parallel} does not divide "
                f"compute.workers={workers} into groups; use a divisor, or other workers"
            )

    def sharing(self, stage: str) -> int:
        """How many workers share every clip in `stage`; a VAE has no tokens to share."""
        return 1 if stage == "vae" else self.sequence_parallel


@dataclass
class TrainedStage:
    """What all trained stages share."""

    SECTION: ClassVar[str]
    METRICS: ClassVar[tuple[str, ...]] = ("loss",)  # what a gate can ask for
    JUDGED: ClassVar[tuple[str, ...]] = ("loss",)  # what its validation measures

    steps: int = 100  # updates of the weights; 0 leaves the stage out
    method: str | None = None  # an entry of training/methods/table.py; null: the stage's own
    batch_size: int = 1  # clips a worker takes at once
    grad_accumulation: int = 1  # batches an update
    learning_rate: float = 1e-4  # AdamW's, after the warm-up
    final_learning_rate: float = 1.0  # share of learning_rate left at the last step (cosine decay)
    warmup_steps: int = 10  # linear, from 0
    weight_decay: float = 0.01  # AdamW's
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's
    grad_clip: float = 1.0  # global gradient norm; 0 does not clip
    log_every: int = 10  # steps
    checkpoint_every: int = 100  # steps
    checkpoint_minutes: float = 30.0  # the latest after so long, whatever the steps; 0 does not
    seed: int | None = None  # null: the pipeline's
    profile: int = 0  # steps of the first worker that PyTorch's profiler records, for the run
    validate_every: int = 0  # steps; 0 does not
    validate_clips: int = 8  # held-out pairs whose loss is taken, with the same noise every time
    sample_clips: int = 2  # held-out pairs edited by the stream, as picture and mp4
    keep_best: str | None = None  # metric, e.g. validation_gain, whose best model is kept; or last
    patience: int = 0  # validations without a better one after which the stage ends; 0 goes on
    # What the finished stage must reach for the pipeline to go on: max_METRIC, min_METRIC
    gate: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        at_least(self, validate_every=0, validate_clips=1, sample_clips=0, patience=0, profile=0)
        check_gate(self, self.gate, (*self.METRICS, *self.validated))
        self._check_best()
        at_least(self, steps=0, batch_size=1, grad_accumulation=1, warmup_steps=0)
        at_least(self, log_every=1, checkpoint_every=1, weight_decay=0, grad_clip=0)
        at_least(self, checkpoint_minutes=0)
        above_0(self, "learning_rate")
        shares(self, "final_learning_rate")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(
                f"{self.SECTION}.betas={list(self.betas)} must both be from 0 to below 1"
            )

    @property
    def validated(self) -> tuple[str, ...]:
        """The metrics of a validation."""
        if not self.validate_every:
            return ()
        edits = ("gain", "background_psnr") if self.sample_clips else ()
        return tuple(f"validation_{name}" for name in (*self.JUDGED, *edits))

    def _check_best(self) -> None:
        if self.keep_best is not None and self.keep_best not in self.validated:
            raise ConfigError(
                f"{self.SECTION}.keep_best={self.keep_best} is no metric of its validation; there "
                f"are {', '.join(self.validated) or f'none: set {self.SECTION}.validate_every'}"
            )
        if self.patience and self.keep_best is None:
            raise ConfigError(
                f"{self.SECTION}.patience={self.patience} waits for a better model; say by which "
                f"metric with {self.SECTION}.keep_best"
            )


@dataclass
class VaeStage(TrainedStage):
    """Trains a small VAE on source and target frames; a null start is from scratch."""

    SECTION: ClassVar[str] = "vae"
    METRICS: ClassVar[tuple[str, ...]] = ("loss", "psnr")
    JUDGED: ClassVar[tuple[str, ...]] = ("loss", "psnr")

    steps: int = 200
    batch_size: int = 2
    learning_rate: float = 5e-4
    final_learning_rate: float = 0.1
    weight_decay: float = 0.0
    train_encoder: bool = True  # false: latents, and what was trained on them, stay as they are
    clip_frames: int = 9  # random crops of this many frames, 4n - 3
    crop: int | None = None  # random squares of this side in pixels, a multiple of 8; null: all
    motion: float = 0.0  # pixels a frame, at most, that a crop wanders over its video, both ways
    mirror: bool = False  # mirror half of the crops, and let a quarter run backwards
    edge_weight: float = 1.0  # of the L1 between spatial differences of neighbouring pixels
    square_weight: float = 0.0  # of the mean square error, beside the L1
    scale_weight: float = 1e-3  # of half the mean square of the standardised latents
    latent_noise: float = 0.1  # std of noise on the standardised latents: a VAE of fixed variance
    noise_warmup: float = 0.5  # share of the steps over which the noise grows to that, from 0
    statistics_clips: int = 16  # pairs a worker takes for the latents' final mean and std

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, edge_weight=0, square_weight=0, scale_weight=0, latent_noise=0, motion=0)
        at_least(self, statistics_clips=1)
        shares(self, "noise_warmup")


@dataclass
class FoundationStage(TrainedStage):
    """Velocity matching, every latent sees every other."""

    SECTION: ClassVar[str] = "foundation"

    steps: int = 200
    shift: float = 8.0  # of the noise levels that are drawn
    weighting: str = "uniform"  # of noise levels, an entry of losses/velocity.py's WEIGHTINGS
    edit_weight: float = 0.0  # further loss of cells that the edit changes; see losses/velocity.py
    edit_full: float = 1.0  # mean square change of a cell from which on it has all of edit_weight
    text_dropout: float = 0.1  # share of clips without text, so that guidance is possible
    source_dropout: float = 0.0  # share of clips without source
    keep_products: int = 0  # recomputed blocks that keep their attention's linear layers: faster
    lora_rank: int = 0  # of adapters beside linear layers, trained in their stead; 0: all weights
    lora_alpha: float = 16.0  # their change counts alpha / rank
    lora_targets: tuple[str, ...] = ("q", "k", "v", "o", "ffn.0", "ffn.2")  # ends of layers' names

    def __post_init__(self) -> None:
        super().__post_init__()
        above_0(self, "shift", "edit_full", "lora_alpha")
        at_least(self, lora_rank=0, keep_products=0)
        shares(self, "text_dropout", "source_dropout")
        if self.lora_rank and not self.lora_targets:
            raise ConfigError(
                f"{self.SECTION}.lora_targets is empty, and {self.SECTION}.lora_rank="
                f"{self.lora_rank} has nothing to go beside; name layers, such as q, v"
            )


@dataclass
class CausalStage(FoundationStage):
    """Velocity matching, a chunk sees itself and the clean chunks before it."""

    SECTION: ClassVar[str] = "causal"

    history: Literal["stream", "full"] = (
        "stream"  # seen of earlier chunks: the stream's window, all
    )


@dataclass
class DistillStage(TrainedStage):
    """Distribution matching distillation on self-forced rollouts; a step is a critic update."""

    SECTION: ClassVar[str] = "distill"
    METRICS: ClassVar[tuple[str, ...]] = ("loss", "dmd_loss", "regression_loss", "critic_loss")

    steps: int = 100
    learning_rate: float = 2e-6  # generator
    critic_learning_rate: float = 4e-7  # of the critic, which tells what the generator makes
    betas: tuple[float, float] = (0.0, 0.999)
    grad_clip: float = 10.0
    generator_every: int = 5  # steps a generator update
    guidance: float = 3.0  # real = c + guidance * (c - u): 3 is classifier-free guidance scale 4
    dmd_weight: float = 1.0  # of the distribution matching loss
    regression_weight: float = 0.25  # of half the mean square error to the ground truth
    edit_weight: float = 0.0  # as in foundation, of the regression
    edit_full: float = 1.0  # as in foundation, of the regression
    teacher: str | None = None  # model directory or models:/NAME@ALIAS; null: foundation's
    mask_cache: bool = True  # rollouts prune tokens as the stream will, if the model does
    history: Literal["own", "truth"] = "own"  # of a rollout: what the generator made; the truth
    gradient_chunks: int | None = None  # last chunks of a rollout that learn; null: all scored ones
    scored_chunks: int | None = None  # last chunks that truth, teacher and critic see; null: all
    min_timestep: float = 20.0  # scores are compared between these, on the 0..1000 scale
    max_timestep: float = 980.0  # see min_timestep
    ema_decay: float = 0.99  # a generator update
    rollout_copy: bool = True  # with ZeRO-3: whole weights on every GPU for the rollouts, faster
    keep_products: int = 0  # as in foundation, of generator and critic

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, generator_every=1, dmd_weight=0, regression_weight=0, keep_products=0)
        at_least(self, gradient_chunks=1, scored_chunks=1)
        if (
            self.gradient_chunks
            and self.scored_chunks
            and self.gradient_chunks > self.scored_chunks
        ):
            raise ConfigError(
                f"distill.gradient_chunks={self.gradient_chunks} is more than "
                f"distill.scored_chunks={self.scored_chunks}: nobody says what the others should "
                "learn; lower it, or leave it out"
            )
        above_0(self, "critic_learning_rate", "edit_full")
        shares(self, "ema_decay")
        if not 0 <= self.min_timestep < self.max_timestep <= 1000:
            raise ConfigError(
                f"distill.min_timestep={self.min_timestep:g} and "
                f"distill.max_timestep={self.max_timestep:g} must rise between 0 and 1000"
            )

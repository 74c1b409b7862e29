"""The sizes of every network as frozen dataclasses.

A `ModelConfig` is what `config.json` of a model directory holds: enough to build the networks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from infra.runtime.errors import UserError
from modeling.geometry import TEMPORAL_STRIDE, TOKEN_PIXELS, frames_of

WIDEST_BLUR = 1.5  # pixels; a VAE that blurs by more is far from its source

# Per-channel statistics of Wan2.1's latents: latents = (mu - mean) / std.
WAN_LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the Wan-compatible transformer; patches are always (1, 2, 2) latent cells."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    freq_dim: int = 256  # size of the sinusoidal time features
    text_dim: int = 4096
    text_tokens: int = 512  # text is zero-padded to this many tokens
    latent_channels: int = 16
    source_channels: int = 16  # concatenated after the noisy channels; 0 is plain Wan
    eps: float = 1e-6

    def __post_init__(self) -> None:
        _at_least_1(self, "dim", "ffn_dim", "num_heads", "num_layers", "text_dim", "text_tokens")
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise UserError(
                f"dim {self.dim} over num_heads {self.num_heads} gives no even head size; "
                "choose dim as a multiple of 2 * num_heads"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclass(frozen=True)
class VaeConfig:
    """Sizes of a causal video VAE with stride 4 in time and 8 in space."""

    kind: str  # an entry of `modeling.vae.build.VAES`
    base_dim: int = 96  # "wan": width at full resolution
    # "tiny": decoder widths, latent side first; "folded": at a quarter and an eighth of the size
    widths: tuple[int, ...] = (256, 128, 64, 64)
    depths: tuple[int, ...] = ()  # "folded": blocks, see `modeling.vae.folded`
    latent_channels: int = 16
    mean: tuple[float, ...] = WAN_LATENT_MEAN
    std: tuple[float, ...] = WAN_LATENT_STD

    def __post_init__(self) -> None:
        sizes = (*self.widths, *self.depths)
        counts = (len(self.widths), len(self.depths))
        if self.kind == "folded" and (counts != (2, 4) or min(sizes) < 1):
            raise UserError(
                f"vae.widths {self.widths} and vae.depths {self.depths} of a folded VAE must be "
                "two widths and four depths, such as 128, 160 and 2, 4, 5, 4"
            )
        if self.kind == "tiny" and (len(self.widths) != 4 or min(self.widths) < 1):
            raise UserError(
                f"vae.widths {self.widths} must be four decoder widths, latent side first, such as "
                "64, 48, 32, 32"
            )
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.latent_channels:
                raise UserError(
                    f"vae.{name} has {len(getattr(self, name))} values for "
                    f"{self.latent_channels} latent channels; give one a channel"
                )


@dataclass(frozen=True)
class TextConfig:
    """Which text encoder feeds cross-attention, and the shape of what it gives."""

    kind: str  # an entry of `modeling.text.build.TEXT_ENCODERS`
    dim: int
    tokens: int
    path: str | None = None  # "umt5": folder with weights and tokenizer


Scope = Literal["attention", "feedforward", "block"]  # self-attention, feed-forward, or both


@dataclass(frozen=True)
class MaskCacheConfig:
    """Which tokens of a chunk are recomputed in which steps (`modeling.streaming.mask_cache`)."""

    policy: str = "budget"  # an entry of `modeling.streaming.policies.POLICIES`
    keep_ratio: float = 0.3  # share recomputed in a pruned step; "follow", "settled" find their own
    threshold: float = 0.02  # mean square change of latents that is an edit, or a movement
    dilate: int = 1  # "follow": tokens added around what is edited
    pruned_steps: tuple[int, ...] = (1, 2)  # indices into the step list
    scope: Scope = "attention"  # what a pruned token skips

    def __post_init__(self) -> None:
        if not 0.0 < self.keep_ratio <= 1.0:
            raise UserError(f"mask_cache.keep_ratio {self.keep_ratio} is outside (0, 1]")
        if self.threshold <= 0 or self.dilate < 0:
            raise UserError(
                f"mask_cache.threshold {self.threshold} must be above 0, mask_cache.dilate "
                f"{self.dilate} 0 or more"
            )
        if self.policy in ("follow", "settled") and self.scope != "block":
            raise UserError(
                f"mask_cache.scope {self.scope} does not fit policy {self.policy}, whose tokens "
                "skip the whole transformer; set scope to block"
            )
        if 0 in self.pruned_steps:
            raise UserError(
                "mask_cache.pruned_steps holds step 0, which has nothing to reuse; start at 1"
            )


@dataclass(frozen=True)
class StreamConfig:
    """How a stream runs: the unit of work, what is remembered, and the denoising steps."""

    height: int  # pixels, the size the model was trained at
    width: int
    fps: int = 16
    chunk_latents: int = 3
    window_latents: int = 12  # keys a query sees: sinks, recent latents and its own chunk
    sink_latents: int = 3  # first latents of the stream that are never forgotten
    window_positions: bool = True  # RoPE positions inside the window, so they never run out
    timesteps: tuple[int, ...] = (1000, 750, 500, 250)  # places on the unshifted grid
    shift: float = 5.0
    mask_cache: MaskCacheConfig | None = None
    # Pixels by which `modeling.detail.guide` blurs the source; None decodes it again instead.
    guide_blur: float | None = None

    def __post_init__(self) -> None:
        chunk, window, sink = self.chunk_latents, self.window_latents, self.sink_latents
        _at_least_1(self, "height", "width", "fps", "chunk_latents", "window_latents")
        if sink < 0 or self.shift <= 0:
            raise UserError(
                f"stream.sink_latents {sink} must be 0 or more, stream.shift {self.shift} above 0"
            )
        if self.guide_blur is not None and not 0 <= self.guide_blur <= WIDEST_BLUR:
            raise UserError(
                f"stream.guide_blur {self.guide_blur} is outside 0 to {WIDEST_BLUR} pixels; where "
                "the VAE blurs by more, leave it null, and the source is decoded again"
            )
        if window % chunk or sink % chunk:
            raise UserError(
                f"stream.window_latents {window} and stream.sink_latents {sink} must be "
                f"multiples of stream.chunk_latents {chunk}"
            )
        if window < sink + chunk:
            raise UserError(
                f"stream.window_latents {window} does not hold {sink} sink latents and a chunk "
                f"of {chunk}; raise it to {sink + chunk} or lower stream.sink_latents"
            )
        if self.height % TOKEN_PIXELS or self.width % TOKEN_PIXELS:
            raise UserError(
                f"stream size {self.width}x{self.height} is not a multiple of {TOKEN_PIXELS} "
                f"pixels; set stream.height={_whole_tokens(self.height)} and "
                f"stream.width={_whole_tokens(self.width)}"
            )
        steps = list(self.timesteps)
        if (
            steps != sorted(steps, reverse=True)
            or not steps
            or not 1 <= steps[-1] <= steps[0] <= 1000
        ):
            raise UserError(
                f"stream.timesteps {self.timesteps} must fall from at most 1000 to at least 1, "
                "e.g. 1000, 750, 500, 250"
            )
        if self.mask_cache and max(self.mask_cache.pruned_steps, default=0) >= len(self.timesteps):
            raise UserError(
                f"mask_cache.pruned_steps {self.mask_cache.pruned_steps} names a step beyond the "
                f"{len(self.timesteps)} of stream.timesteps"
            )

    @property
    def usual_mask_cache(self) -> MaskCacheConfig:
        """Its own, or else the default one, in those of its steps that this stream has."""
        if self.mask_cache is not None:
            return self.mask_cache
        usual = MaskCacheConfig()
        steps = tuple(step for step in usual.pruned_steps if step < len(self.timesteps))
        return replace(usual, pruned_steps=steps)

    @property
    def chunk_frames(self) -> int:
        """Pixel frames of every chunk but a stream's first."""
        return TEMPORAL_STRIDE * self.chunk_latents

    @property
    def first_chunk_frames(self) -> int:
        return frames_of(self.chunk_latents)


@dataclass(frozen=True)
class ModelConfig:
    """Everything needed to build an editor's networks; `config.json` of a model directory."""

    transformer: TransformerConfig
    vae: VaeConfig
    text: TextConfig
    stream: StreamConfig

    def __post_init__(self) -> None:
        if self.transformer.text_dim != self.text.dim:
            raise UserError(
                f"text.dim {self.text.dim} does not fit transformer.text_dim "
                f"{self.transformer.text_dim}; set both to what the text encoder gives"
            )
        if self.transformer.latent_channels != self.vae.latent_channels:
            raise UserError(
                f"vae.latent_channels {self.vae.latent_channels} does not fit "
                f"transformer.latent_channels {self.transformer.latent_channels}"
            )


def _at_least_1(owner: object, *names: str) -> None:
    for name in names:
        if getattr(owner, name) < 1:
            section = type(owner).__name__.removesuffix("Config").lower()
            raise UserError(f"{section}.{name} {getattr(owner, name)} is too small; use 1 or more")


def _whole_tokens(pixels: int) -> int:
    return max(TOKEN_PIXELS, round(pixels / TOKEN_PIXELS) * TOKEN_PIXELS)

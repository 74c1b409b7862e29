"""VAE: trains the small video VAE on the frames of sources and targets.

A VAE of fixed variance: noise of `latent_noise` on the standardised latents, a small penalty on
their scale. The noise makes neighbouring latents decode alike, which is what a diffusion model
that never hits a latent exactly needs. Afterwards mean and standard deviation of every channel are
measured over the training data and become part of the model. `train_encoder=false` trains the
decoder alone, under a transformer that knows the latents as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, distributed, nn

from data.loader import Split, loader
from modeling.config import VaeConfig
from modeling.geometry import SPATIAL_STRIDE, latents_of
from modeling.losses.reconstruction import reconstruction_loss, scale_penalty
from modeling.model_dir import Model, ModelError
from modeling.pixels import from_uint8
from modeling.vae.build import build_vae
from modeling.vae.streaming import StreamingVae
from pipelines.config.stages import VaeStage
from pipelines.training.export import Exported
from pipelines.training.methods.base import Draw, Setting
from pipelines.training.zero.average import Ema
from pipelines.training.zero.engines import make_engine, update
from pipelines.training.zero.inside import full_weights


class Autoencoder(nn.Module):
    """A VAE's encoder and decoder as one forward, which an engine can be made of."""

    def __init__(self, vae: StreamingVae, *, train_encoder: bool) -> None:
        super().__init__()
        self.vae, self.train_encoder = vae, train_encoder

    def forward(self, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [B, f, 3, H, W] -> decoded pixels and standardised latents [B, F, C, h, w]."""
        vae = self.vae
        with torch.set_grad_enabled(self.train_encoder and torch.is_grad_enabled()):
            raw, _ = vae.encode_raw(pixels)
        latents = (raw - vae.mean) / vae.std
        decoded, _ = vae.decode_raw((latents + noise.to(latents)) * vae.std + vae.mean)
        return decoded, latents


class VaeTraining:
    """See `base.Stage`."""

    def __init__(self, setting: Setting, model: Model) -> None:
        if not isinstance(model.vae, StreamingVae):
            raise ModelError(f"{setting.job.start} holds no VAE to train")
        section = setting.section
        self.setting, self.section = setting, section
        self.config = model.config.vae
        network = Autoencoder(model.vae, train_encoder=section.train_encoder)
        self.engine = make_engine(network, setting.config.compute, section, section.learning_rate)
        self.engines = {"vae": self.engine}
        self.ema: Ema | None = None
        self.learning_rates = {"vae": section.learning_rate}

    def step(self, batch: dict[str, Any], draw: Draw) -> dict[str, Tensor]:
        given = torch.as_tensor(batch["clip"]).to(self.setting.device)
        pixels = _pixels(crop(given, self.section, draw))
        clips, frames, _, height, width = pixels.shape
        channels = self.config.latent_channels
        cells = (height // SPATIAL_STRIDE, width // SPATIAL_STRIDE)
        noise = torch.randn(
            (clips, latents_of(frames), channels, *cells),
            device=self.setting.device,
            generator=draw.own,
        )
        loss, metrics = self.loss(self.engine, pixels, self.noise_level(draw.step) * noise)
        norm = update(self.engine, loss)
        return metrics if norm is None else metrics | {"grad_norm": norm}

    def loss(self, network: Any, pixels: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        decoded, latents = network(pixels, noise)
        section = self.section
        loss = reconstruction_loss(decoded, pixels, section.edge_weight, section.square_weight)
        loss = loss + section.scale_weight * scale_penalty(latents)
        with torch.no_grad():
            error = (decoded.float().clamp(-1, 1) - pixels).square().mean()
        psnr = 10 * torch.log10(4 / error.clamp_min(1e-10))  # pixels span 2
        return loss, {"loss": loss.detach(), "psnr": psnr}

    def judge(self, batch: dict[str, Any], draw: Draw) -> dict[str, Tensor]:
        given = torch.as_tensor(batch["clip"]).to(self.setting.device)
        pixels = _pixels(crop(given, self.section, draw))
        return self.loss(self.engine.module, pixels, torch.zeros((), device=pixels.device))[1]

    def flops(self, batch: dict[str, Any], step: int) -> None:
        return None

    def tokens(self, batch: dict[str, Any]) -> float:
        return 0.0

    def noise_level(self, step: int) -> float:
        """Std of the latents' noise: noise from the first step on drowns what the encoder has only
        begun to say (colour, here), and the decoder then never learns to listen for it."""
        warmup = self.section.noise_warmup * self.section.steps
        return self.section.latent_noise * min(1.0, step / warmup if warmup else 1.0)

    def export(self) -> Exported:
        weights = {
            name.removeprefix("vae."): value for name, value in full_weights(self.engine).items()
        }
        config = self._measure(weights) if self.section.train_encoder else self.config
        return Exported(vae=weights, vae_config=config)

    @torch.no_grad()
    def _measure(self, weights: dict[str, Tensor]) -> VaeConfig:
        """The VAE's config with the latents' mean and std of every channel; a collective."""
        device = self.setting.device
        vae = build_vae(self.config)
        vae.load_state_dict(weights)
        vae.to(device).eval()
        channels = self.config.latent_channels
        sums = torch.zeros(2 * channels + 1, dtype=torch.float64, device=device)
        for clips in self._statistics_clips():
            raw, _ = vae.encode_raw(_pixels(clips.to(device)))  # [B, F, C, h, w]
            values = raw.double().transpose(0, 2).flatten(1)  # [C, B * F * h * w]
            sums[:channels] += values.sum(dim=1)
            sums[channels:-1] += values.square().sum(dim=1)
            sums[-1] += values.shape[1]
        distributed.all_reduce(sums)
        mean = sums[:channels] / sums[-1]
        variance = sums[channels:-1] / sums[-1] - mean.square()
        std = variance.clamp_min(1e-8).sqrt()
        return replace(
            self.config,
            mean=tuple(round(v, 6) for v in mean.tolist()),
            std=tuple(round(v, 6) for v in std.tolist()),
        )

    def _statistics_clips(self) -> Iterator[Tensor]:
        """uint8 [1, f, H, W, 3], source and target of each of this worker's first pairs."""
        batches = loader(
            self.setting.job.dataset,
            Split(
                batch_size=1,
                rank=self.setting.data_rank,
                world_size=self.setting.data_workers,
                shuffle=False,
                epochs=1,
            ),
        )
        for batch in islice(batches, self.section.statistics_clips):
            yield from (torch.as_tensor(batch[name]) for name in ("source", "target"))


def crop(clips: Tensor, section: VaeStage, draw: Draw) -> Tensor:
    """Clips uint8 [B, f, H, W, 3] on the draw's device -> [B, f, h, w, 3]: any place of each.

    With `section.motion` the place wanders in a straight line, so that the VAE sees more motion
    than the videos have; with `section.mirror` crops are mirrored and run backwards, too.
    """
    count, frames, height, width, device = *clips.shape[:4], draw.device
    high, wide = min(section.crop or height, height), min(section.crop or width, width)
    # In one gather where the clips are: a GPU that is asked for numbers has to finish its work.
    chances = torch.rand(count, 6, device=device, generator=draw.own).double().unbind(1)
    row, column, down, right, mirrored, backwards = (chance[:, None] for chance in chances)
    tops = _way(row, (2 * down - 1) * section.motion, height - high, frames)
    lefts = _way(column, (2 * right - 1) * section.motion, width - wide, frames)
    times = torch.arange(frames, device=device).expand(count, -1)
    rows = tops[..., None] + torch.arange(high, device=device)  # [B, f, h]
    columns = lefts[..., None] + torch.arange(wide, device=device)  # [B, f, w]
    if section.mirror:
        columns = torch.where(mirrored[..., None] < 0.5, columns.flip(2), columns)
        reverse = backwards < 0.25
        times = torch.where(reverse, times.flip(1), times)
        rows = torch.where(reverse[..., None], rows.flip(1), rows)
        columns = torch.where(reverse[..., None], columns.flip(1), columns)
    videos = torch.arange(count, device=device)[:, None, None, None]
    return clips[videos, times[:, :, None, None], rows[..., None], columns[:, :, None]]


def _way(place: Tensor, speed: Tensor, room: int, frames: int) -> Tensor:
    """Crops' offsets [B, f] from 0 to `room` pixels, `place` [B, 1] (0 to 1) in the middle frame;
    they stop at the border."""
    from_middle = torch.arange(frames, device=place.device) - (frames - 1) / 2
    start = (place * (room + 1)).long()
    return (start + (speed * from_middle).round().long()).clamp(0, room)


def _pixels(clips: Tensor) -> Tensor:
    """uint8 [B, f, H, W, 3] -> float [B, f, 3, H, W] in [-1, 1]."""
    return from_uint8(clips.permute(0, 1, 4, 2, 3))

"""The vae stage with a VAE whose latents and pixels are known, and its losses by hand.

B batch, f pixel frames, F latents, C channels, H x W pixels.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate

from data.sample import Pair
from data.shards import write_dataset
from modeling.config import VaeConfig
from modeling.model_dir import Model, ModelError
from modeling.presets import PRESETS
from modeling.vae.streaming import StreamingVae
from modeling.vae.tiny import TinyVae
from pipelines.training.methods import vae as module
from pipelines.training.methods.base import Setting
from pipelines.training.methods.vae import Autoencoder, VaeTraining
from tests.pipelines.training.plain import PlainEngine, setting, use_plain_engines

CLIPS, LENGTH, HEIGHT, WIDTH = 3, 13, 24, 40
MEAN = tuple(n / 10 for n in range(16))
STD = tuple(1 + n / 8 for n in range(16))
CONFIG = VaeConfig(kind="tiny", mean=MEAN, std=STD)


class BlockVae(StreamingVae):
    """Latents are block means of a latent's last frame, times a gain a channel; decoding repeats
    the first three channels."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__(config)
        self.encoder = nn.Parameter(torch.linspace(0.5, 2, 16).view(16, 1, 1))
        self.decoder = nn.Parameter(torch.tensor([15.0, 2.5, -9.0]).view(3, 1, 1))

    def _encode_pass(self, pixels: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        means = avg_pool2d(pixels[:, -1], 8).repeat(1, 6, 1, 1)[:, :16]  # colours in turn
        return (means * self.encoder)[:, None], [pixels[:0]]

    def _decode_pass(self, raw: Tensor, caches: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        frames = (raw[:, :, :3] * self.decoder).repeat_interleave(4 if caches else 1, dim=1)
        return interpolate(frames, scale_factor=(1, 8, 8)), [raw[:0]]


def model(vae: StreamingVae | None) -> Model:
    config = replace(PRESETS["demo"], vae=CONFIG)
    return Model(config, None, vae, {}, None)


class Noting:
    """The engine, with a note of what it was given."""

    def __init__(self, engine: PlainEngine) -> None:
        self.engine, self.given = engine, []

    def __call__(self, *args: Tensor) -> Any:
        self.given.append(args)
        return self.engine(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


@pytest.fixture(autouse=True)
def _engines(monkeypatch: pytest.MonkeyPatch) -> None:
    use_plain_engines(monkeypatch)


def make(here: Setting) -> VaeTraining:
    training = VaeTraining(here, model(BlockVae(CONFIG)))
    training.engine = Noting(training.engine)
    return training


def clips(length: int = 9) -> dict[str, Tensor]:
    """Clips whose pixels say where they are: clip and frame in red, row, column."""
    count, frame = torch.arange(CLIPS)[:, None, None, None], torch.arange(length)[:, None, None]
    row, column = torch.arange(HEIGHT)[:, None] * 10, torch.arange(WIDTH) * 6
    place = torch.broadcast_tensors(count * 80 + frame * 4, row, column)
    return {"clip": torch.stack(place, dim=-1).to(torch.uint8)}


def bytes_of(pixels: Tensor) -> Tensor:
    """[B, f, 3, H, W] in [-1, 1] -> uint8 [B, f, H, W, 3]."""
    return ((pixels + 1) * 127.5).round().to(torch.uint8).permute(0, 1, 3, 4, 2)


def test_the_loss_by_hand() -> None:
    weights = {"edge_weight": 0.7, "square_weight": 1.3, "scale_weight": 0.2}
    here = setting("vae", **weights, clip_frames=5, crop=16)
    training = make(here)
    asked = deepcopy(training.engine.module.vae)  # before the optimizer moves it
    metrics = training.step(clips(5), here.draw(150, 0))  # the noise has come to its level
    ((pixels, noise),) = training.engine.given
    assert pixels.shape == (CLIPS, 5, 3, 16, 16)
    assert noise.shape == (CLIPS, 2, 16, 2, 2)
    mean, std = (torch.tensor(x).view(16, 1, 1) for x in (MEAN, STD))
    with torch.no_grad():
        colours = torch.stack([avg_pool2d(pixels[:, n], 8) for n in (0, 4)], dim=1)
        latents = (colours.repeat(1, 1, 6, 1, 1)[:, :, :16] * asked.encoder - mean) / std
        raw = (latents + noise) * std + mean
        frames = [raw[:, 0]] + [raw[:, 1]] * 4
        small = torch.stack(frames, dim=1)[:, :, :3] * asked.decoder
        decoded = interpolate(small, scale_factor=(1, 8, 8))
        error = (decoded - pixels).double()
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        scale = 0.5 * latents.double().square().mean()
        loss = error.abs().mean() + 0.7 * edges + 1.3 * error.square().mean() + 0.2 * scale
        square = (decoded.clamp(-1, 1) - pixels).double().square().mean()
    assert decoded.abs().max() > 1  # the clamp counts
    assert metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert training.engine.losses == [metrics["loss"].item()]
    assert metrics["psnr"].item() == pytest.approx(10 * np.log10(4 / square.item()), rel=1e-5)
    assert set(metrics) == {"loss", "psnr", "grad_norm"}


def test_a_clip_that_comes_out_as_it_was_has_a_finite_psnr() -> None:
    """One that is not finite ends a training."""
    training, latents = make(setting("vae")), torch.zeros(1, 2, 16, 2, 2)
    for pixels in (torch.zeros(1, 5, 3, 16, 16), torch.ones(1, 5, 3, 16, 16)):  # white stays white
        _, metrics = training.loss(lambda given, _: (2 * given, latents), pixels, latents)
        assert 90 < metrics["psnr"].item() < 120


def test_crops_are_any_place() -> None:
    here = setting("vae", clip_frames=9, crop=16)
    training = make(here)
    given = clips()
    found: list[tuple[int, ...]] = []
    for step in range(120):
        training.step(given, here.draw(step, 0))
        for clip, crop in enumerate(bytes_of(training.engine.given[-1][0])):
            red, green, blue = crop[0, 0, 0].tolist()
            top, left = green // 10, blue // 6
            assert red == clip * 80
            assert torch.equal(crop, given["clip"][clip, :, top : top + 16, left : left + 16])
            found.append((top, left))
    columns = np.array(found).T
    assert set(columns[0]) == set(range(9))
    assert {0, 24} <= set(columns[1])  # first and last place of 25
    assert abs(np.corrcoef(columns)[0, 1]) < 0.25  # and independent


@pytest.mark.parametrize(
    ("place", "speed", "frames", "way"),
    [
        (0.5, 1.0, 5, [8, 9, 10, 11, 12]),  # in the middle frame where it was drawn
        (0.5, -2.0, 5, [14, 12, 10, 8, 6]),
        (0.5, 2.0, 4, [7, 9, 11, 13]),  # between the two middle ones
        (0.0, 3.0, 5, [0, 0, 0, 3, 6]),
        (0.99, 3.0, 5, [14, 17, 20, 20, 20]),  # the last place is as likely as any
        (0.5, 0.0, 1, [10]),
    ],
)
def test_a_crop_s_way_by_hand(place: float, speed: float, frames: int, way: list[int]) -> None:
    drawn, pace = torch.tensor([[place]]), torch.tensor([[speed]])
    assert module._way(drawn, pace, 20, frames).tolist() == [way]


def test_a_crop_wanders_in_a_straight_line_no_faster_than_asked_and_stops_at_the_border() -> None:
    here = setting("vae", clip_frames=9, crop=16, motion=2.0)
    fastest, rested = 0, 0
    ways: set[tuple[float, ...]] = set()
    for step in range(60):
        for view in module.crop(clips()["clip"], here.section, here.draw(step, 0)):
            corner = view[:, 0, 0].int()  # red says the frame, green the row, blue the column
            rows, columns = corner[:, 1] // 10, corner[:, 2] // 6
            ways.add(tuple((way[-1] - way[0]).sign().item() for way in (rows, columns)))
            for way, room in ((rows, HEIGHT - 16), (columns, WIDTH - 16)):
                steps = way.diff()
                assert steps.abs().max() <= 2
                inside = steps[
                    (way[1:] > 0) & (way[1:] < room) & (way[:-1] > 0) & (way[:-1] < room)
                ]
                assert not len(inside) or inside.max() - inside.min() <= 1  # rounded, so by one
                assert way.min() >= 0
                assert way.max() <= room
                fastest, rested = (
                    max(fastest, int(steps.abs().max())),
                    rested + int(way[0] == way[-1]),
                )
            assert torch.equal(corner[:, 0].diff(), torch.full((8,), 4))  # frames stay in order
    assert fastest == 2
    assert rested < 120  # it does move
    assert {(down, right) for down in (-1, 1) for right in (-1, 1)} <= ways


def test_crops_are_mirrored_and_run_backwards_when_asked() -> None:
    here = setting("vae", clip_frames=9, crop=16, mirror=True)
    seen = {"mirrored": 0, "backwards": 0, "clips": 0}
    for step in range(100):
        for view in module.crop(clips()["clip"], here.section, here.draw(step, 0)):
            blue, red = view[0, 0, :, 2].int().diff(), view[:, 0, 0, 0].int().diff()
            assert blue.abs().eq(6).all()
            assert red.abs().eq(4).all()
            seen["clips"] += 1
            seen["mirrored"] += int(blue[0] < 0)
            seen["backwards"] += int(red[0] < 0)
    assert 0.38 < seen["mirrored"] / seen["clips"] < 0.62
    assert 0.13 < seen["backwards"] / seen["clips"] < 0.38


@pytest.mark.parametrize("crop", [None, 32])  # a square that is higher than the clip
def test_without_a_crop_all_of_the_picture_is_taken(crop: int | None) -> None:
    training = make(here := setting("vae", crop=crop))
    given = clips(LENGTH)
    training.step(given, here.draw(0, 0))
    pixels = training.engine.given[0][0]
    assert pixels.shape == (CLIPS, LENGTH, 3, HEIGHT, WIDTH if crop is None else 32)
    if crop is None:  # rows and columns are all there, in their order
        assert torch.equal(bytes_of(pixels)[..., 1:], given["clip"][..., 1:])


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [(0.5, [0.0, 0.02, 0.1, 0.2, 0.2]), (0.0, [0.2] * 5), (1.0, [0.0, 0.01, 0.05, 0.1, 0.1975])],
)
def test_the_noise_grows_to_its_level(warmup: float, expected: list[float]) -> None:
    here = setting("vae", steps=80, latent_noise=0.2, noise_warmup=warmup, crop=None)
    training = make(here)
    for step, level in zip((0, 4, 20, 40, 79), expected, strict=True):
        assert training.noise_level(step) == pytest.approx(level)
        training.step(clips(), here.draw(step, 0))
        noise = training.engine.given[-1][1]
        assert noise.std().item() == pytest.approx(level, rel=0.08)
    assert training.noise_level(10**6) == pytest.approx(0.2)


def test_noise_and_crops_differ_between_ranks_and_steps() -> None:
    noises, crops = [], []
    for rank in (0, 1):
        training = make(here := setting("vae", rank, 2, noise_warmup=0.0, crop=16))
        for step in (0, 1):
            training.step(clips(), here.draw(step, 0))
            pixels, noise = training.engine.given[-1]
            noises.append(noise.flatten())
            crops.append(pixels.flatten())
    related = torch.corrcoef(torch.stack(noises)) - torch.eye(4)
    assert related.abs().max() < 0.2
    assert torch.stack(crops).unique(dim=0).shape[0] == 4


def test_torchs_own_random_numbers_are_without_effect() -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        training = make(here := setting("vae", noise_warmup=0.0, crop=16))
        found.append(training.step(clips(), here.draw(0, 0)))
    assert found[0] == found[1]


@pytest.mark.parametrize("train_encoder", [True, False])
def test_the_encoder_learns_only_if_it_is_told_to(train_encoder: bool) -> None:
    torch.manual_seed(0)
    vae = TinyVae(replace(PRESETS["demo"].vae, widths=(16, 12, 8, 8)))
    network = Autoencoder(vae, train_encoder=train_encoder)
    decoded, _ = network(torch.rand(1, 5, 3, 16, 16), torch.zeros(1, 2, 16, 2, 2))
    decoded.square().mean().backward()
    assert all(parameter.grad is not None for parameter in vae.decoder.parameters())
    assert all((p.grad is not None) == train_encoder for p in vae.encoder.parameters())


def dataset(uri: Path, count: int) -> tuple[str, list[Pair]]:
    """Pairs of flat frames, of levels that no coding changes much; each frame of its own."""
    pairs = []
    for n in range(count):
        levels = np.arange(5)[:, None, None, None] * 9 + 20 * n
        source = np.broadcast_to(levels + np.array([5, 60, 90]), (5, 16, 16, 3)).astype(np.uint8)
        mask = np.zeros((5, 16, 16), bool)
        pairs.append(Pair(source, source + np.uint8(40), mask, "x", 16.0))
    write_dataset(uri, [partial(lambda p: p, pair) for pair in pairs], made_by={})
    return str(uri), pairs


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(("rank", "world", "limit"), [(0, 1, 3), (0, 1, 99), (1, 2, 2)])
def test_mean_and_std_are_measured_over_sources_and_targets(
    tmp_path: Path, rank: int, world: int, limit: int
) -> None:
    uri, pairs = dataset(tmp_path / "set", 6)
    here = setting("vae", rank, world, statistics_clips=limit)
    here = replace(here, job=replace(here.job, dataset=uri))
    training = VaeTraining(here, model(BlockVae(CONFIG)))
    trained = training.engine.module.vae
    with torch.no_grad():
        trained.encoder.mul_(3)  # what was learned is measured, not what training started from
    module_build = module.build_vae
    try:
        module.build_vae = BlockVae  # type: ignore[assignment]
        made = training.export()
    finally:
        module.build_vae = module_build
    assert made.transformer is None
    assert made.vae is not None
    assert set(made.vae) == {"encoder", "decoder"}
    assert torch.equal(made.vae["encoder"], trained.encoder)

    share = pairs[len(pairs) // world * rank :][: min(limit, len(pairs) // world)]
    values = []
    for pair in share:
        for video in (pair.source, pair.target):
            pixels = torch.from_numpy(video[[0, 4]].astype(np.float64)).mean(dim=(1, 2)) / 127.5 - 1
            values.append(pixels.repeat(1, 6)[:, :16])
    latents = torch.cat(values) * torch.linspace(0.5, 2, 16).double() * 3  # [2 * pairs, 16]
    assert made.vae_config is not None
    found = torch.tensor(made.vae_config.mean), torch.tensor(made.vae_config.std)
    # Coding moves a level by up to one of 255.
    torch.testing.assert_close(found[0].double(), latents.mean(dim=0), atol=0.04, rtol=0)
    deviation = latents.std(dim=0, correction=0)
    torch.testing.assert_close(found[1].double(), deviation, atol=0.04, rtol=0)
    assert replace(made.vae_config, mean=MEAN, std=STD) == CONFIG


@pytest.mark.usefixtures("alone")
def test_mean_and_std_are_of_all_ranks_clips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_all(sums: Tensor) -> None:
        """Four values a channel, whose mean is 3 and whose square's is 25."""
        assert sums[-1] > 0
        sums[:16], sums[16:-1], sums[-1] = 12, 100, 4

    monkeypatch.setattr(module.distributed, "all_reduce", of_all)
    monkeypatch.setattr(module, "build_vae", BlockVae)
    uri, _ = dataset(tmp_path / "set", 2)
    here = setting("vae", statistics_clips=1)
    here = replace(here, job=replace(here.job, dataset=uri))
    made = VaeTraining(here, model(BlockVae(CONFIG))).export().vae_config
    assert made is not None
    assert (set(made.mean), set(made.std)) == ({3.0}, {4.0})


def test_a_decoder_alone_keeps_the_latents_as_they_are() -> None:
    training = VaeTraining(setting("vae", train_encoder=False), model(BlockVae(CONFIG)))
    assert training.export().vae_config == CONFIG


def test_engine_and_refusal() -> None:
    training = make(setting("vae", learning_rate=3e-4, train_encoder=False))
    assert training.tokens(clips()) == 0  # of pixels there are none
    assert training.flops(clips(), 0) is None
    assert list(training.engines) == ["vae"]
    assert training.engine.rate == training.learning_rates["vae"] == 3e-4
    assert training.ema is None
    assert training.engine.module.train_encoder is False
    with pytest.raises(ModelError, match="nowhere holds no VAE to train"):
        VaeTraining(setting("vae"), model(None))

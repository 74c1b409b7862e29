"""TAEHV against outputs of the public network; Wan's frame geometry around it."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from modeling.config import VaeConfig
from modeling.presets import PRESETS
from modeling.vae.build import build_vae
from modeling.vae.pyramid_start import start_as_pyramid
from modeling.vae.tiny import TinyVae

REFERENCE = Path(__file__).parents[2] / "reference" / "taehv_reference.safetensors"


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    return load_file(REFERENCE)


@pytest.fixture(scope="module")
def vae() -> TinyVae:
    """taew2_1's sizes with the weights that the reference file's header defines by a formula."""
    vae = build_vae(VaeConfig(kind="tiny", mean=(0.0,) * 16, std=(1.0,) * 16))
    assert isinstance(vae, TinyVae)
    shapes = {name: tensor.shape for name, tensor in vae.state_dict().items()}
    weights = {}
    for n, name in enumerate(sorted(shapes)):
        shape = shapes[name]
        i = torch.arange(shape.numel(), dtype=torch.float64)
        x = 43758.5453 * torch.sin(12.9898 * i + 78.233 * n)
        scale = math.sqrt(3 / math.prod(shape[1:])) if len(shape) > 1 else 0.05
        weights[name] = ((2 * (x - x.floor()) - 1) * scale).float().view(shape)
    vae.load_state_dict(weights)
    return vae.requires_grad_(False)


PRECISIONS = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["f32", "bf16"]
)


@PRECISIONS
def test_encoder_equals_the_public_network(
    vae: TinyVae, reference: dict[str, Tensor], dtype: torch.dtype, tolerance: float
) -> None:
    vae = copy.deepcopy(vae).to(dtype)
    pixels = reference["input.pixels"] * 2 - 1
    # The public network encodes plain groups of four. Ours, after a stream's start, does so too:
    # with the memories of the start set to zero it is the public one.
    _, state = vae.encode(pixels[:, :1])
    state.caches = [torch.zeros_like(cache) for cache in state.caches]
    latents, _ = vae.encode(pixels, state)
    assert relative_error(latents, reference["output.latents"]) < tolerance


@PRECISIONS
def test_decoder_equals_the_public_network(
    vae: TinyVae, reference: dict[str, Tensor], dtype: torch.dtype, tolerance: float
) -> None:
    vae = copy.deepcopy(vae).to(dtype)
    pixels, _ = vae.decode(reference["input.latents"])
    assert pixels.shape[1] == 13
    assert relative_error(pixels, reference["output.pixels"] * 2 - 1) < tolerance


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted).norm() / wanted.norm())


def test_streaming_equals_the_public_network_frame_by_frame(
    vae: TinyVae, reference: dict[str, Tensor]
) -> None:
    state, frames = None, []
    for latent in reference["input.latents"].split(1, dim=1):
        pixels, state = vae.decode(latent, state)
        frames.append(pixels)
    assert [piece.shape[1] for piece in frames] == [1, 4, 4, 4]
    whole = (torch.cat(frames, dim=1) + 1) / 2
    torch.testing.assert_close(whole, reference["output.pixels"], atol=2e-5, rtol=0)


def test_first_frame_is_encoded_as_four_copies_of_itself(
    vae: TinyVae, reference: dict[str, Tensor]
) -> None:
    pixels = reference["input.pixels"][:, :5] * 2 - 1
    latents, _ = vae.encode(pixels)
    assert latents.shape == (1, 2, 16, 4, 6)

    _, state = vae.encode(pixels[:, :1])
    state.caches = [torch.zeros_like(cache) for cache in state.caches]
    padded = torch.cat([pixels[:, :1]] * 3 + [pixels], dim=1)
    expected, _ = vae.encode(padded, state)
    torch.testing.assert_close(latents, expected, atol=1e-6, rtol=0)


def test_channels_stay_innermost_in_memory(vae: TinyVae, reference: dict[str, Tensor]) -> None:
    _, state = vae.encode(reference["input.pixels"])
    _, decoding = vae.decode(reference["input.latents"])
    for cache in (*state.caches, *decoding.caches):
        assert cache.is_contiguous(memory_format=torch.channels_last)


def test_demo_vae_is_small_enough_to_train_from_scratch() -> None:
    vae = build_vae(PRESETS["demo"].vae)
    assert sum(parameter.numel() for parameter in vae.parameters()) <= 1_300_000


def pyramid(seed: int = 0, widths: tuple[int, ...] = PRESETS["demo"].vae.widths) -> TinyVae:
    torch.manual_seed(seed)
    vae = build_vae(replace(PRESETS["demo"].vae, widths=widths)).requires_grad_(False)
    assert isinstance(vae, TinyVae)
    start_as_pyramid(vae)
    return vae


@pytest.mark.parametrize(
    ("widths", "carried"),
    [(PRESETS["demo"].vae.widths, 13), ((12, 9, 8, 7), 7), ((12, 2, 8, 7), 2)],
)
def test_a_new_vae_tells_colours_and_edges_apart(widths: tuple[int, ...], carried: int) -> None:
    """Of ramps, whose slopes a pixel are known: right by `across`, down by `down`. A narrow network
    does as far as it can."""
    across, down = 0.012, 0.009
    x, y = torch.arange(96) * across - 0.5, torch.arange(64)[:, None] * down - 0.3
    pixels = torch.stack([x + 0 * y, 0 * x + y, (x - y) / 2])  # red, green, blue
    latents, _ = pyramid(widths=widths).encode_raw(pixels.expand(1, 5, 3, 64, 96))
    inner = latents[0, 1, :, 2:-2, 2:-2]
    # Pixels in [-1, 1] are made half as large, and latents four times: a cell's colour is twice
    # that of its first pixel, on which the strides' blurs are centred.
    means = 2 * pixels[:, ::8, ::8][:, 2:-2, 2:-2]
    slopes = torch.tensor([[across, 0], [0, down], [across / 2, -down / 2]])
    wanted = [
        *(2 * 2 * 4 * slopes[:, 0]),  # each colour where pixels are 4 apart, one left to one right
        *(2 * 2 * 4 * slopes[:, 1]),
        *(2 * 2 * 2 * slopes.mean(0)),  # brightness where they are 2 apart
        *(2 * 2 * slopes.mean(0)),  # and 1
    ]
    flat = torch.stack(wanted).view(-1, 1, 1).expand_as(inner[3:13])
    begun = torch.cat([means, flat])[:carried]
    torch.testing.assert_close(inner[:carried], begun, atol=1e-5, rtol=0)


def test_a_new_decoder_enlarges_the_mean_colours() -> None:
    torch.manual_seed(0)
    fresh = build_vae(PRESETS["demo"].vae).requires_grad_(False)
    vae = pyramid()
    last = vae.decoder[-1]
    grown = last.weight - fresh.decoder[-1].weight  # the colours, beside what is random
    assert torch.equal(grown.nonzero(), torch.tensor([[c, c, 1, 1] for c in range(3)]))
    torch.testing.assert_close(grown[grown != 0], torch.ones(3))
    last.weight.copy_(grown)
    latents = torch.zeros(1, 2, 16, 5, 7)
    latents[0, 1, :3, 2, 3] = torch.tensor([0.3, -0.2, 0.1])
    pixels = vae.decode_raw(latents)[0]
    assert (
        pixels[0, 0, :, 8:-8, 8:-8].abs().max() < 1e-6
    )  # outside, the border's zeros are blurred in
    centre = pixels[0, 1:, :, 16:24, 24:32].mean(dim=(2, 3))
    # Blurs leave half of a single cell's value in it.
    torch.testing.assert_close(
        centre / centre[:, :1], torch.tensor([[1, -2 / 3, 1 / 3]] * 4), atol=5e-3, rtol=0
    )
    even = vae.decode_raw(latents[:, 1:, :, 2:3, 3:4].expand(1, 2, 16, 5, 7))[0]
    inner = even[0, :, :, 8:-8, 8:-8].permute(0, 2, 3, 1)
    wanted = 3 * torch.tanh(torch.tensor([0.3, -0.2, 0.1]) / 3) / 2
    torch.testing.assert_close(inner, wanted.expand_as(inner), atol=1e-5, rtol=0)


def test_wrong_number_of_widths_is_refused() -> None:
    with pytest.raises(ValueError, match="four decoder widths"):
        build_vae(VaeConfig(kind="tiny", widths=(64, 48, 32)))

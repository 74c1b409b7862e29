"""Wan's VAE against the public networks; streaming, state and gradients of both VAEs."""

from __future__ import annotations

import io
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from modeling.config import VaeConfig
from modeling.vae.build import build_vae
from modeling.vae.streaming import StreamingVae, VaeState
from modeling.vae.wan import WanVae

REFERENCE = Path(__file__).parents[2] / "reference" / "wan_tiny.safetensors"
WAN = VaeConfig(kind="wan", base_dim=4)
TINY = VaeConfig(kind="tiny", widths=(8, 8, 4, 4))
FOLDED = VaeConfig(kind="folded", widths=(8, 12), depths=(1, 2, 2, 1))
Step = Callable[[Tensor, VaeState | None], tuple[Tensor, VaeState]]  # encode or decode


@pytest.fixture(scope="module")
def reference() -> dict[str, Tensor]:
    """Inputs, weights and outputs of the public VAE, videos turned into [B, F, C, H, W]."""
    tensors = load_file(REFERENCE)
    videos = ("vae_input.pixels", "vae_output.pixels", "vae_output.latents")
    return tensors | {name: tensors[name].transpose(1, 2) for name in videos}


@pytest.fixture(scope="module")
def wan(reference: dict[str, Tensor]) -> StreamingVae:
    config = VaeConfig(
        kind="wan",
        base_dim=4,
        mean=tuple(reference["vae_input.mean"].tolist()),
        std=tuple(reference["vae_input.std"].tolist()),
    )
    vae = build_vae(config)
    prefix = "vae."
    vae.load_state_dict(
        {k.removeprefix(prefix): v for k, v in reference.items() if k.startswith(prefix)}
    )
    return vae.requires_grad_(False)


@pytest.fixture(scope="module", params=[WAN, TINY, FOLDED], ids=["wan", "tiny", "folded"])
def vae(request: pytest.FixtureRequest) -> StreamingVae:
    """Random weights in float64, where equality is not blurred by rounding."""
    return random_vae(request.param, seed=1).requires_grad_(False)


def random_vae(config: VaeConfig, seed: int) -> StreamingVae:
    """No weight is zero: a tiny VAE's memory blocks begin as the identity and would hide errors."""
    torch.manual_seed(seed)
    vae = build_vae(config).double()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return vae


def in_pieces(step: Step, x: Tensor, sizes: list[int]) -> Tensor:
    assert sum(sizes) == x.shape[1]
    state, pieces = None, []
    for piece in x.split(sizes, dim=1):
        out, state = step(piece, state)
        pieces.append(out)
    return torch.cat(pieces, dim=1)


def clip(frames: int, *, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(batch, frames, 3, 16, 24, generator=generator, dtype=torch.float64) * 2 - 1


def test_wan_equals_the_public_network(wan: StreamingVae, reference: dict[str, Tensor]) -> None:
    latents, _ = wan.encode(reference["vae_input.pixels"])
    torch.testing.assert_close(latents, reference["vae_output.latents"], atol=1e-4, rtol=0)

    expected = reference["vae_output.pixels"]  # the file holds them before the clamp
    raw = reference["vae_output.latents"] * wan.std + wan.mean
    torch.testing.assert_close(wan.decode_raw(raw)[0], expected, atol=1e-4, rtol=0)
    pixels, _ = wan.decode(reference["vae_output.latents"])
    assert expected.abs().max() > 1
    torch.testing.assert_close(pixels, expected.clamp(-1, 1), atol=1e-4, rtol=0)


def test_wan_in_pieces_equals_the_public_network(
    wan: StreamingVae, reference: dict[str, Tensor]
) -> None:
    clip, latents = reference["vae_input.pixels"], reference["vae_output.latents"]
    whole, _ = wan.encode(clip)
    torch.testing.assert_close(in_pieces(wan.encode, clip, [5, 8, 4]), whole, atol=1e-6, rtol=0)
    whole, _ = wan.decode(latents)
    torch.testing.assert_close(in_pieces(wan.decode, latents, [2, 1, 2]), whole, atol=1e-6, rtol=0)


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4))
@settings(max_examples=12, deadline=None)
def test_any_split_of_the_pixels_gives_the_same_latents(
    vae: StreamingVae, sizes: list[int]
) -> None:
    pixels = clip(sum(sizes))
    whole, _ = vae.encode(pixels)
    assert whole.shape == (1, 1 + (sum(sizes) - 1) // 4, 16, 2, 3)
    torch.testing.assert_close(in_pieces(vae.encode, pixels, sizes), whole, atol=1e-12, rtol=0)


@given(sizes=st.lists(st.integers(0, 5), min_size=1, max_size=3).filter(any))
@settings(max_examples=12, deadline=None)
def test_any_split_of_the_latents_gives_the_same_pixels(
    vae: StreamingVae, sizes: list[int]
) -> None:
    generator = torch.Generator().manual_seed(sum(sizes))
    latents = torch.randn(1, sum(sizes), 16, 2, 3, generator=generator, dtype=torch.float64)
    whole, _ = vae.decode(latents)
    assert whole.shape == (1, 4 * sum(sizes) - 3, 3, 16, 24)
    torch.testing.assert_close(in_pieces(vae.decode, latents, sizes), whole, atol=1e-12, rtol=0)


def test_streams_of_a_batch_and_of_turns_are_independent(vae: StreamingVae) -> None:
    pixels = clip(13, batch=2)
    apart = torch.cat([vae.encode(stream)[0] for stream in pixels.split(1)])
    torch.testing.assert_close(vae.encode(pixels)[0], apart, atol=1e-12, rtol=0)

    states: list[VaeState | None] = [None, None]
    latents: list[list[Tensor]] = [[], []]
    for piece in pixels.split(3, dim=1):
        for i in range(2):
            out, states[i] = vae.encode(piece[i : i + 1], states[i])
            latents[i].append(out)
    torch.testing.assert_close(
        torch.cat([torch.cat(latent, dim=1) for latent in latents]), apart, atol=1e-12, rtol=0
    )


def test_decoded_pixels_are_clamped_and_latents_standardised() -> None:
    torch.manual_seed(2)
    vae = build_vae(VaeConfig(kind="tiny", widths=(8, 8, 4, 4), mean=(0.5,) * 16, std=(2.0,) * 16))
    with torch.no_grad():
        vae.decoder[-1].weight.mul_(50)
        pixels = clip(5).float()
        raw, _ = vae.encode_raw(pixels)
        latents, _ = vae.encode(pixels)
        torch.testing.assert_close(latents, (raw - 0.5) / 2)
        unclamped, _ = vae.decode_raw(raw)
        assert unclamped.abs().max() > 1
        torch.testing.assert_close(vae.decode(latents)[0], unclamped.clamp(-1, 1))


def test_state_survives_saving_and_is_not_changed_by_a_call(vae: StreamingVae) -> None:
    pixels = clip(19)
    _, state = vae.encode(pixels[:, :7])
    assert state.pending is not None
    before = deepcopy(state)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)

    first, _ = vae.encode(pixels[:, 7:], state)
    again, _ = vae.encode(pixels[:, 7:], loaded.to("cpu"))
    assert torch.equal(first, again)
    for cache, kept in zip(state.caches, before.caches, strict=True):
        assert torch.equal(cache, kept)
    assert torch.equal(state.pending, before.pending)


def test_frames_that_wait_move_with_the_caches() -> None:
    """A state is made on one machine and goes on at another, which may have a GPU."""
    state = VaeState([torch.ones(2, 3)], pending=torch.ones(1, 2, 3, 8, 8))
    moved = state.to("meta", torch.float64)
    assert moved.pending is not None
    for tensor in (*moved.caches, moved.pending):
        assert (tensor.device.type, tensor.dtype) == ("meta", torch.float64)


def test_state_is_fixed_in_size_and_holds_no_clip(vae: StreamingVae) -> None:
    def sizes(state: VaeState) -> list[tuple[int, ...]]:
        for cache in state.caches:  # a view would keep the whole activation in memory
            assert cache.untyped_storage().nbytes() == cache.numel() * cache.element_size()
        return [tuple(cache.shape) for cache in state.caches]

    latents, state = vae.encode(clip(1))
    _, decoding = vae.decode(latents)
    at_start = sizes(state), sizes(decoding)
    for _ in range(3):
        latents, state = vae.encode(clip(16 + 4), state)
        _, decoding = vae.decode(latents, decoding)
        assert (sizes(state), sizes(decoding)) == at_start
    _, state = vae.encode(clip(3), state)
    assert state.pending is not None
    assert state.pending.untyped_storage().nbytes() == 3 * 3 * 16 * 24 * 8


@pytest.mark.parametrize("config", [WAN, TINY], ids=["wan", "tiny"])
def test_gradients_reach_every_parameter_through_several_passes(config: VaeConfig) -> None:
    vae = random_vae(config, seed=3)
    pixels = clip(16 + 5)

    def gradients(sizes: list[int]) -> dict[str, Tensor]:
        vae.zero_grad()
        latents = in_pieces(vae.encode_raw, pixels, sizes)
        decoded = in_pieces(vae.decode_raw, latents, [latents.shape[1]])
        (decoded - pixels).square().mean().backward()
        return {name: p.grad.clone() for name, p in vae.named_parameters() if p.grad is not None}

    whole = gradients([pixels.shape[1]])
    assert whole.keys() == dict(vae.named_parameters()).keys()
    for name, gradient in whole.items():
        assert gradient.isfinite().all(), name
        assert gradient.any(), name
    for name, gradient in gradients([6, 15]).items():
        torch.testing.assert_close(gradient, whole[name], atol=1e-12, rtol=1e-9)


def test_channels_last_weights_give_the_same_latents(wan: StreamingVae) -> None:
    pixels = clip(5).float()
    expected, _ = wan.encode(pixels)
    vae = build_vae(wan.config)
    vae.load_state_dict(wan.state_dict())
    for parameter in vae.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(vae.encode(pixels)[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", [(1, 5, 3, 20, 24), (1, 5, 4, 16, 24), (5, 3, 16, 24)])
def test_pixels_of_a_wrong_shape_are_refused(vae: StreamingVae, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"multiples of 8|must be \[batch"):
        vae.encode(torch.zeros(shape, dtype=torch.float64))


def test_a_state_of_another_size_is_refused(vae: StreamingVae) -> None:
    latents, state = vae.encode(clip(5))
    _, decoding = vae.decode(latents)
    for batch, height, width in ((1, 32, 24), (1, 16, 32), (2, 16, 24)):
        wrong = rf"of batch 1 and size .* brings batch {batch} and size .* start a new stream"
        with pytest.raises(ValueError, match=wrong):
            vae.encode(torch.zeros(batch, 4, 3, height, width, dtype=torch.float64), state)
        small = torch.zeros(batch, 1, 16, height // 8, width // 8, dtype=torch.float64)
        with pytest.raises(ValueError, match=wrong):
            vae.decode(small, decoding)


def test_nothing_in_gives_nothing_out(vae: StreamingVae) -> None:
    pixels, state = vae.decode(torch.zeros(1, 0, 16, 2, 3, dtype=torch.float64))
    assert pixels.shape == (1, 0, 3, 16, 24)
    pixels, _ = vae.decode(torch.zeros(1, 1, 16, 2, 3, dtype=torch.float64), state)
    assert pixels.shape == (1, 1, 3, 16, 24)


def test_the_full_size_builds_without_memory() -> None:
    with torch.device("meta"):
        vae = build_vae(VaeConfig(kind="wan"))
    assert isinstance(vae, WanVae)
    assert sum(parameter.numel() for parameter in vae.parameters()) == 126_892_531

"""The transformer against outputs of the public Wan / Self-Forcing networks at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from modeling.config import TransformerConfig
from modeling.diffusion.attention import Spans, bidirectional, chunk_causal, teacher_forcing
from modeling.diffusion.transformer import Transformer
from modeling.streaming.kv_cache import Cached, KVCache

REFERENCE = Path(__file__).parents[2] / "reference" / "wan_tiny.safetensors"
TOLERANCE = 1e-4


class Reference:
    """Tensors of the file; latents are turned from [B, C, F, H, W] into ours."""

    def __init__(self) -> None:
        with safe_open(REFERENCE, "pt") as file:
            self.sizes = json.loads(file.metadata()["config"])
            self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

    def latents(self, name: str) -> Tensor:
        return self.tensors[name].transpose(-4, -3)


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


@pytest.fixture(scope="module")
def transformer(reference: Reference) -> Transformer:
    sizes = reference.sizes
    model = Transformer(
        TransformerConfig(
            dim=sizes["dim"],
            ffn_dim=sizes["ffn_dim"],
            num_heads=sizes["num_heads"],
            num_layers=sizes["num_layers"],
            freq_dim=sizes["freq_dim"],
            text_dim=sizes["text_dim"],
            text_tokens=sizes["text_len"],
        )
    )
    prefix = "weight."
    model.load_state_dict(
        {k.removeprefix(prefix): v for k, v in reference.tensors.items() if k.startswith(prefix)}
    )
    return model.eval().requires_grad_(False)


def forward(model: Transformer, reference: Reference, timestep: Tensor, visible: Spans) -> Tensor:
    noisy, source = reference.latents("input.noisy"), reference.latents("input.source")
    return model(noisy, source, timestep, reference.tensors["input.text"], visible)


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


def test_bidirectional(reference: Reference, transformer: Transformer) -> None:
    out = forward(
        transformer, reference, reference.tensors["input.t_bidirectional"], bidirectional(9)
    )
    assert_close(out, reference.latents("output.bidirectional"))


def test_chunk_causal(reference: Reference, transformer: Transformer) -> None:
    out = forward(transformer, reference, reference.tensors["input.t_chunks"], chunk_causal(9, 3))
    assert_close(out, reference.latents("output.block_causal"))


def test_teacher_forcing(reference: Reference, transformer: Transformer) -> None:
    source, t = reference.latents("input.source"), reference.tensors["input.t_chunks"]
    both = torch.cat([reference.latents("input.clean"), reference.latents("input.noisy")], dim=1)
    out = transformer(
        both,
        torch.cat([source, source], dim=1),
        torch.cat([torch.zeros_like(t), t], dim=1),
        reference.tensors["input.text"],
        teacher_forcing(9, 3),
    )
    assert_close(out[:, 9:], reference.latents("output.teacher_forcing"))


def test_a_short_text_is_a_text_with_zeros_behind_it(
    reference: Reference, transformer: Transformer
) -> None:
    """As Wan does; a softmax over fewer keys would be another network."""
    text = reference.tensors["input.text"]
    padded = torch.zeros(text.shape[0], transformer.config.text_tokens, text.shape[2])
    padded[:, :3] = text[:, :3]
    for short, whole in zip(
        transformer.prepare_text(text[:, :3]), transformer.prepare_text(padded), strict=True
    ):
        assert short.shape[2] == transformer.config.text_tokens
        torch.testing.assert_close(short, whole)


@pytest.mark.parametrize(
    ("output", "frames", "window", "sinks"),
    [("full", 9, 9, 0), ("window", 15, 9, 0), ("window_sink", 15, 9, 3)],
)
def test_stream(
    reference: Reference,
    transformer: Transformer,
    output: str,
    frames: int,
    window: int,
    sinks: int,
) -> None:
    suffix = "_long" if frames == 15 else ""
    noisy = reference.latents(f"input.noisy{suffix}")
    source = reference.latents(f"input.source{suffix}")
    expected = reference.latents(f"output.stream_{output}")
    assert reference.sizes["window_latents"] == 9
    cache = KVCache(
        transformer.config,
        batch=1,
        latent_height=8,
        latent_width=12,
        chunk_latents=3,
        window_latents=window,
        sink_latents=sinks,
        window_positions=False,
    )
    text = transformer.prepare_text(reference.tensors["input.text"])
    outputs = []
    for first in range(0, frames, 3):
        x, y = noisy[:, first : first + 3], source[:, first : first + 3]
        for t in reference.sizes["stream_timesteps"]:
            outputs.append(transformer(x, y, torch.tensor([t]), text, Cached(cache)))
        transformer(0.5 * x, y, torch.tensor([0]), text, Cached(cache))
        cache.commit()
    assert_close(torch.stack(outputs), expected)

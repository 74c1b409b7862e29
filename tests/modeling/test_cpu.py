"""The VAE of real video in bfloat16, on the shipped weights and a shipped clip."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from data.video import read_frames
from infra.runtime.paths import ROOT
from modeling import cpu
from modeling.editor import StreamingEditor
from modeling.model_dir import load_model
from modeling.pixels import from_uint8, to_uint8
from modeling.vae.streaming import StreamingVae
from tests.known_editors import known_editor

FLOWER = ROOT / "data/samples/footage/flower.mp4"


def vae() -> StreamingVae:
    found = load_model(ROOT / "pipelines/start/natural", device="cpu", dtype=torch.float32).vae
    assert found is not None
    return found


@pytest.fixture(scope="module")
def fast() -> StreamingVae:
    made = vae()
    cpu.accelerate(made)
    return made


@pytest.fixture(scope="module")
def clip() -> Tensor:
    """What the networks see of half a second, [1, 9, 3, 96, 160] in [-1, 1]."""
    frames = list(itertools.islice(read_frames(FLOWER), 9))
    pixels = torch.from_numpy(np.stack(frames)[:, 64:160, 64:224])
    return from_uint8(pixels.permute(0, 3, 1, 2))[None]


@pytest.mark.parametrize(
    ("able", "does"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": False, "avx2": True}, False),
        ({"neon": True}, False),
    ],
)
def test_a_processor_multiplies_bfloat16_if_it_says_so(
    able: dict[str, bool], does: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert cpu.multiplies_bfloat16() is does


@torch.no_grad()
def test_its_pictures_and_latents_are_those_of_float32(fast: StreamingVae, clip: Tensor) -> None:
    plain = vae()
    latents, found = (network.encode(clip)[0] for network in (plain, fast))
    assert found.dtype == torch.float32  # what the transformer and its caches are given
    assert (found - latents).norm() / latents.norm() < 1e-2
    pictures = [to_uint8(network.decode(latents)[0]).int() for network in (plain, fast)]
    differ = (pictures[0] - pictures[1]).abs()
    assert differ.float().mean() < 0.3  # levels
    assert differ.max() <= 4
    assert differ.any()  # or it was not in bfloat16


@torch.no_grad()
def test_frames_in_any_pieces_give_the_same_bits(fast: StreamingVae, clip: Tensor) -> None:
    whole, _ = fast.encode(clip)
    state, pieces = None, []
    for frames in clip.split([3, 4, 2], dim=1):
        latents, state = fast.encode(frames, state)
        pieces.append(latents)
    assert torch.equal(torch.cat(pieces, dim=1), whole)


def test_an_editor_uses_it_where_the_cpu_multiplies_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for able, expected in (({"avx512_bf16": True}, torch.bfloat16), ({}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: able)
        editor = StreamingEditor.load(ROOT / "pipelines/start/natural", device="cpu")
        assert editor.vae.dtype == expected
        assert editor.vae.mean.dtype == torch.float32
        assert editor.transformer.dtype == torch.float32
        slow = StreamingEditor(
            load_model(ROOT / "pipelines/start/natural", dtype=torch.float32),
            mask_cache=None,
            accelerated=False,
        )
        assert slow.vae.dtype == torch.float32
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert known_editor().vae.dtype == torch.float32  # of the small VAE it was not measured

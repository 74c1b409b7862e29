"""What a benchmark times: the editor that is built for it, and what is said of it."""

from __future__ import annotations

from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from modeling.config import MaskCacheConfig
from modeling.presets import PRESETS
from pipelines.bench import subject
from pipelines.bench.subject import (
    BenchOptions,
    build_editor,
    describe,
    noise_frames,
    plain_editor,
)
from tests.pipelines.bench.test_figures import OPTIONS

DEMO = PRESETS["demo"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> str:
    """A preset whose networks are drawn in milliseconds."""
    transformer = replace(DEMO.transformer, dim=128, ffn_dim=16, num_heads=1, num_layers=1)
    vae = replace(DEMO.vae, widths=(16, 8, 8, 8))
    monkeypatch.setitem(PRESETS, "small", replace(DEMO, transformer=transformer, vae=vae))
    return "small"


def test_a_presets_weights_are_drawn_alike_each_time_and_nobody_elses_numbers(small: str) -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    weights = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        editor = build_editor(replace(OPTIONS, model=small))
        assert editor.name == small
        networks: tuple[nn.Module, ...] = (editor.transformer, editor.vae)
        weights.append([p for network in networks for p in network.parameters()])
        assert not any(network.training for network in networks)
        assert not any(parameter.requires_grad for parameter in weights[-1])
        if seed == 5:
            assert torch.equal(torch.rand(3), wanted)
    assert all(torch.equal(*pair) for pair in zip(*weights, strict=True))


def test_the_plain_path_is_of_the_same_sizes_and_precision_and_nothing_is_skipped(
    small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    monkeypatch.setattr(
        subject, "StreamingEditor", lambda *given, **named: made.append((*given, named))
    )
    build_editor(replace(OPTIONS, model=small, policy="published"))
    cache = MaskCacheConfig(policy="published")
    ((model, named),) = made
    assert named == {"mask_cache": cache, "fp8": False}
    build_editor(replace(OPTIONS, model=small, fp8=True))
    assert made[1][1]["fp8"] is True
    fast: Any = SimpleNamespace(
        config=model.config, device=torch.device("cpu"), card={"name": "mine"},
        transformer=model.transformer.to(torch.bfloat16),
    )  # fmt: skip
    plain_editor(fast)
    plain, named = made[2]
    assert named == {"mask_cache": None, "accelerated": False}
    assert (plain.config, plain.card) == (model.config, {"name": "mine"})
    for one, other in ((plain.transformer, model.transformer), (plain.vae, model.vae)):
        assert one is not other
        assert not one.training
        assert {(p.dtype, p.requires_grad) for p in one.parameters()} == {(torch.bfloat16, False)}
        assert [p.shape for p in one.parameters()] == [p.shape for p in other.parameters()]


@pytest.mark.parametrize("asked", [{"policy": "guess"}, {"vae": "guess"}])
def test_what_does_not_exist_is_told_before_weights_are_drawn(
    asked: dict[str, str], small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for network in ("Transformer", "build_vae"):
        monkeypatch.setattr(subject, network, pytest.fail)
    with pytest.raises(ValueError, match="'guess'; there are"):
        build_editor(replace(OPTIONS, model=small, **asked))  # type: ignore[arg-type]


def test_a_gpu_that_is_not_there_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        replace(OPTIONS, device="cpu")
        if there:
            replace(OPTIONS, device="cuda")
    for device in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match="--device cuda finds no GPU"):
            replace(OPTIONS, device=device)


def test_another_vae_is_timed_without_the_blur_that_was_measured_for_the_first(
    small: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = replace(DEMO.stream, guide_blur=0.5)
    blurred = replace(PRESETS[small], vae=PRESETS["natural"].vae, stream=stream)
    monkeypatch.setitem(PRESETS, "blurred", blurred)
    mine = replace(OPTIONS, model="blurred")
    same, other = (build_editor(replace(mine, vae=kind)) for kind in ("folded", "tiny"))
    assert (same.config.vae.kind, same.settings.guide_blur) == ("folded", 0.5)
    assert (other.config.vae.kind, other.settings.guide_blur) == ("tiny", None)
    again = build_editor(replace(mine, vae="tiny", guide_blur=0.25))
    assert again.settings.guide_blur == 0.25


def test_all_that_decides_the_work_is_described() -> None:
    options = BenchOptions(model="mine", device="cpu", chunks=2, sessions=0)
    settings = replace(
        DEMO.stream, fps=11, window_latents=15, sink_latents=6, timesteps=(1000, 600),
        guide_blur=0.5, mask_cache=None,
    )  # fmt: skip
    editor: Any = SimpleNamespace(
        config=replace(DEMO, stream=settings), settings=settings, mask_cache=None,
        transformer=SimpleNamespace(dtype=torch.bfloat16),
    )  # fmt: skip
    told = describe(editor, replace(options, fp8=True), (48, 64))
    assert told == {
        "model": "mine", "height": 48, "width": 64, "dtype": "bfloat16", "vae": "tiny",
        "transformer": asdict(DEMO.transformer), "chunk_frames": 12, "window_latents": 15,
        "sink_latents": 6, "steps": 2, "fps": 11, "fp8": True, "mask_cache": None,
    }  # fmt: skip
    for detail, blur in (("off", {}), ("source", {"guide_blur": 0.5})):
        half = describe(editor, replace(options, work_size="32x16", detail=detail), (48, 64))  # type: ignore[arg-type]
        work = {"work_height": 16, "work_width": 32, "detail": detail} | blur
        assert half == told | {"fp8": False} | work


def test_frames_are_the_same_noise_in_every_run() -> None:
    frames = noise_frames(2, 8, 16)
    assert (frames.shape, frames.dtype) == ((2, 8, 16, 3), np.uint8)
    assert np.array_equal(frames, noise_frames(2, 8, 16))
    assert np.unique(frames).size > 200

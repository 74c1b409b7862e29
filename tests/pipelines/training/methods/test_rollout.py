from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling.config import MaskCacheConfig, StreamConfig, TransformerConfig
from modeling.diffusion.flow import FlowSchedule
from modeling.diffusion.transformer import TextKV, Transformer
from modeling.editor import StreamingEditor
from modeling.model_dir import Model
from modeling.presets import PRESETS
from modeling.streaming.forward import ForwardOn, PlainForward
from modeling.streaming.history import Unrolled
from modeling.text.build import build_text_encoder
from modeling.vae.build import build_vae
from pipelines.training.methods import rollout as module
from pipelines.training.methods.rollout import exit_step, rollout
from tests.modeling.networks import random_transformer

CONFIG = TransformerConfig(
    dim=32, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16, text_dim=8, text_tokens=4,
    latent_channels=4, source_channels=4,
)  # fmt: skip
STREAM = StreamConfig(height=32, width=32, chunk_latents=1, window_latents=3, sink_latents=1)


class Recorder:
    """A network that notes whether each call had gradient, and at which timestep."""

    def __init__(self) -> None:
        self.network = random_transformer(CONFIG, std=0.2)
        self.calls: list[tuple[bool, float]] = []

    def __call__(self, noisy: Tensor, source: Tensor, timestep: Tensor, *rest: Any) -> Tensor:
        self.calls.append((torch.is_grad_enabled(), timestep[0].item()))
        out: Tensor = self.network(noisy, source, timestep, *rest)
        return out

    def prepare_text(self, text: Tensor) -> TextKV:
        return self.network.prepare_text(text)


def run(network: Recorder, source: Tensor, last_step: int, **kwargs: Any) -> Tensor:
    return rollout(
        kwargs.pop("trained", network),
        network,
        CONFIG,
        kwargs.pop("stream", STREAM),
        FlowSchedule(5.0),
        source=source,
        text=torch.ones(source.shape[0], 4, 8),
        last_step=last_step,
        generator=torch.Generator().manual_seed(1),
        forwards=kwargs.pop("forwards", None),
    )


def source_of(frames: int) -> Tensor:
    return torch.randn(1, frames, 4, 4, 4, generator=torch.Generator().manual_seed(2))


def test_only_the_last_steps_have_gradient_all_chunks_together() -> None:
    network = Recorder()
    made = run(network, source_of(3), last_step=2)
    last = pytest.approx(833.333, abs=1e-2)
    chunk, refresh = [(False, 1000.0), (False, 937.5), (False, last)], [(False, 0.0)]
    made_alone = chunk + refresh + chunk + refresh + chunk  # no refresh after the last
    assert network.calls == [*made_alone, (True, last)]
    assert made.shape == (1, 3, 4, 4, 4)
    assert made.requires_grad


def test_without_a_trained_network_nothing_has_gradient() -> None:
    network = Recorder()
    made = run(network, source_of(2), last_step=1, trained=None)
    assert not made.requires_grad
    assert not any(grad for grad, _ in network.calls)


@pytest.mark.parametrize("frames", [3, 5])  # inside the window, and rolling beyond it
def test_history_is_seen_but_carries_no_gradient(frames: int) -> None:
    network = Recorder()
    source = source_of(frames).requires_grad_()
    made = run(network, source, last_step=1)
    (gradient,) = torch.autograd.grad(made[:, -1].square().sum(), source)
    assert gradient[:, -1].abs().max() > 0
    assert torch.equal(gradient[:, :-1], torch.zeros_like(gradient[:, :-1]))

    changed = source.detach().clone()
    changed[:, 0] += 1.0  # the first chunk is in the history, as a sink of the long clip too
    again = run(network, changed, last_step=1)
    assert (again[:, -1] - made[:, -1]).abs().max() > 1e-4


def test_a_rollout_with_and_without_gradient_makes_the_same_clip() -> None:
    network, source = Recorder(), source_of(5)
    with_gradient = run(network, source, last_step=3)
    without = run(network, source, last_step=3, trained=None)
    torch.testing.assert_close(with_gradient.detach(), without, atol=1e-5, rtol=1e-5)


def test_activation_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        network = Recorder()
        network.network.gradient_checkpointing = checkpointing
        run(network, source_of(5), last_step=1).square().mean().backward()
        gradients.append([p.grad for p in network.network.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("mask", [None, "published"])
def test_what_runs_streams_makes_the_same_clips_with_the_same_gradients(mask: str | None) -> None:
    """Beyond the window; a GPU's kernels in Triton's interpreter, whose fused GELU is another on a
    CPU."""
    pytest.importorskip("triton", reason="Triton exists for Linux only")
    from modeling.gpu.training import RolloutForward

    network = Recorder()
    for block in network.network.layers():
        block.ffn[1] = torch.nn.GELU()
    stream = replace(STREAM, mask_cache=MASKS[mask] if mask else None)
    source = source_of(4)
    found = []
    forwards: dict[str, ForwardOn | None] = {
        "called": None,
        "plain": lambda cache: PlainForward(network.network, cache),
        "kernels": RolloutForward(network.network),
    }
    for name, on in forwards.items():
        network.network.zero_grad()
        network.calls.clear()
        made = run(network, source, last_step=1, stream=stream, forwards=on)
        if on is not None:
            assert network.calls == [(True, 937.5)], name
        made.square().mean().backward()
        grads = {n: p.grad for n, p in network.network.named_parameters() if p.grad is not None}
        found.append({"made": made.detach()} | grads)
    # The bias of the text's keys has a gradient of rounding alone: a softmax does not depend on it.
    largest = max(value.abs().max().item() for value in found[0].values())
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, atol=1e-6 * largest, rtol=1e-3, msg=name)


CHUNK_TOKENS = 16  # of two latents of 2 x 16 cells


@pytest.mark.parametrize("fills", [CHUNK_TOKENS * CONFIG.dim, CHUNK_TOKENS * CONFIG.dim + 1])
def test_small_clips_are_rolled_out_together_and_make_what_each_makes_alone(
    monkeypatch: pytest.MonkeyPatch, fills: int
) -> None:
    """Beyond the window, at positions that go on; each with the same noise. What is faster for one
    clip is for those that fill a device, and for a clip alone."""
    monkeypatch.setattr(module, "FILLS", fills)
    drawn: dict[int, Tensor] = {}
    asked: list[int] = []

    def noise(latents: Tensor, generator: torch.Generator) -> Tensor:
        asked.append(len(asked))
        place = asked[-1] % 8  # of 4 chunks, each with 2 steps
        like = torch.Generator().manual_seed(place)
        return drawn.setdefault(place, torch.randn(latents[:1].shape, generator=like)).expand(
            latents.shape
        )

    monkeypatch.setattr(module, "_noise_like", noise)
    source = torch.randn(3, 8, 4, 2, 16, generator=torch.Generator().manual_seed(2))
    window = {"window_latents": 6, "sink_latents": 2, "window_positions": False}
    stream = replace(STREAM, chunk_latents=2, **window)
    runs: list[int] = []

    def found(clips: Tensor) -> list[Tensor]:
        asked.clear()
        network = Recorder()

        def fast(cache: Any) -> Any:
            runs.append(cache.k.shape[1])
            return PlainForward(network.network, cache)

        made = run(network, clips, last_step=1, stream=stream, forwards=fast)
        made.square().mean().backward()
        grads = [p.grad for p in network.network.parameters() if p.grad is not None]
        return [made.detach(), *grads]

    together = found(source)
    assert runs == ([1, 1, 1] if fills == CHUNK_TOKENS * CONFIG.dim else [])
    runs.clear()
    alone = [found(clip) for clip in source.split(1)]
    assert runs == [1, 1, 1]
    torch.testing.assert_close(together[0], torch.cat([clip[0] for clip in alone]))
    for number, gradient in enumerate(together[1:], 1):
        mean = torch.stack([clip[number] for clip in alone]).mean(dim=0)
        torch.testing.assert_close(gradient, mean, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "together"),
    [("demo", True), ("natural", True), ("wan-1.3b", False), ("wan-14b", False)],
)
def test_a_published_model_s_chunk_fills_a_gpu_and_a_small_one_s_does_not(
    name: str, together: bool
) -> None:
    model = PRESETS[name]
    cells = (model.stream.height // 8) * (model.stream.width // 8)
    numbers = model.stream.chunk_latents * cells // 4 * model.transformer.dim
    assert (numbers < module.FILLS) is together


@pytest.mark.parametrize("lacks", ["text", "truth"])
def test_clips_of_which_one_lacks_something_are_refused(lacks: str) -> None:
    clips = torch.zeros(3, 2, 4, 4, 4)
    given = {"source": clips, "text": torch.ones(3, 4, 8), "truth": clips}
    stream = replace(STREAM, mask_cache=MASKS["budget"])
    with pytest.raises(ValueError, match="zip"):
        rollout(
            None, Recorder(), CONFIG, stream, FlowSchedule(5.0), last_step=0,
            generator=torch.Generator(), **given | {lacks: given[lacks][:2]},
        )  # fmt: skip


def test_exit_steps_depend_on_seed_and_step_alone_and_cover_all() -> None:
    drawn = [exit_step(7, step, 4) for step in range(400)]
    assert drawn == [exit_step(7, step, 4) for step in range(400)]
    other = [exit_step(8, step, 4) for step in range(400)]
    assert sum(a == b for a, b in zip(drawn, other, strict=True)) < 150  # 100 by chance
    assert sum(a == b for a, b in zip(drawn[1:], other, strict=False)) < 150  # nor moved by a step
    counts = torch.bincount(torch.tensor(drawn), minlength=4)
    assert counts.shape == (4,)
    assert counts.min() > 60  # 100 expected


@pytest.mark.parametrize("chunks", [2, 9])
def test_only_the_last_chunks_learn(chunks: int) -> None:
    network, source = Recorder(), source_of(4).requires_grad_()
    made = rollout(
        network, network, CONFIG, STREAM, FlowSchedule(5.0), source=source,
        text=torch.ones(1, 4, 8), last_step=0, gradient_chunks=chunks,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    assert [grad for grad, time in network.calls if time > 0] == 4 * [False] + [True]
    (gradient,) = torch.autograd.grad(made.square().sum(), source)
    learns = [number >= 4 - chunks for number in range(4)]
    assert (gradient.abs().amax(dim=(0, 2, 3, 4)) > 0).tolist() == learns


@pytest.mark.parametrize("truth", [False, True])
def test_of_several_clips_each_is_rolled_out_with_all_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, truth: bool
) -> None:
    """Tokens are chosen clip by clip, which takes as many rollouts."""
    asked = {name: object() for name in inspect.signature(rollout).parameters}
    asked["stream"] = replace(STREAM, mask_cache=MaskCacheConfig())
    clips = torch.arange(3.0).view(3, 1, 1, 1, 1)
    asked |= {"source": clips, "text": clips + 10, "truth": clips + 20 if truth else None}
    calls: list[dict[str, Any]] = []

    def alone(*given: Any, **named: Any) -> Tensor:
        calls.append(inspect.signature(rollout_of_one).bind(*given, **named).arguments)
        made: Tensor = calls[-1]["source"] * 2
        return made

    rollout_of_one = rollout
    monkeypatch.setattr(module, "rollout", alone)
    first = ("trained", "passed", "config", "stream", "schedule")
    named = {name: value for name, value in asked.items() if name not in first}
    made = rollout_of_one(*(asked[name] for name in first), **named)  # type: ignore[arg-type]
    assert torch.equal(made, 2 * clips)
    for clip, call in enumerate(calls):
        for name, value in asked.items():
            if isinstance(value, Tensor):
                assert torch.equal(call[name], value[clip : clip + 1]), name
            else:
                assert call[name] is value, name


MASKS = {
    "published": MaskCacheConfig(policy="published", keep_ratio=0.5),
    "budget": MaskCacheConfig(policy="budget", keep_ratio=0.3),
    "budget, block": MaskCacheConfig(policy="budget", keep_ratio=0.3, scope="block"),
    "follow": MaskCacheConfig(policy="follow", scope="block", threshold=0.4, dilate=0),
    "follow nothing": MaskCacheConfig(policy="follow", scope="block", threshold=1e9),
}


@pytest.mark.parametrize("name", MASKS)
@torch.no_grad()
def test_a_rollout_is_what_a_stream_with_that_mask_cache_makes(name: str) -> None:
    """Beyond the window; the stream's own loop, without its VAE."""
    demo = PRESETS["demo"]
    small = replace(demo.transformer, dim=24, ffn_dim=32, num_heads=2, num_layers=2)
    settings = replace(
        demo.stream, height=32, width=64, chunk_latents=2, window_latents=6, sink_latents=2,
        mask_cache=MASKS[name],
    )  # fmt: skip
    torch.manual_seed(0)
    network = Transformer(small)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    config = replace(demo, transformer=small, stream=settings)
    editor = StreamingEditor(
        Model(config, network, build_vae(demo.vae), {}, None), mask_cache=MASKS[name]
    )
    stream = editor.open("make it blue", height=32, width=64, seed=5)
    source = torch.randn(1, 10, 16, 4, 8, generator=torch.Generator().manual_seed(2))
    chunks, shares = [], []
    for piece in source.split(2, dim=1):
        chunks.append(stream._denoise(piece))
        assert stream._mask is not None
        shares.append(stream._mask.recomputed(4))
        stream._mask.observe(chunks[-1], piece)
        stream._forward.refresh(chunks[-1], piece, stream._text)
    text = build_text_encoder(demo.text).encode(["make it blue"])
    calls: list[int] = []

    def counting(*args: Any) -> Tensor:
        reuse = args[-1].reuse
        assert reuse is None or not reuse.idle, "a GPU's kernels take no empty input"
        calls.append(1)
        out: Tensor = network(*args)
        return out

    def trains_on_what_a_stream_makes(stream: StreamConfig) -> None:
        made = rollout(
            None, counting, small, stream, FlowSchedule(stream.shift), source=source,
            text=text, last_step=3, generator=torch.Generator().manual_seed(5),
        )  # fmt: skip
        torch.testing.assert_close(made, torch.cat(chunks, dim=1), atol=1e-4, rtol=1e-4)

    trains_on_what_a_stream_makes(settings)
    assert min(shares) < 1
    assert len(calls) == 5 * 4 + 4  # equally many on all ranks, whatever the picture
    with pytest.raises(AssertionError):  # the published training, which never prunes
        trains_on_what_a_stream_makes(replace(settings, mask_cache=None))


def one_by_one(network: Transformer) -> Any:
    """A trained network that takes each chunk's last step alone."""

    def trained(noisy: Tensor, source: Tensor, times: Tensor, text: Tensor, all_: Unrolled) -> Any:
        pieces = zip(noisy.split(1, dim=1), source.split(1, dim=1), all_.chunks, strict=True)
        return torch.cat([network(*piece, times, text, own) for *piece, own in pieces], dim=1)

    return trained


@pytest.mark.parametrize("name", [None, *(name for name in MASKS if name != "follow nothing")])
def test_chunks_learn_together_what_each_learns_alone(name: str | None) -> None:
    """And make what they made without. Beyond the window, and when blocks are computed again: by
    then later chunks have gone on with the mask cache, and chosen other tokens."""
    stream = replace(STREAM, mask_cache=MASKS[name] if name else None)
    without = run(Recorder(), source_of(5), last_step=1, stream=stream, trained=None)
    found = []
    for together in (False, True):
        network = Recorder()
        network.network.gradient_checkpointing = together
        trained = network if together else one_by_one(network.network)
        made = run(network, source_of(5), last_step=1, stream=stream, trained=trained)
        made.square().mean().backward()
        gradients = [p.grad for p in network.network.parameters() if p.grad is not None]
        found.append([made.detach(), *gradients])
        torch.testing.assert_close(made.detach(), without, atol=1e-5, rtol=1e-5)
    assert len(found[0]) == len(found[1]) > 1
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)

"""What the foundation and causal stages ask of the network, and the loss they make of its answer.

The network is a sum of its inputs, so each loss is worked out here from what it was asked: the
timestep is 1000 sigma, hence noisy = (1 - sigma) target + sigma noise gives the noise, and the
answer has to be noise - target.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling.diffusion.attention import Spans
from modeling.diffusion.transformer import Transformer
from modeling.model_dir import Model, save_model
from pipelines.training.methods import foundation as module
from pipelines.training.methods.base import FixedDraw, Setting
from pipelines.training.methods.causal import CausalTraining, visibility
from pipelines.training.methods.foundation import FoundationTraining
from tests.pipelines.training.plain import (
    CHUNK,
    CLIPS,
    CONFIG,
    FRAMES,
    Call,
    PlainNetwork,
    batch,
    model,
    over,
    setting,
    use_plain_engines,
)

KINDS = {"foundation": FoundationTraining, "causal": CausalTraining}
both = pytest.mark.parametrize("stage", ["foundation", "causal"])


@both
def test_a_model_is_judged_beside_its_engine(stage: str) -> None:
    """Which would count the forward as one of a step, on every worker alike."""
    training, network = make(setting(stage))
    before = network.factors.detach().clone()
    losses = training.judge(batch(), FixedDraw(setting(stage), 0, 2))
    assert training.engine.forwards == 0
    assert len(network.calls) == 1
    assert losses.keys() == {"loss"}
    assert network.factors.equal(before)


@pytest.fixture(autouse=True)
def _engines(monkeypatch: pytest.MonkeyPatch) -> None:
    use_plain_engines(monkeypatch)


def make(here: Setting) -> tuple[FoundationTraining, PlainNetwork]:
    network = PlainNetwork(noisy=0.3, source=-0.7, text=0.2, time=1.1)
    return KINDS[here.stage](here, model(network)), network


def judged(call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, source and sigma [B] or [B, F] of the half of a call that is judged."""
    half = call.noisy.shape[1] // FRAMES > 1
    first = FRAMES if half else 0
    timestep = call.timestep[:, first:] if half else call.timestep
    return call.noisy[:, first:], call.source[:, first:], timestep.double() / 1000


def noise_in(call: Call, target: Tensor) -> Tensor:
    noisy, _, sigma = judged(call)
    sigma = over(sigma, target)
    return (noisy.double() - (1 - sigma) * target.double()) / sigma


def level_weight(sigma: Tensor, shift: float) -> Tensor:
    """The published weight of a noise level: a bell around 1/2 that ends at 0 and averages 1."""
    grid = [shift * u / (1 + (shift - 1) * u) for u in (n / 1000 for n in range(1, 1001))]
    bell = [math.exp(-2 * (s - 0.5) ** 2) for s in grid]
    total = sum(b - min(bell) for b in bell)
    return (torch.exp(-2 * (sigma - 0.5) ** 2) - min(bell)) * 1000 / total


@both
@pytest.mark.parametrize(("edit_weight", "full"), [(0.0, 1.0), (4.0, 1.0), (4.0, 2.5)])
@pytest.mark.parametrize("weighting", ["uniform", "published"])
def test_the_loss_by_hand(stage: str, weighting: str, edit_weight: float, full: float) -> None:
    edited = {"edit_weight": edit_weight, "edit_full": full}
    here = setting(stage, weighting=weighting, **edited, text_dropout=0.0, shift=3.0)
    training, network = make(here)
    asked = deepcopy(network)  # before the optimizer moves it
    given = batch()
    metrics = training.step(given, here.draw(3, 0))

    (call,) = network.calls
    noisy, source, sigma = judged(call)
    noise = noise_in(call, given["target"])
    predicted = asked.answer(noisy, source, 1000 * sigma.float(), given["text"]).double()
    wanted = noise - given["target"].double()
    change = (given["target"] - given["source"]).double().square().mean(dim=2, keepdim=True)
    weight = 1 + edit_weight * (change / full).clamp(max=1)
    if weighting == "published":
        weight = weight * over(level_weight(sigma, 3.0), noisy)
    loss = (weight * (predicted - wanted) ** 2).mean().item()
    assert training.engine.forwards == 1
    assert training.engine.losses == [metrics["loss"].item()]
    assert metrics["loss"].item() == pytest.approx(loss, rel=1e-5)
    assert metrics["grad_norm"] == training.engine.norm


@both
def test_the_noise_is_fresh_and_has_nothing_of_the_clip(stage: str) -> None:
    here = setting(stage)
    training, network = make(here)
    given = batch()
    for step, micro in ((0, 0), (1, 0), (1, 1)):
        training.step(given, here.draw(step, micro))
    drawn = [noise_in(call, given["target"]).float().flatten(1) for call in network.calls]
    rows = [
        *drawn[0],
        *drawn[1],
        *drawn[2],
        *given["source"].flatten(1),
        *given["target"].flatten(1),
    ]
    related = torch.corrcoef(torch.stack(rows))[: 3 * CLIPS]
    alone = related - torch.eye(len(rows))[: 3 * CLIPS]
    assert alone.abs().max() < 0.12  # of 2304 numbers each; 0.02 is the deviation
    for noise in drawn:
        assert noise.std().item() == pytest.approx(1, abs=0.03)


def test_the_foundation_sees_the_whole_clip_at_one_level() -> None:
    here = setting("foundation", text_dropout=0.0)
    training, network = make(here)
    given = batch()
    training.step(given, here.draw(0, 0))
    (call,) = network.calls
    assert call.grad
    assert call.timestep.shape == (CLIPS,)
    assert torch.equal(call.source, given["source"])
    assert torch.equal(call.text, given["text"])
    assert isinstance(call.visible, Spans)
    assert [(s.queries, s.keys) for s in call.visible.spans] == [((0, FRAMES), ((0, FRAMES),))]
    assert call.visible.positions == tuple(range(FRAMES))


def test_the_causal_stage_sees_true_history_and_is_judged_on_the_noisy_half() -> None:
    here = setting("causal", text_dropout=0.0)
    training, network = make(here)
    given = batch()
    training.step(given, here.draw(0, 0))
    (call,) = network.calls
    assert call.grad
    assert torch.equal(call.noisy[:, :FRAMES], given["target"])  # the truth, clean
    assert torch.equal(call.source, torch.cat([given["source"], given["source"]], dim=1))
    assert torch.equal(call.timestep[:, :FRAMES], torch.zeros(CLIPS, FRAMES))
    levels = call.timestep[:, FRAMES:].unflatten(1, (-1, CHUNK))
    assert torch.equal(levels, levels[:, :, :1].expand_as(levels))  # one a chunk
    assert levels.unique().numel() == CLIPS * FRAMES // CHUNK  # of its own
    sees = {s.queries: s.keys for s in call.visible.spans}
    assert sees[(6, 9)] == ((6, 9),)  # the first noisy chunk: itself alone
    assert sees[(9, 12)] == ((0, 3), (9, 12))  # the second: the clean chunk before it, and itself
    assert call.visible.positions == (*range(FRAMES), *range(FRAMES))


def test_history_is_the_streams_window_or_all_of_it() -> None:
    frames = 24  # the stream's window is 12, with 3 sinks
    streams, full = (
        make(setting("causal", history=history))[0].visibility(frames).spans[-1]
        for history in ("stream", "full")
    )
    assert (streams.keys, streams.moved) == (((0, 3), (15, 21), (45, 48)), 12)
    assert (full.keys, full.moved) == (((0, 21), (45, 48)), 0)


@pytest.mark.parametrize(
    ("stream", "keys", "moved"),
    [
        ({"window_latents": 9}, ((0, 3), (18, 21), (45, 48)), 15),
        ({"window_latents": 9, "sink_latents": 0}, ((15, 21), (45, 48)), 0),
        ({"window_positions": False}, ((0, 3), (15, 21), (45, 48)), 0),
        ({"chunk_latents": 6, "sink_latents": 6}, ((0, 6), (42, 48)), 12),
    ],
)
def test_what_a_chunk_sees_and_where_is_all_as_its_stream_has_it(
    stream: dict[str, Any], keys: tuple[tuple[int, int], ...], moved: int
) -> None:
    usual = replace(CONFIG.stream, chunk_latents=CHUNK, window_latents=12, sink_latents=3)
    last = visibility(setting("causal").section, replace(usual, **stream), 24).spans[-1]
    assert (last.keys, last.moved) == (keys, moved)


@both
def test_levels_are_drawn_on_the_grid_of_the_stages_shift(stage: str) -> None:
    """u = sigma / (s - (s - 1) sigma) is uniform for the shift s of the stage, not the stream's."""
    here = setting(stage, shift=9.0)
    training, network = make(here)
    given = batch(clips=4)
    for step in range(100):
        training.step(given, here.draw(step, 0))
    sigma = torch.stack([judged(call)[2] for call in network.calls]).flatten()
    u = (sigma / (9 - 8 * sigma)).sort().values
    expected = torch.linspace(0, 1, u.numel(), dtype=torch.float64)
    assert (u - expected).abs().max() < 0.06


@both
@pytest.mark.parametrize("text_share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("source_share", [0.0, 0.6, 1.0])
def test_dropouts_take_whole_clips_of_the_right_input(
    stage: str, text_share: float, source_share: float
) -> None:
    here = setting(stage, text_dropout=text_share, source_dropout=source_share)
    training, network = make(here)
    given = batch()
    kept_text, kept_source = [], []
    drawn = {text_share, source_share} - {0.0, 1.0}
    for step in range(150 if drawn else 10):
        training.step(given, here.draw(step, 0))
        call = network.calls.pop()
        source = judged(call)[1]
        for clip in range(CLIPS):
            for kept, found, whole in (
                (kept_text, call.text[clip], given["text"][clip]),
                (kept_source, source[clip], given["source"][clip]),
            ):
                kept.append(not torch.equal(found, torch.zeros_like(found)))
                assert not kept[-1] or torch.equal(found, whole)
        noise = noise_in(call, given["target"])  # the target is never dropped
        assert noise.std().item() == pytest.approx(1, abs=0.03)
    text, source = torch.tensor(kept_text).float(), torch.tensor(kept_source).float()
    for found, share in ((text, text_share), (source, source_share)):
        assert 1 - found.mean().item() == pytest.approx(share, abs=0.06 if 0 < share < 1 else 0)
    both_dropped = ((1 - text) * (1 - source)).mean().item()
    assert both_dropped == pytest.approx(text_share * source_share, abs=0.06)  # independent


@both
def test_accumulated_batches_are_one_update_of_their_mean_gradient(stage: str) -> None:
    here = setting(stage, grad_accumulation=3, learning_rate=1e-3)
    training, network = make(here)
    start = network.factors.detach().clone()
    norms: list[Any] = []
    for micro in range(3):
        assert torch.equal(network.factors, start)
        norms.append(training.step(batch(micro), here.draw(0, micro)).get("grad_norm"))
    assert norms[:2] == [None, None]
    assert norms[2] is not None
    assert not torch.equal(network.factors, start)
    assert len(training.engine.losses) == 3


@both
def test_torchs_own_random_numbers_are_without_effect(stage: str) -> None:
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        here = setting(stage, source_dropout=0.3, text_dropout=0.3)
        losses.append(make(here)[0].step(batch(), here.draw(2, 0))["loss"].item())
    assert losses[0] == losses[1]


@both
@pytest.mark.parametrize("rank", [0, 1])
def test_engine_and_export(stage: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    here = setting(stage, rank, 2, learning_rate=3e-4)
    here.config.compute.activation_checkpointing = True
    training, network = make(here)
    assert training.engine.whole
    assert training.engines == {"transformer": training.engine}
    assert training.engine.rate == training.learning_rates["transformer"] == 3e-4
    assert network.gradient_checkpointing
    assert training.ema is None

    def gather(engine: Any, keep: bool) -> dict[str, Any]:
        return {"engine": engine, "kept": keep}

    monkeypatch.setattr(module, "full_weights", gather)
    made = training.export()  # a rank that writes nothing holds nothing
    assert made.transformer == {"engine": training.engine, "kept": rank == 0}
    assert made.vae is None


@both
def test_adapters_are_trained_and_merged_with_the_starts_own_weights(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = replace(CONFIG.transformer, dim=24, ffn_dim=32, num_heads=2, num_layers=1, text_dim=8)
    config = replace(CONFIG, transformer=sizes, text=replace(CONFIG.text, dim=8))
    torch.manual_seed(0)
    network = Transformer(sizes)
    torch.nn.init.normal_(network.head.head.weight, std=0.1)  # or there is no gradient yet
    save_model(tmp_path / "start", config, transformer=network, card={})
    start = deepcopy(network.state_dict())
    asked = {"lora_rank": 2, "lora_alpha": 8.0, "lora_targets": ("self_attn.v",)}
    here = setting(stage, learning_rate=0.1, **asked)
    here = replace(here, job=replace(here.job, start=tmp_path / "start"))
    training = KINDS[stage](here, Model(config, network, None, {}, None))
    assert not training.engine.whole
    training.step(batch(), here.draw(0, 0))
    trained = {n: p.detach() for n, p in network.named_parameters() if p.requires_grad}
    monkeypatch.setattr(module, "full_weights", lambda engine, keep: trained if keep else {})
    made = training.export()
    assert made.transformer is not None
    assert made.card == {"weights": "merged with adapters of rank 2"}
    changed = {name for name, value in made.transformer.items() if not value.equal(start[name])}
    value = "blocks.0.self_attn.v"
    assert changed == {f"{value}.weight", "patch_embedding.weight", "patch_embedding.bias"}
    change = 4.0 * trained[f"{value}.lora_up"] @ trained[f"{value}.lora_down"]
    found = made.transformer[f"{value}.weight"]
    torch.testing.assert_close(found, start[f"{value}.weight"] + change)
    plain = Transformer(sizes)
    plain.load_state_dict(made.transformer)
    alike = KINDS[stage](setting(stage), Model(config, plain, None, {}, None))
    losses = [each.judge(batch(), here.draw(1, 0))["loss"] for each in (training, alike)]
    torch.testing.assert_close(*losses)
    training.rank = 1  # which writes nothing
    assert training.export().transformer == {}

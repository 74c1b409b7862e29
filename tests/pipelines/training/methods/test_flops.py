"""Model FLOPs of a step of every method, which its TFLOP/s and MFU are made of, by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from modeling.config import MaskCacheConfig
from modeling.diffusion.flops import forward_flops
from pipelines.training.methods.base import tokens_of
from pipelines.training.methods.causal import CausalTraining
from pipelines.training.methods.distill import step_flops
from pipelines.training.methods.foundation import FoundationTraining
from pipelines.training.methods.rollout import rollout_flops
from tests.pipelines.training.plain import (
    CHUNK,
    CLIPS,
    CONFIG,
    FRAMES,
    HEIGHT,
    WIDTH,
    PlainNetwork,
    batch,
    model,
    setting,
    use_plain_engines,
)

count = partial(forward_flops, CONFIG.transformer, height=HEIGHT, width=WIDTH)


def test_a_step_of_foundation_and_causal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three forwards' worth. Of two chunks the clean ones see 3 and 6 latents, and so do the noisy
    ones: each the clean ones before it, and itself."""
    use_plain_engines(monkeypatch)
    whole = FoundationTraining(setting("foundation"), model(PlainNetwork()))
    wanted = 3 * CLIPS * count(frames=FRAMES, pairs=FRAMES**2)
    assert whole.flops(batch(), 0) == pytest.approx(wanted)
    chunks = CausalTraining(setting("causal"), model(PlainNetwork()))
    wanted = 3 * CLIPS * count(frames=2 * FRAMES, pairs=2 * CHUNK * (3 + 6))
    assert chunks.flops(batch(), 0) == pytest.approx(wanted)
    for method in (whole, chunks):
        assert method.tokens(batch()) == tokens_of(batch()["source"]) == CLIPS * 6 * 2 * 3


@pytest.mark.parametrize("step", [0, 1])
@pytest.mark.parametrize(
    ("changes", "learning", "judged"),
    [
        ({}, 4, 12),
        ({"scored_chunks": 2}, 2, 6),
        ({"scored_chunks": 9}, 4, 12),
        ({"gradient_chunks": 1}, 1, 12),
        ({"gradient_chunks": 3, "scored_chunks": 1}, 3, 3),
        ({"dmd_weight": 0.0}, 4, None),
        ({"dmd_weight": 0.0, "gradient_chunks": 2}, 2, None),
    ],
)
def test_a_step_of_distillation(
    changes: dict[str, Any], learning: int, judged: int | None, step: int
) -> None:
    """Four chunks up to their third step, and the refreshes of all but the last. Who learns passes
    back through the last step of so many chunks; scores of another size look at so many latents."""
    section = setting("distill", generator_every=2, **changes).section
    score = replace(CONFIG.transformer, num_layers=CONFIG.transformer.num_layers + 3)
    clip = (CLIPS, 4 * CHUNK, 16, HEIGHT, WIDTH)
    chunks = [count(frames=3, pairs=3 * seen) for seen in (3, 6, 9, 12)]
    wanted = 3 * sum(chunks) + sum(chunks[:-1])
    learns = step == 0 or judged is None
    if learns:
        wanted += 2 * sum(chunks[-learning:])
    if judged is not None:
        sizes = {"height": HEIGHT, "width": WIDTH}
        whole = forward_flops(score, frames=judged, pairs=judged**2, **sizes)
        wanted += (6 if learns else 3) * whole
    found = step_flops(section, CONFIG.transformer, score, CONFIG.stream, clip, step, 2)
    assert found == pytest.approx(CLIPS * wanted)


@pytest.mark.parametrize(
    ("cache", "step", "second"),
    [
        (None, 2, (3, 18, 1)),
        ({"scope": "block"}, 1, (3, 18, 1)),  # not pruned
        ({"scope": "block"}, None, (3, 18, 1)),  # the refresh
        ({"scope": "block"}, 2, (1.5, 1.5 * (3 + 1.5), 1)),
        ({"scope": "attention"}, 2, (3, 1.5 * (3 + 1.5), 0.5)),
        ({"scope": "feedforward"}, 2, (3, 18, 1)),  # counted whole
        ({"scope": "block", "policy": "follow"}, 2, (3, 18, 1)),  # may keep all
    ],
)
def test_a_step_of_each_chunk_of_a_rollout(
    cache: dict[str, Any] | None, step: int | None, second: tuple[float, float, float]
) -> None:
    """Latents that are computed, pairs that see each other, share that attends: half the tokens in
    the pruned third step, but of the first chunk, over a window of 6 latents."""
    mask = cache and MaskCacheConfig(pruned_steps=(2,), keep_ratio=0.5, **cache)
    stream = replace(CONFIG.stream, window_latents=6, sink_latents=0, mask_cache=mask)
    made: Any = rollout_flops(lambda **counted: tuple(counted.values()), 9, stream, step)
    assert made == [(3, 9, 1), second, second]  # the third sees one chunk before it, too

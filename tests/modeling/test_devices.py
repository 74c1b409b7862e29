"""Everything is made where its inputs lie: what a CPU alone cannot tell.

On the `meta` device, which has shapes and no numbers, each operation's results are looked at; on a
GPU a tensor of the CPU among them is an error in the best case, and a wait in every chunk else.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from modeling.config import MaskCacheConfig, Scope, StreamConfig, TransformerConfig, VaeConfig
from modeling.detail.guide import blurred, following
from modeling.detail.noise_gate import only_edited
from modeling.detail.resample import resize
from modeling.detail.transfer import transfer
from modeling.diffusion.attention import Visibility, bidirectional, teacher_forcing
from modeling.diffusion.flow import FlowSchedule
from modeling.diffusion.reuse import Reuse
from modeling.diffusion.sequence import Sequence, by_latents
from modeling.diffusion.transformer import Transformer
from modeling.editor import StreamingEditor
from modeling.losses.dmd import dmd_gradient, gradient_as_loss, guided
from modeling.losses.velocity import WEIGHTINGS, edit_weight, velocity_loss
from modeling.model_dir import load_model
from modeling.streaming.caches import kv_cache, mask_cache
from modeling.streaming.follow import grow, undilated
from modeling.streaming.history import History, Remembered, Unrolled
from modeling.streaming.kv_cache import Cached, KVCache
from modeling.streaming.mask_cache import MaskCache
from modeling.streaming.policies import POLICIES
from modeling.vae.build import build_vae
from tests.known_editors import write_known_model

THERE = torch.device("meta")
NETWORK = TransformerConfig(
    dim=24, ffn_dim=8, num_heads=2, num_layers=1, freq_dim=8, text_dim=8, text_tokens=4
)
STREAM = StreamConfig(height=32, width=48, chunk_latents=1, window_latents=3, sink_latents=1)
SIZE = (32, 48)  # 2 x 3 tokens


class NothingElsewhere(TorchFunctionMode):
    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else (made,):
            assert not isinstance(x, Tensor) or x.device == THERE, f"{function} on {x.device}"
        return made


def there(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, device=THERE, dtype=dtype)


def network() -> Transformer:
    with THERE:
        return Transformer(NETWORK)


def forward(visible: Visibility, latents: int = 1) -> None:
    clip = there(1, latents, 16, 4, 6)
    network()(clip, clip, there(1), there(1, 3, 8), visible)


def rolled() -> KVCache:
    """With its window full and its sinks turned."""
    cache = kv_cache(network(), STREAM, SIZE, THERE)
    for _ in range(4):
        cache.commit()
    return cache


def moved() -> None:
    cache, other = rolled(), rolled()
    away = cache.elsewhere(torch.empty_like(cache.k), torch.empty_like(cache.v))
    away.copy_(other)
    cache.take(away)
    cache.load_state_dict(other.state_dict())


def history() -> History:
    grid = {"latent_height": 4, "latent_width": 6}
    made = History(NETWORK, STREAM, batch=1, **grid, device=THERE)  # type: ignore[arg-type]
    for _ in range(4):
        made.commit(*made.empty())
    return made


def reuse(scope: Scope, kept: bool = True) -> Reuse:
    outputs = there(0 if scope == "block" else NETWORK.num_layers, 1, 6, NETWORK.dim)
    tokens = there(2, dtype=torch.long) if kept else None
    return Reuse(scope, outputs, tokens, fixed_size=True)


def remembered(scope: Scope) -> None:
    past = history()
    forward(Remembered(past, keeps=past.empty()))
    forward(Remembered(past, reuse(scope)))
    forward(Unrolled([Remembered(past, reuse(scope)), Remembered(past)]), 2)


def masked(name: str) -> MaskCache:
    scope: Scope = "attention" if POLICIES[name].choose else "block"
    mask = mask_cache(MaskCacheConfig(name, scope=scope), network(), STREAM, SIZE, THERE)
    assert mask is not None
    return mask


def masks() -> None:
    for name in POLICIES:
        mask = masked(name)
        mask.let_go()
        mask.cell_mask()
        mask.carry_on(there(2, dtype=torch.long), there(16, 4, 6), 1)
        mask.cell_mask()
        mask.reuse(1)
    masked("budget").observe(there(1, 1, 16, 4, 6), there(1, 1, 16, 4, 6))
    for choose in (POLICIES["published"].choose, POLICIES["budget"].choose):
        assert choose is not None
        choose(there(1, 2, 2), 0.01)


def autoencoder(config: VaeConfig) -> None:
    with THERE:
        vae = build_vae(config)
    vae.to(THERE)
    state = None
    for count in (0, 6, 2):
        _, state = vae.encode(there(1, count, 3, 16, 24), state)
    state = None
    for count in (0, 2, 1):
        _, state = vae.decode(there(1, count, 16, 2, 3), state)
    assert state is not None
    state.to(THERE)


def frames(height: int = 6, width: int = 9) -> Tensor:
    return there(2, height, width, 3, dtype=torch.uint8)


def detail() -> None:
    only_edited(frames(), frames())
    following(frames(), frames())
    blurred(frames(), 1.0)


def losses() -> None:
    x, target = there(2, 3, 4, 2, 2), there(2, 3, 4, 2, 2)
    velocity_loss(x, target, edit_weight(x, target, 2.0))
    gradient_as_loss(x, dmd_gradient(x, guided(x, target, 3.0), target))


@pytest.mark.parametrize(
    "work",
    [
        lambda: forward(bidirectional(2), 2),
        lambda: forward(teacher_forcing(3, 1, window=2, sinks=1), 6),
        *(
            lambda scope=scope, kept=kept: forward(Cached(rolled(), reuse(scope, kept)))
            for scope, kept in (
                ("attention", True), ("attention", False), ("feedforward", True), ("block", True)
            )
        ),
        lambda: remembered("attention"),
        lambda: remembered("block"),
        moved,
        masks,
        lambda: undilated(there(1, 16, 4, 6), there(1, 16, 4, 6), None, threshold=1.0),
        lambda: grow(there(1, 2, 3, dtype=torch.bool), 1),
        lambda: by_latents(Sequence(None, 1, 2), 3, 4, THERE),  # type: ignore[arg-type]
        lambda: autoencoder(VaeConfig("tiny", widths=(4,) * 4)),
        lambda: autoencoder(VaeConfig("folded", widths=(4, 8), depths=(1,) * 4)),
        detail,
        losses,
    ],
)  # fmt: skip
def test_nothing_is_made_elsewhere(work: Callable[[], object]) -> None:
    with NothingElsewhere(), torch.no_grad():
        work()


def test_what_is_made_on_the_host_is_brought_there(tmp_path: Path) -> None:
    """Once, and used there ever after."""
    flow = FlowSchedule(5.0, THERE)
    found = [flow.sigmas, flow.timesteps, flow.warp([1000, 500])]
    found += [weigh(flow, there(2)) for weigh in WEIGHTINGS.values()]
    found += [resize(frames(), 3, 4), transfer(frames(), frames(3, 4), frames(3, 4))]
    write_known_model(tmp_path / "one")
    editor = StreamingEditor.load(tmp_path / "one", device=THERE, dtype=torch.bfloat16)
    assert editor.device == THERE
    stream = editor.open("make it red", height=32, width=48)
    assert stream._mask is not None
    of_its_type = [*editor.encode_prompt("make it red"), stream._kv.k, stream._mask._outputs]
    drawn = load_model("demo", device=THERE, dtype=torch.bfloat16)
    for part in (editor.vae, drawn.transformer, drawn.vae):
        assert part is not None
        of_its_type += part.parameters()
    assert {x.dtype for x in of_its_type} == {torch.bfloat16}
    found += [*of_its_type, editor.timesteps, editor.vae.mean, editor.text.encode(["red"])]
    assert {x.device for x in found} == {THERE}

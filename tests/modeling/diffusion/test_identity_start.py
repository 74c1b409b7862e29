from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from modeling.diffusion.attention import bidirectional
from modeling.diffusion.identity_start import start_as_identity
from modeling.diffusion.transformer import Transformer
from modeling.presets import PRESETS


def test_a_new_editor_predicts_that_nothing_changes() -> None:
    torch.manual_seed(0)
    transformer = Transformer(PRESETS["demo"].transformer).requires_grad_(False)
    noise, source = torch.randn(2, 3, 16, 8, 8), torch.randn(2, 3, 16, 8, 8)
    text = torch.randn(2, 24, 64)
    full = torch.full((2,), 1000.0)

    def clean() -> torch.Tensor:
        """The estimate of the edited video at full noise."""
        return noise - transformer(noise, source, full, text, bidirectional(3))

    def relative_error(found: torch.Tensor) -> float:
        return float((found - source).norm() / source.norm())

    before = relative_error(clean())
    assert start_as_identity(transformer)
    assert relative_error(clean()) < 0.35 < before  # 0.23 to 0.31 by seed
    velocity = transformer(noise, source, full, text, bidirectional(3)).flatten()
    parts = torch.stack([noise.flatten(), source.flatten()], dim=1)
    fitted = torch.linalg.lstsq(parts, velocity[:, None]).solution.flatten()
    torch.testing.assert_close(fitted, torch.tensor([1.0, -1.0]), atol=0.03, rtol=0)
    assert not torch.equal(
        transformer(noise, source, full, text, bidirectional(3)),
        transformer(noise, source, full, text.flip(0), bidirectional(3)),
    )


@pytest.mark.parametrize(
    ("sizes", "starts"),
    [
        ({"dim": 128}, True),  # of 16 channels in 2 x 2 cells, noisy and source
        ({"dim": 120}, False),
        ({"source_channels": 0}, False),
        ({"source_channels": 8}, False),
    ],
)
def test_a_network_without_room_or_source_is_left_as_it_is(
    sizes: dict[str, int], starts: bool
) -> None:
    small = replace(PRESETS["demo"].transformer, num_heads=4, num_layers=1, **sizes)  # type: ignore[arg-type]
    network = Transformer(small)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    assert start_as_identity(network) is starts
    same = [torch.equal(value, before[name]) for name, value in network.state_dict().items()]
    assert all(same) is not starts


def test_what_is_added_is_small_and_words_count() -> None:
    """A tenth of what blocks add, and text layers that keep half as much again of a word's size."""
    network = Transformer(replace(PRESETS["demo"].transformer, num_layers=1))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    start_as_identity(network)
    found = network.state_dict()
    outputs = {f"blocks.0.{name}.weight" for name in ("self_attn.o", "cross_attn.o", "ffn.2")}
    for name, value in found.items():
        if name in outputs:
            torch.testing.assert_close(value, before[name] / 10)
        elif name.startswith("text_embedding") and value.dim() == 2:
            assert value.std() * value.shape[1] ** 0.5 == pytest.approx(1.5, rel=0.03)
        elif name == "patch_embedding.weight":
            own = value.flatten(1)
            assert torch.equal(own[:64, :64], 1.5 * torch.eye(64))
            assert torch.equal(own[64:128, 64:], torch.eye(64))
            assert own.count_nonzero() == 128
        else:
            assert torch.equal(value, before[name]) is (name != "head.head.weight"), name


def test_a_network_that_is_drawn_sees_the_noisy_latents_and_not_yet_the_source() -> None:
    drawn = Transformer(replace(PRESETS["demo"].transformer, latent_channels=4, source_channels=3))
    noisy, source = drawn.patch_embedding.weight.split([4, 3], dim=1)
    assert noisy.all()
    assert not source.any()
    assert not drawn.head.head.weight.any()  # and predicts that nothing moves
    for name, value in drawn.state_dict().items():
        if name.endswith("bias"):
            assert not value.any(), name
        elif name.endswith("modulation"):
            assert value.std() == pytest.approx(192**-0.5, rel=0.15), name
        elif name.startswith(("text_embedding", "time_embedding")):
            assert value.std() == pytest.approx(0.02, rel=0.05), name

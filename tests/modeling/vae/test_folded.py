"""The folded VAE: training's one pass over a clip, and sizes that are refused."""

from __future__ import annotations

import pytest
import torch

from modeling.config import VaeConfig
from modeling.vae.build import build_vae
from modeling.vae.folded import ShiftBlock
from modeling.vae.streaming import StreamTape

SMALL = VaeConfig(kind="folded", widths=(8, 12), depths=(1, 2, 2, 1))


def test_training_in_one_pass_gives_what_a_stream_gives() -> None:
    torch.manual_seed(0)
    vae = build_vae(SMALL).double()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    pixels = torch.rand(2, 18, 3, 16, 24, dtype=torch.float64)  # one frame waits
    results = []
    for training in (True, False):
        vae.train(training)
        latents, state = vae.encode_raw(pixels)
        assert state.pending is not None
        assert state.pending.shape[1] == 1
        results.append((latents, vae.decode_raw(latents)[0]))
    assert results[0][1].shape == (2, 17, 3, 16, 24)
    for at_once, streamed in zip(*results, strict=True):
        torch.testing.assert_close(at_once, streamed)


@pytest.mark.parametrize(("training", "passes"), [(True, 1), (False, 4)])
def test_training_makes_one_pass_of_a_clip(training: bool, passes: int) -> None:
    """A stream's encoder makes one a latent, its decoder one of the first and one of three."""
    vae = build_vae(SMALL).train(training).requires_grad_(False)
    made: list[str] = []
    for name in ("_encode_pass", "_decode_pass"):
        run = getattr(vae, name)
        setattr(
            vae, name, lambda x, caches, name=name, run=run: (made.append(name), run(x, caches))[1]
        )
    latents, _ = vae.encode_raw(torch.rand(1, 13, 3, 16, 16))
    vae.decode_raw(latents)
    assert made == ["_encode_pass"] * passes + ["_decode_pass"] * (1 if training else 2)


def test_what_stands_still_stays_as_it_is_from_the_first_frame_on() -> None:
    """A stream begins as if its first picture had always been there, and a latent's one picture is
    the last of the four that it would be later."""
    torch.manual_seed(1)
    vae = build_vae(SMALL).double().eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    still = torch.rand(1, 1, 3, 16, 24, dtype=torch.float64).expand(-1, 9, -1, -1, -1)
    latents, _ = vae.encode_raw(still)
    for n in (1, 2):
        torch.testing.assert_close(latents[:, n], latents[:, 0])
    frames, _ = vae.decode_raw(latents[:, :1].expand(-1, 3, -1, -1, -1))
    for n in (4, 8):
        torch.testing.assert_close(frames[:, n], frames[:, 0])
    torch.testing.assert_close(frames[:, 1:5], frames[:, 5:])
    assert not torch.allclose(frames[:, 1], frames[:, 4])


def test_a_new_block_changes_nothing() -> None:
    """Training begins at the linear network around the blocks, see `pyramid_start`."""
    torch.manual_seed(2)
    x = torch.randn(6, 8, 5, 7)  # two clips of three latents
    assert torch.equal(ShiftBlock(8)(x, StreamTape([]), 2), x)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="two widths and four depths"):
        VaeConfig(kind="folded", widths=(8, 12), depths=(1, 2, 2))

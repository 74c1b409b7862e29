from __future__ import annotations

import pytest
import torch

from modeling.diffusion.flow import FlowSchedule, velocity


def test_shift_5_grid() -> None:
    sigmas = FlowSchedule(5.0).sigmas
    found = [round(sigmas[i].item(), 6) for i in (0, 250, 500, 750, 998, 999)]
    assert found == pytest.approx([1.0, 0.9375, 0.833333, 0.625, 0.009921, 0.004980], abs=1e-6)


def test_shift_8_grid() -> None:
    sigmas = FlowSchedule(8.0).sigmas
    found = [sigmas[i].item() for i in (250, 500, 750, 999)]
    assert found == pytest.approx([0.96, 0.8889, 0.7273, 0.00794], abs=5e-5)


def test_timesteps_snap_to_the_nearest_level() -> None:
    found = FlowSchedule(5.0).sigma(torch.tensor([750.0, 500.0, 250.0, 0.0]))
    assert found.tolist() == pytest.approx([0.75, 0.5006, 0.2516, 0.00498], abs=1e-4)


def test_published_loss_weights() -> None:
    flow = FlowSchedule(8.0)
    t = torch.tensor([1000.0, 937.5, 833.0, 625.0, 500.0, 250.0, 20.0])
    expected = [0, 0.474, 1.22, 2.28, 2.47, 1.73, 0.18]
    assert flow.loss_weight(t).tolist() == pytest.approx(expected, abs=0.006)
    assert flow.loss_weight(flow.timesteps).mean().item() == pytest.approx(1.0, abs=1e-5)


def test_warped_steps() -> None:
    warped = FlowSchedule(5.0).warp((1000, 750, 500, 250))
    assert warped.tolist() == pytest.approx([1000, 937.5, 833.3333, 625], abs=1e-3)
    with pytest.raises(ValueError, match="place 0 is outside"):
        FlowSchedule(5.0).warp((1000, 0))


@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_x0_comes_back(shape: tuple[int, ...]) -> None:
    flow = FlowSchedule(5.0)
    x0, noise = torch.randn(2, 2, 3, 4, 4, 4)
    t = torch.rand(shape) * 1000
    x_t = flow.add_noise(x0, noise, t)
    torch.testing.assert_close(flow.to_x0(x_t, velocity(x0, noise), t), x0)


def test_latents_of_less_precision_are_rounded_once() -> None:
    """After arithmetic in float32, either way."""
    flow, t = FlowSchedule(5.0), torch.tensor([700.0])
    x, y = torch.randn(2, 1, 3, 4, 4, 4).bfloat16()
    for convert in (flow.add_noise, flow.to_x0):
        found = convert(x, y, t)
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, convert(x.float(), y.float(), t).bfloat16())

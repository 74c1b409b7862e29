from __future__ import annotations

import pytest
import torch

from modeling.losses.dmd import dmd_gradient, gradient_as_loss, guided
from modeling.losses.reconstruction import reconstruction_loss, scale_penalty
from modeling.losses.velocity import edit_weight, regression_loss, velocity_loss

SHAPE = (2, 3, 4, 5, 6)  # B, F, C, H, W


def latents(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def test_velocity_loss_is_the_weighted_mean_square() -> None:
    a, b = latents(0), latents(1)
    per_latent = ((a - b) ** 2).mean(dim=(2, 3, 4))
    assert velocity_loss(a, b) == pytest.approx(((a - b) ** 2).mean().item(), rel=1e-6)

    by_clip = torch.tensor([0.0, 2.0])
    expected = (per_latent * by_clip[:, None]).mean().item()
    assert velocity_loss(a, b, by_clip) == pytest.approx(expected, rel=1e-6)

    by_latent = torch.rand(2, 3, generator=torch.Generator().manual_seed(2))
    expected = (per_latent * by_latent).mean().item()
    assert velocity_loss(a, b, by_latent) == pytest.approx(expected, rel=1e-6)


def test_a_weight_for_each_cell() -> None:
    a, b, weight = latents(0), latents(1), latents(2)[:, :, :1]
    expected = ((a - b) ** 2 * weight).mean().item()
    assert velocity_loss(a, b, weight) == pytest.approx(expected, rel=1e-5)
    assert regression_loss(a, b, weight) == pytest.approx(0.5 * expected, rel=1e-5)


def test_cells_that_an_edit_changes_weigh_more() -> None:
    source = latents(0)
    target = source.clone()
    target[0, 1, :, 2, 3] += 0.5  # a change of mean square 0.25
    target[1, 0, :, 4, 5] -= 30.0
    weight = edit_weight(source, target, 8.0)
    assert weight.shape == (2, 3, 1, 5, 6)
    assert weight[0, 1, 0, 2, 3] == pytest.approx(3.0)
    assert weight[1, 0, 0, 4, 5] == pytest.approx(9.0)
    weight[0, 1, 0, 2, 3] = weight[1, 0, 0, 4, 5] = 1.0
    assert torch.equal(weight, torch.ones_like(weight))
    assert edit_weight(source, target, 8.0, 0.5)[0, 1, 0, 2, 3] == pytest.approx(5.0)
    assert edit_weight(source, target, 8.0, 0.125)[0, 1, 0, 2, 3] == pytest.approx(9.0)


def test_excess_guidance_3_is_guidance_scale_4() -> None:
    c, u = latents(0), latents(1)
    torch.testing.assert_close(guided(c, u, 3.0), u + 4.0 * (c - u))
    assert torch.equal(guided(c, u, 0.0), c)


def test_dmd_gradient_is_normalised_for_each_sample() -> None:
    x, real, fake = latents(0), latents(1), latents(2)
    gradient = dmd_gradient(x, real, fake)
    for n in range(SHAPE[0]):
        expected = (fake[n] - real[n]) / (x[n] - real[n]).abs().mean()
        torch.testing.assert_close(gradient[n], expected)
    # A sample whose distances are all ten times as large gets the same direction.
    torch.testing.assert_close(dmd_gradient(10 * x, 10 * real, 10 * fake), gradient)


def test_dmd_gradient_is_zero_where_the_sample_is_already_real() -> None:
    x, fake = latents(0), latents(1)
    assert torch.equal(dmd_gradient(x, x, fake), torch.zeros(SHAPE))


def test_gradient_as_loss_has_just_that_gradient() -> None:
    x, gradient = latents(0).requires_grad_(), latents(1)
    loss = gradient_as_loss(x, gradient)
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * gradient.square().mean().item(), rel=1e-5)
    torch.testing.assert_close(x.grad, gradient / x.numel(), atol=1e-8, rtol=1e-4)


def test_regression_loss_pulls_as_strongly_as_a_gradient_of_the_error() -> None:
    x, target = latents(0).requires_grad_(), latents(1)
    regression_loss(x, target).backward()
    torch.testing.assert_close(x.grad, (x.detach() - target) / x.numel())


def test_reconstruction_loss_counts_edges_beside_values() -> None:
    target = torch.zeros(1, 1, 1, 4, 4)
    flat = torch.full_like(target, 0.5)  # off everywhere, no wrong edge
    assert reconstruction_loss(flat, target, 1.0).item() == pytest.approx(0.5)
    stripes = torch.zeros_like(target)
    stripes[..., ::2] = 1.0  # same mean error, every horizontal difference is off by 1
    assert reconstruction_loss(stripes, target, 0.0).item() == pytest.approx(0.5)
    assert reconstruction_loss(stripes, target, 2.0).item() == pytest.approx(0.5 + 2.0)
    assert reconstruction_loss(flat, target, 0.0, 3.0).item() == pytest.approx(0.5 + 3.0 * 0.25)
    assert reconstruction_loss(stripes, target, 2.0, 3.0).item() == pytest.approx(2.5 + 3.0 * 0.5)


def test_scale_penalty_is_half_the_mean_square() -> None:
    assert scale_penalty(torch.full((1, 1, 1, 2, 2), 3.0)).item() == pytest.approx(4.5)


def test_losses_of_bf16_latents_are_computed_in_float32() -> None:
    a, b = latents(0).bfloat16(), latents(1).bfloat16()
    for loss in (velocity_loss(a, b), gradient_as_loss(a, b), regression_loss(a, b)):
        assert loss.dtype == torch.float32

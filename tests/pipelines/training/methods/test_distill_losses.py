"""Distribution matching by hand: who is asked what, which way the generator is pulled, and when.

All networks are sums of their inputs with factors of their own, so every clean estimate and the
gradient that the generator gets can be worked out here from what they were asked."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from modeling.diffusion.attention import Spans
from pipelines.training.methods import distill as module
from pipelines.training.methods.distill import DistillTraining
from pipelines.training.methods.rollout import exit_step
from tests.pipelines.training.methods.factors import (
    CRITIC,
    GENERATOR,
    TEACHER,
    clean,
    make,
    noise_in,
    sigma_of,
)
from tests.pipelines.training.plain import (
    CHUNK,
    CLIPS,
    FRAMES,
    PlainNetwork,
    batch,
    model,
    over,
    setting,
)

pytestmark = pytest.mark.usefixtures("distill_networks")


@pytest.mark.parametrize(
    ("guidance", "dmd_weight", "regression_weight", "edit_weight", "full"),
    [(3.0, 1.0, 0.25, 0.0, 1.0), (0.0, 0.7, 0.0, 0.0, 1.0), (1.5, 0.3, 2.0, 5.0, 2.5)],
)
def test_the_generators_gradient_by_hand(
    guidance: float, dmd_weight: float, regression_weight: float, edit_weight: float, full: float
) -> None:
    weights = {"dmd_weight": dmd_weight, "regression_weight": regression_weight}
    edited = {"edit_weight": edit_weight, "edit_full": full}
    here = setting("distill", guidance=guidance, **edited, **weights)
    training = make(here)
    given = batch()
    source, target, text = given["source"], given["target"], given["text"]
    made = batch(seed=1)["target"].requires_grad_()
    metrics = training.train_generator(made, source, target, text, here.draw(0, 0))

    (fake_call,), (real_call, blind_call) = training.critic.module.calls, training.real.calls
    for call in (fake_call, real_call, blind_call):
        assert not call.grad
        assert torch.equal(call.noisy, fake_call.noisy)  # they judge the same thing
        assert torch.equal(call.timestep, fake_call.timestep)
        assert call.timestep.shape == (CLIPS,)
        assert torch.equal(call.source, source)
        assert isinstance(call.visible, Spans)
        assert [(s.queries, s.keys) for s in call.visible.spans] == [((0, FRAMES), ((0, FRAMES),))]
    assert torch.equal(fake_call.text, text)
    assert torch.equal(real_call.text, text)
    assert torch.equal(blind_call.text, torch.zeros_like(text))
    noise = noise_in(fake_call, made.detach())
    assert noise.std().item() == pytest.approx(1, abs=0.03)

    fake = clean(CRITIC, fake_call, text)
    seeing, blind = clean(TEACHER, real_call, text), clean(TEACHER, real_call, text * 0)
    real = seeing + guidance * (seeing - blind)
    x = made.detach().double()
    distance = (x - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    gradient = (fake - real) / distance  # descending it leads from fake to real
    change = (target - source).double().square().mean(dim=2, keepdim=True)
    weight = 1 + edit_weight * (change / full).clamp(max=1)
    error = x - target.double()
    wanted = (dmd_weight * gradient + regression_weight * weight * error) / x.numel()
    assert made.grad is not None
    torch.testing.assert_close(made.grad.double(), wanted, atol=1e-8, rtol=1e-3)

    dmd = 0.5 * gradient.square().mean().item()
    regression = 0.5 * (weight * error.square()).mean().item()
    found = {name: value.item() for name, value in metrics.items()}
    assert found["dmd_loss"] == pytest.approx(dmd, rel=1e-4)
    assert found["regression_loss"] == pytest.approx(regression, rel=1e-4)
    total = dmd_weight * dmd + regression_weight * regression
    assert found["loss"] == pytest.approx(total, rel=1e-4)
    assert training.generator.losses == [pytest.approx(found["loss"])]
    assert training.critic.losses == []
    assert set(found) == {"loss", "dmd_loss", "regression_loss", "grad_norm"}


def test_without_dmd_there_are_no_score_networks_and_the_generator_learns_in_every_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "load_model", lambda *_, **__: pytest.fail("a teacher is loaded"))
    here = setting("distill", dmd_weight=0.0, regression_weight=0.5, generator_every=3)
    training = DistillTraining(here, model(PlainNetwork(*GENERATOR)))
    assert set(training.engines) == set(training.learning_rates) == {"generator"}
    for step in range(3):
        before = training.generator.module.factors.detach().clone()
        metrics = training.step(batch(), here.draw(step, 0))
        assert set(metrics) == {"loss", "regression_loss", "grad_norm"}
        assert metrics["loss"].item() == pytest.approx(0.5 * metrics["regression_loss"].item())
        assert not torch.equal(training.generator.module.factors, before)


def test_the_critics_loss_by_hand() -> None:
    here = setting("distill")
    training = make(here)
    given = batch()
    made = batch(seed=1)["target"]
    metrics = training.train_critic(made, given["source"], given["text"], here.draw(0, 0))
    (call,) = training.critic.module.calls
    assert call.grad
    assert training.critic.forwards == 1
    assert torch.equal(call.source, given["source"])
    assert torch.equal(call.text, given["text"])
    assert [(s.queries, s.keys) for s in call.visible.spans] == [((0, FRAMES), ((0, FRAMES),))]
    noise = noise_in(call, made)
    assert noise.std().item() == pytest.approx(1, abs=0.03)
    sigma = over(sigma_of(call.timestep), made)
    predicted = (call.noisy - clean(CRITIC, call, given["text"])) / sigma
    loss = (predicted - (noise - made)).square().mean().item()  # learns what is made
    assert metrics["critic_loss"].item() == pytest.approx(loss, rel=1e-4)
    assert training.critic.losses == [metrics["critic_loss"].item()]
    assert set(metrics) == {"critic_loss", "critic_grad_norm"}
    assert training.real.calls == []


def test_scores_are_compared_between_the_two_timesteps() -> None:
    here = setting("distill", min_timestep=300.0, max_timestep=900.0)
    training = make(here)
    made = batch()["target"]
    drawn = torch.cat([training.draw_timestep(made, here.draw(s, 0)) for s in range(200)])
    assert drawn.shape == (200 * CLIPS,)
    assert drawn.min() == 300
    assert drawn.max() == 900
    u = drawn / 1000 / (5 - 4 * drawn / 1000)  # uniform under the stream's shift, between the ends
    within = (u > 0.2) & (u < 0.6)
    assert within.float().mean().item() == pytest.approx(0.4, abs=0.03)


def test_the_generator_learns_in_every_nth_step_and_the_critic_in_all() -> None:
    here = setting("distill", generator_every=3, critic_learning_rate=1e-2, learning_rate=1e-2)
    training = make(here)
    teacher, moved = training.real.factors.detach().clone(), []
    for step in range(7):
        before = deepcopy([e.module.factors for e in (training.generator, training.critic)])
        metrics = training.step(batch(step), here.draw(step, 0))
        after = [training.generator.module.factors, training.critic.module.factors]
        moved.append([not torch.equal(a, b) for a, b in zip(before, after, strict=True)])
        names = {"loss", "dmd_loss", "regression_loss", "grad_norm"} if step % 3 == 0 else set()
        assert set(metrics) == {"critic_loss", "critic_grad_norm"} | names
    assert moved == [[step % 3 == 0, True] for step in range(7)]
    assert torch.equal(training.real.factors, teacher)
    assert training.average.updates == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_the_rollout_and_who_judges_it(rank: int) -> None:
    """The generator's own clip of source and text goes to the scores and, without gradient, to the
    critic; it ends at the step that all ranks agree on."""
    here = setting("distill", rank, 2, generator_every=2, seed=5)
    here.config.compute.precision = "bf16" if rank else "fp32"
    training = make(here)
    judged: list[tuple[Tensor, ...]] = []
    training.train_generator = lambda *args: judged.append(args[:4]) or {}  # type: ignore
    training.train_critic = lambda *args: judged.append(args[:3]) or {}  # type: ignore
    for step in range(6):
        calls = training.generator.module.calls
        calls.clear()
        judged.clear()
        given = batch(step)
        training.step(given, here.draw(step, 0))
        last = exit_step(5, step, 4)
        alone = 2 * (last + 1) + 1  # two chunks and one refresh
        learns = step % 2 == 0
        assert [call.grad for call in calls] == [False] * alone + [True] * learns
        assert all(torch.equal(call.text, given["text"]) for call in calls)
        rolled, learnt = calls[:alone], calls[alone:]
        assert {call.visible.history.empty()[0].dtype for call in rolled} == {here.dtype}
        assert torch.equal(rolled[0].source, given["source"][:, :3])
        assert torch.equal(rolled[-1].source, given["source"][:, 3:])
        assert all(torch.equal(call.source, given["source"]) for call in learnt)
        assert training.generator.forwards == step // 2 + 1

        *generators, (made, source, text) = judged
        assert not made.requires_grad
        assert torch.equal(source, given["source"])
        assert torch.equal(text, given["text"])
        assert len(generators) == learns
        for mine, *others in generators:
            assert mine.requires_grad
            assert torch.equal(mine, made)
            for found, name in zip(others, ("source", "target", "text"), strict=True):
                assert torch.equal(found, given[name])


def test_held_out_clips_are_judged_by_what_the_whole_stream_makes_of_them() -> None:
    """All four steps of every chunk, whichever a training step would end at."""
    here = setting("distill", edit_weight=2.0, edit_full=1.5)
    training, given = make(here), batch()
    calls = training.generator.module.calls
    found = training.judge(given, here.draw(0, 0))
    assert [call.grad for call in calls] == [False] * (2 * 4 + 1)
    made = training.edit(given["source"], given["text"], here.draw(0, 0), False, 3).double()
    change = (given["target"] - given["source"]).double().square().mean(dim=2, keepdim=True)
    weight = 1 + 2.0 * (change / 1.5).clamp(max=1)
    loss = 0.5 * (weight * (made - given["target"]).square()).mean()
    assert set(found) == {"loss"}
    assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-4)
    training.judge(given, here.draw(1, 0))
    assert len(calls) == 3 * (2 * 4 + 1)  # whatever step it is


def test_all_that_is_drawn_for_a_step_differs() -> None:
    """First noise of the rollout, of the scores and of the critic, on two ranks and in two steps:
    none equals another."""
    drawn = []
    for rank in (0, 1):
        here = setting("distill", rank, 2, generator_every=1)
        training = make(here)
        for step in range(2):
            made = training.edit(batch()["source"], batch()["text"], here.draw(step, 0), False)
            training.generator.module.calls.clear()
            training.critic.module.calls.clear()
            training.step(batch(), here.draw(step, 0))
            judged, learned = training.critic.module.calls
            drawn.append(training.generator.module.calls[0].noisy[:, :3].flatten())
            for call in (judged, learned):
                drawn.append(noise_in(call, made)[:, :3].float().flatten())
            assert not torch.equal(judged.timestep, learned.timestep)
    related = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))
    assert related.abs().max() < 0.2


def test_torchs_own_random_numbers_are_without_effect() -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        here = setting("distill")
        found.append(make(here).step(batch(), here.draw(0, 0)))
    assert found[0] == found[1]


def test_a_long_rollout_is_judged_by_its_last_chunks() -> None:
    here = setting("distill", scored_chunks=1, generator_every=1, seed=2)
    training = make(here)
    given = batch(frames=4 * CHUNK)
    training.step(given, here.draw(0, 0))
    made = [call for call in training.generator.module.calls if call.grad]
    assert len(made) == 1  # what nobody judges has no gradient
    assert torch.equal(made[0].source, given["source"][:, -CHUNK:])
    judges = [*training.critic.module.calls, *training.real.calls]
    assert len(judges) == 4
    for call in judges:
        assert torch.equal(call.source, given["source"][:, -CHUNK:])
    shorter = make(setting("distill", generator_every=1, seed=2))
    assert training.flops(given, 0) < shorter.flops(given, 0)

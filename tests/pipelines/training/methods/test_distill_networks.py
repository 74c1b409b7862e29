"""Which networks a distillation has, copies, averages and exports."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modeling.config import MaskCacheConfig, VaeConfig
from modeling.diffusion.flops import forward_flops
from modeling.diffusion.transformer import Transformer
from modeling.model_dir import Model, ModelError
from pipelines.training.methods import distill as module
from pipelines.training.methods.distill import DistillTraining
from pipelines.training.methods.rollout import exit_step, rollout
from pipelines.training.zero.engines import deepspeed_config
from tests.pipelines.training.methods.factors import GENERATOR, TEACHER, make
from tests.pipelines.training.plain import (
    CLIPS,
    CONFIG,
    FRAMES,
    HEIGHT,
    WIDTH,
    PlainNetwork,
    batch,
    model,
    setting,
)

pytestmark = pytest.mark.usefixtures("distill_networks")


def test_under_zero_3_rollouts_go_through_a_copy_that_follows_the_generator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copied: list[list[float]] = []
    gathered: list[Any] = []
    sharded: list[Any] = []

    def frozen(network: Any, config: dict[str, Any]) -> Any:
        sharded.append((network, config))
        return network

    def copy(engine: Any, target: PlainNetwork) -> None:
        target.load_state_dict(engine.module.state_dict())
        copied.append(target.factors.tolist())

    monkeypatch.setattr(module, "_empty_copy", lambda *_: PlainNetwork().requires_grad_(False))
    monkeypatch.setattr(module, "copy_weights", copy)
    monkeypatch.setattr(module, "shard_frozen", frozen)
    monkeypatch.setattr(module, "gather_by_block", lambda network, _: gathered.append(network))
    here = setting("distill", generator_every=2, learning_rate=1e-2, keep_products=3)
    here.config.compute.zero_stage = 3
    training = make(here)
    for step in range(5):
        before = training.generator.module.factors.tolist()
        training.passed.calls.clear()
        training.step(batch(step), here.draw(step, 0))
        assert training.passed.factors.tolist() == before
        assert training.passed.calls
    # The generator's gradient, like the critic's, passes each block once.
    assert not training.generator.module.recompute_attention
    assert gathered == [training.generator.module, training.critic.module]
    assert training.passed.sequence is here.sequence  # told as the generator was, as
    assert training.passed.keep_products == 3  # the ranks that share a clip must all be
    config = deepspeed_config(here.config.compute, here.section)
    assert sharded == [(training.real, config)]  # the critic has an engine of its own
    assert len(copied) == 3  # at first, and after the updates of steps 0 and 2

    here.section.rollout_copy = False
    here.section.batch_size = 2  # of clips that pass them one by one
    training = make(here)
    training.step(batch(0), here.draw(0, 0))
    assert len(copied) == 3
    assert gathered[2:] == [training.critic.module]
    assert [network for network, _ in sharded[1:]] == [training.real]  # whole nowhere
    assert training.generator.module.recompute_attention


def test_what_rollouts_go_through_is_a_copy_in_shape_that_never_learns() -> None:
    here = setting("distill")
    here.config.compute.precision = "bf16"
    made = module._empty_copy(here, model(PlainNetwork()))
    with torch.device("meta"):
        alike = Transformer(CONFIG.transformer).state_dict()
    assert {n: p.shape for n, p in made.state_dict().items()} == {
        n: p.shape for n, p in alike.items()
    }
    assert {(p.device, p.dtype, p.requires_grad) for p in made.parameters()} == {
        (here.device, torch.bfloat16, False)
    }
    assert not made.training


def test_fast_rollouts_take_up_each_update_before_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = setting("distill", generator_every=2, learning_rate=1e-2)
    training = make(here)
    factors = training.generator.module.factors
    events: list[str] = []
    taken: list[list[float]] = []

    def renew() -> None:
        events.append("renew")
        taken.append(factors.tolist())

    def rolled(*given: Any, forwards: Any, **named: Any) -> Any:
        assert forwards is training.forwards
        assert taken[-1] == factors.tolist(), "of the weights before"
        events.append("rollout")
        return rollout(*given, forwards=None, **named)

    monkeypatch.setattr(module, "rollout", rolled)
    training.forwards = SimpleNamespace(renew=renew)  # type: ignore[assignment]
    for step in range(5):
        training.step(batch(step), here.draw(step, 0))
    training.judge(batch(), here.draw(9, 0))
    # Updates end steps 0, 2 and 4; what nothing has changed is not taken up again.
    taken_up = {0, 1, 3, 5}
    wanted = [["renew"] * (n in taken_up) + ["rollout"] for n in range(6)]
    assert events == [event for turn in wanted for event in turn]


def test_what_a_step_computes_is_counted() -> None:
    """Two chunks, which see 3 and 6 latents, in as many steps as the rollout has, a refresh of the
    first, and the scores over the whole clip; a generator's step costs its backward pass and three
    scores more."""
    training = make(setting("distill", generator_every=2))
    count = partial(forward_flops, CONFIG.transformer, height=HEIGHT, width=WIDTH)
    first, second = (count(frames=3, pairs=3 * seen) for seen in (3, 6))
    whole = count(frames=FRAMES, pairs=FRAMES**2)
    for step in range(4):
        steps = exit_step(0, step, 4) + 1
        wanted = steps * (first + second) + first + 3 * whole
        if step % 2 == 0:
            wanted += 2 * (first + second) + 3 * whole
        assert training.flops(batch(), step) == pytest.approx(CLIPS * wanted)


def test_the_average_is_what_is_exported() -> None:
    here = setting("distill", generator_every=1, learning_rate=0.05, ema_decay=0.25, warmup_steps=0)
    training = make(here)
    average = torch.tensor(GENERATOR, dtype=torch.float64)
    for step in range(4):
        training.step(batch(step), here.draw(step, 0))
        decay = min(0.25, (2 + step) / (11 + step))  # 2/11, 3/12, then as configured
        average = decay * average + (1 - decay) * training.generator.module.factors.double()
    made = training.export()
    assert made.transformer is not None
    torch.testing.assert_close(made.transformer["factors"].double(), average, atol=1e-6, rtol=0)
    assert (made.transformer["factors"] - training.generator.module.factors).abs().max() > 1e-3
    assert made.card == {"weights": "average of the generator, decay 0.25"}
    assert training.ema is training.average


def test_the_average_moves_with_updates_not_with_batches() -> None:
    here = setting("distill", generator_every=1, grad_accumulation=2)
    training = make(here)
    metrics = [training.step(batch(micro), here.draw(0, micro)) for micro in range(2)]
    assert training.average.updates == 1
    norms = {"grad_norm", "critic_grad_norm"}
    assert [norms & set(found) for found in metrics] == [set(), norms]


def test_a_rank_that_writes_nothing_holds_nothing() -> None:
    assert make(setting("distill", 1, 2)).export().transformer == {}


def test_networks_and_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(path: Any, **options: Any) -> Any:
        asked.append((path, options["device"], options["dtype"]))
        return SimpleNamespace(transformer=PlainNetwork(*TEACHER), config=CONFIG)

    monkeypatch.setattr(module, "load_model", load)
    here = setting("distill", learning_rate=1e-3, critic_learning_rate=2e-4)
    here.config.compute.activation_checkpointing = True
    here.config.compute.precision = "bf16"
    generator = PlainNetwork(*GENERATOR)
    training = DistillTraining(here, model(generator))
    assert training.generator.module is generator
    assert training.engines == {"generator": training.generator, "critic": training.critic}
    assert (training.generator.rate, training.critic.rate) == (1e-3, 2e-4)
    assert training.learning_rates == {"generator": 1e-3, "critic": 2e-4}
    assert training.critic.module is not training.real  # it learns, the teacher does not
    assert torch.equal(training.critic.module.factors, training.real.factors)
    assert generator.gradient_checkpointing
    assert training.critic.module.gradient_checkpointing
    assert asked == [(here.job.models["teacher"], here.device, torch.bfloat16)] * 2


def test_a_teacher_is_needed_and_must_be_one(monkeypatch: pytest.MonkeyPatch) -> None:
    here = setting("distill")
    here.job.models.pop("teacher")  # type: ignore[attr-defined]
    with pytest.raises(ModelError, match=r"needs the foundation model .* models=\{'teacher'"):
        make(here)
    monkeypatch.setattr(
        module, "load_model", lambda *_, **__: SimpleNamespace(transformer=None, config=CONFIG)
    )
    with pytest.raises(ModelError, match=r"teacher nowhere holds no transformer; give a"):
        make(setting("distill"))


def test_a_teacher_may_be_larger_and_must_know_the_same_latents(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def taught_by(vae: VaeConfig = CONFIG.vae, **sizes: int) -> DistillTraining:
        teacher = replace(CONFIG, transformer=replace(CONFIG.transformer, **sizes), vae=vae)
        given = SimpleNamespace(transformer=PlainNetwork(*TEACHER), config=teacher)
        monkeypatch.setattr(module, "load_model", lambda *_, **__: given)
        return DistillTraining(setting("distill"), model(PlainNetwork(*GENERATOR)))

    alike, larger = taught_by(), taught_by(num_layers=8)
    assert larger.flops(batch(), 0) > alike.flops(batch(), 0)  # of scores and critic
    with pytest.raises(ModelError, match="has source_channels 0, its student 16; give a teacher"):
        taught_by(source_channels=0)
    for name in ("mean", "std"):
        other = replace(CONFIG.vae, **{name: (0.5,) * CONFIG.vae.latent_channels})
        with pytest.raises(
            ModelError, match=rf"another VAE \(its vae.{name} is \(0.5, .*student's"
        ):
            taught_by(other)


def test_a_model_without_its_mask_cache() -> None:
    """Rollouts prune as the stream will, unless told not to."""
    pruned = replace(CONFIG, stream=replace(CONFIG.stream, mask_cache=MaskCacheConfig()))
    for wanted in (True, False):
        here = setting("distill", mask_cache=wanted)
        given = Model(pruned, PlainNetwork(*GENERATOR), None, {}, None)  # type: ignore[arg-type]
        assert (DistillTraining(here, given).stream.mask_cache is not None) is wanted


@pytest.mark.parametrize("history", ["own", "truth"])
def test_whose_history_a_rollout_is_trained_on(
    monkeypatch: pytest.MonkeyPatch, history: str
) -> None:
    """Judged it is by what a stream will do, whose past is its own."""
    truths: list[Any] = []

    def rolled(*given: Any, truth: Any, **named: Any) -> Any:
        truths.append(truth)
        return rollout(*given, truth=truth, **named)

    monkeypatch.setattr(module, "rollout", rolled)
    here = setting("distill", history=history)
    training, given = make(here), batch()
    training.step(given, here.draw(0, 0))
    training.judge(given, here.draw(0, 0))
    trained, judged = truths
    assert judged is None
    assert trained is None if history == "own" else torch.equal(trained, given["target"])

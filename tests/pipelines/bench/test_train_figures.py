"""What the training benchmark makes of what was timed, and of workers that it kills; by hand."""

from __future__ import annotations

from pathlib import Path

import torch

from modeling.model_dir import load_model
from pipelines.bench.drawn import draw_model
from pipelines.bench.train import TrainOptions, ratios, summary, together
from pipelines.bench.training_worker import TrainCase
from pipelines.config.load import load_config

SMALL = ["model.preset=demo", "data.footage=null", "data.frames=21", "model.stream.height=32",
         "model.stream.width=48", "vae.crop=32"]  # fmt: skip


def test_ratios_are_of_one_run() -> None:
    cases = [
        {"name": TrainCase(*case).name, "stage": case[0], "workers": case[1], "zero": case[2],
         "out_of_memory": False, "seconds": seconds, "tflops": 100.0 / seconds}
        for case, seconds in (
            (("causal", 1, 2), 2.0), (("causal", 4, 2), 2.5), (("causal", 4, 3), 4.0),
        )
    ]  # fmt: skip
    found = ratios({"yardstick": {"tflops": 800.0}, "cases": cases})
    assert {name: entry["value"] for name, entry in found.items()} == {
        "causal, 1 workers, ZeRO-2 / matrix products": 16.0,
        "causal, 4 workers, ZeRO-2 / matrix products": 20.0,
        "causal, 4 workers, ZeRO-2 / 1 workers": 1.25,
        "causal, 4 workers, ZeRO-3 / matrix products": 32.0,
    }


def test_a_case_without_room_has_no_figures_and_no_ratios() -> None:
    case = {"stage": "distill", "workers": 2, "zero": 2}
    row = summary(case | {"out_of_memory": True})
    assert row == case | {"out_of_memory": True, "name": "distill, 2 workers, ZeRO-2"}
    assert ratios({"yardstick": {"tflops": 1.0}, "cases": [row]}) == {}


def test_what_shares_processes() -> None:
    """ZeRO-3 keeps its memory, so nothing may come after it in the same process."""
    cases = [TrainCase("causal", workers, zero) for workers in (1, 2) for zero in (1, 2, 3, 2)]
    groups = []
    while cases:
        groups.append(together(cases))
        cases = cases[len(groups[-1]) :]
    assert [[(c.workers, c.zero) for c in group] for group in groups] == [
        [(1, 1), (1, 2)], [(1, 3)], [(1, 2)], [(2, 1), (2, 2)], [(2, 3)], [(2, 2)],
    ]  # fmt: skip


def test_drawn_weights_are_not_zero(tmp_path: Path) -> None:
    config = load_config("demo", SMALL).model.resolve()
    draw_model(tmp_path / "model", config, torch.device("cpu"))
    network = load_model(tmp_path / "model").transformer
    assert network is not None
    biases = [name for name, p in network.named_parameters() if not p.any()]
    assert all(name.endswith(".bias") for name in biases)


def test_a_case_saves_nothing_in_all_its_steps() -> None:
    config = load_config("demo", ["compute.zero_stage=2"])
    prepared = TrainOptions(config, False, ("causal",), (1,), (2,), steps=4).prepared()
    for stage in ("foundation", "causal", "distill"):
        section = getattr(prepared, stage)
        assert (section.steps, section.log_every) == (6, 1)
        assert section.checkpoint_every > section.steps
        assert section.checkpoint_minutes == 0

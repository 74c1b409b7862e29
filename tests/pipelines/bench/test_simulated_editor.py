"""A simulated editor: what its chunks cost, and when it decides."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from serve.admission.ladder import OVER_S
from serve.admission.rungs import Means, Rung
from tests.pipelines.bench.test_day_figures import WORK, device
from tests.pipelines.bench.test_simulation import DAY, client


def test_an_editor_costs_on_every_rung_what_was_measured_of_it() -> None:
    rungs = {Rung("full", WORK): 1.0, Rung("steps", (32, 48), True, True): 0.25}
    day = replace(DAY, rungs=rungs)
    made = device(day, [5.0])
    made.loading = "v2"
    made.learn("v2")
    wanted = {
        replace(day.sizes.at(rung), model="v2"): part * day.cost_s for rung, part in rungs.items()
    }
    assert made.capacity.costs == made.capacity.warm == wanted
    assert made.capacity.costs is not made.capacity.warm
    assert made.loading == ""
    assert made.capacity.models["v2"].chunk_frames == 12
    assert (made.means, device(day, [0.0], degrade=False).means) == (Means(steps=4), None)
    one = client(0, 0.0)
    made.clients = {"0.0": one}
    made.capacity.rung = {"0.0": Rung("steps", (32, 48), True, True)}.__getitem__  # type: ignore[method-assign]
    assert made._cost(one) == 0.25 * one.cost_s
    assert made._load() == pytest.approx(0.25 * one.cost_s * 16 / 12)
    made.capacity.rung = {"0.0": Rung("slowed", WORK)}.__getitem__  # type: ignore[method-assign]
    one.cost_s = 0.75
    assert made._load() == pytest.approx(0.75 / 5)  # a chunk in five seconds, when others go first


@pytest.mark.parametrize(
    ("lowered", "since", "over", "again"),
    [
        (False, 90.0, None, math.inf),
        (True, 90.0, None, 120.0),  # when it has been calm for long enough
        (True, 70.0, None, math.inf),  # it has been: nothing changes by waiting
        (False, 90.0, 99.0, 99.0 + OVER_S),
        (True, 90.0, 99.0, min(120.0, 99.0 + OVER_S)),
        (True, 75.0, 110.0, min(105.0, 110.0 + OVER_S)),
    ],
)
def test_an_editor_decides_by_what_chunks_really_cost_and_says_when_again(
    lowered: bool, since: float, over: float | None, again: float
) -> None:
    made, one = device(DAY, [100.0]), client(0, 0.0)
    load = SimpleNamespace(cost=0.0)
    calm = SimpleNamespace(since=since, up_s=30.0, over=over)

    def decide() -> Any:
        assert load.cost == one.cost_s
        return SimpleNamespace(calm=calm, rungs={"0.0": lowered}, close="0.0")

    capacity: Any = SimpleNamespace(
        loads={"0.0": load}, decide=decide, rung=lambda stream: Rung("full", WORK)
    )
    made.clients, made.capacity = {"0.0": one}, capacity
    assert made.decide() == ("0.0", again)

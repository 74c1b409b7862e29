from __future__ import annotations

import math

import pytest

from pipelines.exits import exit_code
from pipelines.stages.running.gate import GateMissedError, check_gate, missed

METRICS = {"loss": 0.25, "psnr": 20.0, "broken": math.nan}


@pytest.mark.parametrize(
    ("gate", "reasons"),
    [
        ({}, []),
        ({"max_loss": 0.25, "min_psnr": 20.0}, []),  # on the bound
        ({"max_loss": 0.2499}, ["loss 0.25 is above vae.gate.max_loss=0.2499"]),
        ({"min_psnr": 20.01}, ["psnr 20 is below vae.gate.min_psnr=20.01"]),
        ({"max_psnr": 19, "min_loss": 1}, ["psnr 20 is above vae.gate.max_psnr=19",
                                          "loss 0.25 is below vae.gate.min_loss=1"]),
        ({"max_broken": 9}, ["broken nan is above vae.gate.max_broken=9"]),
        ({"min_broken": -9}, ["broken nan is below vae.gate.min_broken=-9"]),
        ({"min_gain": 1}, ["gain was not measured, for vae.gate.min_gain=1"]),
    ],
)  # fmt: skip
def test_what_keeps_no_gate(gate: dict[str, float], reasons: list[str]) -> None:
    assert missed("vae", METRICS, gate) == reasons


def test_a_missed_gate_says_what_is_kept_and_has_a_code_of_its_own() -> None:
    check_gate("vae", "runs/models/vae", METRICS, {"max_loss": 1})
    with pytest.raises(GateMissedError) as stopped:
        check_gate("vae", "runs/models/vae", METRICS, {"max_loss": 0.1})
    assert "loss 0.25 is above vae.gate.max_loss=0.1. The stage is finished and kept in " in str(
        stopped.value
    )
    assert exit_code(stopped.value) == 3

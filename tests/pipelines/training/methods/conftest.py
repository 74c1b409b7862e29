"""Networks of known factors in the places of distillation's."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from pipelines.training.methods import base
from pipelines.training.methods import distill as module
from tests.pipelines.training.methods.factors import TEACHER
from tests.pipelines.training.plain import (
    CONFIG,
    PlainNetwork,
    use_plain_engines,
)


@pytest.fixture
def distill_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    use_plain_engines(monkeypatch)
    # However long a busy machine takes to begin: there is no folder to say it in.
    monkeypatch.setattr(base, "_LONG_SECONDS", math.inf)
    monkeypatch.setattr(
        module,
        "load_model",
        lambda *_, **__: SimpleNamespace(transformer=PlainNetwork(*TEACHER), config=CONFIG),
    )

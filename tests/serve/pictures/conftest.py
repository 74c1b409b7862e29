"""One server of two models whose answers are known, for every file here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.known_editors import (
    TURNED,
    write_known_model,
)
from tests.serve.conftest import Server, serving


@pytest.fixture(scope="package")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("model")
    model = write_known_model(folder / "known")
    turned = write_known_model(folder / "turned", name="turned", paints=TURNED)
    both = (str(model), str(turned))
    with serving(model, models=both, work_size="full", detail="off") as running:
        yield running

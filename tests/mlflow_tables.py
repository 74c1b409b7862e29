"""MLflow's tables, which take seconds to make: once for all workers, then copied."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from infra.runtime.registry import client_for


def made_tables(factory: pytest.TempPathFactory) -> Path:
    """An empty database of a registry, to be copied and not to be opened."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    with (folder / "mlflow.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (path := folder / "migrated.db").exists():
            client_for(f"sqlite:///{folder / 'made.db'}")
            (folder / "made.db").rename(path)
    return path

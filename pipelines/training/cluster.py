"""One Ray for a whole pipeline: a private one, or a given cluster."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from infra.runtime.ray import joined_ray, private_ray
from pipelines.config.stages import ComputeConfig

OBJECT_STORE_BYTES = 256 << 20  # training hands over paths, not objects


@contextmanager
def ray_session(compute: ComputeConfig) -> Iterator[None]:
    """Ray for the training processes of `compute`. Raises ClusterError."""
    if compute.address is not None:
        with joined_ray(compute.address, "compute.address"):
            yield
        return
    cpus = max(os.cpu_count() or 1, compute.workers or 2)
    with private_ray(cpus, object_store_memory=OBJECT_STORE_BYTES):
        yield

"""Fixtures of the servers' tests."""

from tests.pipelines.conftest import tiny_config, tiny_model
from tests.serve.conftest import anyio_backend, small_model

__all__ = ["anyio_backend", "small_model", "tiny_config", "tiny_model"]

"""Fixtures of the servers' tests."""

from tests.serve.conftest import anyio_backend, small_model

__all__ = ["anyio_backend", "small_model"]

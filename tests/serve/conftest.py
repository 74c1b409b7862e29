"""A real server: a front on a port of its own with a real editor (demo preset, random weights)."""

from __future__ import annotations

import asyncio
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn

from serve.front.front import Front
from serve.limits import Limits
from serve.settings import ServeSettings
from tests.mlflow_tables import made_tables
from tests.serve.local import local_front
from tests.serve.models import save_small_model
from tests.serve.registry import Registry


class Server:
    """A front in a thread of its own; `call` runs a coroutine on its event loop."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        listener = socket.socket()
        # Small, so that a client that does not read is felt after a few frames.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        self.port = listener.getsockname()[1]
        self.url = f"ws://127.0.0.1:{self.port}"
        self.http = f"http://127.0.0.1:{self.port}"
        self._listener = listener
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()
        assert self._ready.wait(60)

    def _main(self) -> None:
        with suppress(asyncio.CancelledError):
            asyncio.run(self._serve())

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.front: Front = await local_front(self.settings)
        config = uvicorn.Config(
            self.front.app, log_level="warning", ws_per_message_deflate=False, lifespan="off"
        )
        server, self._serving = uvicorn.Server(config), asyncio.current_task()
        self._ready.set()
        try:
            await server.serve(sockets=[self._listener])
        finally:
            self._listener.close()
            for connection in list(server.server_state.connections):
                connection.transport.abort()

    @property
    def engine(self) -> Any:
        """Of its first model."""
        backend: Any = self.front.services.backend
        return next(iter(backend.engines.values()))

    def call(self, function: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self.loop).result(10)

    def stop(self) -> None:
        """At once: uvicorn's own end looks ten times a second. A front's is `Front.stop`."""
        self.loop.call_soon_threadsafe(self._serving.cancel)
        self._thread.join(20)


@contextmanager
def serving(model: Path, limits: Limits | None = None, **settings: Any) -> Iterator[Server]:
    torch.set_num_threads(1)
    limits = limits or Limits(resume_s=20.0)
    chosen = ServeSettings(model=str(model), measured_capacity=False, limits=limits)
    if settings.get("models"):  # which has `model` among them, or not
        settings["model"] = None
    running = Server(replace(chosen, **settings))
    try:
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    card = {"name": "small", "words": ["make", "it", "red", "blue"]}
    return save_small_model(tmp_path_factory.mktemp("model") / "small", card=card)


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    folder = tmp_path_factory.mktemp("registry")
    shutil.copy(made_tables(tmp_path_factory), folder / "mlflow.db")
    return Registry(folder)


@pytest.fixture(scope="session")
def server(small_model: Path) -> Iterator[Server]:
    """One server for the tests that only talk to it."""
    with serving(small_model) as running:
        yield running


def clip(frames: int, *, width: int = 48, height: int = 32, seed: int = 0) -> np.ndarray:
    """uint8 [frames, height, width, 3]: a gradient with a square that moves."""
    random = np.random.default_rng(seed)
    colour = random.integers(100, 255, 3)
    out = np.zeros((frames, height, width, 3), np.uint8)
    out[..., 0] = np.linspace(0, 200, width).astype(np.uint8)
    for n in range(frames):
        x = n % max(1, width - 8)
        out[n, 8:16, x : x + 8] = colour
    return out

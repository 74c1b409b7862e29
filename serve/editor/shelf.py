"""The models that one editor holds: loaded beside running sessions, and let go of again."""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from functools import partial
from typing import Any

import torch

from modeling.editor import StreamingEditor
from modeling.model_dir import Model, load_model
from serve.admission.admission import Editor, Sizes
from serve.admission.rungs import LOSSLESS_PATIENCE
from serve.editor.accelerator import Accelerator
from serve.editor.engine import ROLLING, Engine
from serve.metrics import EditorMetrics
from serve.versions.source import ModelSource
from serve.wire.protocol import RETRY_AFTER_S, WireError
from serve.wire.work import EditorEvent, Opening, Take

log = logging.getLogger(__name__)

TICK_S = 0.05


class Shelf:
    """Implements `work.Backend` on the models that are here and warm.

    Args:
        usual: Sizes that streams of a model start quickly with, beside its own.
        tell: Hears what takes its time before the first model is there.
    """

    def __init__(
        self,
        on: Accelerator,
        *,
        device: str = "cpu",
        fp8: bool = False,
        usual: Callable[[ModelSource], Iterable[Sizes]] = lambda source: (),
        tell: Callable[[str], None] = lambda doing: None,
    ) -> None:
        self.on, self.device, self.fp8 = on, device, fp8
        self.engines: dict[str, Engine] = {}
        self.failed: dict[str, str] = {}  # why a version could not be loaded here
        self.loading = ""  # key of the version that is being taken in
        self._usual, self._tell = usual, tell
        self._leaving: dict[str, Engine] = {}
        self._left = False
        self._tasks: set[asyncio.Future[None]] = set()

    # --- what is here

    def edit(self, opening: Opening, take: Take) -> AsyncGenerator[EditorEvent]:
        """See `work.Backend.edit`."""
        engine = self.engines.get(opening.version)
        if engine is None:
            raise WireError(
                "at_capacity", f"{opening.version} is not here (any more)", RETRY_AFTER_S
            )
        return engine.edit(opening, take)

    def describe(self) -> dict[str, dict[str, Any]]:
        """By key, what `/v1/models` says of it."""
        return {key: engine.describe() for key, engine in self.engines.items()}

    def known(self, name: str) -> Editor:
        """What placement knows of this editor, called `name` there."""
        return self.on.capacity.known(name, self.loading)

    def gauge(self, metrics: EditorMetrics) -> None:
        """The dearest model's chunk stands for all."""
        costs = [engine.chunk_s for engine in self.engines.values()]
        self.on.gauge(metrics, max(costs, default=0.0))

    def leave(self) -> None:
        """From now on every session is given back at its next chunk."""
        self._left = True
        for engine in self.engines.values():
            engine.leave()

    # --- what comes and goes

    def put(self, source: ModelSource) -> None:
        """Before any session: load and warm up, on this thread. Raises what goes wrong."""
        source.check()
        self._tell(f"loading weights of {source.label}")
        model = load_model(source.directory, device="cpu", dtype=self._dtype)
        engine = self._engine(source, model)
        seconds = engine.warm_up(self._usual(source), self._tell)
        self.engines[source.key] = engine
        log.info("%s on %s: a chunk costs %.0f ms", source.key, self.device, seconds * 1000)

    def order(self, load: ModelSource | None, drop: Iterable[str]) -> None:
        """Take `load` in beside what is here, after `drop` is let go of; returns at once."""
        gone = [self.engines.pop(key) for key in drop if key in self.engines]
        for engine in gone:
            self.on.capacity.models.pop(engine.key, None)
            self._leaving[engine.key] = engine
            engine.leave(ROLLING)
            self._start(self._let_go(engine))
        new = load is not None and load.key not in self.engines
        if load is not None and new and not self.loading and not self._left:
            self.loading = load.key
            self.failed.pop(load.key, None)
            self._start(self._take_in(load))

    async def _take_in(self, source: ModelSource) -> None:
        began = time.monotonic()
        log.info("loading %s beside %s", source.key, ", ".join(self.engines) or "nothing")
        try:
            while self._leaving:  # its memory may be what there is for this one
                await asyncio.sleep(TICK_S)
            await asyncio.to_thread(source.check)
            model = await asyncio.to_thread(
                load_model, source.directory, device="cpu", dtype=self._dtype
            )
            engine = await self._beside(partial(self._engine, source, model))
            steps = self.on.capacity.warm_up(engine.editor, source.key, self._usual(source))
            while await self._beside(lambda: next(steps, self)) is not self:
                pass  # a chunk at a time, so that sessions' chunks come between
            self.engines[source.key] = engine
            log.info("%s is warm after %.0f s", source.key, time.monotonic() - began)
        except Exception as error:  # whatever its files or its networks raise: it is not taken
            self.on.capacity.forget(source.key)
            self.failed[source.key] = f"{type(error).__name__}: {error}"
            log.exception("%s could not be loaded", source.key)
            if isinstance(error, torch.AcceleratorError):
                self.on.broken = str(error)
        finally:
            self.loading = ""

    async def _let_go(self, engine: Engine) -> None:
        try:
            while engine.sessions:
                await asyncio.sleep(TICK_S)
            self.on.capacity.forget(engine.key)
            log.info("%s is let go of", engine.key)
        finally:
            del self._leaving[engine.key]
        del engine
        await self._beside(_free)

    async def _beside(self, function: Callable[[], Any]) -> Any:
        """On the accelerator, whose sessions come first."""
        due = time.monotonic() + LOSSLESS_PATIENCE
        return (await self.on.scheduler.run(function, due=due)).value

    def _engine(self, source: ModelSource, model: Model) -> Engine:
        for network in (model.transformer, model.vae):
            if network is not None:
                network.to(self.device)
        self._tell(f"compiling kernels for {source.label}")
        editor = StreamingEditor(
            model, mask_cache=model.config.stream.mask_cache, name=source.name, fp8=self.fp8
        )
        return Engine(editor, source.key, self.on)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.float32 if torch.device(self.device).type == "cpu" else torch.bfloat16

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _free() -> None:
    """The memory of networks that nobody has any more, back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""Models that come and go beside running sessions, on one accelerator."""

from __future__ import annotations

import asyncio
import json
import time
import weakref
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from infra.runtime.errors import UserError
from modeling.editor import StreamingEditor
from modeling.model_dir import Model, load_model
from serve.admission.admission import Sizes, Warm
from serve.admission.rungs import LOSSLESS_PATIENCE
from serve.editor import shelf as shelf_module
from serve.editor.accelerator import Accelerator
from serve.editor.capacity import Capacity, native
from serve.editor.shelf import Shelf
from serve.metrics import EditorMetrics
from serve.versions.source import ModelSource
from serve.wire.protocol import WireError
from serve.wire.work import Edited, Moved, Opening, Ready, Work
from tests.known_editors import TOLERANCE, TURNED, block_clip, expected_edit, write_known_model
from tests.serve.editor.works import following, together

pytestmark = pytest.mark.anyio

WARM = Warm(12)
SOURCE = block_clip(33, 32, 48)
OPENING = Opening("s", "red", 48, 32, 16.0, "lossless", seed=1)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[ModelSource]:
    folder = tmp_path_factory.mktemp("models")
    return [
        ModelSource(str(write_known_model(folder / "red", height=32, width=48))),
        ModelSource(str(write_known_model(folder / "blue", paints=TURNED, height=32, width=48))),
    ]


@pytest.fixture
async def shelf(sources: list[ModelSource]) -> AsyncIterator[Shelf]:
    torch.set_num_threads(1)
    made = Shelf(Accelerator())
    made.put(sources[0])
    yield made
    made.on.scheduler.stop()


async def edited(shelf: Shelf, opening: Opening, first: int, last: int, number: int) -> np.ndarray:
    """A stream of one chunk, which is its last."""
    frames = SOURCE[first:last]

    async def take() -> Work:
        return Work(number, opening.prompt, frames, last=True)

    async with aclosing(shelf.edit(opening, take)) as events:
        ready, made = [event async for event in together(events)]
    assert isinstance(ready, Ready)
    return made.frames


async def until_loaded(shelf: Shelf) -> None:
    async with asyncio.timeout(60):
        while shelf.loading:
            await asyncio.sleep(0.01)


def assert_is(frames: np.ndarray, colour: str, first: int = 0) -> None:
    wanted = expected_edit(SOURCE, colour)[first : first + len(frames)]
    assert np.abs(frames.astype(int) - wanted).max() <= TOLERANCE


async def test_a_model_is_taken_in_beside_a_session_which_then_goes_on_with_it(
    shelf: Shelf, sources: list[ModelSource]
) -> None:
    one, two = (replace(OPENING, version=source.key) for source in sources)
    works: asyncio.Queue[Work] = asyncio.Queue()
    works.put_nowait(Work(0, "red", SOURCE[:9], last=False))
    async with aclosing(shelf.edit(one, works.get)) as events:
        await anext(events)
        shelf.order(sources[1], ())
        assert shelf.known("e").loading == two.version
        assert shelf.known("e").models == {one.version: WARM}
        first = await following(events)
        with pytest.raises(WireError, match="not here") as raised:  # until it is warm
            await edited(shelf, two, 0, 9, 0)
        assert raised.value.code == "at_capacity"
        await until_loaded(shelf)
        assert shelf.known("e").models == {one.version: WARM, two.version: WARM}
        native = Sizes((32, 48), (32, 48))
        assert {replace(native, model=s.key) for s in sources} <= shelf.on.capacity.costs.keys()
        # The old one goes: its session is given back, and edited on by the new one.
        shelf.order(None, [one.version])
        assert shelf.known("e").models == {two.version: WARM}  # nobody else may have it
        await asyncio.sleep(0.1)
        assert shelf.on.capacity.costs.keys() >= {replace(native, model=one.version)}  # it has one
        moved = await following(events)
    assert isinstance(first, Edited)
    assert_is(first.frames, "red")
    assert isinstance(moved, Moved)
    assert moved.why == "rolling"
    async with asyncio.timeout(10):
        while shelf.on.capacity.costs.keys() & {replace(native, model=one.version)}:
            await asyncio.sleep(0.01)
    assert shelf.known("e").models == {two.version: WARM}
    assert list(shelf.describe()) == [two.version]
    state = moved.state.completed(first.state)
    assert_is(await edited(shelf, replace(two, state=state), 9, 21, 1), "blue", 9)


async def test_the_dearest_model_stands_for_what_a_chunk_costs(shelf: Shelf) -> None:
    (engine,) = shelf.engines.values()
    other: Any = SimpleNamespace(chunk_s=2 * engine.chunk_s)
    for engines, seconds in (
        ([], 0.0), ([engine], engine.chunk_s), ([engine, other], other.chunk_s),
    ):  # fmt: skip
        shelf.engines = {str(n): each for n, each in enumerate(engines)}
        metrics = EditorMetrics()
        shelf.gauge(metrics)
        found = metrics.registry.get_sample_value("liveedit_editor_chunk_seconds")
        assert found == pytest.approx(seconds)


@pytest.mark.parametrize("how", ["files", "networks"])
async def test_a_model_that_does_not_load_is_none(
    shelf: Shelf, sources: list[ModelSource], tmp_path: Path, how: str
) -> None:
    broken = write_known_model(tmp_path / "broken", height=32, width=48)
    if how == "files":
        (broken / "vae.safetensors").write_bytes(b"")
    else:  # its warm-up fails: a text encoder whose files are not there
        config = (broken / "config.json").read_text()
        (broken / "config.json").write_text(config.replace('"words"', '"umt5"'))
    source = ModelSource(str(broken))
    shelf.order(source, ())
    await until_loaded(shelf)
    assert shelf.failed.keys() == {source.key}
    assert shelf.known("e").models == {sources[0].key: WARM}
    assert_is(await edited(shelf, replace(OPENING, version=sources[0].key), 0, 9, 0), "red")
    write_known_model(broken, height=32, width=48)  # mended, and ordered again
    shelf.order(source, ())
    await until_loaded(shelf)
    assert shelf.failed == {}
    assert_is(await edited(shelf, replace(OPENING, version=source.key), 0, 9, 0), "red")


async def test_of_a_model_that_failed_half_way_nothing_is_known(
    shelf: Shelf, sources: list[ModelSource]
) -> None:
    """Its own size was measured before one that it cannot do."""
    shelf._usual = lambda source: [Sizes((8, 8), (8, 8), model=source.key)]
    shelf.order(sources[1], ())
    await until_loaded(shelf)
    assert shelf.failed.keys() == {sources[1].key}
    for known in (shelf.on.capacity.costs, shelf.on.capacity.warm):
        assert {sizes.model for sizes in known} == {sources[0].key}


async def test_an_editor_that_leaves_takes_nothing_in(
    shelf: Shelf, sources: list[ModelSource]
) -> None:
    shelf.leave()
    shelf.order(sources[1], ())
    assert shelf.loading == ""
    (engine,) = shelf.engines.values()
    assert (engine._leaving.is_set(), engine._why) == (True, "drain")  # and gives back what it has


async def test_what_is_done_beside_sessions_waits_for_their_chunks(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    dues, run = list[float](), shelf.on.scheduler.run

    def noted(function: Any, *, due: float) -> Any:
        dues.append(due - time.monotonic())
        return run(function, due=due)

    monkeypatch.setattr(shelf.on.scheduler, "run", noted)
    assert await shelf._beside(lambda: 7) == 7
    assert dues == [pytest.approx(LOSSLESS_PATIENCE, abs=1.0)]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The directories that are read, in order; nothing that is read is warmed up."""
    monkeypatch.setattr("serve.editor.shelf.TICK_S", 0.002)
    read = list[str]()

    def warm_up(
        self: Capacity, editor: StreamingEditor, model: str, sizes: Iterable[Sizes] = (), *_: Any
    ) -> Iterator[None]:
        self.costs |= dict.fromkeys([native(editor, model), *sizes], 0.1)
        self.models = {**self.models, model: WARM}
        yield

    def load(directory: str, **options: Any) -> Model:
        read.append(directory)
        return load_model(directory, **options)

    monkeypatch.setattr("serve.editor.shelf.load_model", load)
    monkeypatch.setattr(Capacity, "warm_up", warm_up)
    return read


@pytest.mark.parametrize(("device", "dtype"), [("cuda:1", torch.bfloat16), ("cpu", torch.float32)])
async def test_networks_are_read_in_the_precision_of_their_device(
    sources: list[ModelSource], monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype
) -> None:
    """The first as those that come later; by way of the CPU, which has more memory."""
    read = list[Any]()

    def load(directory: str, **options: Any) -> Model:
        read.append(options)
        raise OSError("they are not there")

    monkeypatch.setattr("serve.editor.shelf.load_model", load)
    made = Shelf(Accelerator(), device=device)
    with pytest.raises(OSError, match="not there"):
        made.put(sources[0])
    made.order(sources[1], ())
    await until_loaded(made)
    assert made.failed == {sources[1].key: "OSError: they are not there"}
    assert read == [{"device": "cpu", "dtype": dtype}] * 2
    made.on.scheduler.stop()


async def test_one_version_is_taken_in_after_another(
    loads: list[str], shelf: Shelf, sources: list[ModelSource]
) -> None:
    """The hub says it again every second for as long as it takes."""
    for source in (sources[1], ModelSource("demo"), sources[1], sources[0]):
        shelf.order(source, ())
        assert shelf.loading == sources[1].key
    await until_loaded(shelf)
    assert loads == [source.directory for source in sources]
    assert shelf.engines.keys() == {source.key for source in sources}
    shelf.order(sources[1], ())  # it is here
    assert shelf.loading == ""


async def test_what_comes_waits_for_the_memory_of_what_goes(
    loads: list[str], shelf: Shelf, sources: list[ModelSource]
) -> None:
    one = replace(OPENING, version=sources[0].key)
    async with aclosing(shelf.edit(one, asyncio.Event().wait)) as events:  # type: ignore[arg-type]
        await anext(events)
        shelf.order(sources[1], [one.version])
        await asyncio.sleep(0.05)
        assert (shelf.loading, loads) == (sources[1].key, [sources[0].directory])
        assert isinstance(await following(events), Moved)
    await until_loaded(shelf)
    assert loads == [source.directory for source in sources]
    assert shelf.engines.keys() == {sources[1].key}


async def test_what_goes_waits_for_its_own_sessions_only(
    loads: list[str],
    shelf: Shelf,
    sources: list[ModelSource],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Then its memory goes back to the device."""
    caplog.set_level("INFO")
    gone, freed, free = weakref.ref(shelf.engines[sources[0].key]), list[bool](), shelf_module._free

    def noted() -> None:
        free()
        freed.append(gone() is None)

    monkeypatch.setattr(shelf_module, "_free", noted)
    usual = Sizes((8, 8), (8, 8), model=sources[1].key)  # what is warmed up beside its own
    shelf._usual = lambda source: [replace(usual, model=source.key)]
    shelf.put(sources[1])
    assert usual in shelf.on.capacity.costs
    assert f"{sources[1].key} on cpu: a chunk costs 100 ms" in caplog.text
    two = replace(OPENING, version=sources[1].key)
    async with aclosing(shelf.edit(two, asyncio.Event().wait)) as events:  # type: ignore[arg-type]
        await anext(events)
        shelf.order(None, [sources[0].key])
        async with asyncio.timeout(20):
            while shelf._tasks:
                await asyncio.sleep(0.005)
        assert freed == [True]
        assert {sizes.model for sizes in shelf.on.capacity.costs} == {two.version}
        assert len(shelf.on.capacity.loads) == 1


async def test_what_a_version_fails_of_decides_what_is_broken(
    loads: list[str], shelf: Shelf, sources: list[ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that are not what was registered are the version's; a device's error is the editor's,
    which Serve then replaces."""
    changed = replace(sources[1], name="m version 2", fingerprint="0" * 64)
    shelf.order(changed, ())
    await until_loaded(shelf)
    assert "m version 2 is not what was registered" in shelf.failed["m version 2"]
    shelf.on.check()

    def engine(*_: Any) -> Any:
        raise torch.AcceleratorError("an illegal address")

    monkeypatch.setattr(shelf, "_engine", engine)
    shelf.order(sources[1], ())
    await until_loaded(shelf)
    assert shelf.failed.keys() == {"m version 2", sources[1].key}
    with pytest.raises(RuntimeError, match="the accelerator is broken: an illegal address"):
        shelf.on.check()


async def test_how_a_model_is_edited_with_comes_from_its_config_and_the_settings(
    sources: list[ModelSource], tmp_path: Path
) -> None:
    on = Accelerator()
    with pytest.raises(UserError, match="fp8 needs a GPU"):
        Shelf(on, fp8=True).put(sources[0])
    whole = write_known_model(tmp_path / "whole", height=32, width=48)
    config = json.loads((whole / "config.json").read_text())
    config["stream"]["mask_cache"] = None
    (whole / "config.json").write_text(json.dumps(config))
    made, kept = Shelf(on), []
    for source in (sources[0], ModelSource(str(whole))):
        version = replace(source, name=f"m version {len(kept)}")
        engine = made._engine(version, load_model(source.directory, device="cpu"))
        kept.append((engine.editor.mask_cache is not None, engine.editor.name, engine.key))
    assert kept == [(True, "m version 0", "m version 0"), (False, "m version 1", "m version 1")]
    on.scheduler.stop()

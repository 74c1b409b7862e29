"""The hub's own part: who reports, who is gone, who has to stop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray.exceptions import RayError

from infra.runtime.ray_private import Replica
from infra.runtime.registry import Pointed
from serve.admission.admission import Editor, Request, Seat, Sizes, Warm
from serve.admission.decisions import Scale
from serve.hub.hub import GONE_S, Hub, Orders, Report
from serve.hub.placement import DECIDE_S, Full, Placed, Placement, Waiting
from serve.hub.records import Commit, Entry, Header, Progress, Shape
from serve.limits import Limits
from serve.metrics import KEPT_APART, GoneProcesses, Metrics, render
from serve.settings import ServeSettings
from serve.versions.rolling import Version
from serve.versions.source import ModelSource, find_models
from serve.wire.split_state import HistoryPart, SplitState
from serve.wire.work import Opening, Ready

pytestmark = pytest.mark.anyio

SIZES = Sizes((32, 48), (32, 48))
HEADER = Header(Opening("s", "red", 48, 32, 16.0, "lossless"), "jpeg", Ready("m", 12, 9, 0))
SETTINGS = ServeSettings("demo", link_host="127.0.0.1", max_editors=3)
SHAPE = Shape(48, 32, "lossless", "jpeg")
PROGRESS = Progress(9, 9, "red", "red", SplitState(b"state"))
PARTS = [HistoryPart.of(b"chunk %d" % number) for number in range(4)]
MODEL = {"name": "m version 3", "width": 48}
SERVES = find_models(["demo", "natural"])


@pytest.fixture
async def actor() -> AsyncIterator[Hub]:
    made = Hub("app", SETTINGS, SERVES)
    yield made
    made._watching.cancel()
    made._following.cancel()


def report(process: str, model: dict[str, Any] | None = None) -> Report:
    metrics = Metrics()
    metrics.frames.labels("ours", "m").inc(len(process))
    metrics.first_chunk.observe(0.1)
    return Report(process, metrics.snapshot(), {} if model is None else {"demo": model})


async def test_models_are_counted_by_the_editors_that_hold_them(actor: Hub) -> None:
    assert await actor.models() == []  # nobody could edit
    for process, model in (("a", MODEL), ("b", MODEL), ("front", None)):
        await actor.report(report(process, model))
    await actor.report(report("a", MODEL))  # again: still one editor
    here, away = await actor.models()
    assert here == {"model": "demo", **MODEL, "editors": 2, "share": 1.0}
    assert (away["model"], away["name"], away["editors"]) == ("natural", "natural", 0)
    assert (away["width"], away["height"], away["steps"]) == (224, 128, 4)
    assert (away["device"], away["chunk_seconds"], away["card"]) == ("", 0.0, {})
    assert set(await actor.snapshots()) == {"a", "b", "front", "hub", "gone"}
    assert "editors" not in MODEL


async def test_versions_of_a_name_are_told_with_their_shares_which_make_one(actor: Hub) -> None:
    actor._catalog.point("demo", Version("new", (64, 96)), 0.25, None)
    actor._follower._told["new"] = {"name": "m version 4"}
    await actor.report(replace(report("a"), models={"demo": MODEL, "new": {"name": "m version 4"}}))
    for name in ("a", "b"):
        actor._placement.report(Editor(name, 12, 8, models={"demo": Warm(12), "new": Warm(12)}))
    told = {m["name"]: (m["model"], m["share"]) for m in await actor.models()}
    assert told["m version 3"] == ("demo", 0.75)
    assert told["m version 4"] == ("demo", 0.25)
    actor._catalog.failed["m version 5"] = "no memory"
    for failed in (True, False):
        text = render(await actor.snapshots()).decode()
        of = '{model="m version 3",name="demo",process="hub"}'
        assert f"liveedit_model_editors{of} 1.0" in text
        assert f"liveedit_model_share{of} 0.75" in text
        assert ('model_failed{model="m version 5",process="hub"} 1.0' in text) is failed
        actor._catalog.failed.clear()


async def test_a_hub_does_as_the_newest_fronts_settings_say(actor: Hub) -> None:
    """It is not started again by a deploy that changes them."""
    changed = ServeSettings(
        "demo", hub_memory_gb=0.5, editor_memory_gb=2.5, on_new_version="move", min_editors=2,
        max_editors=7, spare_editors=1, downscale_delay_s=33.0, limits=Limits(resume_s=7.0),
    )  # fmt: skip
    new, old = (
        replace(report("front"), serves=SERVES, began=began, settings=settings)
        for began, settings in ((7.0, changed), (6.0, SETTINGS))
    )
    for told in (old, new, old):
        await actor.report(told)
    assert (actor.store.max_bytes, actor.store.resume_s) == (500_000_000, 7.0)
    assert (actor._catalog.budget, actor._catalog.move) == (2_500_000_000, True)
    assert actor._placement.scale == Scale(2, 7, 1, 33.0)
    # What aliases said is known until there is a newer one: each word of a front is no new deploy.
    actor._follower._seen["demo"] = Pointed("1")
    await actor.report(new)
    assert actor._follower._seen
    back = replace(new, began=8.0, settings=SETTINGS)
    await actor.report(back)
    assert (actor._catalog.budget, actor._catalog.move) == (0, False)
    assert actor._placement.scale == SETTINGS.scale


async def test_who_does_not_report_is_gone(actor: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr("serve.hub.hub.time", SimpleNamespace(monotonic=lambda: now))
    await actor.report(report("a", MODEL))
    now += GONE_S - 1
    await actor.report(report("b", MODEL))
    assert (await actor.models())[0]["editors"] == 2
    now += 2
    assert (await actor.models())[0]["editors"] == 1
    assert set(await actor.snapshots()) == {"b", "hub", "gone"}
    await actor.report(report("c", MODEL))
    now += GONE_S - 1
    await actor.report(report("b", MODEL))  # it came before c, and is heard after it
    now += 2
    assert set(await actor.snapshots()) == {"b", "hub", "gone"}


async def test_what_an_editor_died_of_is_not_given_to_the_next(
    actor: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr("serve.hub.hub.time", SimpleNamespace(monotonic=lambda: now))
    actor._catalog.point("demo", Version("m version 4", (32, 48)), 1.0, None)
    loading = Editor("a", 12, 8, models={"demo": Warm(12)}, loading="m version 4")
    await actor.report(replace(report("a", MODEL), editor=loading))
    now += GONE_S + 1
    orders = await actor.report(replace(report("b", MODEL), editor=Editor("b", 12, 8)))
    assert orders.load is None
    assert actor._catalog.failed == {"m version 4": "editor a died of it"}


async def test_what_an_editor_dies_of_before_it_reports_again_is_known_too(
    actor: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An order is given once, so the next editor would get it, and die of it, and the next."""
    now = time.monotonic()
    monkeypatch.setattr("serve.hub.hub.time", SimpleNamespace(monotonic=lambda: now))
    actor._catalog.point("demo", Version("m version 4", (32, 48)), 1.0, None)
    actor._placement.settle_s = 0.0
    actor._follower.sources["m version 4"] = ModelSource("m", "m version 4")
    calm = Editor("a", 12, 8, models=dict.fromkeys(["demo", "natural", "old"], Warm(12)))
    orders = await actor.report(replace(report("a", MODEL), editor=calm))
    assert (orders.load, orders.drop) == (ModelSource("m", "m version 4"), {"old"})
    now += GONE_S + 1
    orders = await actor.report(replace(report("b", MODEL), editor=replace(calm, name="b")))
    assert orders.load is None
    assert actor._catalog.failed == {"m version 4": "editor a died of it"}


async def test_what_editors_do_before_they_are_ready_is_known(
    actor: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr("serve.hub.hub.time", SimpleNamespace(monotonic=lambda: now))
    assert await actor.started() == ""
    await actor.starting("a", "loading weights")
    now += 5
    await actor.starting("b", "loading weights")
    await actor.starting("a", "warming 832x480 at 416x240")
    now += 2.4
    assert await actor.started() == (
        "editor a is warming 832x480 at 416x240, for 2 s; editor b is loading weights, for 2 s"
    )
    await actor.report(report("a", MODEL))
    assert await actor.started() == "editor b is loading weights, for 2 s"


async def test_serve_is_asked_who_has_to_stop_and_who_starts(
    actor: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is told to stop while it starts, or is there no more, starts no longer. While Serve says
    nothing all is as it said last."""
    there = {"a": False, "b": True, "new": False}  # and whether it has to stop
    asked = asyncio.Event()

    def serve_replicas(app: str) -> list[Replica]:
        assert app == "app"
        loop.call_soon_threadsafe(asked.set)
        if not there:
            raise RayError("no controller")
        return [Replica(name, "editor", not stops, stops, 1) for name, stops in there.items()]

    async def hear() -> None:
        for _ in range(2):  # what was asked when this began may be what was there before
            asked.clear()
            await asked.wait()

    loop = asyncio.get_running_loop()
    monkeypatch.setattr("serve.hub.hub.serve_replicas", serve_replicas)
    monkeypatch.setattr("serve.hub.hub.WATCH_S", 0.001)
    for name in ("a", "b", "gone"):
        await actor.starting(name, "loading weights")
    for name in there:
        actor._placement.report(Editor(name, 12, 8))
    watching = asyncio.create_task(actor._watch())
    async with asyncio.timeout(20):
        for _ in range(2):
            await hear()
            assert await actor.started() == "editor a is loading weights, for 0 s"
            assert actor._stopping == {"b"}
            assert {known.name for known in actor._placement.editors} == {"a", "new"}
            there.clear()
    watching.cancel()


def values(text: bytes, name: str) -> dict[str, float]:
    """By process, over all other labels."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            if sample.name == f"liveedit_{name}":
                process = sample.labels["process"]
                found[process] = found.get(process, 0.0) + sample.value
    return found


async def test_what_was_counted_outlives_who_counted_it(
    actor: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.monotonic()
    monkeypatch.setattr("serve.hub.hub.time", SimpleNamespace(monotonic=lambda: now))
    for process in ("a", "bb", "ccc"):  # each has edited as many frames as its name is long
        await actor.report(report(process))
    now += GONE_S + 1
    await actor.report(report("ccc"))
    text = render(await actor.snapshots())
    assert values(text, "frames_edited_total") == {"ccc": 3, "gone": 3}
    assert values(text, "first_chunk_seconds_count") == {"ccc": 1, "gone": 2}
    assert values(text, "sessions") == {"ccc": 0}  # a gauge of who is gone means nothing
    assert values(text, "processes_lost_total") == {"hub": 2}
    await actor.report(report("bb"))  # it was only silent
    assert values(render(await actor.snapshots()), "frames_edited_total") == {
        "bb": 2, "ccc": 3, "gone": 1,
    }  # fmt: skip


def test_of_many_that_went_the_sum_is_kept() -> None:
    retired = GoneProcesses()
    for number in range(3 * KEPT_APART):
        metrics = Metrics()
        metrics.frames.labels("ours", "old" if number % 2 else "new").inc(2)
        retired.add(str(number), metrics.snapshot())
    # Those that went last, of whom one may have been silent only.
    assert list(retired._last) == [str(n) for n in range(2 * KEPT_APART, 3 * KEPT_APART)]
    text = render({"gone": retired.snapshot()}).decode()
    for model in ("old", "new"):
        series = f'liveedit_frames_edited_total{{model="{model}",process="gone",tenant="ours"}}'
        assert f"{series} {3.0 * KEPT_APART}" in text


async def test_who_was_asked_to_go_is_not_lost(actor: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr("serve.hub.hub.time", SimpleNamespace(monotonic=lambda: now))
    for process in ("stopped", "died"):
        await actor.report(report(process, MODEL))
    actor._stopping = {"stopped"}
    assert b"liveedit_build_info{" in render(await actor.snapshots())
    now += GONE_S + 1
    text = render(await actor.snapshots())
    assert values(text, "processes_lost_total") == {"hub": 1}
    assert text.count(b"liveedit_build_info{") == 1  # and what they ran is not said any more


async def test_an_editor_too_many_is_not_lost(monkeypatch: pytest.MonkeyPatch, actor: Hub) -> None:
    now = time.monotonic()
    clock = SimpleNamespace(monotonic=lambda: now)
    monkeypatch.setattr("serve.hub.hub.time", clock)
    actor._placement = Placement(Scale(1, 2, delay_s=0.0), clock=clock.monotonic)
    told = {}
    for _ in range(2):
        now += 1
        for process in ("a", "b"):
            editor = Editor(process, 12, 1)
            told[process] = await actor.report(replace(report(process, MODEL), editor=editor))
    assert sorted(orders.go for orders in told.values()) == [False, True]
    now += GONE_S + 1
    lost = values(render(await actor.snapshots()), "processes_lost_total")
    assert lost == {"hub": 1}  # the other had not been asked


async def test_the_hub_says_what_it_holds_and_wants(actor: Hub) -> None:
    token = await actor.store.create(HEADER)
    assert await actor.store.commit(Commit(token, 0, HEADER, PROGRESS, [Entry(0, b"image")]))
    full = Editor("a", 12, 1, {"x": Seat("s", 0.1)})
    await actor.report(replace(report("a", MODEL), editor=full))
    await actor.part("places", "ask", [Request("z", "u", SIZES, 16.0, waits=True)], {})
    await asyncio.sleep(DECIDE_S)
    text = render(await actor.snapshots())
    said = {
        name: values(text, name)["hub"]
        for name in ("hub_bytes", "hub_max_bytes", "hub_sessions", "editors_wanted",
                     "editors_ready", "sessions_waiting", "build_info")
    }  # fmt: skip
    assert said == {
        "hub_bytes": len(b"image") + len(b"state"), "hub_max_bytes": 2e9, "hub_sessions": 1,
        "editors_wanted": 2, "editors_ready": 1, "sessions_waiting": 1, "build_info": 1,
    }  # fmt: skip
    assert b'model="m version 3"' in text


async def test_an_editor_that_starts_takes_first_what_the_fewest_have(actor: Hub) -> None:
    assert [source.key for source in await actor.first(SERVES)] == ["demo", "natural"]
    here = Editor("a", 12, 8, models={"demo": Warm(12)})
    await actor.report(replace(report("a", MODEL), editor=here))
    assert [source.key for source in await actor.first(SERVES)] == ["natural", "demo"]


async def test_a_replica_hears_that_it_has_to_stop(actor: Hub) -> None:
    actor._stopping = {"a"}
    assert (await actor.report(report("a"))).leave
    assert not (await actor.report(report("b"))).leave


async def test_an_editor_hears_how_many_are_wanted_and_whether_it_goes(actor: Hub) -> None:
    actor._placement.settle_s = 0.0
    full = Editor("a", 12, 1, {"x": Seat("s", 0.1)})
    told = await actor.report(replace(report("a", MODEL), editor=full))
    assert told == Orders(leave=False, go=False, wanted=1)
    at_once = Request("y", "t", SIZES, 16.0)
    assert isinstance(await actor.part("places", "ask", [at_once], {}), Full)
    await asyncio.sleep(DECIDE_S)
    assert (await actor.report(replace(report("a", MODEL), editor=full))).wanted == 2
    waits = Request("z", "u", SIZES, 16.0, waits=True)
    assert isinstance(await actor.part("places", "ask", [waits], {}), Waiting)
    await actor.report(replace(report("b", MODEL), editor=replace(full, name="b", streams={})))
    assert await actor.part("places", "ask", [waits], {}) == Placed("b")
    await actor.part("places", "released", ["z"], {})
    # Nobody else may go while three are wanted, and one that Serve stops is not asked to.
    actor._stopping = {"b"}
    told = await actor.report(replace(report("b", MODEL), editor=replace(full, name="b")))
    assert (told.leave, told.go) == (True, False)


async def test_fronts_finish_before_the_application_has_stopped(actor: Hub) -> None:
    told = await actor.report(replace(report("front"), connections=2))
    assert (told.leave, told.stop) == (False, False)
    await actor.report(replace(report("editor", MODEL), editor=Editor("editor", 12, 1)))
    assert not await actor.stop()
    told = await actor.report(replace(report("front"), connections=1))
    assert told.stop
    assert not await actor.stop()
    await actor.report(replace(report("front"), connections=0))
    assert await actor.stop()

"""What the replicas of an application tell the hub, second by second, and make of its orders.

They are made as Ray makes them; the hub is a list of answers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.core import Metric
from ray.exceptions import ActorUnavailableError

from serve.editor import replica as editor_replica
from serve.front import replica as front_replica
from serve.hub.hub import GONE_S, Orders, Report
from serve.hub.recent import Recent
from serve.settings import ServeSettings
from serve.versions.catalog import Menu
from serve.versions.rolling import Offer, Version
from serve.versions.source import ModelSource, find_models
from serve.wire.link import Address
from serve.wire.protocol import WireError
from serve.wire.work import Opening
from tests.serve.test_settings_arrive import processes

__all__ = ["processes"]  # a fixture

pytestmark = pytest.mark.anyio

SERVES = find_models(["demo"])
DOWN = ActorUnavailableError("starting", None)
QUIET = Orders(leave=False)


@dataclass
class Answers:
    """A hub: what it answers to each report, the last one again and again, and what it heard."""

    orders: list[Orders | Exception]
    asked: dict[str, Any] = field(default_factory=dict)  # by method, what else it answers
    heard: list[Report] = field(default_factory=list)

    async def call(self, method: str, *args: Any) -> Any:
        if method != "report":
            answer = self.asked[method]
        else:
            answer = self.orders[min(len(self.heard), len(self.orders) - 1)]
            self.heard.append(args[0])
        if isinstance(answer, Exception):
            raise answer
        return answer


def asks(front: Any, hub: Any) -> None:
    """The front has asked for nothing before."""
    front._recent = Recent(hub, 0.0)


async def reported(replica: Any, hub: Answers, times: int) -> None:
    """Until it has reported so often, and taken in the answer."""
    replica.hub.call = hub.call
    await replica.check_health()
    async with asyncio.timeout(60):
        while len(hub.heard) < times:
            await asyncio.sleep(0)
    await asyncio.sleep(0)


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (front_replica, editor_replica):
        monkeypatch.setattr(module, "REPORT_S", 0.0)


@pytest.fixture
async def front(processes: None, soon: None) -> AsyncIterator[Any]:
    made = front_replica.FrontReplica.__mro__[1](ServeSettings("demo"), SERVES, None)  # type: ignore[call-arg]
    yield made
    if made._reporting:
        made._reporting.cancel()


@pytest.fixture
async def editor(processes: None, soon: None) -> AsyncIterator[Any]:
    made = editor_replica.EditorReplica(ServeSettings("demo"), SERVES)
    yield made
    if made._reporting:
        made._reporting.cancel()
    made.shelf.on.scheduler.stop()


def menu(*names: str) -> Menu:
    return Menu(
        tuple(Offer(name, name) for name in names), {n: Version(n, (16, 16)) for n in names}
    )


async def test_a_front_offers_what_the_hub_said_last(front: Any) -> None:
    assert [offer.name for offer in front.front.services.menu().offers] == ["demo"]
    orders = [DOWN, replace(QUIET, menu=menu("a", "b")), QUIET, DOWN]
    await reported(front, Answers(orders), 4)  # silence and a hub that is down change nothing
    assert [offer.name for offer in front.front.services.menu().offers] == ["a", "b"]


async def test_a_front_says_who_it_is_and_all_that_it_has_open(front: Any) -> None:
    hub, before = Answers([QUIET]), front._began
    front.front.connections[object()] = None
    front.front.edits.running = 2  # whole videos are clients, too
    front.metrics.frames.labels("ours", "m").inc(5)
    await reported(front, hub, 1)
    told = hub.heard[0]
    assert (told.process, told.connections, told.serves) == ("replica", 3, SERVES)
    assert told.began == before > 0
    assert told.settings == ServeSettings("demo")
    assert told.editor is None
    assert "liveedit_frames_edited" in {metric.name for metric in told.metrics}


@pytest.mark.parametrize(
    ("orders", "done"),
    [
        (QUIET, ""),
        (replace(QUIET, leave=True), "leave"),
        (replace(QUIET, stop=True), "stop"),
        # The end of all is the stronger word: there is no other front to come back to.
        (replace(QUIET, leave=True, stop=True), "stop"),
    ],
)
async def test_a_front_does_as_it_is_told(front: Any, orders: Orders, done: str) -> None:
    calls: list[str] = []
    front.front.leave = lambda: calls.append("leave")
    front.front.stop = lambda: calls.append("stop")
    await reported(front, Answers([orders]), 1)
    assert set(calls) == ({done} if done else set())


async def test_who_stopped_reporting_begins_again(front: Any, editor: Any) -> None:
    """A defect ends a replica's reports until Serve next asks for its health."""
    for replica in (front, editor):
        await reported(replica, Answers([KeyError("a defect")]), 1)
        with pytest.raises(KeyError):
            await replica._reporting
        hub = Answers([DOWN, TimeoutError(), QUIET])
        await reported(replica, hub, 3)
        assert not replica._reporting.done()


async def test_metrics_of_this_process_are_those_of_now(front: Any) -> None:
    """The hub has them as of the last report."""
    old, other = [Metric("old", "", "gauge")], [Metric("other", "", "gauge")]
    asks(front, Answers([], {"snapshots": {"replica": old, "editor": other}}).call)
    told = await front.snapshots()
    assert told["editor"] is other
    assert "old" not in {metric.name for metric in told["replica"]}
    for broken in (DOWN, TimeoutError()):
        asks(front, Answers([], {"snapshots": broken}).call)
        assert list(await front.snapshots()) == ["replica"]


async def test_no_model_yet_says_what_is_being_done(front: Any) -> None:
    doing = "editor a is loading weights, for 3 s"
    for started, said in ((doing, f"no editor is warmed up yet: {doing}"),
                          ("", "no editor is warmed up yet")):  # fmt: skip
        asks(front, Answers([], {"models": [], "started": started}).call)
        with pytest.raises(WireError) as raised:
            await front.models()
        assert (raised.value.code, raised.value.message) == ("at_capacity", said)


async def test_a_hub_that_hangs_is_not_waited_for(
    front: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front_replica, "ANSWER_S", 0.01)

    async def hang(*_: Any) -> None:
        await asyncio.Event().wait()

    asks(front, hang)
    async with asyncio.timeout(60):
        with pytest.raises(WireError, match="the server's records do not answer"):
            await front.models()
        assert list(await front.snapshots()) == ["replica"]


async def test_an_editor_tells_a_failure_until_it_was_heard_and_then_no_more(editor: Any) -> None:
    editor.shelf.failed["a"] = "no memory"
    hub = Answers([DOWN, QUIET, QUIET])
    await reported(editor, hub, 3)
    assert [report.failed for report in hub.heard[:3]] == [{"a": "no memory"}] * 2 + [{}]


async def test_an_editor_takes_its_orders_to_the_shelf(editor: Any) -> None:
    told: list[Any] = []
    editor.shelf.order = lambda load, drop: told.append((load, drop))
    editor.shelf.leave = lambda: told.append("leave")
    source = ModelSource("other")
    orders = Orders(leave=False, load=source, drop=frozenset("x"))
    await reported(editor, Answers([orders, QUIET]), 2)
    assert told[:2] == [(source, frozenset("x")), (None, frozenset())]
    for order in (Orders(leave=True), Orders(leave=False, go=True)):
        editor._reporting.cancel()
        await asyncio.gather(editor._reporting, return_exceptions=True)
        told.clear()
        await reported(editor, Answers([order]), 1)
        assert told[0] == "leave"


async def test_an_editor_too_many_goes_when_it_is_empty(editor: Any) -> None:
    """Once told it goes, whatever it hears after that; it does not leave sessions behind."""
    opening = Opening("s", "p", 16, 16, 16.0, "live")
    name = editor.shelf.on.capacity.admit(opening)
    await reported(editor, Answers([replace(QUIET, go=True), QUIET]), 3)
    await editor.check_health()
    editor.shelf.on.capacity.release(name)
    with pytest.raises(RuntimeError, match="one too many and has no sessions"):
        await editor.check_health()


async def test_how_many_are_wanted_is_forgotten_when_nobody_says_so_any_more(
    editor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(editor_replica, "time", SimpleNamespace(monotonic=lambda: now))
    assert await editor.record_autoscaling_stats() == {"wanted": 0.0}
    await reported(editor, Answers([replace(QUIET, wanted=4), DOWN]), 2)
    assert await editor.record_autoscaling_stats() == {"wanted": 4.0}
    now += GONE_S - 0.1
    assert await editor.record_autoscaling_stats() == {"wanted": 4.0}
    now += 0.2
    assert await editor.record_autoscaling_stats() == {"wanted": 0.0}


async def test_a_gpu_is_watched_once_however_often_health_is_asked_for(
    editor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the loop of reports is, which goes on should it ever have ended."""
    watched: list[str] = []

    async def watch(device: str, metrics: Any) -> None:
        watched.append(device)
        await asyncio.Event().wait()

    monkeypatch.setattr(editor_replica.gpu, "watch", watch)
    hub = Answers([QUIET])
    for times in (1, 2, 3):
        await reported(editor, hub, times)
    assert watched == [editor.shelf.device]
    editor._watching.cancel()
    first = editor._reporting
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await reported(editor, hub, len(hub.heard) + 1)
    assert editor._reporting is not first


@pytest.mark.parametrize("error", [None, OSError("the front is gone"), KeyError("a defect")])
async def test_a_streams_link_is_closed_however_it_ends(
    editor: Any, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    """Of a front that is gone the next one hears; a defect is told to who asked."""
    told: list[Any] = []
    link = SimpleNamespace(close=lambda: told.append("closed"))
    opening, address = Opening("s", "p", 16, 16, 16.0, "live"), Address("here", 1, b"")

    async def connect(*to: Any) -> Any:
        told.append(to)
        return link

    async def answer(*args: Any) -> None:
        told.append(args)
        if error is not None:
            raise error

    monkeypatch.setattr(editor_replica.Link, "connect", connect)
    monkeypatch.setattr(editor_replica, "answer", answer)
    if isinstance(error, KeyError):
        with pytest.raises(KeyError):
            await editor.edit(opening, address)
    else:
        await editor.edit(opening, address)
    assert told == [(address, editor_replica.KINDS), (editor.shelf, opening, link), "closed"]


async def test_serve_hears_of_an_editor_that_is_broken(editor: Any) -> None:
    await reported(editor, Answers([QUIET]), 1)
    editor.shelf.on.broken = "an illegal address"
    with pytest.raises(RuntimeError, match="the accelerator is broken: an illegal address"):
        await editor.check_health()


async def test_an_editor_says_what_it_does_before_it_is_ready(editor: Any) -> None:
    said: list[tuple[str, str]] = []
    editor.hub.starting = lambda *doing: said.append(doing)
    editor.shelf._tell("loading weights")
    assert said == [("replica", "loading weights")]


async def test_an_editors_gauges_are_of_the_moment_of_its_report(editor: Any) -> None:
    editor.shelf.on.capacity.admit(Opening("s", "p", 16, 16, 16.0, "live"))
    hub = Answers([QUIET])
    await reported(editor, hub, 1)
    told = {s.name: s.value for metric in hub.heard[0].metrics for s in metric.samples}
    assert told["liveedit_editor_sessions"] == 1.0

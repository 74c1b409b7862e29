"""A process's way to the hub: alive, down, silent, new, on another machine."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, RayTaskError

from serve.admission.admission import Request
from serve.hub import client, remote
from serve.hub.client import HubClient
from serve.hub.hub import Hub
from serve.hub.ledger import Used
from serve.hub.placement import Placed
from serve.hub.records import Commit, Entry
from serve.tenants import Tenant
from serve.wire.protocol import WireError
from serve.wire.split_state import SplitState
from tests.serve.hub.test_hub import HEADER, PARTS, PROGRESS, SERVES, SETTINGS, SHAPE, SIZES, actor

__all__ = ["actor"]  # a fixture

pytestmark = pytest.mark.anyio


async def test_a_process_calls_the_hubs_parts_as_if_they_were_here(
    actor: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "hub_actor", lambda *_: Handle(actor))
    store = HubClient("app", SETTINGS).store
    token = await store.create(HEADER)
    states = [SplitState(b"", tuple(p.name for p in pair), pair) for pair in pairwise(PARTS)]
    for state in states:
        progress = replace(PROGRESS, state=state)
        assert await store.commit(Commit(token, 0, HEADER, progress, [Entry(0, b"image")]))
    record = await store.claim(token, 0, SHAPE)
    assert (record.epoch, record.progress.state) == (1, states[-1])
    assert not await store.commit(Commit(token, 0, HEADER, progress, []))
    assert store._commits._there == {}  # type: ignore[attr-defined]
    assert await store.commit(Commit(token, 1, HEADER, progress, []))
    assert await store.beat([(token, 0)]) == [(token, 0)]
    with pytest.raises(WireError, match="has width 48, open says 64"):
        await store.claim(token, 0, replace(SHAPE, width=64))
    await store.release(token, 1, forget=True)
    assert store._commits._there == {}  # type: ignore[attr-defined]
    assert len(actor.store) == 0
    assert (await actor.commits()).port == (await actor.commits()).port


class Handle:
    """Ray's to an actor: what a method raises comes as the cause of a RayTaskError."""

    def __init__(self, actor: Hub) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> Any:
        async def remote(*args: Any) -> Any:
            try:
                return await getattr(self.actor, name)(*args)
            except Exception as error:
                raise RayTaskError(name, "", error) from None

        return SimpleNamespace(remote=remote)


async def test_a_defect_of_the_hub_is_not_taken_for_a_refusal(
    actor: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "hub_actor", lambda *_: Handle(actor))
    with pytest.raises(RayTaskError):
        await HubClient("app", SETTINGS).store.beat("token")  # type: ignore[arg-type]


async def test_a_session_goes_on_while_the_hub_is_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its progress is not kept, and nobody takes it away."""

    class Down:
        def __getattr__(self, name: str) -> Any:
            async def remote(*_: Any) -> Any:
                raise ActorUnavailableError("starting", None)

            return SimpleNamespace(remote=remote)

    monkeypatch.setattr(client, "hub_actor", lambda *_: Down())
    way = HubClient("app", SETTINGS)
    store, tenant = way.store, Tenant("a", max_sessions=0)
    assert await store.commit(Commit("token", 0, HEADER, PROGRESS, [])) is True
    assert await store.beat([("token", 0)]) == []
    await store.release("token", 0)
    # Any editor will do: it decides itself whether it has room.
    assert await way.places.ask(Request("x", "s", SIZES, 16.0)) == Placed("")
    await way.places.released("x")
    # Nobody is held to a limit that all fronts share.
    await way.ledger.enter(("s", 0), tenant)
    await way.ledger.leave(("s", 0))
    assert await way.ledger.beat(Used("front", 0, {}, {}), {"a": tenant}) == set()
    assert len(await store.create(HEADER)) >= 32  # its first commit makes the record
    with pytest.raises(WireError) as raised:  # whose it is nobody can say now
        await store.claim("token", 0, SHAPE)
    assert raised.value.code == "at_capacity"


async def test_a_hub_that_was_started_again_is_asked_in_place_of_the_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[Any, ...]] = []

    class Mortal:
        def __getattr__(self, name: str) -> Any:
            async def remote(*_: Any) -> Any:
                if len(asked) == 1:
                    raise ActorDiedError
                return "alive"

            return SimpleNamespace(remote=remote)

    def hub_actor(*told: Any) -> Mortal:
        asked.append(told)
        return Mortal()

    monkeypatch.setattr(client, "hub_actor", hub_actor)
    assert await HubClient("app", SETTINGS, SERVES).call("notes") == "alive"
    assert asked == [("app", SETTINGS, SERVES)] * 2  # it is made of the same


@pytest.mark.parametrize(("memory", "loaded"), [(0.0, ["demo", "natural"]), (1.0, ["demo"])])
async def test_what_an_editor_loads_while_the_hub_is_down_fits(
    monkeypatch: pytest.MonkeyPatch, memory: float, loaded: list[str]
) -> None:
    def get(*_: Any, **__: Any) -> None:
        raise GetTimeoutError

    hub = SimpleNamespace(first=SimpleNamespace(remote=lambda *_: None))
    monkeypatch.setattr(client, "hub_actor", lambda *_: hub)
    monkeypatch.setattr(client.ray, "get", get)
    way = HubClient("app", replace(SETTINGS, editor_memory_gb=memory), SERVES)
    assert [source.key for source in way.first()] == loaded


async def test_a_silent_hub_is_waited_for_once_and_heard_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As it is when its machine is gone, of which Ray hears after a while."""
    asked: list[str] = []
    heals = asyncio.Event()

    class Silent:
        def __getattr__(self, name: str) -> Any:
            async def remote(*_: Any) -> Any:
                asked.append(name)
                await heals.wait()
                return name

            return SimpleNamespace(remote=remote)

    monkeypatch.setattr(client, "hub_actor", lambda *_: Silent())
    monkeypatch.setattr(client, "ASK_S", 0.01)
    way = HubClient("app", SETTINGS)
    async with asyncio.timeout(60):
        asking = [way.places.ask(Request(name, "s", SIZES, 16.0)) for name in "xy"]
        assert await asyncio.gather(*asking) == [Placed("")] * 2
        await asyncio.sleep(0)
        assert asked == ["part", "part", "pid"]  # whether it is back
        monkeypatch.setattr(client, "ASK_S", 60.0)
        await way.places.released("x")
        assert await way.store.beat([("token", 0)]) == []
        with pytest.raises(TimeoutError):
            await way.call("report")
        assert asked == ["part", "part", "pid"]
        handing = way._records._handing
        assert handing is not None  # the one that answers may be new: it is given the sessions
        heals.set()
        await way._listening  # type: ignore[misc]
        await handing
        assert await way.call("notes") == "notes"


async def test_while_a_hub_is_silent_it_is_looked_for_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It hung, and then its machine was found to be gone."""
    made: list[int] = []
    slept: list[float] = []
    sleep = asyncio.sleep

    class Silent:
        def __init__(self, number: int) -> None:
            self.number = number

        def __getattr__(self, name: str) -> Any:
            async def remote(*_: Any) -> int:
                if name != "pid":
                    await asyncio.Event().wait()
                if self.number < 3:
                    raise ActorDiedError
                return self.number

            return SimpleNamespace(remote=remote)

    def hub_actor(*_: Any) -> Silent:
        made.append(len(made) + 1)
        return Silent(made[-1])

    async def nap(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    monkeypatch.setattr(client, "hub_actor", hub_actor)
    monkeypatch.setattr(client, "ASK_S", 0.01)
    way = HubClient("app", SETTINGS)
    with pytest.raises(TimeoutError):
        await way.call("notes")
    monkeypatch.setattr(client.asyncio, "sleep", nap)
    async with asyncio.timeout(60):
        await way._listening  # type: ignore[misc]
    assert (made, way.hub.number) == ([1, 2, 3], 3)
    assert slept == [remote.AGAIN_S] * 2


async def test_a_hub_on_another_machine_is_given_the_sessions(
    actor: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that go on and those whose clients may come back, once, to their last chunk."""
    monkeypatch.setattr(remote, "AGAIN_S", 0.01)
    second, third = (Hub("app", SETTINGS, SERVES) for _ in range(2))
    here = [actor]

    class Handing:
        def __getattr__(self, name: str) -> Any:
            async def remote(*args: Any) -> Any:
                if not here:
                    raise ActorUnavailableError("starting", None)
                return await getattr(Handle(here[0]), name).remote(*args)

            return SimpleNamespace(remote=remote)

    monkeypatch.setattr(client, "hub_actor", lambda *_: Handing())
    way = HubClient("app", SETTINGS)

    def chunk(token: str, edited: int) -> Commit:
        entries = [Entry(n, bytes([n])) for n in range(edited - 3, edited)]
        return Commit(token, 0, HEADER, replace(PROGRESS, edited=edited), entries)

    async with asyncio.timeout(60):
        tokens = goes_on, left, over = [await way.store.create(HEADER) for _ in range(3)]
        for token in tokens:
            for edited in (3, 6):
                assert await way.store.commit(chunk(token, edited))
        drops = [Entry(6, "dropped")]
        same = replace(chunk(goes_on, 6), entries=drops)
        assert await way.store.commit(same)  # frames that were left out, after the same chunk
        await way.store.release(left, 0)
        await way.store.release(over, 0, forget=True)
        here.clear()
        link = way._records._asker._link
        assert link is not None
        link.close()
        with pytest.raises(ActorUnavailableError):
            await way.call("report")
        here.append(second)
        await way._records._handing  # type: ignore[misc]
        assert [token for token, _ in way._records._commits._there] == [goes_on]
        assert sorted(second.store._records) == sorted([goes_on, left])
        assert [second.store._records[t].held for t in (goes_on, left)] == [True, False]
        for token in (goes_on, left):
            with pytest.raises(WireError, match="from 3 to 6"):
                await second.store.claim(token, 2)
        record = await second.store.claim(goes_on, 3)
        assert [e.data for e in record.tail] == [b"\x03", b"\x04", b"\x05", "dropped"]
        # The next new one is given them again. One that was there all the time, and only could not
        # be reached, has nothing twice.
        for hub in (third, actor):
            here[0] = hub
            way._records._asker._drop()
            way._records.hand_over()
            await way._records._handing  # type: ignore[misc]
        assert sorted(third.store._records) == sorted([goes_on, left])
        record = await actor.store.claim(goes_on, 0)
        assert [e.position for e in record.tail] == [0, 1, 2, 3, 4, 5, 6]
    for hub in (second, third):
        hub._watching.cancel()
        hub._following.cancel()


async def test_a_commit_does_not_overtake_those_that_are_handed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A hub that had the newer first would take the older for said already."""
    came: list[int] = []
    goes_on = asyncio.Event()

    class Slow:
        async def commit(self, commit: Commit) -> bool:
            came.append(commit.progress.edited)
            await goes_on.wait()
            return True

    records = remote.RemoteRecords(SimpleNamespace(settings=SETTINGS, call=print))  # type: ignore[arg-type]
    monkeypatch.setattr(records, "_commits", Slow())

    def chunk(edited: int) -> Commit:
        return Commit("token", 0, HEADER, replace(PROGRESS, edited=edited), [])

    goes_on.set()
    assert await records.commit(chunk(3))
    goes_on.clear()
    records.hand_over()
    while came != [3, 3]:
        await asyncio.sleep(0)
    second = asyncio.create_task(records.commit(chunk(6)))
    for _ in range(20):
        await asyncio.sleep(0)
    assert (came, second.done()) == ([3, 3], True)  # nobody waits for it, and it waits its turn
    goes_on.set()
    await records._handing  # type: ignore[misc]
    assert came == [3, 3, 6]


async def test_a_commit_that_does_not_arrive_is_handed_over_until_it_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    came, slept, sleep = list[int](), list[float](), asyncio.sleep

    class Away:
        async def commit(self, commit: Commit) -> bool:
            came.append(commit.progress.edited)
            if len(came) < 4:
                raise OSError("no way there")
            return True

    async def nap(seconds: float) -> None:
        slept.append(seconds)
        await sleep(0)

    records = remote.RemoteRecords(SimpleNamespace(settings=SETTINGS, call=print))  # type: ignore[arg-type]
    monkeypatch.setattr(records, "_commits", Away())
    monkeypatch.setattr(remote.asyncio, "sleep", nap)
    assert await records.commit(Commit("token", 0, HEADER, PROGRESS, []))
    async with asyncio.timeout(20):
        await records._handing  # type: ignore[misc]
    assert (came, slept) == ([9] * 4, [remote.AGAIN_S] * 2)


async def test_what_cannot_be_resumed_any_more_is_kept_no_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As long as the hub itself has it, from when its connection was lost."""
    now = 500.0

    class Here:
        def __init__(self) -> None:
            self.forgotten: list[tuple[str, int]] = []

        async def commit(self, commit: Commit) -> bool:
            return True

        def forget(self, *holder: Any) -> None:
            self.forgotten.append(holder)

    async def call(*_: Any) -> None: ...

    settings = replace(SETTINGS, limits=replace(SETTINGS.limits, resume_s=7.0))
    records = remote.RemoteRecords(SimpleNamespace(settings=settings, call=call))  # type: ignore[arg-type]
    here = Here()
    monkeypatch.setattr(records, "_commits", here)
    monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=lambda: now))
    for token in ("left", "held"):
        await records.commit(Commit(token, 0, HEADER, PROGRESS, []))
    await records.release("held", 1)  # another holder's
    await records.release("left", 0)
    assert here.forgotten == [("held", 1), ("left", 0)]
    for after, kept in ((6.9, {"left", "held"}), (0.2, {"held"})):
        now += after
        await records.release("another", 0)
        assert records._kept.keys() == kept


async def test_what_somebody_else_holds_is_kept_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection here may hear of that much later, or never."""

    class Taken:
        async def commit(self, commit: Commit) -> bool:
            return False

    records = remote.RemoteRecords(SimpleNamespace(settings=SETTINGS, call=print))  # type: ignore[arg-type]
    monkeypatch.setattr(records, "_commits", Taken())
    assert not await records.commit(Commit("token", 0, HEADER, PROGRESS, []))
    records.hand_over()
    await records._handing  # type: ignore[misc]
    assert records._kept == {}

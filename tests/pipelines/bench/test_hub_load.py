"""What a hub is measured with does what a hub does."""

from __future__ import annotations

import multiprocessing
import threading
from itertools import pairwise
from types import SimpleNamespace

import pytest

from pipelines.bench import hub_load
from pipelines.bench.hub_load import CHUNKS, FRAMES, HEADER, JPEG, REST, commit_s, placement_s
from serve.hub.records import Commit, SessionStore


@pytest.mark.slow  # starts a hub and a front, twice
def test_a_real_hub_takes_real_commits_and_whole_states_cost_more() -> None:
    for _ in range(3):  # a busy machine's caches are others'
        new, whole = (
            commit_s(7_000_000, whole=whole, fronts=1, sessions=1, chunks=8)
            for whole in (False, True)
        )
        if new < whole:
            break
    assert 0 < new < whole


@pytest.mark.parametrize("whole", [False, True])
def test_a_front_commits_chunks_of_which_one_part_is_new(
    whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a hub beside it in this process: each session's frames go on, and of its state what the
    hub does not have, or all."""
    taken: dict[str, list[Commit]] = {}

    class Noting(SessionStore):
        async def commit(self, commit: Commit) -> bool:
            taken.setdefault(commit.token, []).append(commit)
            return await super().commit(commit)

    monkeypatch.setattr(hub_load, "SessionStore", Noting)
    monkeypatch.setattr(hub_load, "time", SimpleNamespace(process_time=lambda: 7.5))
    ours, its = multiprocessing.Pipe()
    hub = threading.Thread(target=hub_load._hub, args=(its, 3))
    hub.start()
    address, tokens = ours.recv()
    hub_load._front(address, tokens[:2], 50, whole, 4)
    assert hub_load._cpu(ours) == 7.5, "of its process, whatever the clock says"
    ours.send("end")
    hub.join(20)
    assert not hub.is_alive()
    assert len(set(tokens)) == 3
    assert list(taken) == tokens[:2]
    for commits in taken.values():
        assert [len(c.progress.state.parts) for c in commits if c.progress.state] == [
            CHUNKS if whole or not n else 1 for n in range(4)
        ]
        for n, commit in enumerate(commits):
            state = commit.progress.state
            assert state is not None
            assert len(set(state.names)) == CHUNKS
            assert {len(part.data) for part in state.parts} == {50}
            assert len(state.rest) == REST
            assert commit.header == HEADER
            assert [e.position for e in commit.entries] == list(range(n * FRAMES, (n + 1) * FRAMES))
            assert {len(entry.data) for entry in commit.entries} == {JPEG}
            assert commit.progress.next_frame == commit.progress.edited == (n + 1) * FRAMES
        states = [c.progress.state for c in commits]
        for one, other in pairwise(states):
            assert one is not None
            assert other is not None
            assert other.names[:-1] == one.names[1:], "one chunk is new, the oldest is gone"


def test_a_commit_that_is_refused_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(SessionStore):
        async def commit(self, commit: Commit) -> bool:
            return False

    monkeypatch.setattr(hub_load, "SessionStore", Refusing)
    ours, its = multiprocessing.Pipe()
    hub = threading.Thread(target=hub_load._hub, args=(its, 1))
    hub.start()
    address, tokens = ours.recv()
    with pytest.raises(RuntimeError, match="the hub refused a commit"):
        hub_load._front(address, tokens, 50, False, 1)
    ours.send("end")
    hub.join(20)


def test_placing_deciding_and_reports_are_counted() -> None:
    found = placement_s(4, 12, rounds=8)
    assert found.keys() == {"place", "report", "decide"}
    assert min(found.values()) > 0

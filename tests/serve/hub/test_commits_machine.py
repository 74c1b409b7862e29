"""What a session goes on from, bit by bit, whatever became of what it was sent in.

Sessions are edited, moved, resized, lost and resumed; the hub loses its memory, is down, or its
answer does not arrive. A state in the hub is always the newest that reached it, as if every state
had been sent whole, and no more of one is sent than has to be. What clients get is there once.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch import Tensor

from modeling.streaming.state import StreamState
from serve.editor.splitter import Splitter, joined
from serve.hub.commits import Commits, Taken, take
from serve.hub.records import COMMIT_KINDS, Commit, Entry, Progress, SessionStore
from serve.wire.conversation import KINDS
from serve.wire.pack import pack, parse, unpack
from serve.wire.split_state import SplitState
from serve.wire.work import Moved
from tests.serve.hub.test_records import HEADER

WINDOW, SINKS = 3, 1  # chunks
ROOMS = [0, 2600, 4500, 7000, 10**9]  # bytes: for no session, for one, for two, for tails, too
SESSIONS = st.sampled_from(["a", "b"])
ON_ITS_WAY = ["arrives", "arrives", "hub is down", "answer is lost", "answer is late"]


def over(message: Any, kinds: Any) -> Any:
    """As it comes out of a link."""
    header, parts = pack(message)
    return unpack(parse(header)[0], [memoryview(bytes(part)) for part in parts], kinds)


def size_of(state: SplitState) -> int:
    return len(state.rest) + sum(len(part.data) for part in state.parts)


def tail_of(entries: list[Entry]) -> int:
    return sum(len(entry.data) for entry in entries)


class Editing:
    """An editor's stream, of which nothing is real but its state."""

    def __init__(self, given: SplitState | None, size: int = 4) -> None:
        self.splitter, self.prompt, self.size, self.chunks = Splitter(given), "red", size, 0
        self.history: list[Tensor] = []
        if given is not None:
            state = joined(given)
            self.prompt, self.size, self.chunks = state.prompt, state.height, state.chunks
            self.history = list(state.history)

    def edit(self, seed: int) -> None:
        """Chunks of one `seed` and size have the same latents."""
        noise = torch.Generator().manual_seed(seed)
        shape = (2, 3, 1, self.size, self.size)
        self.history.append(torch.randn(shape, generator=noise).half())
        if len(self.history) > WINDOW:
            self.history.pop(SINKS)
        self.chunks += 1

    def resize(self, size: int) -> None:
        self.size = size
        self.history = [part[..., :1, :1].repeat(1, 1, 1, size, size) for part in self.history]

    def state(self, *, exact: bool = False) -> StreamState:
        return StreamState(
            prompt=self.prompt, height=self.size, width=self.size, work_height=self.size,
            work_width=self.size, detail="off", seed=1, chunks=self.chunks, frames=self.chunks,
            generator=torch.tensor([self.chunks]), pending=torch.zeros(int(exact), 4, 4, 3).byte(),
            history=tuple(self.history), mask_tokens=torch.arange(self.chunks),
            kv={"keys": torch.ones(3), "committed": 2} if exact else None,
        )  # fmt: skip


class CommitsMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.room = ROOMS[-1]
        self.commits, self.store = Commits(self.ask), self.empty()
        self.way = "arrives"
        self.sent: list[Commit] = []
        self.editors = {token: Editing(None) for token in "ab"}
        self.front: dict[str, SplitState] = {}  # the newest state that a front has
        self.epochs = {"a": 0, "b": 0}
        self.edited: dict[str, bytes] = {}  # the newest state, had it been sent whole
        self.arrived: dict[str, bytes] = {}  # and of what reached the hub
        self.has: dict[str, set[str]] = {}  # parts that the hub has
        self.there: dict[str, set[str]] = {}  # and those that the front knows it to have
        self.numbers = itertools.count(1)
        self.frames = {"a": 0, "b": 0}  # that the front has edited
        self.tails: dict[str, list[Entry]] = {}  # what reached the hub for the client
        self.sizes: dict[str, int] = {}  # bytes of the states there
        self.known: dict[str, int] = {}  # edited frames after the last that did

    def teardown(self) -> None:
        self.runner.close()

    def empty(self) -> SessionStore:
        return SessionStore(clock=lambda: 0.0, max_bytes=self.room)

    async def ask(self, commit: Commit) -> Taken:
        if self.way == "hub is down":
            raise ConnectionError
        self.sent.append(commit)
        answer = await take(self.store, over(commit, COMMIT_KINDS))
        if self.way == "answer is lost":
            raise ConnectionError
        if self.way == "answer is late":  # an `Asker` says it again
            answer = await take(self.store, over(commit, COMMIT_KINDS))
        return answer

    def commit(self, token: str, way: str, entries: list[Entry]) -> None:
        state = self.front[token]
        editor, self.way, self.sent = self.editors[token], way, []
        edited = self.frames[token]
        progress = Progress(editor.chunks, edited, editor.prompt, editor.prompt, state)
        commit = Commit(token, self.epochs[token], HEADER, progress, entries, next(self.numbers))
        try:
            assert self.runner.run(self.commits.commit(commit))
        except ConnectionError:
            if self.sent and self.carried(0) | self.has.get(token, set()) >= set(state.names):
                self.arrives(token, entries)
            return
        assert self.carried(0) == set(state.names) - self.there.get(token, set())
        enough = self.carried(0) | self.has.get(token, set()) >= set(state.names)
        self.arrives(token, entries)
        if token in self.arrived:  # and not gone with its own commit
            assert len(self.sent) == (1 if enough else 2)
        self.there[token] = set(state.names)

    def arrives(self, token: str, entries: list[Entry]) -> None:
        kept = self.tails.get(token, [])
        if entries[0].position > self.known.get(token, 0):
            kept = []  # what came between never came
        self.tails[token], self.known[token] = kept + entries, self.frames[token]
        self.arrived[token], self.has[token] = self.edited[token], set(self.front[token].names)
        self.sizes[token] = size_of(self.front[token])
        self.make_room()

    def make_room(self) -> None:
        """All of one tenant: first what clients of the longest tails lack goes, the oldest first,
        and where no tail is left sessions do."""
        while self.held > self.room:
            longest = max(self.tails, key=lambda t: (tail_of(self.tails[t]), -ord(t)))
            if tail_of(self.tails[longest]):
                self.tails[longest].pop(0)
            else:
                self.lose(next(iter(self.arrived)))  # all are held, and this one came first

    @property
    def held(self) -> int:
        return sum(self.sizes[t] + tail_of(self.tails[t]) for t in self.arrived)

    def lose(self, token: str) -> None:
        for kept in (self.arrived, self.has, self.tails, self.known):
            kept.pop(token, None)  # type: ignore[attr-defined]

    def carried(self, number: int) -> set[str]:
        state = self.sent[number].progress.state
        assert state is not None
        return {part.name for part in state.parts}

    # --- what happens

    @rule(token=SESSIONS, seed=st.integers(0, 5), way=st.sampled_from(ON_ITS_WAY))
    def chunk(self, token: str, seed: int, way: str) -> None:
        editor, before = self.editors[token], self.front.get(token)
        editor.edit(seed)
        state = editor.state()
        self.edited[token] = state.to_bytes()
        came = over(self.runner.run(editor.splitter.split(state)), KINDS)
        assert not before or not {part.name for part in came.parts} & set(before.names)
        self.front[token] = came.completed(before)
        first = self.frames[token]
        self.frames[token] += 2
        frames = [Entry(first + n, bytes([seed] * 300)) for n in range(2)]
        self.commit(token, way, [*frames, Entry(first + 2, "chunk")])

    @rule(token=SESSIONS, way=st.sampled_from(ON_ITS_WAY))
    def only_drops_are_told(self, token: str, way: str) -> None:
        if token in self.front:
            self.commit(token, way, [Entry(self.frames[token], "drops")])

    @rule(token=SESSIONS, prompt=st.sampled_from(["blue", "green"]))
    def prompt(self, token: str, prompt: str) -> None:
        self.editors[token].prompt = prompt

    @rule(token=SESSIONS, size=st.sampled_from([2, 4, 6]))
    def size(self, token: str, size: int) -> None:
        self.editors[token].resize(size)

    @rule(token=SESSIONS)
    def editor_dies(self, token: str) -> None:
        self.editors[token] = Editing(self.front.get(token))

    @rule(token=SESSIONS)
    def editor_moves(self, token: str) -> None:
        """As it is by now, another prompt and size included."""
        editor = self.editors[token]
        exact = editor.state(exact=True)
        moved = over(Moved(self.runner.run(editor.splitter.split(exact)), 0), KINDS)
        given = moved.state.completed(self.front.get(token))
        assert joined(given).to_bytes() == exact.to_bytes()
        self.editors[token], self.front[token] = Editing(given), given
        self.edited[token] = exact.to_bytes()

    @rule(token=SESSIONS)
    def front_dies(self, token: str) -> None:
        """Its session goes on from what the hub has, at another front."""
        if token not in self.arrived:
            return
        self.way = "arrives"
        before = Commit(
            token, self.epochs[token], HEADER, self.store._records[token].progress,
            [Entry(self.known[token], "late")], next(self.numbers),
        )  # fmt: skip
        record = self.runner.run(self.store.claim(token, self.known[token]))
        assert not self.runner.run(self.commits.commit(before))  # by who held it
        self.frames[token] = record.progress.edited
        self.commits.forget(token, self.epochs[token])
        self.epochs[token], state = record.epoch, record.progress.state
        assert state is not None
        assert joined(state).to_bytes() == self.arrived[token]
        self.front[token], self.edited[token] = state, self.arrived[token]
        self.editors[token] = Editing(state)
        self.there.pop(token, None)

    @rule()
    def hub_dies(self) -> None:
        self.store = self.empty()
        self.arrived, self.has, self.tails, self.known = {}, {}, {}, {}

    @rule(room=st.sampled_from(ROOMS))
    def hub_gets_other_room(self, room: int) -> None:
        """From the next commit on."""
        self.room = self.store.max_bytes = room

    # --- what must be so

    @invariant()
    def the_hub_has_what_arrived_to_the_bit(self) -> None:
        records, size = self.store._records, 0
        assert records.keys() == self.arrived.keys()
        for token, record in records.items():
            state = record.progress.state
            assert state is not None
            assert joined(state).to_bytes() == self.arrived[token]
            assert len(state.parts) == len(set(state.names))
            assert list(record.tail) == self.tails[token]
            size += size_of(state) + tail_of(self.tails[token])
        assert self.store.bytes == size


TestCommits = CommitsMachine.TestCase
TestCommits.settings = settings(
    max_examples=15, stateful_step_count=60, deadline=None, derandomize=True,
    phases=[Phase.generate],  # add Phase.shrink for a shorter story, in minutes
    suppress_health_check=list(HealthCheck),
)  # fmt: skip

"""How many sessions one hub holds: CPU of its process, over real links from real fronts.

    python -m pipelines.bench.hub_load

What bounds it is CPU, of which a process has one core: time on the clock says little where fronts
share its machine, so seconds of the hub's own process are counted. A session commits a chunk every
0.75 s (12 frames at 16 a second): twelve JPEGs of 832x480 and its state, in which the latents of
one chunk are new.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from serve.admission.admission import Editor, Request, Seat, Sizes
from serve.admission.decisions import Scale
from serve.hub.commits import Commits, take
from serve.hub.placement import Placement
from serve.hub.records import COMMIT_KINDS, Commit, Entry, Header, Progress, SessionStore
from serve.wire.link import Address, Asker, Listener
from serve.wire.split_state import HistoryPart, SplitState
from serve.wire.work import Opening, Ready

CHUNK_S = 0.75
FRAMES, JPEG = 12, 60_000  # of a chunk, and bytes of each
CHUNKS, LATENTS = 3, 1_200_000  # in a state at 832x480, and bytes of the latents of each
REST = 10_000  # and of the rest of it
HEADER = Header(Opening("s", "red", 832, 480, 16.0, "live"), "jpeg", Ready("m", FRAMES, 9, 0))


def commit_s(
    latents: int = LATENTS,
    *,
    whole: bool = False,
    fronts: int = 2,
    sessions: int = 4,
    chunks: int = 25,
) -> float:
    """Seconds of the hub's CPU for one commit with a state of `CHUNKS` times so many bytes, of
    which the newest go, or the whole."""
    spawn = multiprocessing.get_context("spawn")
    ours, its = spawn.Pipe()
    hub = spawn.Process(target=_hub, args=(its, fronts * sessions), daemon=True)
    hub.start()
    address, tokens = ours.recv()
    begun = _cpu(ours)
    working = [
        spawn.Process(
            target=_front, args=(address, tokens[n::fronts], latents, whole, chunks), daemon=True
        )
        for n in range(fronts)
    ]
    for front in working:
        front.start()
    for front in working:
        front.join()
        if front.exitcode:
            raise RuntimeError(f"a front ended with {front.exitcode}")
    used = _cpu(ours) - begun
    ours.send("end")
    hub.join()
    return used / (len(tokens) * chunks)


def _cpu(hub: Connection) -> float:
    hub.send("cpu")
    seconds: float = hub.recv()
    return seconds


def _hub(pipe: Connection, sessions: int) -> None:
    async def run() -> None:
        store, listener = SessionStore(60.0), Listener("127.0.0.1", COMMIT_KINDS)
        address = await listener.answer(partial(take, store))
        pipe.send((address, [await store.create(HEADER) for _ in range(sessions)]))
        while await asyncio.to_thread(pipe.recv) == "cpu":
            pipe.send(time.process_time())

    asyncio.run(run())


def _front(address: Address, tokens: Sequence[str], latents: int, whole: bool, chunks: int) -> None:
    async def run() -> None:
        async def find() -> Address:
            return address

        commits, jpeg = Commits(Asker(find, COMMIT_KINDS).ask), os.urandom(JPEG)
        rest, parts = os.urandom(REST), [_part(latents) for _ in range(CHUNKS + 1)]
        for chunk in range(chunks):
            first = chunk * FRAMES
            parts = [*parts[1:], parts[0]]
            shown = tuple(parts[:CHUNKS])
            state = SplitState(rest, tuple(part.name for part in shown), shown)
            progress = Progress(first + FRAMES, first + FRAMES, "red", "red", state)
            entries = [Entry(first + n, jpeg) for n in range(FRAMES)]
            for token in tokens:
                if whole:
                    commits.forget(token, 0)
                if not await commits.commit(Commit(token, 0, HEADER, progress, entries)):
                    raise RuntimeError("the hub refused a commit")

    asyncio.run(run())


def _part(latents: int) -> HistoryPart:
    return HistoryPart.of(os.urandom(latents))


def placement_s(editors: int, sessions: int, rounds: int = 2000) -> dict[str, float]:
    """Seconds of CPU to place a session and take it away again, to hear an editor's report, and to
    decide how many editors there shall be, where there are so many."""
    now, sizes = 0.0, Sizes((480, 832), (480, 832))
    placement = Placement(Scale(1, editors), lambda: now)
    share = 0.6 * editors / sessions
    known = [
        Editor(
            f"e{n}", FRAMES, 16,
            {f"e{n}-{k}": Seat(f"e{n}-{k}", share) for k in range(sessions // editors)},
            {sizes: share * CHUNK_S},
        )
        for n in range(editors)
    ]  # fmt: skip
    for editor in known:
        placement.report(editor)
    new = [replace(known[n % editors], frame_s=1e-9) for n in range(rounds)]

    def placed() -> None:
        for number in range(rounds):
            placement.ask(Request(f"x{number}", f"x{number}", sizes, 16.0))
            placement.released(f"x{number}")

    def reported() -> None:
        for editor in new:
            placement.report(editor)

    found = {"place": _spent(placed) / rounds, "report": _spent(reported) / rounds}
    now += 1000.0
    for editor in known:
        placement.report(editor)
    return {**found, "decide": _spent(placement.wanted)}


def _spent(work: Any) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def main() -> None:
    for latents, whole in ((LATENTS, True), (LATENTS, False), (0, False)):
        seconds = commit_s(latents, whole=whole)
        print(
            f"{CHUNKS * latents / 1e6:.1f} MB of latents, {'all' if whole else 'new ones'} sent: "
            f"{1000 * seconds:.2f} ms of the hub a commit, {CHUNK_S / seconds:.0f} sessions a core"
        )
    for editors in (100, 1000):
        spent = placement_s(editors, 10 * editors)
        told = ", ".join(f"{name} {1000 * seconds:.3f} ms" for name, seconds in spent.items())
        print(f"{editors} editors, {10 * editors} sessions: {told}")


if __name__ == "__main__":
    main()

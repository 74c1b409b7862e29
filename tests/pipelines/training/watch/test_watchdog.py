"""Which worker hangs, and where: two workers of one folder, each a thread of this process."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.training.run_folder import RunFolder
from pipelines.training.watch.watchdog import COMPUTES, EXPORTS, READS, Watchdog

SECONDS, POLL = 0.2, 0.1


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path)
    folder.open()
    return folder


def test_a_place_is_looked_at_often_enough_to_know_of_a_hang_soon(folder: RunFolder) -> None:
    """A tenth of the time later, and of a long one seconds; it takes three looks until all end."""
    looks = {seconds: Watchdog(folder, 0, 2, seconds).poll for seconds in (1.0, 20.0, 600.0)}
    assert looks == {1.0: 0.1, 20.0: 2.0, 600.0: 5.0}


class Workers:
    """Two that stand still until `release`; `codes` are what they end with."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder, self.release = folder, threading.Event()
        self.codes: list[int] = []
        self.ended = threading.Semaphore(0)
        self.threads: list[threading.Thread] = []
        self.together = threading.Barrier(1)

    def start(self, rank: int, *place: int) -> None:
        def end(code: int) -> None:
            self.codes.append(code)
            self.ended.release()

        def reads_a_shard_that_never_comes() -> None:
            watchdog = Watchdog(self.folder, rank, 2, SECONDS, end)
            watchdog.poll = POLL  # twice so long the other has, on a busy machine too
            with watchdog:
                self.together.wait()
                watchdog.at(*place)
                self.release.wait()

        thread = threading.Thread(target=reads_a_shard_that_never_comes)
        thread.start()
        self.threads.append(thread)


@pytest.fixture
def workers(folder: RunFolder) -> Iterator[Workers]:
    made = Workers(folder)
    yield made
    made.release.set()
    for thread in made.threads:
        thread.join()


@pytest.mark.parametrize("behind", [(7, READS, 1), (7, COMPUTES, 0)])
def test_the_worker_that_is_furthest_behind_is_named_with_its_place_and_stack(
    folder: RunFolder, workers: Workers, behind: tuple[int, ...]
) -> None:
    workers.together = threading.Barrier(2)
    workers.start(0, 7, COMPUTES, 1)  # waits for the other's gradients
    workers.start(1, *behind)
    for _ in range(2):
        assert workers.ended.acquire(timeout=60)
    assert workers.codes == [75, 75]
    hang = folder.hang()
    assert hang is not None
    doing = "reading data" if behind[1] == READS else "computing"
    assert re.match(rf"worker 1 has been {doing} after step 7 for \d+ s \(process \d+ on ", hang)
    assert "reads_a_shard_that_never_comes" in hang
    assert "worker 0" not in hang
    assert folder.said(0)[0] == [hang]  # once
    for rank in (0, 1):
        place, stacks = (folder.path / f"hang-{rank}.txt").read_text().split("\n", 1)
        assert json.loads(place)["batch"] == (1, behind[2])[rank]
        assert "in reads_a_shard_that_never_comes" in stacks  # by faulthandler, of all threads
    folder.open()
    assert folder.hang() is None


def test_a_worker_that_cannot_even_write_is_the_one(folder: RunFolder, workers: Workers) -> None:
    workers.start(1, 7, COMPUTES)
    assert workers.ended.acquire(timeout=60)
    hang = str(folder.hang())
    assert hang.startswith("worker 0 of 2 hangs and says nothing, as of a process that was stopped")
    assert "worker 1 has been computing after step 7" in hang


def test_one_worker_alone_waits_for_nobody_and_two_at_one_place_for_each_other(
    folder: RunFolder,
) -> None:
    first, second = (Watchdog(folder, rank, 2, 0) for rank in (0, 1))
    for worker in (first, second):
        worker.at(7, COMPUTES)
        worker._write()
    assert first._verdict().startswith("all workers stand at the same place; worker 0 has been com")
    alone = Watchdog(folder, 0, 1, 0)
    assert alone._verdict().startswith("worker 0 has been computing after step 7")


def test_a_worker_that_is_done_is_not_taken_for_a_silent_one(
    folder: RunFolder, workers: Workers
) -> None:
    with Watchdog(folder, 1, 2, SECONDS):
        pass  # the first still writes the model
    workers.start(0, 9, EXPORTS)
    assert workers.ended.acquire(timeout=60)
    assert str(folder.hang()).startswith("worker 0 has been exporting after step 9")


def test_what_an_earlier_try_left_says_nothing_of_this_one(
    folder: RunFolder, workers: Workers
) -> None:
    """Its hang, and that its workers were done: this time the first says nothing."""
    (folder.path / "hang-0.txt").write_text("a hang of yesterday")
    with Watchdog(folder, 0, 2, 0):
        pass
    with Watchdog(folder, 0, 2, 0), Watchdog(folder, 1, 2, 0):
        assert not list(folder.path.glob("hang-*"))
        workers.start(1, 7, COMPUTES)
        assert workers.ended.acquire(timeout=60)
        assert str(folder.hang()).startswith("worker 0 of 2 hangs and says nothing")


def test_who_moves_on_while_it_is_written_down_was_only_slow(folder: RunFolder) -> None:
    codes: list[int] = []
    left: list[bool] = []  # of the time before, when it is written down again
    written = threading.Semaphore(0)

    class Slow(Watchdog):
        def _write(self) -> None:
            left.append(self._file(0).is_file())
            super()._write()
            self.at(self._now[0] + 1, COMPUTES)
            written.release()

    with Slow(folder, 0, 1, 0.05, codes.append):
        for _ in range(3):  # it goes on watching
            assert written.acquire(timeout=60)
    assert not any(left)  # or another that hangs would take it for one that does, too
    assert codes == []
    assert folder.hang() is None


@pytest.mark.parametrize("limit", [0.6, 0.0])
def test_who_gets_on_and_who_is_not_watched_is_left_alone(folder: RunFolder, limit: float) -> None:
    codes: list[int] = []
    with Watchdog(folder, 0, 1, limit, codes.append) as watchdog:
        for step in range(10 if limit else 1):  # without a limit nobody watches
            watchdog.at(step, COMPUTES)
            threading.Event().wait(0.1)
    assert codes == []
    assert folder.hang() is None
    assert not list(folder.path.glob("hang-*"))

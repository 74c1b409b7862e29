"""Names the worker that hangs, and ends a training that would otherwise stand still.

Workers wait for each other in every step, so when one hangs, all do. Each notes where it is and has
a thread that looks at the note: one that is too old is written to the run's folder, with the stacks
of all threads. The worker that is furthest behind is the one that the others wait for; one that
cannot even write (a stopped process, a lost node) is taken for it. Then all end, and Ray starts
them again from the last checkpoint.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.exits import TRY_AGAIN
from pipelines.training.run_folder import RunFolder

# What a worker can be doing in a step, in the order of a step; what comes late waits for nobody
# that has come as far.
STARTS, READS, COMPUTES, REPORTS, SAVES, VALIDATES, EXPORTS = range(7)
WORDS = ("starting", "reading data", "computing", "reporting", "saving", "validating", "exporting")
FRAMES = 4  # of a stack, in the message


@dataclass(frozen=True)
class Place:
    """Where a worker stands."""

    step: int  # steps done
    batch: int  # of the step, where gradients are accumulated
    doing: int
    seconds: float  # for so long
    pid: int
    host: str
    stack: list[str]  # innermost last, "file:line function"

    @property
    def progress(self) -> tuple[int, int, int]:
        return self.step, self.batch, self.doing

    def line(self) -> str:
        return (
            f"has been {WORDS[self.doing]} after step {self.step} for {self.seconds:.0f} s "
            f"(process {self.pid} on {self.host}), in {' > '.join(self.stack[-FRAMES:])}"
        )


class Watchdog:
    """Of one worker, made by the thread that trains; a context manager. `seconds` 0 never barks."""

    def __init__(
        self,
        folder: RunFolder,
        rank: int,
        world_size: int,
        seconds: float,
        end: Callable[[int], Any] = os._exit,
    ) -> None:
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self.seconds, self.end = seconds, end
        # Twice so long all others have written, too: they stand still for as long.
        self.poll = min(5.0, seconds / 10)
        self._thread = threading.get_ident()
        self._ended = threading.Event()
        self.at(0, STARTS)

    def at(self, step: int, doing: int, batch: int = 0) -> None:
        """Note what comes now, after `step` steps and so many batches of the next."""
        self._now = (step, batch, doing, time.monotonic())

    def __enter__(self) -> Watchdog:
        self._file(self.rank).unlink(missing_ok=True)
        self._mark_of_end(self.rank).unlink(missing_ok=True)
        if self.seconds > 0:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._mark_of_end(self.rank).touch()

    def _watch(self) -> None:
        while not self._ended.wait(self.poll):
            stuck = self._now
            if time.monotonic() - stuck[-1] <= self.seconds:
                continue
            self._write()
            if self._ended.wait(2 * self.poll) or self._now != stuck:  # it was only slow
                self._file(self.rank).unlink(missing_ok=True)
                continue
            if self._first() == self.rank:
                self.folder.tell_hang(self._verdict())
            self.end(TRY_AGAIN)
            return

    def _write(self) -> None:
        step, batch, doing, since = self._now
        frame = sys._current_frames().get(self._thread)
        stack = [
            f"{os.path.basename(entry.filename)}:{entry.lineno} {entry.name}"
            for entry in traceback.extract_stack(frame)
        ]
        seconds = time.monotonic() - since
        place = Place(step, batch, doing, seconds, os.getpid(), socket.gethostname(), stack)
        half = self._file(self.rank).with_suffix(".half")
        with half.open("w") as file:
            file.write(json.dumps(asdict(place)) + "\n")
            file.flush()
            faulthandler.dump_traceback(file)
        half.replace(self._file(self.rank))

    def _first(self) -> int:
        """The first worker that could write: it speaks for all."""
        return next(rank for rank in range(self.world_size) if self._file(rank).is_file())

    def _verdict(self) -> str:
        places: dict[int, Place] = {}
        for rank in range(self.world_size):
            if self._file(rank).is_file():
                text = self._file(rank).read_text()
                places[rank] = Place(**json.loads(text.splitlines()[0]))
        silent = [
            rank
            for rank in range(self.world_size)
            if rank not in places and not self._mark_of_end(rank).is_file()
        ]
        if silent:
            names = ", ".join(map(str, silent))
            return (
                f"worker {names} of {self.world_size} hangs and says nothing, as of a process that "
                f"was stopped or a node that is gone; worker {self.rank} "
                f"{places[self.rank].line()}"
            )
        behind = min(place.progress for place in places.values())
        last = [rank for rank, place in places.items() if place.progress == behind]
        if len(last) == self.world_size > 1:
            return f"all workers stand at the same place; worker {last[0]} {places[last[0]].line()}"
        return "; ".join(f"worker {rank} {places[rank].line()}" for rank in last) + (
            f". The others wait for it; all stacks are in {self._file(0).parent}/hang-*.txt"
        )

    def _file(self, rank: int) -> Path:
        return self.folder.path / f"hang-{rank}.txt"

    def _mark_of_end(self, rank: int) -> Path:
        """There once a worker has nothing left to do, and waits for nobody."""
        return self.folder.path / f".ended-{rank}"

"""The `liveedit` command from its first moment to its last: `pipelines.cli`, and what is around it.

Before: its imports take a second, in which Ctrl-C should look as it does later. After: to take
apart what is imported by then (torch, Ray, MLflow) costs most of a second, ten on a busy machine,
for nothing.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys

STOPPED = 130


def main() -> None:
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is not signal.SIG_IGN:  # nohup, or a shell's background job
            signal.signal(ending, _leave)
    leave = _LastOfAll()
    atexit.register(leave)  # which, as the first, is called after all that others put away
    from pipelines.cli import main as command

    try:
        command()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            leave.code = end.code or 0
        raise


def _leave(number: int, frame: object) -> None:
    """Nothing has begun yet."""
    with contextlib.suppress(OSError):  # of a terminal that is gone
        os.write(2, b"\nStopping.\n")
    os._exit(STOPPED)


class _LastOfAll:
    """Ends the process with `code`; the interpreter does that itself where there is none."""

    code: int | None = None

    def __call__(self) -> None:
        if self.code is not None:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):
                    stream.flush()
            os._exit(self.code)


if __name__ == "__main__":
    main()

"""What a command's exit code tells whoever started it: a person, a script or a scheduler.

0    done
1    the configuration, the data or the machine; mend what the last line names, for the same
     command would end in the same way (2 if it is the command line itself)
3    a stage missed its gate; everything is kept: train it on, or move the gate
4    --plan --exit-code: a stage would run
75   a worker, a node or a service was lost; the same command goes on from what is kept
130  stopped by Ctrl-C, SIGTERM or SIGHUP; the same command goes on from what is kept
"""

from __future__ import annotations

MEND = 1
GATE_MISSED = 3
WOULD_RUN = 4
TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h


class TryAgainError(RuntimeError):
    """Something outside of the configuration failed; the same command may well succeed."""

    exit_code = TRY_AGAIN


def exit_code(error: BaseException) -> int:
    """For an error that is told in one line."""
    code: int = getattr(error, "exit_code", MEND)
    return TRY_AGAIN if isinstance(error, (ConnectionError, TimeoutError)) else code

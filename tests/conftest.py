"""What must be so before anything is imported, in which order files are begun, what of them the
garbage collector passes over, and how the process ends.

Bytecode is kept, though many images of containers set PYTHONDONTWRITEBYTECODE: without it pytest
rewrites every assertion anew in every process, which for tests/serve alone takes as long as all
that it imports, and each process that Ray starts compiles our modules again.

Ctrl-C must reach what the tests start, even where it is ignored for themselves: a shell starts
`make test &` with SIGINT ignored, and children inherit that for ever.

Without a GPU, Triton's interpreter runs our kernels; Triton looks whether it shall when it is
imported, by whatever test comes first.
"""

from __future__ import annotations

import atexit
import gc
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from hypothesis import settings

from pipelines.__main__ import _LastOfAll

if os.environ.pop("PYTHONDONTWRITEBYTECODE", ""):
    sys.dont_write_bytecode = False

# A call of Ray where none runs starts one, and that leaves a token in the home of who runs the
# tests: every later Ray asks for it.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"

LEAVE = _LastOfAll()
atexit.register(LEAVE)
gc.disable()  # until all tests are collected
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# An example has 200 ms by default, which on a busy machine says nothing of the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


WHOLLY_SLOW = re.compile(r"^pytestmark = .*\bpytest\.mark\.slow\b", re.MULTILINE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """`make quick` does not read files of slow tests alone, which import Ray Serve and browsers."""
    if config.option.markexpr != "not slow" or collection_path.suffix != ".py":
        return None
    return bool(WHOLLY_SLOW.search(collection_path.read_text())) or None


# Files whose quick tests take or wait five seconds and more: docs/testing.md, "How long it takes".
DEAR = {
    f"test_{name}.py"
    for name in ("sequence_parallel", "edit_remote", "resuming", "stream", "encode", "rollout",
                 "versions", "evaluate", "ablation", "kept", "run", "lost_nothing")
}  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Between workers files with a slow test go first, then dear ones: none is left with one at the
    end."""
    if hasattr(config, "workerinput"):
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: (item.path not in slow, item.path.name not in DEAR))


def pytest_collection_finish() -> None:
    """What is imported by now stays: a collection that looks at all of it takes a second, and in a
    forked process copies all of it. DeepSpeed asks for one with every engine under ZeRO-3. What
    of it is garbage stays as well: to find it is such a collection."""
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """The process ends as `liveedit` does: to take apart all that is imported takes seconds."""
    LEAVE.code = int(session.exitstatus)

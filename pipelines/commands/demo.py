"""`liveedit demo`: the whole job on this machine."""

from __future__ import annotations

from pipelines.commands.options import Overrides
from pipelines.commands.show import console


def demo(overrides: Overrides = None) -> None:
    """Do the whole job on real footage, small enough for a laptop.

    Makes editing pairs of photos and clips that ship, continues the model that ships through all
    stages, evaluates it on held-out footage, registers, edits and serves it, and opens a page of
    what it made. Everything lands in runs/demo. A second run reuses what is finished.
    """
    console.print(
        "LiveEdit demo: some minutes on two cores; a second run reuses what is finished.\n"
    )
    from pipelines.commands.run import run_demo

    run_demo(overrides or [], console)

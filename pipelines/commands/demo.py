"""`liveedit demo`: the whole job on this machine."""

from __future__ import annotations

from pipelines.commands.options import Overrides
from pipelines.commands.show import console


def demo(overrides: Overrides = None) -> None:
    """Do the whole job on synthetic pairs, small enough for a laptop.

    Makes editing pairs, trains all stages, evaluates, registers the model and edits a held-out
    video. Everything lands in runs/demo. A second run reuses what is finished.
    """
    console.print(
        "[bold]LiveEdit demo[/]: about 5 minutes on two cores; a second run reuses what is "
        "finished.\n"
    )
    from pipelines.commands.run import run_demo

    run_demo(overrides or [], console)

"""`liveedit send`: what a pipeline could not tell MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from infra.runtime.errors import UserError
from pipelines.commands.show import console


def send(
    output: Annotated[Path, typer.Argument(help="The output folder of a pipeline.")],
    uri: Annotated[
        str | None, typer.Option(help="MLflow's address (default: the pipeline's tracking.uri).")
    ] = None,
) -> None:
    """Send what a pipeline could not tell MLflow: metrics, files, registered models.

    A run whose process was killed is ended, as KILLED. Everything is kept until MLflow has it.
    """
    from pipelines.config.load import load_config
    from pipelines.stages.running.runner import locked
    from pipelines.tracking.outbox import Outbox
    from pipelines.tracking.tracker import TrackingError, check_reachable

    if not (output / "tracking").is_dir():
        raise UserError(f"{output} is no output folder of a pipeline: it has no folder tracking")
    config = load_config(output / "config.yaml", [f"tracking.uri={uri}"] if uri else [])
    place = config.tracking.uri
    assert place is not None
    check_reachable(place)
    said: list[str] = []
    with locked(output), Outbox(output, place, config.tracking.experiment, said.append) as outbox:
        outbox.put_refused_back()
    if said:
        raise TrackingError(said[-1])
    console.print(f"{place} has all of {output}", soft_wrap=True)

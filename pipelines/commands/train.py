"""`liveedit train`: a pipeline from pairs to a registered model."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.show import console


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[CONFIG] [KEY=VALUE]...",
            help="A YAML file, or demo, wan-1.3b, wan-14b (default demo); then settings over it.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and print the configuration, then stop.")
    ] = False,
) -> None:
    """Run the pipeline: data, VAE, encoding, three training stages, evaluation, registration.

    Stages whose settings and inputs have not changed since they finished are not run again.
    """
    from pipelines.config.load import load_config, to_yaml

    given = list(arguments or [])
    source = given.pop(0) if given and "=" not in given[0] else "demo"
    config = load_config(source, given)
    if dry_run:
        console.print(to_yaml(config), end="", markup=False, soft_wrap=True)
        return
    from pipelines.commands.run import run_train

    run_train(config, console)

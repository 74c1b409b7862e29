"""`liveedit train`: a pipeline from pairs to a registered model."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.commands.show import console


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG [KEY=VALUE]...",
            help="A YAML file, or a recipe's name (see below); then settings over it.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and print the configuration, then stop.")
    ] = False,
) -> None:
    """Run the pipeline: data, VAE, encoding, three training stages, evaluation, registration.

    Stages whose settings and inputs have not changed since they finished are not run again.
    Without a CONFIG it lists the recipes and starts nothing.
    """
    from pipelines.config.load import load_config, to_yaml

    given = list(arguments or [])
    if not given or "=" in given[0]:
        _propose(given)
    config = load_config(given.pop(0), given)
    if dry_run:
        console.print(to_yaml(config), end="", markup=False, soft_wrap=True)
        return
    from pipelines.commands.run import run_train

    run_train(config, console)


def _propose(settings: list[str]) -> None:
    """The recipes, with what each would do; nothing is started."""
    from pipelines.config.load import load_config, recipes
    from pipelines.stages.chain import STAGES

    console.print(f"A training runs {', '.join(STAGES)}, as a configuration says. There are:\n")
    for name, purpose in recipes().items():
        output = load_config(name).output
        console.print(f"  [bold]{name:<12}[/]{purpose} Writes to {output}.", soft_wrap=True)
    console.print()
    again = " ".join(["liveedit train demo", *settings, "--dry-run"])
    raise ValueError(
        f"train needs a configuration, and nothing was started; say for example {again}"
    )

"""`liveedit train`: a pipeline from pairs to a registered model."""

from __future__ import annotations

from typing import Annotated

import typer

from infra.runtime.errors import UserError
from pipelines.commands.show import console, item
from pipelines.exits import WOULD_RUN


def train(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="CONFIG [KEY=VALUE]...",
            help="A YAML file, or a recipe's name (see below); then settings over it.",
        ),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Show which stages would run and why, then stop."),
    ] = False,
    exit_code: Annotated[
        bool,
        typer.Option("--exit-code", help="With --plan: exit with 4 if any stage would run."),
    ] = False,
    card: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="With --plan: the GPU whose time is counted, e.g. H100.",
            show_default="this machine's",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print every setting, the model's too, check all paths, then stop."
        ),
    ] = False,
    first: Annotated[
        str | None,
        typer.Option(
            "--from", metavar="STAGE", help="Begin here; take what comes before as it lies."
        ),
    ] = None,
    only: Annotated[
        str | None,
        typer.Option(metavar="STAGE", help="Run this stage alone; what comes before must be done."),
    ] = None,
) -> None:
    """Run the pipeline: data, VAE, encoding, three training stages, evaluation, registration.

    Stages whose settings and inputs have not changed since they finished are not run again.
    Without a CONFIG it lists the recipes and starts nothing.
    Exits with 0 (done), 1 (mend what it names), 3 (a stage missed its gate), 75 (try again) or
    130 (stopped).
    """
    from pipelines.config.load import load_config, resolved_yaml

    for option, is_given in (("--exit-code", exit_code), ("--card", card is not None)):
        if is_given and not plan:
            raise UserError(f"{option} belongs to --plan, and nothing was started; add --plan")
    given = list(arguments or [])
    if not given or "=" in given[0]:
        _propose(given)
    config = load_config(given.pop(0), given)
    if dry_run:
        from pipelines.stages.preflight import check

        console.print(resolved_yaml(config), end="", soft_wrap=True)
        check(config, writes=False)
        return
    from pipelines.commands.run import print_plan, run_train

    if plan:
        runs = print_plan(config, console, first=first, only=only, card=card)
        if runs and exit_code:
            raise typer.Exit(WOULD_RUN)
    else:
        run_train(config, console, first=first, only=only)


def _propose(settings: list[str]) -> None:
    """The recipes, with what each would do; nothing is started."""
    from pipelines.config.load import load_config, recipes
    from pipelines.stages.chain import STAGES

    console.print(f"A training runs {', '.join(STAGES)}, as a configuration says. There are:\n")
    for name, purpose in recipes().items():
        output = load_config(name).output
        console.print(item(name, f"{purpose} Writes to {output}.", 12), soft_wrap=True)
    console.print()
    again = " ".join(["liveedit train demo", *settings, "--dry-run"])
    raise UserError(
        f"train needs a configuration, and nothing was started; say for example {again}"
    )

"""The `liveedit` command. Heavy packages are imported by the command that needs them."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import signal
import sys
import time
import warnings
from typing import Annotated, Any

import typer

from infra.runtime.environment import set_default, variable
from infra.runtime.errors import UserError
from pipelines.commands.data import data_app
from pipelines.commands.demo import demo
from pipelines.commands.doctor import doctor, show_version
from pipelines.commands.edit import edit
from pipelines.commands.import_model import import_model
from pipelines.commands.measure.ablate import ablate
from pipelines.commands.measure.evaluate import evaluate
from pipelines.commands.measure.stream import bench_app
from pipelines.commands.measure.trace import trace
from pipelines.commands.models import models_app
from pipelines.commands.send import send
from pipelines.commands.serve import serve
from pipelines.commands.show import errors, examples, flowing
from pipelines.commands.token import token
from pipelines.commands.train import train
from pipelines.exits import TryAgainError, exit_code

DASHED = re.compile(r"--\w+[._][\w.]*(?==|$)")  # options have hyphens, settings dots or underscores
REMEDIES = {
    errno.ENOSPC: "the disk is full: free space, or choose another place",
    errno.EROFS: "choose a place that can be written",
}
PATIENCE_S = 5.0  # for which further signals are not heard

app = typer.Typer(
    name="liveedit",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "Train a video editor that works chunk by chunk, and edit videos with it.\n\n"
        "New here? [bold]liveedit serve[/bold] names a page that edits your camera with the model "
        "that ships; [bold]liveedit demo[/bold] does the whole job on this machine: it makes data, "
        "trains, evaluates and edits a video."
    ),
)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.add_typer(models_app, name="models")


@app.callback()
def liveedit(
    version: Annotated[
        bool,
        typer.Option("--version", help="Say which version this is.", callback=show_version),
    ] = False,
) -> None:
    pass


app.command(epilog=examples("liveedit demo", "liveedit demo distill.steps=200"))(demo)

app.command(
    epilog=examples(
        "liveedit train demo --plan",
        "liveedit train wan-1.3b model.start=models/wan data.train=s3://bucket/pairs",
        "liveedit train my.yaml foundation.steps=2000",
    )
)(train)

app.command(
    epilog=examples(
        "liveedit evaluate runs/demo/models/distill runs/demo/data/heldout",
        "liveedit evaluate models:/liveedit@production s3://bucket/heldout mask_cache=true",
    )
)(evaluate)

app.command(
    epilog=examples(
        "liveedit ablate MODEL bench steps=1,2,4 every=5 long=false",
        "liveedit ablate MODEL data/heldout cache=none,attention,feedforward,block,follow",
        "liveedit ablate runs/demo/models bench stages=foundation,causal,distill half=drawn",
    )
)(ablate)


app.command(
    epilog=examples(
        'liveedit edit in.mp4 out.mp4 --prompt "make the red circle blue"',
        'liveedit edit in.mov out.mp4 --prompt "add fog" --side-by-side --work-size 1/2',
        'liveedit edit in.mp4 out.mp4 --prompt "add fog" --url ws://localhost:8000',
    )
)(edit)

app.command(epilog=examples("liveedit send runs/demo"))(send)

app.command(
    "import",
    epilog=examples("liveedit import Wan2.1-T2V-1.3B --to models/wan --vae taew2_1.pth"),
)(import_model)

app.command(
    epilog=examples(
        "liveedit serve",
        "liveedit serve models:/liveedit@production --port 8080",
        "liveedit serve --https",
        "liveedit serve models/wan models/cartoon",
        "liveedit serve models/wan --host 0.0.0.0 token_file=tokens max_editors=4",
    )
)(serve)

app.command(epilog=examples("liveedit doctor", "liveedit doctor --port 8080"))(doctor)

app.command(
    epilog=examples(
        "liveedit token acme >> tokens",
        "liveedit token acme --sessions 4 --opens 30 --minutes 600 >> tokens",
    )
)(token)

app.command(epilog=examples("liveedit trace traces", "liveedit trace traces --session 3f9a12c4"))(
    trace
)

for group in (app, data_app, bench_app, models_app):
    for registered in group.registered_commands:
        assert registered.callback is not None
        registered.help = flowing(registered.callback)


class _Stop:
    """A signal handler: the first signal is a KeyboardInterrupt, those right after it are not.

    Impatient fingers must not interrupt the cleaning up that the first one asked for. That it was
    heard is said at once, and past Python's own buffers: the signal may have come while they write.
    """

    def __init__(self) -> None:
        self._last = -math.inf

    @property
    def heard(self) -> bool:
        return self._last > -math.inf

    def __call__(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if now - self._last > PATIENCE_S:
            self._last = now
            with contextlib.suppress(OSError):  # of a terminal that is gone
                os.write(2, b"\nStopping.\n")
            raise KeyboardInterrupt


def main() -> None:
    """Exits with a code of `pipelines.exits`, after an error in one line; 130 is typer's.

    SIGTERM, by which schedulers end a program, and SIGHUP, when its terminal closes, are as Ctrl-C.
    One line is for what can be mended outside of this program (`infra.runtime.errors`, or what the
    system refuses); LIVEEDIT_DEBUG=1 shows its traceback, too.
    """
    # Threads that spin while they wait for each other take a busy machine's time from those that
    # they wait for: an edit beside six other processes on two cores took 64 s, and 23 where they
    # spin for a moment. Not at all costs 40 % where nothing else runs. Read when torch is imported.
    if variable("OMP_WAIT_POLICY") is None:
        set_default("GOMP_SPINCOUNT", "1000")
    stop = _Stop()
    signal.signal(signal.SIGTERM, stop)
    for ending in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(ending) is not signal.SIG_IGN:  # nohup, or a shell's background job
            signal.signal(ending, stop)
    if variable("LIVEEDIT_DEBUG") == "1":
        app()
        return
    for argument in sys.argv[1:]:
        if setting := DASHED.match(argument):
            _complain(_dashed(setting[0], argument))
            sys.exit(2)
    warnings.filterwarnings("ignore", module=r"(torchdata|torch|ray|mlflow)\b")
    try:
        app()
    except (UserError, OSError, TryAgainError) as error:
        _complain(_one_line(error))
        sys.exit(exit_code(error))
    finally:
        if stop.heard:  # a further signal must not kill the interpreter while it puts things away
            for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(ending, signal.SIG_IGN)


def _dashed(name: str, argument: str) -> str:
    """What is wrong with an option that has a dot or an underscore."""
    command: Any = typer.main.get_command(app)
    for word in sys.argv[1:]:
        command = getattr(command, "commands", {}).get(word, command)
    hyphened = name.replace("_", "-")
    if any(hyphened in parameter.opts for parameter in command.params):
        return f"there is no option {name}; write {argument.replace(name, hyphened)}"
    value = argument.removeprefix(name).removeprefix("=") or "VALUE"
    return f"{name}... is a setting, which has no dashes: write {name.lstrip('-')}={value}"


def _one_line(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:  # what the system refuses
        remedy = REMEDIES.get(error.errno or 0, "check the path and its rights")
        text = f"{error.filename}: {error.strerror}; {remedy}"
    return " ".join(" ".join([text, *getattr(error, "__notes__", [])]).split())


def _complain(text: str) -> None:
    errors.print("Error:", style="red", end=" ")
    errors.print(text, soft_wrap=True)


if __name__ == "__main__":
    main()

"""`liveedit serve`: the Ray Serve application on this machine, until Ctrl-C."""

from __future__ import annotations

import contextlib
import shlex
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from infra.runtime.errors import UserError
from infra.runtime.paths import RUNS
from infra.runtime.registry import SCHEME
from pipelines.commands.show import chosen_model, command_name, console, item, short

if TYPE_CHECKING:
    from serve.run import Running
    from serve.settings import ServeSettings
    from serve.tls import Tls


ALL = "0.0.0.0"  # every address of this machine
END_S = 12.0  # for a stop that has been asked to hurry


def serve(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]... [KEY=VALUE]...",
            help="Model directories or models:/NAME@ALIAS (default: the last demo's, else the one "
            "that ships), of which clients choose by name; then settings.",
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            help="Address to listen on; 0.0.0.0 is all of this machine's.",
            show_default="127.0.0.1; 0.0.0.0 with --https",
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="Port to listen on.", min=1, max=65535)] = 8000,
    https: Annotated[
        bool,
        typer.Option(
            "--https",
            help="For phones and other machines, whose browsers give a page a camera only over "
            "https: with a certificate that this machine makes for itself.",
        ),
    ] = False,
    tls_cert: Annotated[
        Path | None, typer.Option(help="PEM certificate, for https:// and wss://.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Its PEM key.")] = None,
) -> None:
    """Serve a model: live streams over WebSocket, whole videos over HTTP, and a page.

    Runs until Ctrl-C, on a Ray of its own or, when RAY_ADDRESS is set, on that cluster. Settings
    (docs/serving.md has all): token_file, max_sessions, min_editors, max_editors, editor_cpus,
    editor_gpus, fronts, limits.max_pixels.
    """
    settings = serve_settings(arguments or [])
    tls = _tls(https, tls_cert, tls_key)
    host = host or (ALL if https else "127.0.0.1")
    status = console.status("starting, about 20 seconds")
    status.start()
    try:
        with application(settings, host=host, port=port, tls=tls) as running:
            status.stop()
            print_running(
                console, running, settings, trust=tls.certificate if tls and https else None
            )
            with contextlib.suppress(KeyboardInterrupt):
                while True:
                    signal.pause()
            console.print(
                f"sessions have {settings.stop_s:g} s to finish, Ctrl-C ends them at once",
                soft_wrap=True,
            )
            _hurry_when_asked(running)
    finally:
        status.stop()


def _tls(https: bool, certificate: Path | None, key: Path | None) -> Tls | None:
    from serve.tls import Tls, own_certificate

    if https and (certificate or key):
        raise UserError("--https makes a certificate; leave it out beside --tls-cert and --tls-key")
    if https:
        return own_certificate(RUNS / "https")
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        missing = "--tls-cert" if certificate is None else "--tls-key"
        raise UserError(f"TLS needs a certificate and its key; give {missing}, too")
    return Tls(certificate, key)


def _hurry_when_asked(running: Running) -> None:
    """A second Ctrl-C cuts the sessions, and ends this process within `END_S` in any case."""

    def hurry(*_: object) -> None:
        if not running.hurry.is_set():
            running.hurry.set()
            timer = threading.Timer(END_S, running.abandon)
            timer.daemon = True
            timer.start()

    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, hurry)


def serve_settings(
    arguments: Iterable[str], defaults: dict[str, Any] | None = None
) -> ServeSettings:
    """`[MODEL]... [KEY=VALUE]...` as settings, over `defaults`. Raises UserError with the key."""
    from pipelines.config.merge import plain_overrides
    from serve.settings import ServeSettings

    given = list(arguments)
    named = list(takewhile(lambda argument: "=" not in argument, given))
    values: Any = {**(defaults or {}), **plain_overrides(given[len(named) :], "max_sessions=4")}
    for key in ("token_file", "log_dir"):  # replicas have another working directory
        if values.get(key):
            values[key] = str(Path(values[key]).absolute())
    if values.get("models") and named:
        raise UserError(f"models={values['models']} names all; leave {' '.join(named)} out")
    if len(named) > 1:
        values["models"] = named
    # Wrong settings are named before a model is looked for.
    if values.get("models"):
        settings = ServeSettings.from_args(values)
        return replace(settings, models=tuple(_found(model) for model in settings.models))
    model = values.pop("model", None) or next(iter(named), None)
    settings = ServeSettings.from_args({"model": model or "demo", **values})
    return replace(settings, model=_found(model))


def _found(model: str | None) -> str:
    """The folder that is meant, or a models:/ reference as it is: that is looked up where the
    application is built, which knows the version's name."""
    return model if model and model.startswith(SCHEME) else chosen_model(model)


@contextmanager
def application(
    settings: ServeSettings,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    registry: str | None = None,
    tls: Tls | None = None,
) -> Iterator[Running]:
    """The application, started, and stopped at the end; `port` null takes a free one.

    `registry` is the MLflow of models:/ references, by default the one that training uses.
    """
    from serve.run import free_port, start

    running = start(settings, host=host, port=port or free_port(), registry=registry, tls=tls)
    try:
        yield running
    finally:
        running.stop()


def print_running(
    console: Console, running: Running, settings: ServeSettings, trust: Path | None = None
) -> None:
    """Where the page is, how to stream, how to stop. `trust` is a certificate of our own."""
    models = running.models()
    token = " --token TOKEN" if settings.token_file else ""
    prompt = shlex.quote((models[0].get("card", {}).get("prompts") or ["make it night"])[0])
    command = f"{command_name('liveedit')} edit IN.mp4 OUT.mp4 --prompt {prompt}"
    trusting = f"SSL_CERT_FILE={shlex.quote(short(trust))} " if trust else ""
    lines = {
        "page": running.url,
        "elsewhere": ", ".join(_elsewhere(running)),
        "client": f"{trusting}{command} --url {shlex.quote(running.stream_url)}{token}",
        **{
            f"model {number}" if len(models) > 1 else "model": _model_line(model, settings)
            for number, model in enumerate(models, 1)
        },
        "stop": "Ctrl-C",
    }
    if settings.log_dir:
        lines["logs"] = settings.log_dir
    elif running.folder is not None:
        lines["logs"] = f"{running.folder}/session_latest/logs/serve"
    for name, value in lines.items():
        if value:
            console.print(item(name, value, 10), soft_wrap=True)
    if trust:
        line = "  a browser asks once whether it may trust this machine's own certificate"
        console.print(line, soft_wrap=True)
    if running.host == ALL and not settings.token_file:
        console.print(
            "  everybody who reaches this machine may use it; with a token only who has one: "
            f"{command_name('liveedit')} token ME >> tokens, then token_file=tokens",
            soft_wrap=True,
        )


def _elsewhere(running: Running) -> list[str]:
    """Addresses for other machines, where there are any."""
    from serve.tls import addresses

    scheme = running.url.partition(":")[0]
    return [f"{scheme}://{a}:{running.port}" for a in addresses()] if running.host == ALL else []


def _model_line(model: dict[str, Any], settings: ServeSettings) -> str:
    where = settings.model or model["model"]
    told = f"{model['name']} ({where}), {model['width']}x{model['height']} at {model['fps']:g} fps"
    if not model["editors"]:
        return f"{told}, loaded when it is asked for"
    seconds = f"{model['chunk_seconds']:.2f} s a chunk of {model['chunk_frames']} frames"
    return f"{told} on {model['device']}, {seconds}"

"""`liveedit doctor`: what this machine has, and what is missing for what."""

from __future__ import annotations

import errno
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.text import Text

from pipelines.commands.show import console

PACKAGES = {  # and what nobody can do without it
    "torch": "training and no editing",
    "ray": "training and no serving",
    "deepspeed": "training",
    "mlflow": "training and no models:/ references",
    "av": "video files",
    "webdataset": "datasets",
    "omegaconf": "settings",
    "starlette": "serving",
}
ROOM_GB = 5  # that `liveedit demo` and its MLflow need with room to spare
MLFLOW_PORT = 5000

Verdict = Literal["ok", "absent", "broken"]
STYLES: dict[Verdict, str] = {"ok": "green", "absent": "default", "broken": "red"}


@dataclass(frozen=True)
class Finding:
    """`absent` is what one can do without, `broken` what stops the work named in `what`."""

    name: str
    state: Verdict
    what: str


def doctor(
    port: Annotated[
        int, typer.Option(help="The port you mean to serve on.", min=1, max=65535)
    ] = 8000,
) -> None:
    """Look at this machine: versions, GPUs, kernels, disk, ports, MLflow and S3.

    Every line says what is there or what is missing for what. Ends with 1 if something is broken
    that the demo needs.
    """
    broken = 0
    looks: dict[str, Callable[[], Iterable[Finding]]] = {
        "packages": _packages,
        "GPU": _gpus,
        "room": _room,
        "ports": partial(_ports, port),
        "MLflow": _mlflow,
        "S3": _s3,
        "tools": _tools,
    }
    for name, look in looks.items():
        for finding in _whatever_is_missing(name, look):
            broken += finding.state == "broken"
            console.print(
                Text.assemble(
                    (f"  {finding.state:<8}", STYLES[finding.state]),
                    (f"{finding.name:<12}", "bold"),
                    finding.what,
                ),
                soft_wrap=True,
            )
    if broken:
        console.print(f"\n{broken} broken", style="red")
        raise typer.Exit(1)
    console.print("\nNothing is broken. Next: liveedit serve")


def _whatever_is_missing(name: str, look: Callable[[], Iterable[Finding]]) -> Iterator[Finding]:
    """What `look` finds, or that a package is not there or does not load with which it would."""
    try:
        yield from look()
    except (ImportError, OSError) as error:
        yield Finding(name, "broken", f"cannot be looked at ({error}); run `make venv`")


def show_version(wanted: bool) -> None:
    """`--version`: the release, the commit where there is one, and what it runs on."""
    if not wanted:
        return
    from pipelines.tracking.tracker import code_commit

    line = f"liveedit {version('liveedit')}, commit {code_commit() or 'unknown'}"
    console.print(line, soft_wrap=True)
    raise typer.Exit


def _packages() -> Iterator[Finding]:
    right = sys.version_info >= (3, 11)
    what = f"{platform.python_version()}, {sys.executable}"
    yield Finding("Python", "ok" if right else "broken", what if right else f"{what}; needs 3.11")
    for name, use in PACKAGES.items():
        try:
            yield Finding(name, "ok", version(name))
        except PackageNotFoundError:
            yield Finding(name, "broken", f"not installed, so no {use}; run `make venv`")


def _gpus() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding(
            "GPU", "absent", "torch sees none: the demo's sizes run on CPUs, Wan's do not"
        )
        return
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        memory = f"{card.total_memory / 2**30:.0f} GiB"
        text = f"{card.name}, {memory}, capability {card.major}.{card.minor}"
        yield Finding(f"GPU {index}", "ok", text)
    yield _kernels()


def _kernels() -> Finding:
    """Loads a small editor on the GPU, which compiles what it needs."""
    from modeling.editor import StreamingEditor

    try:
        StreamingEditor.load("demo", device="cuda")
    except Exception as error:  # whatever a compiler or driver raises is the finding
        return Finding("kernels", "broken", f"{type(error).__name__}: {error}".splitlines()[0])
    return Finding("kernels", "ok", "Triton's and NVRTC's are compiled")


def _room() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    what = f"{free:.0f} GB free in {Path.cwd()}"
    short = f"{what}; a demo wants {ROOM_GB}"
    yield Finding("disk", "ok" if free >= ROOM_GB else "broken", what if free >= ROOM_GB else short)
    if not os.access(Path.cwd(), os.W_OK):
        yield Finding(
            "folder", "broken", f"{Path.cwd()} cannot be written to: nothing can be made here"
        )
    shared = Path("/dev/shm")
    if shared.is_dir():
        size = shutil.disk_usage(shared).free / 1e9
        text = f"{size:.1f} GB of shared memory; Ray wants 2 or more, and else uses the disk"
        yield Finding("/dev/shm", "ok" if size >= 2 else "absent", text)
    yield Finding("CPU", "ok", f"{len(os.sched_getaffinity(0))} cores for this process")


def _ports(port: int) -> Iterator[Finding]:
    for number, use in ((port, "liveedit serve"), (MLFLOW_PORT, "mlflow ui")):
        obstacle = _obstacle(number)
        text = f"{obstacle}: `{use}` needs another --port" if obstacle else f"free for `{use}`"
        yield Finding(f"port {number}", "absent" if obstacle else "ok", text)


def _mlflow() -> Iterator[Finding]:
    from infra.runtime.registry import resolve_uri
    from pipelines.tracking.tracker import TrackingError, check_reachable

    uri = resolve_uri(None)
    path = Path(uri.removeprefix("sqlite:///")) if uri.startswith("sqlite:///") else None
    if path and not path.exists():
        yield Finding("MLflow", "ok", f"{path}, made when needed")
        return
    try:
        check_reachable(uri)
    except TrackingError as error:
        yield Finding("MLflow", "broken", str(error))
    else:
        yield Finding("MLflow", "ok", f"{path}, there" if path else f"{uri} answers")


def _s3() -> Iterator[Finding]:
    from data.store import DatasetError, s3_buckets
    from infra.runtime.environment import variable

    endpoint = variable("AWS_ENDPOINT_URL_S3") or variable("AWS_ENDPOINT_URL")
    if not endpoint and not variable("AWS_ACCESS_KEY_ID") and not variable("AWS_PROFILE"):
        text = "no AWS_ENDPOINT_URL and no keys: datasets on disk only"
        yield Finding("S3", "absent", text)
        return
    try:
        buckets = s3_buckets()
    except DatasetError as error:
        yield Finding("S3", "broken", f"{error}; s3:// datasets cannot be read")
        return
    may = "may not list buckets" if buckets is None else f"open {len(buckets)} buckets"
    yield Finding("S3", "ok", f"{endpoint or 'AWS'} answers, and these keys {may}")


def _tools() -> Iterator[Finding]:
    for name, use in (("git", "commits in records"), ("chromium", "the page's tests")):
        found = shutil.which(name)
        yield Finding(name, "ok" if found else "absent", found or f"not found: no {use}")


def _obstacle(port: int) -> str:
    """Why nobody here can listen on a port; empty where one can."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            return "something listens there" if taken else f"not allowed here ({error.strerror})"
    return ""

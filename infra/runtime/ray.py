"""The Ray that this process works on: a private one, or a cluster that runs already.

A private Ray has a folder and a token of its own and never looks at other Rays of this host; ending
it ends exactly the processes that it started. Ray is imported when it is needed, which takes
seconds.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from infra.runtime.environment import environment, unless_set
from infra.runtime.errors import UserError
from infra.runtime.paths import ROOT
from infra.runtime.ray_private import reread_settings

# Of this tree, what a cluster's workers get. Ray would pack all that lies in it and no .gitignore
# names, send it through the head's memory, and refuse 500 MiB.
SENT = ["data", "infra", "modeling", "pipelines", "serve"]
LEFT_BEHIND = ["/*", "!/.", *(f"!/{package}" for package in SENT), "__pycache__"]
CONNECT_S = 10.0  # for a cluster to answer
END_S = 2.0  # for Ray's processes to end by themselves
STUCK_S = 15.0  # for Ray's start to hear that it shall stop


class ClusterError(UserError):
    """Ray cannot be started or reached; the message says what to do."""

    exit_code = 75  # of a command, see `pipelines.exits`: what is not there may come


@contextmanager
def private_ray(cpus: int, **options: Any) -> Iterator[Path]:
    """A Ray that may plan with `cpus`, ended at the end; `options` are further ones of `ray.init`.

    Yields its folder, which goes with it. On an error the folder, with every worker's log, is kept
    and named in a note on the exception. Raises ClusterError.
    """
    folder = Path(tempfile.mkdtemp(prefix="liveedit-ray-", dir=_short_tmp()))
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    variables = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_AUTH_TOKEN": None,
        **unless_set({"RAY_USAGE_STATS_ENABLED": "0"}),
    }
    place = {"address": "local", "include_dashboard": False, "_temp_dir": str(folder)}
    keep = False
    with environment(variables):
        reread_settings()
        try:
            try:
                with _stopped_in_time(folder):
                    _init(num_cpus=cpus, **place, **options)
            except Exception as error:
                raise ClusterError(f"Ray did not start on this machine: {error}") from error
            yield folder
        except Exception as error:
            keep = True
            error.add_note(f"The workers' logs are in {folder}/session_latest/logs")
            raise
        finally:
            _shutdown(folder)
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _stopped_in_time(folder: Path) -> Iterator[None]:
    """End this process and its Ray where it is told to stop within, and does not.

    About one start in 30 waits in Ray's own code for ever after SIGTERM, where no handler of
    Python's is run. The bytes that Python's signals write are read beside it.
    """
    if threading.current_thread() is not threading.main_thread():  # signals are not this one's
        yield
        return
    heard, told = socket.socketpair()
    told.setblocking(False)
    started = threading.Event()

    def watch() -> None:
        with heard:
            while number := heard.recv(1):
                if number[0] in (signal.SIGTERM, signal.SIGINT) and not started.wait(STUCK_S):
                    _end_at_once(folder, number[0])

    before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        started.set()
        signal.set_wakeup_fd(before)
        told.close()


def _end_at_once(folder: Path, number: int) -> None:
    print(f"Ray's start did not hear signal {number}; it is ended", file=sys.stderr, flush=True)
    for _ in range(5):  # what is killed may have been starting others; nothing is waited for long
        processes = _processes(folder) - {psutil.Process()}
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=END_S)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(128 + number)


def _shutdown(folder: Path) -> None:
    """Ray's end, and that of all that writes into `folder`: its agents outlive it by seconds, and
    where Ray was still starting, its daemon starts them even now."""
    import ray

    processes = _processes(folder)
    ray.shutdown()
    while processes := processes | _processes(folder):
        _, late = psutil.wait_procs(processes, timeout=END_S)
        for process in late:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(late, timeout=END_S)  # a zombie whose parent does not ask stays one
        processes = set()


def _processes(folder: Path) -> set[psutil.Process]:
    """Those that were started with `folder` or write there, orphans too, and what they started."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            said = " ".join(process.cmdline())
            paths = [said]
            if said.startswith("ray::"):  # Ray gives its processes titles over their arguments
                paths = [file.path for file in process.open_files()]
            if any(str(folder) in path for path in paths):
                found |= {process, *process.children(recursive=True)}
    return found


@contextmanager
def joined_ray(
    address: str, setting: str, *, env_vars: Mapping[str, str] | None = None, **options: Any
) -> Iterator[None]:
    """The cluster at `address`, which `setting` names; its workers get our packages and `env_vars`.

    It goes on at the end. In a job that was submitted with a working directory of its own, Ray
    would refuse ours beside it; this process runs this tree, and so shall they. Raises
    ClusterError.
    """
    check_address(address, setting)
    import ray

    reread_settings()  # of a private Ray that was there before
    workers = {"working_dir": str(ROOT), "excludes": LEFT_BEHIND, "env_vars": dict(env_vars or {})}
    try:
        with environment(unless_set({"RAY_OVERRIDE_JOB_RUNTIME_ENV": "1"})):
            _init(address=address, runtime_env=workers, **options)
    except ConnectionError as error:  # though something listens there
        remedy = "set RAY_AUTH_MODE=token if it asks for the token in ~/.ray/auth_token, as a head "
        remedy += "does that found one there; start it if it is not Ray"
        raise _unreachable(address, setting, error, remedy) from error
    try:
        yield
    finally:
        ray.shutdown()


def check_address(address: str, setting: str) -> None:
    """Raise a ClusterError if nothing listens at HOST:PORT, which Ray would try for minutes, and a
    UserError for what is no address."""
    host, _, port = address.rpartition("//")[2].partition("/")[0].rpartition(":")
    if not port.isdigit():
        if address not in ("auto", "local") and "://" not in address:  # a scheme of Ray's own
            raise UserError(
                f"{setting}={address} is no address of a Ray cluster; write ray://HOST:10001, "
                "HOST:6379, or auto for the one that runs on this machine"
            )
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise _unreachable(address, setting, error) from error


def _unreachable(
    address: str, setting: str, error: Exception, remedy: str = "start it"
) -> ClusterError:
    return ClusterError(
        f"{setting}={address}: no Ray cluster answers there ({error}); {remedy}, or leave "
        f"{setting} out for a private Ray on this machine"
    )


def _init(**options: Any) -> None:
    """`ray.init`, quiet, and a program's own handler of SIGTERM stays in force."""
    import ray

    handler = signal.getsignal(signal.SIGTERM)
    ray.init(log_to_driver=False, logging_level=logging.WARNING, **options)
    ours = handler is not signal.SIG_DFL
    if ours and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)


def _short_tmp() -> str | None:
    """Ray's socket names must stay below 108 bytes: /tmp where TMPDIR is a long path."""
    return "/tmp" if len(tempfile.gettempdir()) > 30 and os.access("/tmp", os.W_OK) else None

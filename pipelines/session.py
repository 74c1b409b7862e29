"""One Ray for a whole pipeline: a private one that is started and ended here, or a given cluster.

A private Ray lives in its own folder with its own token and never looks at other Rays of this
host; ending it ends exactly the processes that it started.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OBJECT_STORE_BYTES = 256 << 20  # training hands over paths, not objects
_TOKEN_ENV = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
_CONNECT_SECONDS = 10
ROOT = Path(__file__).parent.parent
_LEFT_BEHIND = ["runs", "**/__pycache__", "*.mp4", ".mypy_cache", ".ruff_cache"]


class SessionError(ValueError):
    """Ray cannot be started or reached; the message says what to do."""


@contextmanager
def ray_session(address: str | None, workers: int) -> Iterator[None]:
    """Ray for `workers` training processes: private when `address` is null, else that cluster.

    On an error the private Ray's folder, with every worker's log, is kept and named in a note on
    the exception.
    """
    if address is None:
        with _private_ray(workers):
            yield
        return
    check_address(address)
    import ray

    try:
        ray.init(
            address=address,
            runtime_env={"working_dir": str(ROOT), "excludes": _LEFT_BEHIND},
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except ConnectionError as error:
        raise _unreachable(address, error) from error
    try:
        yield
    finally:
        ray.shutdown()  # disconnects; the cluster goes on


def check_address(address: str) -> None:
    """Raise a SessionError if nothing listens at HOST:PORT, which Ray would try for minutes."""
    host, _, port = address.rpartition("//")[2].partition("/")[0].rpartition(":")
    if not port.isdigit():
        return  # "auto", or a scheme of Ray's own
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        raise _unreachable(address, error) from error


def _unreachable(address: str, error: Exception) -> SessionError:
    return SessionError(
        f"compute.address={address}: no Ray cluster answers there ({error}); start it, or set "
        "compute.address=null for a private Ray on this machine"
    )


@contextmanager
def _private_ray(workers: int) -> Iterator[None]:
    folder = Path(tempfile.mkdtemp(prefix="liveedit-ray-", dir=_short_tmp()))
    before = {name: os.environ.get(name) for name in _TOKEN_ENV}
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    _reread_token()

    keep = False
    try:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, workers),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
            _temp_dir=str(folder),
        )
        yield
    except Exception as error:
        keep = True
        error.add_note(f"The workers' logs are in {folder}/session_latest/logs")
        raise
    finally:
        ray.shutdown()
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _reread_token() -> None:
    """Make Ray read the token settings again: it does so once a process, when it is imported, which
    may have been long ago, and keeps the token of an earlier session."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def _short_tmp() -> str | None:
    """Ray's socket names must stay below 108 bytes: /tmp where TMPDIR is a long path."""
    return "/tmp" if len(tempfile.gettempdir()) > 30 and os.access("/tmp", os.W_OK) else None

"""Start the application on this machine, or on the cluster that RAY_ADDRESS names, and stop it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import shutil
import signal
import socket
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import ray
from ray import serve as ray_serve
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.serve.config import HTTPOptions

from serve import ingress
from serve.app import build
from serve.hub import NAMESPACE, replicas
from serve.model_source import model_directory
from serve.settings import ServeSettings

APP = "liveedit"
SYSTEM_CPUS = 1.0  # beside the replicas, for Serve's own actors
READY_S = 180.0
TOKEN = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


class StartError(RuntimeError):
    """The application did not come up; the message says where to look."""


@dataclass
class Running:
    """A started application. `url` is the page, `stream_url` what clients open."""

    host: str
    port: int
    folder: Path | None  # Ray's files and logs, when this process started Ray
    environment: dict[str, str | None]  # what `stop` puts back

    @property
    def url(self) -> str:
        return f"http://{self._address}"

    @property
    def stream_url(self) -> str:
        return f"ws://{self._address}"

    @property
    def _address(self) -> str:
        return f"{'localhost' if self.host == '0.0.0.0' else self.host}:{self.port}"

    def wait_ready(self, timeout_s: float = READY_S) -> None:
        """Returns when an editor is warmed up. Raises StartError."""
        deadline = time.monotonic() + timeout_s
        reason = "no answer"
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.url}/readyz", timeout=5):
                    return
            except urllib.error.HTTPError as error:
                reason = error.read().decode(errors="replace")[:200]
            except OSError as error:
                reason = str(error)
            time.sleep(0.2)
        raise StartError(f"{self.url} is not ready after {timeout_s:g} s: {reason}")

    def kill(self, deployment: str) -> str | None:
        """Kill a replica of "editor" or "front" as a machine that loses its power would.

        For tests and measurements on this machine. Returns its id, None if none is alive.
        """
        for replica in replicas(APP):
            if replica.deployment == deployment and replica.running and replica.pid:
                with contextlib.suppress(ProcessLookupError):  # dead, Serve has not noticed yet
                    os.kill(replica.pid, signal.SIGKILL)
                    return replica.name
        return None

    def stop(self, *, keep_logs: bool = False) -> None:
        """Ends the application, and Ray if `start` started it."""
        if ray.is_initialized():
            ray_serve.delete(APP)
            with contextlib.suppress(ValueError):  # it may have ended itself
                ray.kill(ray.get_actor(f"hub-{APP}", namespace=NAMESPACE))
            if self.folder is not None:
                ray_serve.shutdown()
            ray.shutdown()
        if self.folder is not None and not keep_logs:
            shutil.rmtree(self.folder, ignore_errors=True)
        for name, value in self.environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def start(
    settings: ServeSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    cpus: int | None = None,
) -> Running:
    """Start Ray (unless RAY_ADDRESS names one), Serve's ingress on `port`, and the application.

    `cpus` is what Ray may plan with, by default what the replicas ask for or this machine has.
    Raises ValueError for settings that cannot work and StartError.
    """
    model_directory(settings.model)  # before minutes are spent
    folder = None
    environment = {name: os.environ.get(name) for name in (*ingress.ENVIRONMENT, *TOKEN)}
    if not os.environ.get("RAY_ADDRESS"):
        _check_port(host, port)
        # Unix sockets have short names, and Ray adds 60 characters to this one.
        folder = Path(tempfile.mkdtemp(prefix="liveedit-ray-", dir="/tmp"))
    running = Running(host, port, folder, environment)
    try:
        if folder is not None:
            _start_ray(folder, settings, cpus)
        else:
            ray.init(namespace=NAMESPACE, logging_level=logging.WARNING, log_to_driver=False)
        ray_serve.start(
            proxy_location="HeadOnly",
            http_options=HTTPOptions(host=host, port=port),
            logging_config={"log_level": "INFO"},
        )
        ray_serve.run(build(settings), name=APP, route_prefix="/", blocking=False)
        running.wait_ready()
    except Exception as error:
        running.stop(keep_logs=True)
        where = f"; its logs are in {folder}/ray/session_latest/logs" if folder else ""
        raise StartError(f"the application did not start: {error}{where}") from error
    except BaseException:
        running.stop()
        raise
    return running


def _check_port(host: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"cannot listen on {host}:{port} ({error}); choose another port"
            ) from (error)


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _start_ray(folder: Path, settings: ServeSettings, cpus: int | None) -> None:
    """A Ray of our own: its files, its token and its namespace are not shared with another."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ.update(ingress.ENVIRONMENT)
    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray reads these once a process, when it is imported: make it read them again.
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    needed = (
        settings.max_editors * settings.editor_cpus
        + settings.fronts * settings.front_cpus
        + SYSTEM_CPUS
    )
    ray.init(
        address="local",
        namespace=NAMESPACE,
        include_dashboard=False,
        num_cpus=cpus or max(math.ceil(needed), os.cpu_count() or 1),
        _temp_dir=str(folder / "ray"),
        logging_level=logging.WARNING,
        log_to_driver=False,
    )

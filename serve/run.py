"""Start the application on this machine, or on the cluster that RAY_ADDRESS names, and stop it."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path

import ray
import torch
from ray import serve as ray_serve
from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client, _set_global_client
from ray.serve.schema import ApplicationStatus

from serve import ingress
from serve.app import build
from serve.hub import NAMESPACE, replicas
from serve.settings import ServeSettings

APP = "liveedit"
SYSTEM_CPUS = 1.0  # beside the replicas, for Serve's own actors
READY_S = 180.0
CONNECT_S = 10.0  # for a cluster to answer
ROOT = Path(__file__).parent.parent
LEFT_BEHIND = ["runs", "**/__pycache__", "*.mp4", ".mypy_cache", ".ruff_cache"]
ENVIRONMENT = (  # what `start` sets in this process, and `stop` puts back
    *ingress.ENVIRONMENT,
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_worker_niceness",
    "MLFLOW_TRACKING_URI",
)


class StartError(ValueError):
    """The application did not come up; the message says where to look."""


@dataclass
class Running:
    """A started application. `url` is the page, `stream_url` what clients open."""

    host: str
    port: int
    folder: Path | None  # Ray's files and logs, when this process started Ray
    environment: dict[str, str | None]  # what `stop` puts back
    started_serve: bool = False

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
        """Ends the application, and Serve and Ray if `start` started them."""
        if _serve_runs():
            ray_serve.delete(APP)
            # Serve's own actors end with a Ray that is ours.
            if self.folder is None and self.started_serve and not ray_serve.status().applications:
                ray_serve.shutdown()
        if ray.is_initialized():
            with contextlib.suppress(ValueError):  # it may have ended itself
                ray.kill(ray.get_actor(f"hub-{APP}", namespace=NAMESPACE))
            _set_global_client(None)
            ray.shutdown()
        if self.folder is not None and not keep_logs:
            shutil.rmtree(self.folder, ignore_errors=True)
        _put_back(self.environment)


def start(
    settings: ServeSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    cpus: int | None = None,
    registry: str | None = None,
) -> Running:
    """Start Ray (unless RAY_ADDRESS names one), Serve's ingress on `port`, and the application.

    `cpus` is what Ray may plan with, by default what the replicas ask for or this machine has.
    `registry` is the MLflow that models:/ references are looked up in (MLFLOW_TRACKING_URI).
    On a machine with a GPU whose settings say nothing of GPUs an editor gets one.
    Raises ValueError for settings that cannot work and StartError.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address and address.startswith("ray://"):
        raise ValueError(
            f"RAY_ADDRESS={address} is a Ray client's address; serve from a node of the cluster "
            "with RAY_ADDRESS=auto, or use `serve deploy`"
        )
    if address:
        _check_address(address)
    else:
        _check_port(host, port)
        if settings.device == "auto" and not settings.editor_gpus and torch.cuda.is_available():
            settings = replace(settings, editor_gpus=1.0)
        if settings.fp8 and not (settings.editor_gpus or settings.device.startswith("cuda")):
            raise ValueError(
                "serve setting fp8=true needs an editor with a GPU, and this machine has none for "
                "it; leave it out, or set editor_gpus"
            )
        wanted, there = settings.min_editors * settings.editor_gpus, torch.cuda.device_count()
        if wanted > there:
            raise ValueError(
                f"{settings.min_editors} editors with editor_gpus={settings.editor_gpus:g} need "
                f"{wanted:g} GPUs, and torch sees {there} here; lower min_editors or editor_gpus"
            )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # in this process
    running = Running(host, port, None, {name: os.environ.get(name) for name in ENVIRONMENT})
    if registry is not None:
        os.environ["MLFLOW_TRACKING_URI"] = registry
    try:
        application = build(settings)  # what is wrong shows here, before minutes are spent
        if address:
            _join_ray(address, host, port)
    except ValueError:
        _put_back(running.environment)  # nothing was started, and another one may run here
        raise
    try:
        if not address:
            # Unix sockets have short names, and Ray adds 60 characters to this one.
            running.folder = Path(tempfile.mkdtemp(prefix="liveedit-ray-", dir="/tmp"))
            _start_ray(running.folder, settings, cpus)
        running.started_serve = not _serve_runs()
        ray_serve.start(
            proxy_location="HeadOnly",
            http_options=HTTPOptions(host=host, port=port),
            logging_config={"log_level": "INFO"},
        )
        ray_serve.run(application, name=APP, route_prefix="/", blocking=False)
        running.wait_ready()
    except Exception as error:
        reason = _deploy_failure() or error
        running.stop(keep_logs=True)
        logs = f"; its logs are in {running.folder}/ray/session_latest/logs"
        where = logs if running.folder else ""
        raise StartError(f"the application did not start: {reason}{where}") from error
    except BaseException:
        running.stop()
        raise
    return running


def _put_back(environment: dict[str, str | None]) -> None:
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def _serve_runs() -> bool:
    """Asked first: Serve's calls start another Ray where there is none."""
    if not ray.is_initialized():
        return False
    return _get_global_client(raise_if_no_controller_running=False) is not None


def _deploy_failure() -> str | None:
    """Why Serve has given a deployment up, in a line; None if it has not."""
    if not _serve_runs():
        return None
    application = ray_serve.status().applications.get(APP)
    if application is None or application.status != ApplicationStatus.DEPLOY_FAILED:
        return None
    messages = [d.message for d in application.deployments.values() if d.message]
    lines = [line.strip() for line in "\n".join(messages).splitlines() if line.strip()]
    causes = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line)]
    return (causes or lines or [application.message])[-1]


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


def _check_address(address: str) -> None:
    """Raises StartError when nobody listens at HOST:PORT, which Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return  # "auto"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> StartError:
    return StartError(
        f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}); start it, or unset "
        "RAY_ADDRESS for a Ray of our own on this machine"
    )


def _join_ray(address: str, host: str, port: int) -> None:
    """The cluster at `address`; its workers get this tree, and its ingress what it needs.

    Raises ValueError, and leaves the cluster as it was, when there is no place in its Serve.
    """
    try:
        ray.init(
            address=address,
            namespace=NAMESPACE,
            runtime_env={
                "working_dir": str(ROOT),
                "excludes": LEFT_BEHIND,
                "env_vars": ingress.ENVIRONMENT,
            },
            logging_level=logging.WARNING,
            log_to_driver=False,
        )
    except ConnectionError as error:
        raise _no_cluster(address, error) from error
    try:
        _check_serve(host, port)
    except ValueError:
        _set_global_client(None)
        ray.shutdown()
        raise


def _check_serve(host: str, port: int) -> None:
    """A cluster's Serve listens at one place and has one application of ours. Raises ValueError."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        _check_port(host, port)
        return
    there = client.http_config
    if APP in ray_serve.status().applications:
        raise ValueError(
            f"an application {APP} runs on {there.host}:{there.port} of this cluster already; stop "
            "it first, or change it with `serve deploy`"
        )
    if (there.host, there.port) != (host, port):
        raise ValueError(
            f"Serve listens on {there.host}:{there.port} in this cluster already, so not on "
            f"{host}:{port}; choose that host and port, or end it with `serve shutdown`"
        )


def _start_ray(folder: Path, settings: ServeSettings, cpus: int | None) -> None:
    """A Ray of our own: its files, its token and its namespace are not shared with another."""
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    os.environ.update(ingress.ENVIRONMENT)
    os.environ.pop("RAY_AUTH_TOKEN", None)
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
    # Ray's workers are nice to others by default, which on a busy machine starves live video.
    os.environ.setdefault("RAY_worker_niceness", "0")
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

"""Start the application on this machine, or on the cluster that RAY_ADDRESS names, and stop it."""

from __future__ import annotations

import contextlib
import errno
import logging
import math
import os
import re
import shutil
import signal
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from ray import serve as ray_serve
from ray.serve import Application
from ray.serve.config import HTTPOptions
from ray.serve.schema import ApplicationStatus

from infra.runtime.environment import environment, unless_set, variable
from infra.runtime.errors import UserError
from infra.runtime.ray import joined_ray, private_ray
from infra.runtime.ray_private import forget_serve, serve_client, serve_replicas
from serve import ingress
from serve.app import build
from serve.hub.hub import NAMESPACE, hub_name
from serve.settings import ServeSettings
from serve.tls import Tls

APP = "liveedit"
SYSTEM_CPUS = 1.0  # beside the replicas, for Serve's own actors
READY_S = 180.0
DELETE_S = 30.0  # for a cluster to stop the replicas
CALL_S = 5.0  # for the hub to answer
TICK_S = 0.3


class StartError(UserError):
    """The application did not come up; the message says where to look."""


@dataclass
class Running:
    """A started application. `url` is the page, `stream_url` what clients open."""

    host: str
    port: int
    tls: Tls | None = None
    folder: Path | None = None  # Ray's files and logs, when this process started Ray
    resources: ExitStack = field(default_factory=ExitStack)  # what `stop` ends
    hurry: threading.Event = field(default_factory=threading.Event)  # set: `stop` waits no longer

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self._address}"

    @property
    def stream_url(self) -> str:
        return f"{'wss' if self.tls else 'ws'}://{self._address}"

    @property
    def _address(self) -> str:
        return f"{'localhost' if self.host == '0.0.0.0' else self.host}:{self.port}"

    def wait_ready(self, timeout_s: float = READY_S) -> None:
        """Returns when an editor is warmed up. Raises StartError."""
        deadline = time.monotonic() + timeout_s
        reason = "no answer"
        # Its certificate is made out to another name than this machine calls itself here.
        trust = ssl._create_unverified_context() if self.tls else None
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.url}/readyz", timeout=5, context=trust):
                    return
            except urllib.error.HTTPError as error:
                reason = error.read().decode(errors="replace")[:200]
            except OSError as error:
                reason = str(error)
            time.sleep(0.2)
        raise StartError(f"{self.url} is not ready after {timeout_s:g} s: {reason}")

    def models(self) -> list[dict[str, Any]]:
        """What `/v1/models` says of the models, without a token and without what holds for all.
        Raises StartError."""
        try:
            models: list[dict[str, Any]] = ray.get(_hub().models.remote(), timeout=CALL_S)
        except (ValueError, ray.exceptions.RayError) as error:
            raise StartError(f"the hub does not say which models there are: {error}") from error
        if not models:
            raise StartError("no editor says which model it has")
        return models

    def kill(self, deployment: str) -> str | None:
        """Kill a replica of "editor" or "front", or the "hub", as a machine that loses its power
        would.

        For tests and measurements on this machine. Returns its id, None if none is alive.
        """
        if deployment == "hub":
            try:
                pid: Any = ray.get(_hub().pid.remote(), timeout=CALL_S)
                os.kill(pid, signal.SIGKILL)
            except (ValueError, ray.exceptions.RayError):  # it is being started again
                return None
            return "hub"
        for replica in serve_replicas(APP):
            if replica.deployment == deployment and replica.running and replica.pid:
                with contextlib.suppress(ProcessLookupError):  # dead, Serve has not noticed yet
                    os.kill(replica.pid, signal.SIGKILL)
                    return replica.name
        return None

    def stop(self) -> None:
        """Ends the application, and Serve and Ray if `start` started them.

        Sessions have `ServeSettings.stop_s` to finish, or until `hurry` is set; their clients hear
        that the server is stopped.
        """
        self.resources.close()

    def abandon(self) -> None:
        """Ends this process and all that it started, at once: for a `stop` that hangs."""
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
        os._exit(1)


def start(
    settings: ServeSettings,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    cpus: int | None = None,
    registry: str | None = None,
    tls: Tls | None = None,
) -> Running:
    """Start Ray (unless RAY_ADDRESS names one), Serve's ingress on `port`, and the application.

    `cpus` is what Ray may plan with, by default what the replicas ask for or this machine has.
    `registry` is the MLflow that models:/ references are looked up in, by default the one that
    training uses.
    On a machine with a GPU whose settings say nothing of GPUs an editor gets one.
    Raises UserError for settings that cannot work and StartError.
    """
    if tls is not None:
        tls.check()
    address = variable("RAY_ADDRESS")
    if address and address.startswith("ray://"):
        raise UserError(
            f"RAY_ADDRESS={address} is a Ray client's address; serve from a node of the cluster "
            "with RAY_ADDRESS=auto, or use `serve deploy`"
        )
    if not address:
        _check_port(host, port)
        # All processes are on this machine: nobody outside it may reach their links.
        settings = replace(settings, link_host="127.0.0.1")
        if settings.device == "auto" and not settings.editor_gpus and torch.cuda.is_available():
            settings = replace(settings, editor_gpus=1.0)
        if settings.fp8 and not (settings.editor_gpus or settings.device.startswith("cuda")):
            raise UserError(
                "serve setting fp8=true needs an editor with a GPU, and this machine has none for "
                "it; leave it out, or set editor_gpus"
            )
        wanted, there = settings.min_editors * settings.editor_gpus, torch.cuda.device_count()
        if wanted > there:
            raise UserError(
                f"{settings.min_editors} editors with editor_gpus={settings.editor_gpus:g} need "
                f"{wanted:g} GPUs, and torch sees {there} here; lower min_editors or editor_gpus"
            )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # in this process
    # Ray's workers are nice to others by default, which on a busy machine starves live video.
    variables = {**ingress.ENVIRONMENT, **unless_set({"RAY_worker_niceness": "0"})}
    running = Running(host, port, tls)
    with ExitStack() as resources:  # ended here unless all goes well
        resources.enter_context(environment(variables))
        application = build(
            settings, registry
        )  # what is wrong shows here, before minutes are spent
        if address:
            resources.enter_context(
                joined_ray(
                    address, "RAY_ADDRESS", env_vars=ingress.ENVIRONMENT, namespace=NAMESPACE
                )
            )
        else:
            cpus = cpus or max(math.ceil(_cpus(settings)), os.cpu_count() or 1)
            running.folder = resources.enter_context(private_ray(cpus, namespace=NAMESPACE))
        resources.callback(forget_serve)
        if address:
            _check_serve(host, port)
        resources.enter_context(_started(application, running, settings.stop_s))
        running.resources = resources.pop_all()
    return running


@contextmanager
def _started(application: Application, running: Running, stop_s: float) -> Iterator[None]:
    """The application, ready, in this process's Ray; ended with a Serve that was started here."""
    started_serve = not _serve_runs()
    try:
        try:
            ray_serve.start(
                proxy_location="HeadOnly",
                http_options=_http_options(running),
                logging_config={"log_level": "INFO"},
            )
            ray_serve.run(application, name=APP, route_prefix="/", blocking=False)
            running.wait_ready()
        except Exception as error:
            reason = _deploy_failure() or error
            raise StartError(f"the application did not start: {reason}") from error
        yield
        _finish_sessions(running, stop_s)
    finally:
        # Replicas and Serve's own actors end with a Ray that is ours.
        if _serve_runs() and running.folder is None:
            _delete(running)
            if started_serve and not ray_serve.status().applications:
                ray_serve.shutdown()
        if ray.is_initialized():
            with contextlib.suppress(ValueError):  # it may have ended itself
                ray.kill(_hub())


def _hub() -> Any:
    """Raises ValueError where there is none (any more)."""
    return ray.get_actor(hub_name(APP), namespace=NAMESPACE)


def _http_options(running: Running) -> HTTPOptions:
    tls = running.tls
    return HTTPOptions(
        host=running.host,
        port=running.port,
        ssl_certfile=str(tls.certificate.absolute()) if tls else None,
        ssl_keyfile=str(tls.key.absolute()) if tls else None,
    )


def _finish_sessions(running: Running, stop_s: float) -> None:
    """Returns when no client is connected any more, or time is up."""
    deadline = time.monotonic() + stop_s
    with contextlib.suppress(ValueError, ray.exceptions.RayError):  # there is no hub (any more)
        hub = _hub()
        while time.monotonic() < deadline and not running.hurry.is_set():
            if ray.get(hub.stop.remote(), timeout=CALL_S):
                return
            running.hurry.wait(TICK_S)


def _delete(running: Running) -> None:
    """The application, from a cluster that goes on; what it does not get rid of in time it will."""
    ray_serve.delete(APP, _blocking=False)
    deadline = time.monotonic() + DELETE_S
    while time.monotonic() < deadline and not running.hurry.is_set():
        if APP not in ray_serve.status().applications:
            return
        running.hurry.wait(TICK_S)


def _serve_runs() -> bool:
    """Asked first: Serve's calls start another Ray where there is none."""
    if not ray.is_initialized():
        return False
    return serve_client() is not None


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
            why, remedy = error.strerror, f"choose another port, such as --port {free_port()}"
            if error.errno == errno.EADDRINUSE:
                why, remedy = _listener(port) or why, f"stop that, or {remedy}"
            elif error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
                remedy = "--host takes an address of this machine, or 0.0.0.0 for all of them"
            raise UserError(f"cannot listen on {host}:{port} ({why}); {remedy}") from error


def _listener(port: int) -> str | None:
    """Who listens on a port of this machine, as far as this user may know."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.laddr[1:] == (port,) and connection.status == psutil.CONN_LISTEN:
                name = psutil.Process(connection.pid).name() if connection.pid else "a program"
                return f"{name} with pid {connection.pid} listens there"
    return None


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _check_serve(host: str, port: int) -> None:
    """A cluster's Serve listens at one place and has one application of ours. Raises UserError."""
    client = serve_client()
    if client is None:
        _check_port(host, port)
        return
    there = client.http_config
    if APP in ray_serve.status().applications:
        raise UserError(
            f"an application {APP} runs on {there.host}:{there.port} of this cluster already; stop "
            "it first, or change it with `serve deploy`"
        )
    if (there.host, there.port) != (host, port):
        raise UserError(
            f"Serve listens on {there.host}:{there.port} in this cluster already, so not on "
            f"{host}:{port}; choose that host and port, or end it with `serve shutdown`"
        )


def _cpus(settings: ServeSettings) -> float:
    """What the replicas and Serve's own actors ask of Ray."""
    return (
        settings.max_editors * settings.editor_cpus
        + settings.fronts * settings.front_cpus
        + SYSTEM_CPUS
    )

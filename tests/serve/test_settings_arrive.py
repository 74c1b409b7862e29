"""Every setting arrives where it is meant, in each of the processes that an application has.

The processes are made as Ray makes them, of settings that are all unlike the defaults. A new
setting needs a line in `ARRIVES`.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Callable
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from infra.runtime.errors import UserError
from serve import app, run
from serve.admission.admission import Sizes
from serve.editor import replica as editor_replica
from serve.editor.shelf import Shelf
from serve.front import replica as front_replica
from serve.front.front import Front
from serve.hub import client
from serve.hub.client import HubClient
from serve.hub.hub import Hub
from serve.hub.placement import Scale
from serve.limits import Limits
from serve.settings import ServeSettings
from serve.versions.source import ModelSource, find_models
from serve.work_sizes import WorkSizes
from tests.serve.local import local_front
from tests.serve.tokens import write_tokens

pytestmark = pytest.mark.anyio

SERVES = find_models(["demo", "natural"])
LIMITS = Limits(max_sessions=11, resume_s=7.0)


@dataclass
class Built:
    """All of an application, and the server in one process; no model is loaded."""

    settings: ServeSettings
    hub: Hub
    front: Any
    editor: Any
    local: Front
    deployed_front: dict[str, Any]
    deployed_editor: dict[str, Any]

    @property
    def fronts(self) -> list[Front]:
        return [self.front.front, self.local]

    @property
    def shelves(self) -> list[Shelf]:
        backend: Any = self.local.services.backend
        return [self.editor.shelf, backend]


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica of Ray Serve's, without Ray, a hub or models."""
    context = SimpleNamespace(app_name="app", replica_id=SimpleNamespace(unique_id="replica"))
    for module in (front_replica, editor_replica):
        monkeypatch.setattr(module.ray_serve, "get_replica_context", lambda: context)
        monkeypatch.setattr(module, "join_serve_log", lambda: None)
    monkeypatch.setattr(client, "hub_actor", lambda *told: told)
    monkeypatch.setattr(HubClient, "first", lambda _: [])
    monkeypatch.setattr(Shelf, "put", lambda *_: None)


@pytest.fixture
async def built(processes: None, tmp_path: Path) -> AsyncIterator[Built]:
    settings = ServeSettings(
        models=("demo", "natural"), on_new_version="move", editor_memory_gb=2.5, hub_memory_gb=0.5,
        device="meta", fp8=True, work_size="full", detail="off", warm_sizes=("64x48", "96x32"),
        token_file=str(write_tokens(tmp_path / "tokens")), allowed_origins=("https://a.example",),
        max_sessions=3, measured_capacity=False, degrade=False, min_editors=2, max_editors=5,
        spare_editors=1, downscale_delay_s=33.0, editor_gpus=0.5, editor_cpus=2.0, fronts=4,
        front_cpus=0.25, stop_s=9.0, drain_s=50.0, log_format="json", log_dir=str(tmp_path),
        traces=str(tmp_path / "traces"), link_host="127.0.0.2", limits=LIMITS, gpu_hour_cost=2.5,
    )  # fmt: skip
    plain = front_replica.FrontReplica.__mro__[1]  # as it is below Ray's wrapper
    made = Built(
        settings,
        Hub("app", settings, SERVES),
        plain(settings, SERVES, None),  # type: ignore[call-arg]
        editor_replica.EditorReplica(settings, SERVES),
        await local_front(settings),
        front_replica.describe_deployment(settings),
        editor_replica.describe_deployment(settings),
    )
    yield made
    made.hub._watching.cancel()
    made.hub._following.cancel()
    for shelf in made.shelves:
        shelf.on.scheduler.stop()


def ray_actors(built: Built) -> tuple[dict[str, float], dict[str, float]]:
    return (
        built.deployed_front["ray_actor_options"],
        built.deployed_editor["ray_actor_options"],
    )


def deployed(built: Built, name: str) -> list[Any]:
    return [built.deployed_front[name], built.deployed_editor[name]]


SOURCE = ModelSource("demo")
# Of the setting: what is found wherever it is read, and what that should be.
ARRIVES: dict[str, tuple[Callable[[Built], Any], Any]] = {
    "on_new_version": (lambda b: b.hub._catalog.move, True),
    "hub_memory_gb": (lambda b: b.hub.store.max_bytes, 500_000_000),
    "editor_memory_gb": (lambda b: b.hub._catalog.budget, 2_500_000_000),
    "device": (lambda b: b.editor.shelf.device, "meta"),
    "fp8": (lambda b: b.editor.shelf.fp8, True),
    "work_size": (
        lambda b: [front.services.sizes for front in b.fronts],
        [WorkSizes(LIMITS, "full", "off")] * 2,
    ),
    "detail": (lambda b: [front.services.sizes.detail for front in b.fronts], ["off"] * 2),
    "warm_sizes": (
        lambda b: b.editor.shelf._usual(SOURCE),
        [Sizes(size, size, "off", model="demo") for size in ((48, 64), (32, 96))],
    ),
    "token_file": (lambda b: [front.door.tenants.open for front in b.fronts], [False] * 2),
    "allowed_origins": (
        lambda b: [front.door.allowed_origins for front in b.fronts],
        [{"https://a.example"}] * 2,
    ),
    "max_sessions": (
        lambda b: [
            *(shelf.on.capacity.max_sessions for shelf in b.shelves),
            b.deployed_editor["max_ongoing_requests"],
        ],
        [3] * 3,
    ),
    "measured_capacity": (lambda b: [s.on.capacity.measured for s in b.shelves], [False] * 2),
    "degrade": (lambda b: [s.on.capacity.degrade for s in b.shelves], [False] * 2),
    "min_editors": (lambda b: b.hub._placement.scale, Scale(2, 5, 1, 33.0)),
    "max_editors": (lambda b: b.deployed_editor["autoscaling_config"].max_replicas, 5),
    "spare_editors": (lambda b: b.hub._placement.scale.spare_editors, 1),
    "downscale_delay_s": (lambda b: b.hub._placement.scale.delay_s, 33.0),
    "editor_gpus": (lambda b: ray_actors(b)[1]["num_gpus"], 0.5),
    "editor_cpus": (lambda b: ray_actors(b)[1]["num_cpus"], 2.0),
    "fronts": (lambda b: b.deployed_front["num_replicas"], 4),
    "front_cpus": (lambda b: ray_actors(b)[0]["num_cpus"], 0.25),
    # Whole videos have to be done before Serve kills.
    "drain_s": (
        lambda b: [b.front.front.grace_s, *deployed(b, "graceful_shutdown_timeout_s")],
        [40.0, 50.0, 50.0],
    ),
    "log_format": (lambda b: [d["encoding"] for d in deployed(b, "logging_config")], ["JSON"] * 2),
    "log_dir": (
        lambda b: [d["logs_dir"] == b.settings.log_dir for d in deployed(b, "logging_config")],
        [True] * 2,
    ),
    "traces": (lambda b: [f.services.tracer is None for f in b.fronts], [False] * 2),
    "gpu_hour_cost": (
        lambda b: [front.services.metrics.gpu_hour_cost for front in b.fronts],
        [2.5] * 2,
    ),
    "link_host": (
        lambda b: [
            b.hub._listener.host,
            b.front.front.services.backend.listener.host,
            b.front.front._listener.host,  # for who owns the sockets
        ],
        ["127.0.0.2"] * 3,
    ),
    "limits": (
        lambda b: [
            b.hub.store.resume_s,
            *(front.services.limits for front in b.fronts),
            b.local.services.store.resume_s,
            # Who is turned away has to be heard first.
            b.deployed_front["max_ongoing_requests"] > LIMITS.max_sessions + LIMITS.max_silent,
        ],
        [7.0, LIMITS, LIMITS, 7.0, True],
    ),
}
ELSEWHERE = {"model", "models", "stop_s"}  # `find_models`, and the test of `run.start` below


async def test_every_setting_arrives(built: Built) -> None:
    assert ARRIVES.keys() | ELSEWHERE == {field.name for field in fields(ServeSettings)}
    usual = ServeSettings("demo")
    alike = [n for n in ARRIVES if getattr(built.settings, n) == getattr(usual, n)]
    assert not alike, "these say nothing here: they are as they are by default"
    found = {name: where(built) for name, (where, _) in ARRIVES.items()}
    assert found == {name: wanted for name, (_, wanted) in ARRIVES.items()}


def test_without_bounds_to_scale_between_serve_scales_nothing() -> None:
    for least, most, found in ((2, 2, 2), (2, 3, None)):
        settings = ServeSettings("demo", min_editors=least, max_editors=most)
        deployed = editor_replica.describe_deployment(settings)
        assert deployed.get("num_replicas") == found
        scaling = deployed.get("autoscaling_config")
        assert (scaling is None) is (found is not None)
        if scaling is not None:  # the hub has waited already
            assert (scaling.upscale_delay_s, scaling.downscale_delay_s) == (0.0, 0.0)
            assert (scaling.min_replicas, scaling.max_replicas) == (least, most)


async def test_every_process_knows_what_is_served_and_who_it_is(built: Built) -> None:
    for process in (built.front, built.editor):
        assert (process.process, process.hub.serves) == ("replica", SERVES)
        assert process.hub.hub == ("app", built.settings, SERVES)  # what a new hub is made of
    assert built.front.front.services.usage.front == "replica"  # the ledger adds fronts up by it
    assert built.hub._placement.catalog is built.hub._catalog is built.hub._follower.catalog


@pytest.mark.parametrize(("degrade", "measured"), [(True, True), (False, True), (True, False)])
async def test_nobody_is_edited_less_well_unless_that_is_asked_for(
    processes: None, degrade: bool, measured: bool
) -> None:
    """What is not measured cannot say that it is too much."""
    settings = ServeSettings("demo", degrade=degrade, measured_capacity=measured)
    front, editor = await local_front(settings), editor_replica.EditorReplica(settings, SERVES)
    backend: Any = front.services.backend
    for shelf in (backend, editor.shelf):
        capacity = shelf.on.capacity
        assert (capacity.degrade, capacity.measured) == (degrade and measured, measured)
        shelf.on.scheduler.stop()


def test_what_a_start_on_this_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def build(settings: ServeSettings, registry: str | None) -> str:
        seen["built"] = settings, registry
        return "application"

    @contextmanager
    def started(application: Any, running: Any, stop_s: float) -> Any:
        seen["started"] = application, running.port, stop_s
        yield

    @contextmanager
    def private_ray(cpus: int, namespace: str) -> Any:
        seen["cpus"] = cpus
        yield Path("folder")

    for name, made in (("build", build), ("_started", started), ("private_ray", private_ray)):
        monkeypatch.setattr(run, name, made)
    monkeypatch.setattr(run, "forget_serve", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    chosen = ServeSettings("demo", stop_s=9.0, max_editors=100, editor_cpus=2.0, fronts=2)
    running = run.start(chosen, port=run.free_port(), registry="sqlite:///elsewhere.db")
    running.stop()
    # On one machine nobody outside it may reach the links.
    assert seen["built"] == (replace(chosen, link_host="127.0.0.1"), "sqlite:///elsewhere.db")
    assert seen["started"] == ("application", running.port, 9.0)
    assert seen["cpus"] == math.ceil(100 * 2.0 + 2 * 0.5 + run.SYSTEM_CPUS)
    assert running.folder == Path("folder")
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("device", "gpus", "there", "gets"),
    [
        ("auto", 0.0, True, 1.0),
        ("auto", 0.0, False, 0.0),
        ("cpu", 0.0, True, 0.0),  # the operator's word
        ("auto", 0.5, True, 0.5),
    ],
)
def test_an_editor_gets_the_gpu_that_is_here_unless_the_settings_say_otherwise(
    device: str, gpus: float, there: bool, gets: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(settings: ServeSettings, registry: str | None) -> None:
        raise RuntimeError(f"gpus={settings.editor_gpus}")

    monkeypatch.setattr(run, "build", build)
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: int(there))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(RuntimeError, match=f"gpus={gets}$"):
        run.start(ServeSettings("demo", device=device, editor_gpus=gpus), port=run.free_port())


@pytest.mark.parametrize(
    ("gpus", "there", "said"),
    [
        (0.5, 1, "build"),  # two editors share one, and the third comes when there are more
        (1.0, 2, "build"),
        (1.0, 1, "2 editors with editor_gpus=1 need 2 GPUs, and torch sees 1 here; lower min_edit"),
        (0.6, 1, "2 editors with editor_gpus=0.6 need 1.2 GPUs, and torch sees 1 here"),
    ],
)
def test_the_editors_that_are_always_there_have_to_find_their_gpus(
    gpus: float, there: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(settings: ServeSettings, registry: str | None) -> None:
        raise UserError("build")

    monkeypatch.setattr(run, "build", build)
    monkeypatch.setattr(run.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(run.torch.cuda, "device_count", lambda: there)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    settings = ServeSettings("demo", editor_gpus=gpus, min_editors=2, max_editors=3)
    with pytest.raises(UserError, match=f"^{said}"):
        run.start(settings, port=run.free_port())


def test_what_cannot_be_started_is_said_before_anything_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wrong = ServeSettings("demo", token_file=str(tmp_path / "absent"))
    with pytest.raises(UserError, match="absent cannot be read"):
        app.build(wrong)
    monkeypatch.setattr(run, "build", None)
    monkeypatch.setenv("RAY_ADDRESS", "ray://10.0.0.1:10001")
    with pytest.raises(UserError, match="serve from a node of the cluster"):
        run.start(ServeSettings("demo"))
    assert not ray.is_initialized()


@pytest.mark.parametrize(
    ("answers", "hurried_at", "asked"),
    [([False, False, True], None, 3), ([False] * 99, 2, 2), ([], None, 0)],
    ids=["until all have finished", "until a second Ctrl-C", "without a hub"],
)
def test_a_stop_waits_for_the_sessions(
    answers: list[bool], hurried_at: int | None, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = 0
    running = run.Running("127.0.0.1", 1)

    def get_actor(name: str, namespace: str) -> Any:
        if not answers:
            raise ValueError("no such actor")
        return SimpleNamespace(stop=SimpleNamespace(remote=lambda: None))

    def get(_: None, timeout: float) -> bool:
        nonlocal heard
        heard += 1
        if heard == hurried_at:
            running.hurry.set()
        return answers[heard - 1]

    monkeypatch.setattr(run.ray, "get_actor", get_actor)
    monkeypatch.setattr(run.ray, "get", get)
    monkeypatch.setattr(run, "TICK_S", 0.001)
    run._finish_sessions(running, 60.0)
    assert heard == asked

"""RayJobs that are made of rayjob.yaml, and the CronJob that creates one if there is work."""

from __future__ import annotations

import json
import os
import shlex
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from infra.kuberay import job as job_module
from infra.kuberay.job import MANIFEST, create_if_needed, ray_job
from pipelines.exits import WOULD_RUN
from pipelines.stages.chain import STAGES
from tests.infra.test_manifests import KUBERAY, load


@pytest.mark.parametrize("stage", STAGES)
def test_a_job_of_one_stage_is_the_whole_one_s_but_for_that(stage: str) -> None:
    whole, one = load(MANIFEST), ray_job(stage, "team-a")
    assert one["metadata"]["name"] == f"liveedit-train-{stage}"
    assert one["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team-a"}
    command = shlex.split(one["spec"]["entrypoint"])
    assert command == [*shlex.split(whole["spec"]["entrypoint"]), "--only", stage]
    for name in ("backoffLimit", "rayClusterSpec"):
        assert one["spec"][name] == whole["spec"][name]
    # What Kueue asks of a RayJob that it manages.
    assert one["spec"]["shutdownAfterJobFinishes"] is True
    assert "clusterSelector" not in one["spec"]
    assert len(one["spec"]["rayClusterSpec"]["workerGroupSpecs"]) <= 6
    assert ray_job()["spec"] == whole["spec"]


class Cluster(HTTPServer):
    """The one path of Kubernetes' API that is asked."""

    def __init__(self) -> None:
        self.jobs: list[dict[str, Any]] = []
        self.asked: list[tuple[str, str, str | None]] = []
        super().__init__(("127.0.0.1", 0), Handler)


class Handler(BaseHTTPRequestHandler):
    server: Cluster

    def answer(self, body: dict[str, Any]) -> None:
        self.server.asked.append((self.command, self.path, self.headers["Authorization"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def do_GET(self) -> None:
        self.answer({"items": self.server.jobs})

    def do_POST(self) -> None:
        job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.jobs.append(job)
        self.answer(job)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        thread = threading.Thread(target=cluster.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield cluster
        cluster.shutdown()


@pytest.fixture
def account(tmp_path: Path) -> Path:
    (tmp_path / "namespace").write_text("video\n")
    (tmp_path / "token").write_text("secret\n")
    return tmp_path


def planned(folder: Path, code: int, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `liveedit` that notes its arguments and exits with `code`."""
    program = folder / "liveedit"
    program.write_text(f'#!/bin/sh\necho "$@" > {folder}/told\nexit {code}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder / "told"


def test_a_job_is_created_once_if_the_plan_has_something_to_run(
    cluster: Cluster, account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = planned(account, WOULD_RUN, monkeypatch)
    api = f"http://127.0.0.1:{cluster.server_port}"
    said = create_if_needed(ray_job(queue="team-a"), api, account)
    (job,) = cluster.jobs
    assert said == f"created {job['metadata']['name']}"
    assert job["metadata"]["name"].startswith("liveedit-train-20")
    assert job["metadata"]["labels"] == {
        "kueue.x-k8s.io/queue-name": "team-a",
        "liveedit.job": "liveedit-train",
    }
    assert job["spec"] == load(MANIFEST)["spec"]
    entrypoint = job["spec"]["entrypoint"].removeprefix("liveedit ")
    assert told.read_text().strip() == f"{entrypoint} --plan --exit-code"
    path = "/apis/ray.io/v1/namespaces/video/rayjobs"
    assert cluster.asked == [
        ("GET", f"{path}?labelSelector=liveedit.job%3Dliveedit-train", "Bearer secret"),
        ("POST", path, "Bearer secret"),
    ]
    for state in ({}, {"jobDeploymentStatus": "Running"}, {"jobDeploymentStatus": "Suspended"}):
        job["status"] = state
        assert (
            create_if_needed(ray_job(), api, account) == f"{job['metadata']['name']} is under way"
        )
    for ended in ("Complete", "Failed"):
        job["status"] = {"jobDeploymentStatus": ended}
        assert create_if_needed(ray_job(), api, account).startswith("created")
        assert len(cluster.jobs) == 2
        cluster.jobs.pop(0)  # what is listed first has ended, and what comes then has not
        cluster.jobs.insert(0, job)
        assert create_if_needed(ray_job(), api, account).endswith("is under way")
        cluster.jobs.pop()


def test_jobs_of_one_day_have_names_of_their_own(
    cluster: Cluster, account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubernetes refuses a second one of a name, and the first stays for a while when it is done:
    who trains again by hand on the day of a nightly run would get nothing."""
    planned(account, WOULD_RUN, monkeypatch)
    api = f"http://127.0.0.1:{cluster.server_port}"
    times = [datetime(2026, 3, 4, 2, 0, tzinfo=UTC), datetime(2026, 3, 4, 14, 5, tzinfo=UTC)]
    clock = SimpleNamespace(now=lambda zone: times[len(cluster.jobs)].astimezone(zone))
    monkeypatch.setattr(job_module, "datetime", clock)
    said = []
    for _ in times:
        said.append(create_if_needed(ray_job(), api, account))
        cluster.jobs[-1]["status"] = {"jobDeploymentStatus": "Complete"}
    assert said == ["created liveedit-train-20260304-0200", "created liveedit-train-20260304-1405"]


def test_no_job_is_created_without_work_or_without_a_plan(
    cluster: Cluster, account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = f"http://127.0.0.1:{cluster.server_port}"
    planned(account, 0, monkeypatch)
    assert create_if_needed(ray_job(), api, account) == "nothing has changed"
    for code in (1, 2, 137):  # also of a pod that ran out of memory
        planned(account, code, monkeypatch)
        with pytest.raises(OSError, match=rf"--plan --exit-code ended with {code};"):
            create_if_needed(ray_job(), api, account)
    assert cluster.jobs == []


def test_a_cluster_that_refuses_creates_nothing(
    cluster: Cluster, account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = planned(account, WOULD_RUN, monkeypatch)
    monkeypatch.setattr(Handler, "do_GET", lambda self: self.send_error(403, "Forbidden"))
    with pytest.raises(OSError, match="403"):
        create_if_needed(ray_job(), f"http://127.0.0.1:{cluster.server_port}", account)
    assert not told.exists()


@pytest.mark.parametrize("create", [False, True])
def test_what_the_command_line_says_of_a_job_arrives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], create: bool
) -> None:
    made: list[Any] = []

    def note(job: Any) -> str:
        made.append(job)
        return "created it"

    given = ["job", "--stage", "distill", "--queue", "team-b"]
    monkeypatch.setattr("sys.argv", [*given, *(["--create-if-needed"] if create else [])])
    monkeypatch.setattr(job_module, "create_if_needed", note)
    job_module.main()
    said = capsys.readouterr().out
    assert made == ([ray_job("distill", "team-b")] if create else [])
    if create:
        assert said == "created it\n"
    else:
        assert yaml.safe_load(said) == ray_job("distill", "team-b")


def test_the_cluster_s_own_authority_is_trusted_alone(
    account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trusted: list[Any] = []
    monkeypatch.setattr(
        job_module.ssl, "create_default_context", lambda cafile: trusted.append(cafile)
    )
    with pytest.raises(OSError, match="refused"):
        job_module._ask(account, "https://127.0.0.1:1/apis")
    assert trusted == [account / "ca.crt"]


def test_a_cluster_that_says_nothing_is_not_waited_for_all_night(
    account: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next run would wait behind it."""
    waits: list[float] = []

    def open_url(request: Any, *, timeout: float, context: Any) -> Any:
        waits.append(timeout)
        raise TimeoutError

    monkeypatch.setattr(job_module.urllib.request, "urlopen", open_url)
    with pytest.raises(OSError):  # noqa: PT011 - as it is raised
        create_if_needed(ray_job(), "http://there", account)
    assert 0 < waits[0] <= 60


def test_the_cron_job_is_alone_and_small() -> None:
    documents = {d["kind"]: d for d in yaml.safe_load_all((KUBERAY / "cronjob.yaml").read_text())}
    cron = documents["CronJob"]["spec"]
    assert cron["concurrencyPolicy"] == "Forbid"  # two plans would create two jobs
    assert cron["schedule"].split() == ["0", "2", "*", "*", "*"]  # "every night"
    pod = cron["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    asked, most = (container["resources"][name] for name in ("requests", "limits"))
    assert asked == {"cpu": "1", "memory": "4Gi"}
    assert most == {"cpu": "2", "memory": "8Gi"}


def test_the_cron_job_may_do_what_it_does_and_sees_what_the_job_sees() -> None:
    documents = {d["kind"]: d for d in yaml.safe_load_all((KUBERAY / "cronjob.yaml").read_text())}
    (rule,) = documents["Role"]["rules"]
    assert rule == {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["list", "create"]}
    pod = documents["CronJob"]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    account = documents["ServiceAccount"]["metadata"]["name"]
    assert pod["serviceAccountName"] == account
    assert documents["RoleBinding"]["subjects"] == [{"kind": "ServiceAccount", "name": account}]
    assert documents["RoleBinding"]["roleRef"]["name"] == documents["Role"]["metadata"]["name"]
    (container,) = pod["containers"]
    assert container["command"] == ["python", "-m", "infra.kuberay.job", "--create-if-needed"]
    head = load(MANIFEST)["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    for name in ("image", "envFrom", "volumeMounts"):
        assert container[name] == head["containers"][0][name], name
    assert pod["volumes"] == head["volumes"]

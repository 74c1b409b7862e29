"""The KubeRay manifests and the Serve config name what exists and fit together."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import botocore.session
import pytest
import ray
import yaml
from ray.scripts.scripts import drain_node
from ray.serve.schema import ServeDeploySchema
from ray.train.v2._internal.execution.worker_group.worker import RayTrainWorker
from typer.testing import CliRunner

from data.store import open_store
from pipelines import cli
from pipelines.config.load import load_config
from serve import ingress
from serve.run import APP
from serve.settings import ServeSettings

ROOT = Path(__file__).parent.parent.parent
KUBERAY = ROOT / "infra" / "kuberay"


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def pods(cluster: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Group and pod template of the head and of every worker group."""
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [(group, group["template"]["spec"]) for group in groups]


@pytest.fixture(scope="module")
def service() -> Any:
    return load(KUBERAY / "rayservice.yaml")["spec"]


@pytest.fixture(scope="module")
def job() -> Any:
    return load(KUBERAY / "rayjob.yaml")["spec"]


@pytest.fixture(scope="module")
def settings() -> ServeSettings:
    (application,) = load(ROOT / "infra" / "serve.yaml")["applications"]
    return ServeSettings.from_args(application["args"])


def test_serve_deploy_and_the_ray_service_start_the_same_application(service: Any) -> None:
    assert yaml.safe_load(service["serveConfigV2"]) == load(ROOT / "infra" / "serve.yaml")


def test_the_application_is_serves_own_and_ray_takes_the_config() -> None:
    parsed = ServeDeploySchema.model_validate(load(ROOT / "infra" / "serve.yaml"))
    (application,) = parsed.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    assert (application.name, application.route_prefix) == (APP, "/")
    # KubeRay counts a pod as ready only where a proxy answers.
    assert parsed.proxy_location == "EveryNode"


def test_every_replica_fits_a_pod(service: Any, settings: ServeSettings) -> None:
    workers = service["rayClusterConfig"]["workerGroupSpecs"]
    room = {
        group["groupName"]: (limits_of(pod), group["maxReplicas"])
        for group, (_, pod) in zip(workers, pods(service["rayClusterConfig"])[1:], strict=True)
    }
    limits, most = room["gpu"]
    assert settings.editor_gpus <= limits["gpu"]
    assert settings.editor_cpus <= limits["cpu"]
    assert settings.max_editors * settings.editor_gpus <= most * limits["gpu"]
    limits, most = room["front"]
    assert settings.fronts * settings.front_cpus <= most * limits["cpu"]


def limits_of(pod: dict[str, Any]) -> dict[str, float]:
    limits = pod["containers"][0]["resources"]["limits"]
    return {"cpu": float(limits["cpu"]), "gpu": float(limits.get("nvidia.com/gpu", 0))}


def test_sessions_have_the_time_to_leave(service: Any, settings: ServeSettings) -> None:
    assert service["rayClusterDeletionDelaySeconds"] >= settings.drain_s
    for _, pod in pods(service["rayClusterConfig"])[1:]:
        (container,) = pod["containers"]
        command = container["lifecycle"]["preStop"]["exec"]["command"][-1]
        drain, sleep = command.split(" && ")
        assert float(sleep.removeprefix("sleep ")) >= settings.drain_s
        assert pod["terminationGracePeriodSeconds"] > float(sleep.removeprefix("sleep "))
        program, subcommand, *arguments = shlex.split(drain)
        assert (program, subcommand) == ("ray", "drain-node")
        taken = drain_node.make_context(subcommand, arguments).params
        assert taken["deadline_remaining_seconds"] >= settings.drain_s


def test_a_pod_of_the_job_that_is_taken_away_has_the_time_to_save(job: Any) -> None:
    waits = set()
    for _, pod in pods_of(job):  # the head trains, too
        (container,) = pod["containers"]
        command = container["lifecycle"]["preStop"]["exec"]["command"][-1]
        drain, _, wait = command.partition(" && ")
        program, subcommand, *arguments = shlex.split(drain)
        assert (program, subcommand) == ("ray", "drain-node")
        taken = drain_node.make_context(subcommand, arguments).params
        assert taken["reason"] == "DRAIN_NODE_REASON_PREEMPTION"  # what Ray Train looks for
        assert pod["terminationGracePeriodSeconds"] > taken["deadline_remaining_seconds"]
        assert f"{{1..{taken['deadline_remaining_seconds']}}}" in wait
        waits.add(wait)
    for wait in waits:
        # The loop as bash runs it: it ends without a worker of Ray Train's, and not with one; here
        # under a name of its own, as others may train on this machine.
        assert RayTrainWorker.__name__ in wait.replace("[R]", "R")
        wait = wait.replace("[R]ayTrain", "[R]ayTest")
        assert subprocess.run(["bash", "-c", wait], timeout=30, check=False).returncode == 0
        with subprocess.Popen(["bash", "-c", "exec -a ray::RayTestWorker sleep 600"]) as worker:
            try:
                with pytest.raises(subprocess.TimeoutExpired):
                    subprocess.run(["bash", "-c", wait], timeout=3, check=False)
            finally:
                worker.kill()


def test_every_process_that_may_own_sockets_loads_the_ingress(service: Any) -> None:
    for _, pod in pods(service["rayClusterConfig"]):
        (container,) = pod["containers"]
        variables = {e["name"]: e["value"] for e in container["env"]}
        assert ingress.ENVIRONMENT.items() <= variables.items()
    module, _, name = ingress.ENVIRONMENT["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"].rpartition(
        "."
    )
    assert callable(getattr(importlib.import_module(module), name))


def test_a_host_that_vanishes_is_dead_within_20_s(service: Any) -> None:
    """By the word of Ray's head, which without these asks for 65 s."""
    _, head = pods(service["rayClusterConfig"])[0]
    asked = {e["name"]: e["value"] for e in head["containers"][0]["env"]}
    period, timeout, times = (
        int(asked[f"RAY_health_check_{name}"])
        for name in ("period_ms", "timeout_ms", "failure_threshold")
    )
    assert times * (period + timeout) == 20_000
    assert times > 3  # one late answer is no death


def test_readiness_asks_the_port_of_the_application(service: Any) -> None:
    port = yaml.safe_load(service["serveConfigV2"])["http_options"]["port"]
    for _, pod in pods(service["rayClusterConfig"])[1:]:
        (container,) = pod["containers"]
        assert f"localhost:{port}/-/healthz" in container["readinessProbe"]["exec"]["command"][-1]


def test_tokens_are_where_the_settings_look(service: Any, settings: ServeSettings) -> None:
    assert settings.token_file is not None
    for _, pod in pods(service["rayClusterConfig"]):
        mounts = {m["mountPath"]: m["name"] for m in pod["containers"][0]["volumeMounts"]}
        volumes = {v["name"]: v for v in pod["volumes"]}
        folder, _, key = settings.token_file.rpartition("/")
        assert volumes[mounts[folder]]["secret"]["secretName"] == "liveedit-tokens"
        readme = (ROOT / "infra" / "README.md").read_text()
        assert f"secret generic liveedit-tokens --from-file={key}" in readme


def test_the_job_is_a_command_that_liveedit_takes(job: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", environment()["MLFLOW_TRACKING_URI"])
    program, subcommand, name, *overrides = shlex.split(job["entrypoint"])
    assert (program, subcommand) == ("liveedit", "train")
    result = CliRunner().invoke(cli.app, [subcommand, name, *overrides, "--dry-run"])
    # All that is wrong with it is that this machine does not have the volume.
    assert str(result.exception).startswith("model.start=/mnt/liveedit/models/"), result.output
    loaded = load_config(name, overrides)
    assert loaded.compute.address == "auto"
    assert loaded.tracking.uri == environment()["MLFLOW_TRACKING_URI"]
    for dataset in (loaded.data.train, loaded.data.heldout):
        assert dataset is not None
        assert type(open_store(dataset)).__name__ == "S3Store"
    mounts = [pod["containers"][0]["volumeMounts"][0]["mountPath"] for _, pod in pods_of(job)]
    for place in (loaded.output, str(loaded.model.start)):
        assert all(place.startswith(f"{mount}/") for mount in mounts)


def pods_of(job: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return pods(job["rayClusterSpec"])


def test_the_head_of_the_job_trains_and_evaluates(job: Any) -> None:
    # The driver runs on the head and evaluates on a GPU if it sees one.
    assert limits_of(pods_of(job)[0][1])["gpu"] > 0
    assert "num-gpus" not in job["rayClusterSpec"]["headGroupSpec"]["rayStartParams"]


def environment() -> dict[str, str]:
    documents = list(yaml.safe_load_all((KUBERAY / "prerequisites.yaml").read_text()))
    values: dict[str, str] = next(d["data"] for d in documents if d["kind"] == "ConfigMap")
    return values


def test_what_the_manifests_ask_for_is_made_or_described(service: Any, job: Any) -> None:
    documents = list(yaml.safe_load_all((KUBERAY / "prerequisites.yaml").read_text()))
    made = {(d["kind"], d["metadata"]["name"]) for d in documents}
    readme = (ROOT / "infra" / "README.md").read_text()
    made |= {("Secret", name) for name in re.findall(r"secret generic (\S+)", readme)}
    asked = set()
    for _, pod in [*pods(service["rayClusterConfig"]), *pods_of(job)]:
        for source in pod["containers"][0]["envFrom"]:
            ((kind, reference),) = source.items()
            asked.add(
                ({"configMapRef": "ConfigMap", "secretRef": "Secret"}[kind], reference["name"])
            )
        for volume in pod["volumes"]:
            if "secret" in volume:
                asked.add(("Secret", volume["secret"]["secretName"]))
            else:
                asked.add(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
    assert asked == made


def test_the_store_is_the_one_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    values = environment()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    readme = (ROOT / "infra" / "README.md").read_text()
    for name in re.findall(r"--from-literal=(\w+)=", readme):
        monkeypatch.setenv(name, f"value of {name}")
    session = botocore.session.Session()
    client = session.create_client("s3")
    assert client.meta.endpoint_url == values["AWS_ENDPOINT_URL"]
    assert client.meta.region_name == values["AWS_DEFAULT_REGION"]
    keys = session.get_credentials()
    assert keys.access_key == "value of AWS_ACCESS_KEY_ID"
    assert keys.secret_key == "value of AWS_SECRET_ACCESS_KEY"


def test_ray_is_the_installed_one(service: Any, job: Any) -> None:
    for cluster in (service["rayClusterConfig"], job["rayClusterSpec"]):
        assert cluster["rayVersion"] == ray.__version__
        assert cluster["authOptions"] == {"mode": "token"}


# What cannot be told from anything else in the tree, and why it is so.
ASKED: list[tuple[str, str, Any, str]] = [
    ("rayjob", "backoffLimit", 2, "a head that is lost ends the job"),
    ("rayjob", "submissionMode", "SidecarMode", "no connection between pods can hang"),
    ("rayjob", "shutdownAfterJobFinishes", True, "GPUs are given back"),
    ("rayjob", "ttlSecondsAfterFinished", 600, "and the logs can be read until then"),
    ("rayjob", "rayClusterSpec.headGroupSpec.template.spec.restartPolicy", "Never",
     "a head that starts again has lost its job"),
    ("rayservice", "excludeHeadPodFromServeSvc", True, "video does not go through the head"),
    ("rayservice", "rayClusterConfig.headGroupSpec.rayStartParams.num-cpus", "0",
     "no replica beside the head's own processes"),
    ("rayservice", "rayClusterConfig.enableInTreeAutoscaling", True, "editors come and go"),
    ("rayservice", "rayClusterConfig.autoscalerOptions.idleTimeoutSeconds", 300,
     "less than the application's own delay"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "place", "wanted", "why"), ASKED, ids=lambda a: str(a)[:40])
def test_a_manifest_asks_for_what_its_comments_say(
    name: str, place: str, wanted: object, why: str
) -> None:
    found = load(KUBERAY / f"{name}.yaml")["spec"]
    for key in place.split("."):
        found = found[key]
    assert found == wanted, why


def test_every_pod_is_nobody_important_and_has_its_volumes(service: Any, job: Any) -> None:
    for _, pod in [*pods(service["rayClusterConfig"]), *pods_of(job)]:
        user = pod["securityContext"]
        assert user == {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000}
        (container,) = pod["containers"]
        assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
        tolerated = {t["key"]: t for t in pod.get("tolerations", [])}
        assert (limits_of(pod)["gpu"] > 0) == ("nvidia.com/gpu" in tolerated)
        for toleration in tolerated.values():
            assert (toleration["operator"], toleration["effect"]) == ("Exists", "NoSchedule")
    for _, pod in pods(service["rayClusterConfig"]):  # which serves, and writes nothing there
        assert all(m["readOnly"] for m in pod["containers"][0]["volumeMounts"])
    for _, pod in pods_of(job):
        assert not any(m.get("readOnly") for m in pod["containers"][0]["volumeMounts"])
        assert not any(v["persistentVolumeClaim"].get("readOnly") for v in pod["volumes"])


def test_groups_begin_with_what_the_settings_begin_with(
    service: Any, job: Any, settings: ServeSettings
) -> None:
    groups = {g["groupName"]: g for g in service["rayClusterConfig"]["workerGroupSpecs"]}
    sizes = {
        name: tuple(group[f"{which}eplicas"] for which in ("minR", "r", "maxR"))
        for name, group in groups.items()
    }
    most = settings.max_editors
    assert sizes == {"front": (2, 2, 2), "gpu": (settings.min_editors, settings.min_editors, most)}
    (group,) = job["rayClusterSpec"]["workerGroupSpecs"]
    assert [group[name] for name in ("minReplicas", "replicas", "maxReplicas")] == [1, 1, 1]
    gpus = sum(limits_of(pod)["gpu"] for _, pod in pods_of(job))
    assert f"on {gpus:g} GPUs" in (KUBERAY / "rayjob.yaml").read_text().splitlines()[0]
    assert len({str(pod["containers"][0]["resources"]) for _, pod in pods_of(job)}) == 1


def test_a_busy_pod_is_not_taken_out_for_one_late_answer(service: Any) -> None:
    for _, pod in pods(service["rayClusterConfig"])[1:]:
        probe = pod["containers"][0]["readinessProbe"]
        asked = [probe[f"{name}"] for name in ("periodSeconds", "timeoutSeconds")]
        assert (*asked, probe["failureThreshold"]) == (5, 10, 3)
        command = probe["exec"]["command"][-1]
        seconds = [int(part.split()[0]) for part in command.split(" -T ")[1:]]
        assert len(seconds) == 2
        assert sum(seconds) < probe["timeoutSeconds"]  # else the probe ends before its answer
        assert command.count("grep -q success") == 2


def test_every_node_reads_what_another_one_wrote() -> None:
    documents = list(yaml.safe_load_all((KUBERAY / "prerequisites.yaml").read_text()))
    (claim,) = [d for d in documents if d["kind"] == "PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim["spec"]["resources"]["requests"]["storage"] == "1Ti"

"""The compose file names what exists; only an engine can run it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.stack import servers
from infra.stack.servers import Settings

ROOT = Path(__file__).parent.parent.parent
STACK = ROOT / "infra" / "stack"


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    services: dict[str, Any] = yaml.safe_load((STACK / "compose.yaml").read_text())["services"]
    return services


def bind_mounts(service: dict[str, Any]) -> Iterator[tuple[Path, str]]:
    for mount in service.get("volumes", []):
        source, target, *_ = mount.split(":")
        if source.startswith("."):
            yield (STACK / source).resolve(), target


def test_services_name_files_and_services_that_exist(services: dict[str, Any]) -> None:
    volumes = yaml.safe_load((STACK / "compose.yaml").read_text())["volumes"]
    for service in services.values():
        assert set(service.get("depends_on", ())) <= set(services)
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert source in volumes or (STACK / source).is_dir(), mount
    (config, target), *_ = bind_mounts(services["prometheus"])
    option = services["prometheus"]["command"][0].removeprefix("--config.file=")
    assert (config / Path(option).relative_to(target)).is_file()
    (folder, target), *_ = bind_mounts(services["grafana"])
    for name in ("GF_PATHS_PROVISIONING", "DASHBOARDS"):
        place = Path(services["grafana"]["environment"][name])
        assert (folder / place.relative_to(target)).is_dir()


def test_grafana_gets_every_variable_that_its_files_use(services: dict[str, Any]) -> None:
    used = set()
    for path in (ROOT / "infra" / "grafana" / "provisioning").rglob("*.yml"):
        used |= set(re.findall(r"\$(\w+)", path.read_text()))
    assert used == {"PROMETHEUS_URL", "DASHBOARDS"}
    assert used <= set(services["grafana"]["environment"])


def test_images_are_pinned_and_mlflow_is_the_installed_one(services: dict[str, Any]) -> None:
    images = {name: service.get("image") for name, service in services.items()}
    inline = services["mlflow"]["build"]["dockerfile_inline"]
    images["mlflow"] = inline.splitlines()[0].removeprefix("FROM ")
    for image in images.values():
        assert re.search(r":v?\d+\.\d+", str(image)), image
    assert images["mlflow"].endswith(f":v{version('mlflow')}")


def test_nobody_else_reaches_the_containers(services: dict[str, Any]) -> None:
    for service in services.values():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")


def test_the_containers_are_the_parts_that_run_without_them(
    services: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same ports, keys and settings."""
    (tmp_path / "mlflow.db").touch()
    here: Any = servers.mlflow(Settings(tmp_path, "x:1", 5000, 9000, 9090, 3000))
    readme = (ROOT / "infra" / "README.md").read_text()
    for name in ("mlflow", "s3", "prometheus", "grafana"):
        default = {"mlflow": 5000, "s3": 9000, "prometheus": 9090, "grafana": 3000}[name]
        assert services[name]["ports"] == [f"127.0.0.1:{default}:{default}"]
        assert f"http://localhost:{default} |" in readme
    quiet = services["mlflow"]["environment"]
    assert quiet.items() <= here.environment.items()
    assert "--port=5000" in services["mlflow"]["command"]
    assert "--port=:9000" in services["s3"]["command"]
    keys = services["s3"]["environment"]
    assert keys == {
        "ROOT_ACCESS_KEY": "${S3_ACCESS_KEY:-liveedit}",
        "ROOT_SECRET_KEY": "${S3_SECRET_KEY:-liveedit-local}",
    }
    assert "keys are `liveedit` and `liveedit-local`" in readme
    assert services["bucket"]["entrypoint"][-1] == f"/data/{servers.BUCKET}"
    assert "/data" in services["s3"]["command"]


def test_mlflow_s_database_is_the_one_that_is_made_for_it(services: dict[str, Any]) -> None:
    made, mlflow = services["database"], services["mlflow"]
    user, password, name = (
        made["environment"][f"POSTGRES_{n}"] for n in ("USER", "PASSWORD", "DB")
    )
    (store,) = [w for w in mlflow["command"] if w.startswith("--backend-store-uri=")]
    assert store == f"--backend-store-uri=postgresql://{user}:{password}@database/{name}"
    assert made["healthcheck"]["test"] == ["CMD", "pg_isready", "-U", user, "-d", name]
    assert mlflow["depends_on"] == {"database": {"condition": "service_healthy"}}
    assert services["s3"]["depends_on"] == {
        "bucket": {"condition": "service_completed_successfully"}
    }
    (hosts,) = [w for w in mlflow["command"] if w.startswith("--allowed-hosts=")]
    assert hosts == "--allowed-hosts=localhost:*,127.0.0.1:*,mlflow:*"
    artifacts = [w for w in mlflow["command"] if w.startswith("--artifacts-destination=")]
    assert artifacts == ["--artifacts-destination=/artifacts"]


def test_what_is_kept_is_in_volumes_and_what_is_ours_is_only_read(services: dict[str, Any]) -> None:
    mounts = {
        name: {m.split(":", 1)[0]: m.split(":", 1)[1] for m in service["volumes"]}
        for name, service in services.items()
    }
    assert mounts == {
        "database": {"database": "/var/lib/postgresql"},
        "mlflow": {"artifacts": "/artifacts"},
        "bucket": {"s3": "/data"},
        "s3": {"s3": "/data"},
        "prometheus": {"../prometheus": "/etc/prometheus:ro", "prometheus": "/prometheus"},
        "grafana": {"../grafana": "/liveedit:ro", "grafana": "/var/lib/grafana"},
    }
    assert "--storage.tsdb.path=/prometheus" in services["prometheus"]["command"]
    grafana = services["grafana"]["environment"]
    assert grafana["PROMETHEUS_URL"] == "http://prometheus:9090"
    assert grafana["GF_AUTH_ANONYMOUS_ENABLED"] == "true"
    targets = yaml.safe_load((ROOT / "infra" / "prometheus" / "targets.yml").read_text())
    ((target,),) = (entry["targets"] for entry in targets)
    (extra,) = services["prometheus"]["extra_hosts"]
    assert extra == f"{target.partition(':')[0]}:host-gateway"

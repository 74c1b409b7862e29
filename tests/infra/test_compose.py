"""The compose file names what exists; only an engine can run it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml

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

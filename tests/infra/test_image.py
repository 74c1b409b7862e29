"""The Dockerfile installs what the Makefile does and copies what is there."""

from __future__ import annotations

import re
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from serve import ingress

ROOT = Path(__file__).parent.parent.parent
DOCKERFILE = (ROOT / "infra" / "docker" / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# One instruction a line, comments and continuations taken out.
LINES = re.sub(r"\\\n\s*", "", re.sub(r"(?m)^#.*\n", "", DOCKERFILE)).splitlines()


def copied() -> list[str]:
    sources = [line.split()[1:-1] for line in LINES if line.startswith("COPY ")]
    return [source for line in sources for source in line]


def test_everything_that_is_copied_exists_and_reaches_the_build() -> None:
    let_in = {
        line.removeprefix("!").rstrip("/")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()
    for source in copied():
        assert (ROOT / source).exists(), source
    assert set(copied()) == let_in


def test_the_image_holds_every_folder_but_the_tests() -> None:
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert packages - {"tests"} == {source for source in copied() if (ROOT / source).is_dir()}
    # What the editable install reads.
    assert {"pyproject.toml", PROJECT["project"]["readme"]} <= set(copied())


def test_python_is_one_that_the_project_takes() -> None:
    (tag,) = re.findall(r"^FROM python:(\d+\.\d+)-slim-(?:\w+) AS", DOCKERFILE, re.MULTILINE)
    assert f">={tag}" == PROJECT["project"]["requires-python"]
    assert tag == PROJECT["tool"]["mypy"]["python_version"]


def test_packages_are_the_makefiles() -> None:
    (install,) = [line for line in LINES if "-r pyproject.toml" in line]
    assert "pip install --no-cache-dir -c constraints.txt torch uv" in install
    assert "DS_BUILD_OPS=0 uv pip install" in install
    assert install.count("-c constraints.txt") == 2
    pins = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line
    )
    # Both builds of torch satisfy the pin only while it names no build.
    assert re.fullmatch(r"[\d.]+", pins["torch"])
    for uri in (ROOT / "infra" / "kuberay").glob("ray*.yaml"):
        assert f'rayVersion: "{pins["ray"]}"' in uri.read_text()


def test_processes_are_nobody_important_and_have_the_ingress() -> None:
    assert re.fullmatch(r"USER (?!root)\w+", LINES[-2])
    for name, value in ingress.ENVIRONMENT.items():
        assert any(line.startswith("ENV ") and f"{name}={value}" in line for line in LINES)
    (user,) = re.findall(r"useradd --uid (\d+)", DOCKERFILE)
    for path in (ROOT / "infra" / "kuberay").glob("ray*.yaml"):
        assert f"runAsUser: {user}," in path.read_text()


def test_probes_find_their_program() -> None:
    assert re.search(r"apt-get install [^&]*\bwget\b", DOCKERFILE)


@pytest.mark.parametrize("name", ["rayjob.yaml", "rayservice.yaml"])
def test_manifests_use_images_that_the_readme_builds(name: str) -> None:
    readme = (ROOT / "infra" / "README.md").read_text()
    version = PROJECT["project"]["version"]
    document = yaml.safe_load((ROOT / "infra" / "kuberay" / name).read_text())["spec"]
    cluster = document.get("rayClusterSpec") or document["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        tag = container["image"].partition(":")[2]
        gpus = "nvidia.com/gpu" in container["resources"]["limits"]
        assert tag == f"{version}-{'cuda' if gpus else 'cpu'}"
        assert tag in readme


def test_every_accelerator_is_a_stage() -> None:
    stages = re.findall(r"^FROM \S+ AS (\S+)$", DOCKERFILE, re.MULTILINE)
    assert [s for s in stages if fnmatch(s, "torch-*")] == ["torch-cpu", "torch-cuda"]
    assert "FROM torch-${ACCELERATOR} AS liveedit" in LINES
    assert "ARG ACCELERATOR=cpu" in LINES

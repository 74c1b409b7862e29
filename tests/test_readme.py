"""The commands and snippets of README.md and docs/wire.md, run as they stand there."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data.video import VideoWriter, probe
from tests.modeling.published import publish
from tests.serve.conftest import Server, clip, serving

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PORT = "localhost:8000"  # in the texts; the tests' server has another


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks(README, "sh") for line in block.splitlines() if line]
SERVERS = [c for c in COMMANDS if re.search(r"liveedit serve\b", c)]  # these run until Ctrl-C
TO_SERVER = [c for c in COMMANDS if PORT in c]
BY_MAKE = [c for c in COMMANDS if c.startswith("make ")]
ALONE = [c for c in COMMANDS if c not in {*SERVERS, *TO_SERVER, *BY_MAKE}]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(ROOT / "pipelines" / "start" / "natural") as running:
        yield running


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands name: the tree's own folders, a video, pairs, Wan's files."""
    desk = tmp_path_factory.mktemp("desk")
    (desk / "pipelines").symlink_to(ROOT / "pipelines")
    activate = desk / ".venv" / "bin" / "activate"
    activate.parent.mkdir(parents=True)
    activate.write_text("")
    for name, frames, width, height in (
        ("in", 16, 96, 64),
        ("a", 81, 832, 480),
        ("b", 81, 832, 480),
    ):
        with VideoWriter(desk / f"{name}.mp4", width, height, 16) as writer:
            writer.write(clip(frames, width=width, height=height))
    (desk / "pairs.json").write_text(
        '[{"instruction": "add fog", "source_path": "a.mp4", "edited_path": "b.mp4"}]'
    )
    shutil.move(publish(desk / "published").wan, desk / "Wan2.1-T2V-1.3B")
    return desk


def run(command: str, desk: Path) -> subprocess.CompletedProcess[str]:
    commands = desk / "bin"
    commands.mkdir(exist_ok=True)
    liveedit = commands / "liveedit"
    liveedit.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m pipelines "$@"\n')
    liveedit.chmod(0o755)
    path = f"{commands}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        ["sh", "-c", command],
        cwd=desk,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_every_command_is_known_to_these_tests() -> None:
    assert len(COMMANDS) >= 10
    assert {shlex.split(command)[0] for command in ALONE} == {"liveedit", "."}
    for command in BY_MAKE:
        dry = subprocess.run(["make", "-n", *command.split()[1:]], cwd=ROOT, capture_output=True)
        assert dry.returncode == 0, command


def test_the_commands_do_what_they_say(desk: Path) -> None:
    """In their order, since later ones take what earlier ones made."""
    for command in ALONE:
        done = run(command, desk)
        if "model.start=models/wan" in command:  # all is right with it but the stand-in's sizes
            assert "model.transformer.dim is 48 there, 1536 here" in done.stderr
        else:
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert probe(desk / "out.mp4").frames == 16
    assert (desk / "sets" / "mine" / "dataset.json").is_file()
    assert (desk / "models" / "wan" / "config.json").is_file()


@pytest.mark.parametrize("command", TO_SERVER)
def test_the_commands_for_a_server(desk: Path, server: Server, command: str) -> None:
    (desk / "out.mp4").unlink(missing_ok=True)
    done = run(command.replace(PORT, f"localhost:{server.port}"), desk)
    assert done.returncode == 0, done.stderr
    assert probe(desk / "out.mp4").frames in (16, None)  # a fragmented file names no count


@pytest.mark.parametrize("command", SERVERS)
def test_what_is_served_is_there(command: str, desk: Path) -> None:
    """What a start looks at first; tests/pipelines/commands/test_serve.py starts the whole."""
    (model,) = command.partition("liveedit serve ")[2].split()
    assert (desk / model / "config.json").is_file()


def test_the_editor_s_snippet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    code = next(block for block in blocks(README, "python") if "StreamingEditor" in block)
    names: dict[str, Any] = {
        "camera": [clip(10, width=224, height=128), clip(11, width=224, height=128)]
    }
    exec(code, names)
    edited = np.concatenate([np.asarray(frames) for frames in names["edited"]])
    assert edited.shape == (21, 128, 224, 3)
    assert edited.dtype == np.uint8


def test_the_client_s_snippet(server: Server) -> None:
    names: dict[str, Any] = {}
    exec(next(block for block in blocks(README, "python") if "serve.client" in block), names)

    async def camera() -> AsyncIterator[np.ndarray]:
        for frame in clip(9, width=224, height=128):
            yield frame

    async def main() -> list[np.ndarray]:
        return [pixels async for pixels in names["live"](camera(), url=server.url)]

    edited = asyncio.run(main())
    assert [frame.shape for frame in edited] == [(128, 224, 3)] * 9

    async def broken() -> AsyncIterator[np.ndarray]:
        yield clip(1, width=224, height=128)[0]
        raise OSError("camera unplugged")

    async def fails() -> None:
        async for _ in names["live"](broken(), url=server.url):
            pass

    with pytest.raises(OSError, match="unplugged"):
        asyncio.run(asyncio.wait_for(fails(), 60))


def test_a_client_can_be_written_from_the_page_of_the_wire(server: Server) -> None:
    names: dict[str, Any] = {}
    code = blocks((ROOT / "docs" / "wire.md").read_text(), "python")[-1]
    assert "serve" not in re.findall(r"(?:from|import) (\w+)", code)
    exec(code, names)
    images = []
    for frame in clip(13, width=64, height=48):
        images.append(io.BytesIO())
        Image.fromarray(frame).save(images[-1], "jpeg")
    sent = [image.getvalue() for image in images]
    edited = asyncio.run(names["edit"](server.url, sent, "make it night", 64, 48, 16))
    assert [Image.open(io.BytesIO(image)).size for image in edited] == [(64, 48)] * 13
    with pytest.raises(RuntimeError, match="prompt"):
        asyncio.run(names["edit"](server.url, sent, "", 64, 48, 16))


def test_the_page_of_the_wire_has_all_that_is_said_of_a_model(server: Server) -> None:
    with urllib.request.urlopen(f"{server.http}/v1/models", timeout=30) as answer:
        (model,) = json.loads(answer.read())["models"]
    (told,) = re.findall(r'\{"models": \[\{(.*?)\}\]\}', (ROOT / "docs" / "wire.md").read_text())
    from_a_hub = {"editors", "share"}  # which knows of all editors; here is one
    assert set(re.findall(r'"(\w+)"', told)) == set(model) | from_a_hub

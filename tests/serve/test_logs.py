"""Logs of an application that has stopped: JSON lines with the fields that an audit asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.client import edit_frames
from serve.run import free_port, start
from serve.settings import ServeSettings
from tests.serve.conftest import clip
from tests.serve.tokens import write_tokens

pytestmark = pytest.mark.timeout(240)


def test_lines_are_kept_and_say_who_did_what(small_model: Path, tmp_path: Path) -> None:
    settings = ServeSettings(
        str(small_model), measured_capacity=False, editor_cpus=0.5, front_cpus=0.25,
        log_format="json", log_dir=str(tmp_path / "logs"),
        token_file=str(write_tokens(tmp_path / "tokens")),
    )  # fmt: skip
    running = start(settings, port=free_port(), cpus=4)
    try:
        frames = list(
            edit_frames(running.stream_url, clip(9), "make it red", fps=16, token="secret")
        )
        assert len(frames) == 9
        assert httpx.get(f"{running.url}/v1/models?token=wrong").status_code == 401
    finally:
        running.stop()
    (file,) = (tmp_path / "logs").glob("*front*.log")
    lines: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    events = {line["event"]: line for line in lines if "event" in line}
    opened, ended = events["opened"], events["ended"]
    for line in (opened, ended):
        assert (line["tenant"], line["client"], line["model"]) == ("ours", "127.0.0.1", "small")
        assert len(line["session"]) == 12
    assert (opened["width"], opened["height"], opened["fps"]) == (48, 32, 16.0)
    assert (ended["reason"], ended["frames"], ended["dropped"]) == ("close", 9, 0)
    asked = [(line["path"], line["status"]) for line in lines if line.get("event") == "request"]
    assert ("/v1/models", 401) in asked
    assert ("/readyz", 200) in asked
    text = "".join(path.read_text() for path in (tmp_path / "logs").rglob("*.log"))
    assert "wrong" not in text
    assert "token=" not in text

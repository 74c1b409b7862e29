"""The command line: help, plans, errors and exit codes, in this process."""

from __future__ import annotations

import errno
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from data.video import VideoWriter
from infra.runtime.errors import UserError
from infra.runtime.ray import ClusterError
from pipelines.cli import app
from pipelines.config.ablation import AXES
from pipelines.config.benchmark import BenchConfig
from pipelines.config.merge import _dotted
from pipelines.config.pipeline import EvaluateConfig, PipelineConfig
from pipelines.exits import TryAgainError
from pipelines.stages.running.gate import GateMissedError
from serve.settings import ServeSettings
from tests.pipelines.commands.entry import Liveedit

ROOT = Path(__file__).parent.parent.parent.parent


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "train",
        "evaluate",
        "edit",
        "import",
        "serve",
        "doctor",
        "data make",
        "data ingest",
        "data check",
    ],
)
def test_help_says_what_it_does_and_gives_an_example(liveedit: Liveedit, command: str) -> None:
    result = liveedit(*command.split(), "--help")
    assert result.returncode == 0, result.stderr
    assert "Usage: " in result.stdout
    assert f"liveedit {command}" in " ".join(result.stdout.split())  # in the example


def test_dry_run_prints_what_would_run(liveedit: Liveedit, tmp_path: Path) -> None:
    result = liveedit("train", "demo", "foundation.steps=5", "--dry-run")
    assert result.returncode == 0, result.stderr
    (tmp_path / "again.yaml").write_text(result.stdout)
    again = liveedit("train", "again.yaml", "--dry-run")
    assert again.stdout == result.stdout
    assert "\nfoundation:\n  steps: 5\n" in result.stdout
    assert "\n  transformer:\n    dim: 224\n" in result.stdout  # of the preset
    assert not (tmp_path / "runs").exists()


def test_dry_run_and_plan_look_at_paths_before_anything_is_begun(
    liveedit: Liveedit, tmp_path: Path
) -> None:
    for option in ("--dry-run", "--plan"):
        result = liveedit("train", "demo", "data.train=nowhere", option)
        assert result.returncode == 1
        assert "nowhere" in result.stderr
        assert ("distill:" in result.stdout) == (option == "--dry-run")
    assert not (tmp_path / "runs").exists()


def test_plan_shows_every_stage(
    liveedit: Liveedit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    result = liveedit("train", "demo", "vae.steps=0", "compute.gpus=false", "--plan")
    assert result.returncode == 0, result.stderr
    lines = {line.split()[0]: " ".join(line.split()) for line in result.stdout.splitlines()}
    # "yet" is on the next line where the path of the start leaves the column no room.
    assert re.match(r"foundation runs not done( yet)? 2 4 ", lines["foundation"])
    assert lines["vae"] == "vae passed over vae.steps=0"
    asked = liveedit("train", "demo", "vae.steps=0", "--plan", "--exit-code")
    assert asked.returncode == 4
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("option", [["--exit-code"], ["--card", "H100"]])
def test_what_belongs_to_a_plan_starts_no_training(
    liveedit: Liveedit, monkeypatch: pytest.MonkeyPatch, option: list[str]
) -> None:
    monkeypatch.setattr("pipelines.commands.run.run_train", pytest.fail)
    result = liveedit("train", "demo", *option)
    assert (result.returncode, result.stdout) == (1, "")
    assert f"{option[0]} belongs to --plan" in result.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("mend me"), 1),
        (OSError("no disk"), 1),
        (GateMissedError("too bad"), 3),
        (TryAgainError("a worker is lost"), 75),
        (ClusterError("no Ray"), 75),
        (ConnectionResetError("by peer"), 75),
        (TimeoutError("no answer"), 75),
    ],
)
def test_exit_codes_say_what_to_do(
    liveedit: Liveedit, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("pipelines.commands.run.run_train", fail)
    result = liveedit("train", "demo")
    assert (result.returncode, result.stderr.split()) == (code, ["Error:", *str(error).split()])


def test_what_was_noted_on_an_error_is_told_with_it(
    liveedit: Liveedit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        error = UserError("mend\nme")
        error.add_note("what was made is kept")
        raise error

    monkeypatch.setattr("pipelines.commands.run.run_train", fail)
    assert liveedit("train", "demo").stderr == "Error: mend me what was made is kept\n"


def test_threads_that_wait_leave_a_busy_machine_to_others(
    liveedit: Liveedit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set before torch is imported, which reads it; somebody else's choice stays."""
    look = "import sys, pipelines.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", look], cwd=ROOT).returncode == 0
    spins, policy = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY"
    for asked, found in (({}, "1000"), ({spins: "7"}, "7"), ({policy: "ACTIVE"}, None)):
        for name in (spins, policy):
            monkeypatch.setenv(name, "")  # is put back afterwards, whoever set it
            monkeypatch.delenv(name)
        for name, value in asked.items():
            monkeypatch.setenv(name, value)
        liveedit("--version")
        assert (os.environ.get(spins), os.environ.get(policy)) == (found, asked.get(policy))


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EROFS, "Read-only file system; choose a place that can be written"),
        (errno.ENOSPC, "No space left on device; the disk is full: free space, or choose"),
        (errno.EACCES, "Permission denied; check the path and its rights"),
    ],
)
def test_what_the_system_refuses_begins_with_the_file(
    liveedit: Liveedit, monkeypatch: pytest.MonkeyPatch, number: int, said: str
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number), "[red]runs/a")

    monkeypatch.setattr("pipelines.commands.run.run_train", fail)
    assert liveedit("train", "demo").stderr.startswith(f"Error: [red]runs/a: {said}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "demo", "foundation.stesp=5"], "did you mean foundation.steps"),
        (["train", "demo", "foundation.steps=x"], "foundation.steps=x must be a whole number"),
        (["train", "--foundation.steps=3"], "write foundation.steps=3"),
        (["--vae.steps=3", "train", "demo"], "write vae.steps=3"),
        (["train", "demo", "--foundation.steps", "3"], "write foundation.steps=VALUE"),
        (["serve", "--max_sessions=3"], "write max_sessions=3"),
        (["serve", "--work_size=1/2"], "write work_size=1/2"),
        (
            ["edit", "a.mp4", "b.mp4", "--work_size=1/2"],
            "no option --work_size; write --work-size=1/2",
        ),
        (["bench", "stream", "--work_size", "1/2"], "no option --work_size; write --work-size"),
        (["serve", "max_sesions=3"], "max_sesions; did you mean max_sessions"),
        (["serve", "limits.max_pixel=3"], "did you mean limits.max_pixels"),
        (["evaluate", "nowhere", "nowhere", "mask_cahe=1"], "did you mean mask_cache?"),
        (["demo", "foundation.steps=x"], "foundation.steps=x must be a whole number"),
        (["train", "nothing.yaml"], "there is no config file nothing.yaml"),
        (["train", "demmo"], "there is no config 'demmo'; give a .yaml file or one of demo, "),
        (
            ["train", "demo", "extra"],
            "'extra' is not key=value; write for example foundation.steps",
        ),
        (["train", "demo", "model.start=nowhere"], "model.start=nowhere is no model directory"),
        (["train", "demo", "data.train=nowhere"], "nowhere: no dataset here"),
        (["edit", "nothing.mp4", "out.mp4", "-p", "x"], "nothing.mp4: no such file"),
        (["evaluate", "nowhere", "nowhere"], "nowhere: no dataset here"),
        (["evaluate", "nowhere", "nowhere", "clip=1"], "did you mean clips"),
        (["data", "check", "nowhere"], "nowhere: no dataset here"),
        (["data", "make", "x", "--size", "8x100"], "--size 8x100"),
        (
            ["data", "make", "x", "--size", "128"],
            "--size 128 must be width x height in pixels, both at least 16",
        ),
        (["data", "make", "x", "--size", "128x-16"], "--size 128x-16 must be"),
        (["data", "make", "x", "--size", "15x128"], "--size 15x128 must be"),
        (["data", "make", "x", "--size", "128x15"], "--size 128x15 must be"),
        (["data", "ingest", "nothing.json", "x"], "nothing.json"),
        (["data", "ingest", "nothing.json", "x", "--frames", "32"], "4n-3 frames: 29 or 33"),
        (["data", "make", "x", "--frames", "10"], "--frames 10 is no whole number of latents"),
    ],
)
def test_user_errors_are_one_line_and_leave_nothing(
    liveedit: Liveedit, tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = liveedit(*arguments)
    assert result.returncode in (1, 2)
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_train_without_a_configuration_lists_them_and_starts_nothing(
    liveedit: Liveedit, tmp_path: Path
) -> None:
    for settings in ([], ["foundation.steps=5"]):
        result = liveedit("train", *settings)
        assert result.returncode == 1
        assert "data, heldout, start, vae, encode, foundation" in " ".join(result.stdout.split())
        for recipe in (ROOT / "pipelines" / "recipes").glob("*.yaml"):
            assert f"Writes to runs/{recipe.stem}." in result.stdout
        assert " ".join(["liveedit train demo", *settings, "--dry-run"]) in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_has_an_example_a_line_and_breaks_no_sentence(
    liveedit: Liveedit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    lines = [line.strip() for line in liveedit("serve", "--help").stdout.splitlines()]
    assert "liveedit serve" in lines
    assert "New here? liveedit serve names" in liveedit("--help").stdout  # bold, and no markup
    assert "liveedit serve models:/liveedit@production --port 8080" in lines
    told = next(line for line in lines if line.startswith("Runs until Ctrl-C"))
    assert told.endswith("limits.max_pixels.")


def examples() -> list[str]:
    """Every command line that a command's help shows."""
    found, waiting = [], [typer.main.get_command(app)]
    for command in waiting:
        waiting += getattr(command, "commands", {}).values()
        lines = [line.strip() for line in (command.epilog or "").splitlines()]
        found += [line for line in lines if line.startswith("liveedit ")]
    return found


@pytest.mark.parametrize("line", examples())
def test_an_example_is_a_command_line_that_is_understood(line: str) -> None:
    """Its command, its options and the words between; settings are looked at where they are."""
    _, *words = shlex.split(line.partition(" >> ")[0])
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    with command.make_context("liveedit", list(words)) as context:
        assert not context.args
    told = (word.partition("=")[0] for word in words if re.match(r"[a-z_.]+=", word))
    known = {*_dotted(PipelineConfig()), *AXES, *(entry.name for entry in fields(BenchConfig))}
    known |= {entry.name for entry in (*fields(EvaluateConfig), *fields(ServeSettings))}
    assert {name for name in told if name not in known} == set()


def test_version(liveedit: Liveedit) -> None:
    assert re.fullmatch(
        r"liveedit \d+\.\d+\.\d+, commit \w+(-dirty)?\n", liveedit("--version").stdout
    )


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("folder", "folder: is a folder; name a file in it"),
        ("out.webm", "name the file .mp4, .mov or .mkv"),
        ("nowhere/out.mp4", "there is no folder nowhere"),
    ],
)
def test_where_nothing_can_be_written_is_told_before_the_model_is_loaded(
    liveedit: Liveedit, tmp_path: Path, output: str, message: str
) -> None:
    (tmp_path / "folder").mkdir()
    with VideoWriter(tmp_path / "in.mp4", 64, 48, 16) as writer:
        writer.write(np.zeros((2, 48, 64, 3), np.uint8))
    result = liveedit("edit", "in.mp4", output, "-p", "x", "--model", "no-such-model")
    assert result.returncode == 1
    assert message in result.stderr


def test_what_will_differ_is_said_before_the_model_is_loaded(
    liveedit: Liveedit, tmp_path: Path
) -> None:
    with VideoWriter(tmp_path / "in.mp4", 64, 48, 16) as writer:
        writer.write(np.zeros((20, 48, 64, 3), np.uint8))
    result = liveedit(
        "edit", "in.mp4", "out.mp4", "-p", "x", "--model", "no-such-model", "--fps", "8"
    )
    assert result.returncode == 1
    assert result.stdout == "in.mp4: the rate becomes 8 frames a second; it is constant 16\n"


def test_a_damaged_source_is_refused_before_the_model_is_loaded_where_it_shall_be(
    liveedit: Liveedit, tmp_path: Path
) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (30, 48, 64, 3), dtype=np.uint8)
    with VideoWriter(tmp_path / "in.mp4", 64, 48, 16) as writer:
        writer.write(noise)
    whole = (tmp_path / "in.mp4").read_bytes()
    (tmp_path / "in.mp4").write_bytes(whole[: len(whole) * 6 // 10])
    words = ["edit", "in.mp4", "out.mp4", "-p", "x", "--model", "no-such-model"]
    assert "in.mp4: is cut off: " in liveedit(*words, "--strict").stderr
    assert "no-such-model" in liveedit(*words).stderr


def test_a_bug_of_ours_is_no_user_s_mistake(
    liveedit: Liveedit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nobody can mend outside of the program shows where it was raised."""

    def bug(*_: object) -> None:
        raise ValueError("not enough values to unpack")

    monkeypatch.setattr("data.shards.check_dataset", bug)
    with pytest.raises(ValueError, match="not enough values"):
        liveedit("data", "check", "somewhere")

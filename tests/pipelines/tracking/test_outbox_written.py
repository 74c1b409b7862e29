"""What an outbox writes down for each thing that a run is told, and what it says at the end."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.tracking import outbox as module
from pipelines.tracking.describe import note
from pipelines.tracking.outbox import Outbox, Run
from pipelines.tracking.tracker import code_tags
from tests.pipelines.tracking.stand_in import LONG, Server


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Outbox:
    """Nobody sends what it holds."""
    monkeypatch.setattr(module, "fingerprint_of", lambda place: f"of {place}")
    monkeypatch.setattr(module, "digest_of", lambda place: f"digest of {place}")
    monkeypatch.setattr(module.time, "time", lambda: 1.5)
    made = Outbox(tmp_path, "http://m", "x", pytest.fail)
    (made.folder / "files").mkdir(parents=True)
    return made


def written(box: Outbox) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in box.journal.read_text().splitlines()]
    assert {entry.pop("at") for entry in entries} <= {1500}
    return entries


TOLD: tuple[tuple[Callable[[Run], None], dict[str, Any]], ...] = (
    (lambda run: run.log_metrics({"a": 1.0}, 3),
     {"what": "metrics", "values": {"a": 1.0}, "step": 3}),
    (lambda run: run.log_metrics({"a": 1.0}), {"what": "metrics", "values": {"a": 1.0}, "step": 0}),
    (lambda run: run.log_input("train", "/d", "training"),
     {"what": "input", "name": "train", "source": "/d", "digest": "digest of /d",
      "context": "training"}),
    (lambda run: run.used({"start": Path("/m")}),
     {"what": "used", "models": {"start": ["/m", "of /m"]}}),
    (lambda run: run.made("vae", Path("/m"), 7),
     {"what": "made", "name": "vae", "place": "/m", "fingerprint": "of /m", "step": 7}),
    (lambda run: run.reused("vae", "r"), {"what": "reused", "stage": "vae", "of": "r"}),
    (lambda run: run.finish(), {"what": "end", "status": "FINISHED"}),
    (lambda run: run.stop(RuntimeError()), {"what": "end", "status": "FAILED"}),
    (lambda run: run.stop(SystemExit()), {"what": "end", "status": "FAILED"}),
    (lambda run: run.stop(KeyboardInterrupt()), {"what": "end", "status": "KILLED"}),
)  # fmt: skip


@pytest.mark.parametrize(("tell", "entry"), TOLD)
def test_what_is_told_is_written(
    tell: Callable[[Run], None], entry: dict[str, Any], box: Outbox
) -> None:
    tell(Run(box, "mark"))
    assert written(box) == [{"run": "mark", **entry}]


def test_files_wait_as_they_were(box: Outbox, tmp_path: Path) -> None:
    run, file = Run(box, "mark"), tmp_path / "a.png"
    file.write_text("first")
    run.log_artifact(file, "steps")
    run.log_artifact(file)
    run.register(
        "n", Path("/m"), fingerprint="f", metrics={"gain": 1.0}, aliases=["a"],
        judged_on=("h", "d"), shown=[file, file],
    )  # fmt: skip
    file.write_text("second")
    first, second, version = written(box)
    names = [first.pop("file"), second.pop("file"), *version.pop("files")]
    assert (first, second) == (
        {"what": "artifact", "run": "mark", "folder": "steps"},
        {"what": "artifact", "run": "mark", "folder": ""},
    )
    assert version == {
        "what": "register", "run": "mark", "name": "n", "location": "/m", "fingerprint": "f",
        "metrics": {"gain": 1.0}, "aliases": ["a"], "judged_on": ["h", "d"],
    }  # fmt: skip
    assert len(set(names)) == 4
    for name in names:
        assert Path(name).name == "a.png"
        assert (box.folder / "files" / name).read_text() == "first"


def test_what_a_run_has_logged_is_known(box: Outbox) -> None:
    run = Run(box, "mark")
    run.log_metrics({"a": 1.0}, 3)
    run.log_metrics({"b": 1.0}, 4)
    assert run.logged == {"a", "b"}


def test_runs_are_begun_with_their_settings_and_what_they_are(box: Outbox) -> None:
    parent = box.start_pipeline("demo", {"a": {"b": None}})
    child = parent.start_stage("vae", {"steps": 2}, "key")
    first, second = written(box)
    assert first == {
        "what": "start", "run": parent.mark, "name": "demo", "params": {"a.b": "None"},
        "tags": code_tags() | note(),
    }  # fmt: skip
    assert second == {
        "what": "start", "run": child.mark, "parent": parent.mark, "name": "vae",
        "params": {"steps": "2"}, "tags": code_tags() | note("vae"),
    }  # fmt: skip
    again = parent.start_stage("vae", {"steps": 2}, "key")
    assert written(box)[2:] == [
        {"what": "resume", "run": child.mark, "parent": parent.mark, "tags": code_tags()}
    ]
    again.finish()
    other = parent.start_stage("vae", {"steps": 2}, "key")
    assert other.mark != child.mark
    again.finish()  # whose note is another's now, and is gone when that one ends
    other.finish()
    assert [(entry["what"], entry["run"]) for entry in written(box)[-2:]] == [
        ("end", child.mark), ("end", other.mark)
    ]  # fmt: skip


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def open_box(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[[], tuple[Outbox, Server]]:
    """An outbox before a stand-in, which answers at once."""
    monkeypatch.setattr(module, "Sender", Server)
    monkeypatch.setattr(module, "RETRY_S", 20 * LONG)

    def make() -> tuple[Outbox, Server]:
        box = Outbox(tmp_path, "http://m", "x", said.append)
        server: Any = box._sender
        return box, server

    return make


def entries(box: Outbox) -> list[tuple[str, str, str | None]]:
    return [
        (entry["what"], entry["run"], entry.get("status"))
        for entry in map(json.loads, box.journal.read_text().splitlines())
    ]


def test_runs_that_were_open_when_a_process_died_are_ended(
    open_box: Callable[[], tuple[Outbox, Server]], tmp_path: Path
) -> None:
    """Begun for the first time or once more; what was ended, by whatever, is not."""
    folder = tmp_path / "tracking"
    folder.mkdir()
    told = [("start", "begun"), ("start", "done"), ("end", "done"), ("resume", "again"),
            ("resume", "over"), ("end", "over"), ("start", "twice"), ("end", "twice"),
            ("resume", "twice"), ("metrics", "none")]  # fmt: skip
    lines = [json.dumps({"what": what, "run": run, "at": 1}) for what, run in told]
    (folder / "journal.jsonl").write_text("\n".join(lines) + '\n{"what": "sta')
    box, server = open_box()
    with box:
        assert box.flush(LONG)
        assert entries(box)[len(told) :] == [
            ("end", run, "KILLED") for run in ("begun", "again", "twice")
        ]
    assert len(server.taken) == len(told) + 3, "but what was torn"


def test_what_was_sent_is_not_sent_again(
    open_box: Callable[[], tuple[Outbox, Server]], tmp_path: Path
) -> None:
    box, server = open_box()
    with box:
        run = box.start_pipeline("demo", {})
        assert box.flush(LONG)
    box, server = open_box()
    with box:  # which ends the run that was left open
        run.outbox = box
        assert box.flush(LONG)
    assert [(entry["what"], entry["run"]) for entry in server.taken] == [("end", run.mark)]
    state = tmp_path / "tracking" / "state.json"
    values = json.loads(state.read_text())
    state.write_text(json.dumps(values | {"sent": 10**6}))  # of a journal that was longer
    box, server = open_box()
    with box:
        box.start_pipeline("next", {}).finish()
        assert box.flush(LONG)
    assert server.order == ["start", "end"]


def test_a_journal_begun_anew_is_sent_from_its_start_also_by_the_next_process(
    open_box: Callable[[], tuple[Outbox, Server]], said: list[str]
) -> None:
    """Where the one that began it got none of it through: nothing of the old place is left."""
    box, server = open_box()
    with box:
        box.start_pipeline("sent", {}).finish()
    assert server.order == ["start", "end"]
    box, server = open_box()
    server.down = True
    with box:
        run = box.start_pipeline("kept", {})
        run.finish()
    assert server.taken == []
    assert "does not have all of this yet" in said[-1]
    box, server = open_box()
    with box:
        assert box.flush(LONG)
    assert [(entry["what"], entry["run"]) for entry in server.taken] == [
        ("start", run.mark), ("end", run.mark)
    ]  # fmt: skip


def test_what_was_refused_is_said_at_the_end_with_the_first_reason(
    open_box: Callable[[], tuple[Outbox, Server]], said: list[str], tmp_path: Path
) -> None:
    box, server = open_box()
    with box:
        server.refuses = {"metrics", "reused"}
        run = box.start_pipeline("demo", {})
        run.log_metrics({"a": 1.0})
        run.reused("vae", "r")
        run.finish()
    assert said == [
        "MLflow at http://m did not take 2 of the entries, the first because of "
        f"FileNotFoundError: metrics; when that is mended, `liveedit send {tmp_path}` sends it"
    ]


def test_mlflow_s_names_are_known_once_a_run_is_sent(
    open_box: Callable[[], tuple[Outbox, Server]], monkeypatch: pytest.MonkeyPatch
) -> None:
    box, _ = open_box()
    with box:
        run = box.start_pipeline("demo", {})
        assert box.flush(LONG)
        monkeypatch.setattr(module, "PATIENCE_S", LONG)
        before = time.monotonic()
        assert (run.run_id, run.experiment_id) == (f"run of {run.mark}", "1")
        assert time.monotonic() - before < LONG / 2, "nobody waits for what is known"
        monkeypatch.setattr(module, "PATIENCE_S", 0.01)
        unknown = Run(box, "unknown")
        assert (unknown.run_id, unknown.experiment_id) == ("unknown", None)
        run.finish()


def test_a_version_is_known_by_its_name_its_files_and_its_registry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by the next process."""
    monkeypatch.setattr(module, "Sender", Server)
    told: dict[str, Any] = {"metrics": {}, "aliases": []}
    for uri in ("http://a", "http://b"):
        with Outbox(tmp_path, uri, "x", pytest.fail) as box:
            assert box.version("n", "f") is None
            run = box.start_pipeline("demo", {})
            for name, fingerprint in (("n", "f"), ("n", "g"), ("o", "f")):
                run.register(name, Path("/m"), fingerprint=fingerprint, **told)
            run.finish()
    for uri in ("http://a", "http://b"):
        with Outbox(tmp_path, uri, "x", pytest.fail) as box:
            asked = [("n", "f"), ("n", "g"), ("o", "f"), ("o", "g")]
            numbers = [box.version(name, fingerprint) for name, fingerprint in asked]
            assert numbers == [f"2 at {uri}", f"3 at {uri}", f"4 at {uri}", None]

"""What is asked of MLflow for each thing that a pipeline tells, by a client that only notes it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.tracking import registry, sender, tracker
from pipelines.tracking.sender import MissingRunError, Sender, files_of
from pipelines.tracking.tracker import Tracker, TrackingError, find_run

Call = tuple[str, tuple[Any, ...], dict[str, Any]]


class Client:
    """Notes what it is asked and gives the `answers` to it, each a value."""

    def __init__(self, **answers: Any) -> None:
        self.calls: list[Call] = []
        self.answers = answers
        self.tracking_uri = "http://m"

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def ask(*given: Any, **named: Any) -> Any:
            self.calls.append((name, given, named))
            return self.answers.get(name)

        return ask

    def of(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(given, named) for asked, given, named in self.calls if asked == name]


RUN = SimpleNamespace(
    info=SimpleNamespace(run_id="r1", experiment_id="5"), data=SimpleNamespace(tags={})
)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Client:
    found = SimpleNamespace(experiment_id="5", lifecycle_stage="active")
    made = Client(create_run=RUN, get_run=RUN, get_experiment_by_name=found, create_experiment=8)
    for module in (tracker, registry):
        monkeypatch.setattr(module, "client_for", lambda uri: made)
    return made


@pytest.fixture
def run(client: Client) -> Tracker:
    return Tracker("http://m", "r1")


def test_runs_are_made_where_and_as_what_they_are(client: Client) -> None:
    parent = Tracker.start_pipeline("http://m", "x", "demo", {"a": 1}, {"mine": "1"}, 7)
    child = parent.start_stage("vae", {"b": 2}, {"liveedit.stage": "own"}, 9)
    assert (parent.run_id, child.run_id, child.uri) == ("r1", "r1", "http://m")
    first, second = client.of("create_run")
    assert (first[0], first[1]["run_name"]) == (("5", 7), "demo")
    assert first[1]["tags"] == {"liveedit.kind": "pipeline", "mine": "1"} | tracker.code_tags()
    assert (second[0], second[1]["run_name"]) == (("5", 9), "vae")
    told = {"mlflow.parentRunId": "r1", "liveedit.kind": "stage", "liveedit.stage": "own"}
    assert second[1]["tags"] == told | tracker.code_tags()
    params = [[(p.key, p.value) for p in n["params"]] for _, n in client.of("log_batch")]
    assert params == [[("a", "1")], [("b", "2")]]


def test_parameters_are_told_a_hundred_at_once_and_none_too_long(
    run: Tracker, client: Client
) -> None:
    run.log_params({"long": "x" * 6001, "a": {"b": {"c": None}}, **{f"k{n}": n for n in range(99)}})
    batches = [named["params"] for _, named in client.of("log_batch")]
    assert [len(batch) for batch in batches] == [100, 1]
    assert (batches[0][0].key, batches[0][0].value) == ("long", "x" * 6000)
    assert (batches[0][1].key, batches[0][1].value) == ("a.b.c", "None")
    assert (batches[1][0].key, batches[1][0].value) == ("k98", "98")


def test_metrics_have_the_time_and_step_that_they_are_of(
    run: Tracker, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker.time, "time", lambda: 2.5)
    run.log_metrics({"a": 1, "b": 2}, 3, at=4)
    run.log_metrics({"a": 1})
    run.log_metrics({"a": 1}, at=0)
    found = [
        [(m.key, m.value, m.timestamp, m.step) for m in named["metrics"]]
        for _, named in client.of("log_batch")
    ]
    assert found == [[("a", 1.0, 4, 3), ("b", 2.0, 4, 3)], [("a", 1.0, 2500, 0)],
                     [("a", 1.0, 0, 0)]]  # fmt: skip
    assert [given for given, _ in client.of("log_batch")] == [("r1",)] * 3


@pytest.mark.parametrize(
    ("source", "kind"), [("s3://b/x", "s3"), ("/data/x", "local"), ("s3/x", "local")]
)
def test_a_dataset_is_told_with_where_it_lies(
    source: str, kind: str, run: Tracker, client: Client
) -> None:
    run.log_input("train", source, "abc", "training")
    ((given, _),) = client.of("log_inputs")
    (entry,) = given[1]
    told = entry.dataset
    assert (told.name, told.digest, told.source_type) == ("train", "abc", kind)
    assert json.loads(told.source) == {"uri": source}
    assert [(tag.key, tag.value) for tag in entry.tags] == [("mlflow.data.context", "training")]


@pytest.mark.parametrize("folder", [None, "steps"])
def test_files_and_ends(folder: str | None, run: Tracker, client: Client) -> None:
    run.log_artifact(Path("a.png"), folder)
    run.finish()
    run.finish("KILLED", 9)
    run.resume({"a": "1"})
    assert client.of("log_artifact") == [(("r1", "a.png", folder), {})]
    assert client.of("set_terminated") == [
        (("r1", "FINISHED", None), {}),
        (("r1", "KILLED", 9), {}),
    ]
    assert client.of("update_run") == [(("r1",), {"status": "RUNNING"})]
    ((_, named),) = client.of("log_batch")
    assert [(tag.key, tag.value) for tag in named["tags"]] == [("a", "1")]


def test_mlflow_prints_no_address_in_the_midst_of_ours(
    run: Tracker, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, seen = "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", []
    monkeypatch.delenv(name, raising=False)
    client.set_terminated = lambda *_: seen.append(os.environ.get(name))  # type: ignore[attr-defined]
    run.finish()
    assert (seen, os.environ.get(name)) == (["true"], None)


def test_reused_stages_are_linked_below_what_was_said(run: Tracker, client: Client) -> None:
    at = f"#/experiments/5/runs/{{}}?{tracker.SIDE}"
    old = f"Said.\n\n{tracker.REUSED}\n\n* vae: [old]"
    tags = {"liveedit.reused.vae": "a" * 32, tracker.NOTE: old, "other": "x"}
    client.answers["get_run"] = SimpleNamespace(info=RUN.info, data=SimpleNamespace(tags=tags))
    run.link_reused("data", "b" * 32)
    tag, note = ([(t.key, t.value) for t in n["tags"]] for _, n in client.of("log_batch"))
    assert tag == [("liveedit.reused.data", "b" * 32)]
    vae, data = (f"* {n}: [{c * 8}]({at.format(c * 32)})" for n, c in (("vae", "a"), ("data", "b")))
    assert note == [(tracker.NOTE, f"Said.\n\n{tracker.REUSED}\n\n{vae}\n{data}")]


def test_where_a_person_finds_a_run(run: Tracker, client: Client) -> None:
    place = "#/experiments/5/runs/r1?workflowType=machine_learning"
    assert run.page() == f"MLflow: http://m/{place}"
    local = Tracker("sqlite:///a.db", "r1").page()
    assert local == (
        f"MLflow: http://127.0.0.1:5000/{place} after `mlflow ui --backend-store-uri sqlite:///a.db`"
    )


def test_an_experiment_is_found_made_or_gone(client: Client, tmp_path: Path) -> None:
    assert tracker.experiment_id("http://m", "x") == "5"
    client.answers["get_experiment_by_name"] = None
    assert tracker.experiment_id("http://m", "x") == "8"
    assert tracker.experiment_id(f"sqlite:///{tmp_path}/m.db", "x") == "8"
    places = [named["artifact_location"] for _, named in client.of("create_experiment")]
    assert places == [None, (tmp_path / "mlartifacts").as_uri()]
    gone = SimpleNamespace(experiment_id="5", lifecycle_stage="deleted")
    client.answers["get_experiment_by_name"] = gone
    with pytest.raises(TrackingError, match=r"tracking.experiment=x was deleted in http://m"):
        tracker.experiment_id("http://m", "x")


@pytest.mark.parametrize(("found", "name"), [([RUN], "r1"), ([], None)])
def test_a_run_is_found_by_our_name_of_it(
    found: list[Any], name: str | None, client: Client
) -> None:
    client.answers["search_runs"] = found
    assert find_run("http://m", "5", "mark") == name
    assert client.of("search_runs") == [
        ((["5"], "tags.`liveedit.run` = 'mark'"), {"max_results": 1})
    ]


@pytest.mark.parametrize(("uri", "writes", "made"), [
    ("sqlite:///{}/a/b/m.db", True, True), ("sqlite:///{}/a/b/m.db", False, False),
    ("http://127.0.0.1:9", True, False),
])  # fmt: skip
def test_a_database_is_made_only_where_something_shall_be_written(
    uri: str, writes: bool, made: bool, client: Client, tmp_path: Path
) -> None:
    tracker.check_store(uri.format(tmp_path), writes=writes)
    assert ((tmp_path / "a" / "b").is_dir(), bool(client.of("search_experiments"))) == (made, made)
    for kind in ("", "ftp://x", "file:///x"):
        with pytest.raises(TrackingError, match="is no tracking store that MLflow takes"):
            tracker.check_store(kind, writes=writes)
    for kind in ("https://h", "postgresql://h/m", "mysql+pymysql://h/m", "databricks://me"):
        tracker.check_store(kind, writes=writes)  # whether it answers or not


def test_who_ran_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "code_commit", lambda: "c-dirty")
    monkeypatch.setattr("getpass.getuser", lambda: "ann")
    monkeypatch.setattr(sys, "argv", ["/x/liveedit", "train", "y" * 300, "a=1", "--plan"])
    tags = tracker.code_tags()
    assert tags.pop("mlflow.source.name") == ("liveedit train " + "y" * 300)[:250]
    assert tags == {
        "liveedit.commit": "c-dirty", "mlflow.source.git.commit": "c-dirty",
        "mlflow.source.type": "LOCAL", "mlflow.user": "ann",
    }  # fmt: skip

    def nobody() -> str:
        raise KeyError("uid 1000")

    monkeypatch.setattr("getpass.getuser", nobody)
    assert tracker.code_tags()["mlflow.user"] == "unknown"


@pytest.mark.parametrize(("changes", "commit"), [("", "abc"), (" M a.py", "abc-dirty")])
def test_the_commit_says_whether_it_is_all(
    changes: str, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {"rev-parse": "abc", "status": changes}
    monkeypatch.setattr(tracker, "_git", lambda *words: said[words[0]])
    tracker.code_commit.cache_clear()
    try:
        assert tracker.code_commit() == commit
    finally:
        tracker.code_commit.cache_clear()


def test_the_files_that_wait_with_an_entry() -> None:
    assert files_of({"what": "end"}) == []
    assert files_of({"file": "a"}) == ["a"]
    assert files_of({"files": ["a", "b"]}) == ["a", "b"]


OF = {"what": "x", "run": "mark", "at": 9}
REGISTERED = {"name": "n", "location": "/m", "fingerprint": "f", "metrics": {"gain": 1.0},
              "aliases": ["a", "b"]}  # fmt: skip
BUT = {"run_id": "of mark", "fingerprint": "f", "metrics": {"gain": 1.0}, "aliases": ("a", "b")}
ENTRIES: tuple[tuple[dict[str, Any], str, tuple[Any, ...], dict[str, Any]], ...] = (
    ({"what": "resume", "parent": "top", "tags": {"a": "1"}}, "Tracker.resume",
     ({"a": "1", "mlflow.parentRunId": "of top"},), {}),
    ({"what": "metrics", "values": {"a": 1.0}, "step": 4}, "Tracker.log_metrics",
     ({"a": 1.0}, 4, 9), {}),
    ({"what": "artifact", "file": "u/a.png", "folder": "steps"}, "Tracker.log_artifact",
     (Path("files/u/a.png"), "steps"), {}),
    ({"what": "artifact", "file": "u/a.png", "folder": ""}, "Tracker.log_artifact",
     (Path("files/u/a.png"), None), {}),
    ({"what": "input", "name": "train", "source": "s", "digest": "d", "context": "c"},
     "Tracker.log_input", ("train", "s", "d", "c"), {}),
    ({"what": "used", "models": {"a": ["/m", "f"]}}, "lineage.log_used",
     ("http://m", "of mark", {"a": ["/m", "f"]}), {}),
    ({"what": "made", "name": "vae", "place": "/m", "fingerprint": "f", "step": 3},
     "lineage.log_made", ("http://m", "of mark", "vae", Path("/m"), "f", 3), {}),
    ({"what": "reused", "stage": "vae", "of": "known"}, "Tracker.link_reused",
     ("vae", "of known"), {}),
    ({"what": "reused", "stage": "vae", "of": "unknown"}, "Tracker.link_reused",
     ("vae", "unknown"), {}),
    ({"what": "end", "status": "KILLED"}, "Tracker.finish", ("KILLED", 9), {}),
    ({"what": "register", **REGISTERED, "judged_on": ["h", "d"], "files": ["u/a.png"]},
     "registry.register", ("http://m", "n", Path("/m")),
     BUT | {"judged_on": ("h", "d"), "shown": [Path("files/u/a.png")]}),
    ({"what": "register", **REGISTERED, "judged_on": None, "files": []},
     "registry.register", ("http://m", "n", Path("/m")), BUT | {"judged_on": None, "shown": []}),
)  # fmt: skip


@pytest.mark.parametrize(("entry", "reaches", "given", "named"), ENTRIES)
def test_what_was_written_down_is_what_is_told(
    entry: dict[str, Any],
    reaches: str,
    given: tuple[Any, ...],
    named: dict[str, Any],
    client: Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = {("5", mark): f"of {mark}" for mark in ("mark", "top", "known")}
    monkeypatch.setattr(sender, "find_run", lambda _, place, mark: known.get((place, mark)))
    monkeypatch.setattr(sender, "experiment_id", lambda uri, experiment: "5")
    calls: list[tuple[Any, ...]] = []

    def note(*asked: Any, **more: Any) -> str:
        first = asked[0]
        if isinstance(first, Tracker):
            assert (first.uri, first.run_id) == ("http://m", "of mark")
            asked = asked[1:]
        calls.append((asked, more))
        return "7"

    owner, _, function = reaches.partition(".")
    monkeypatch.setattr(getattr(sender, owner), function, note)
    number = Sender("http://m", "x").send(OF | entry, Path("files"))
    assert calls == [(given, named)]
    assert number == ("7" if entry["what"] == "register" else None)


def test_a_run_that_nobody_knows_is_missing(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender, "find_run", lambda *_: None)
    with pytest.raises(MissingRunError, match=r"liveedit\.run=mark"):
        Sender("http://m", "x").send(OF | {"what": "end", "status": "FAILED"}, Path("files"))


START = OF | {"what": "start", "name": "demo", "params": {"p": "1"}, "tags": {"t": "2"}}


@pytest.mark.parametrize("parent", [None, "top"])
@pytest.mark.parametrize("found", [None, "r0"])
def test_a_run_is_begun_once_as_child_of_its_parent(
    parent: str | None, found: str | None, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sender, "find_run", lambda _, place, mark: found if mark == "mark" else "top"
    )
    box = Sender("http://m", "x")
    box.send(START | ({"parent": parent} if parent else {}), Path("files"))
    assert box.runs["mark"] == (found or "r1")
    made = client.of("create_run")
    assert len(made) == (found is None)
    if made:
        ((given, named),) = made
        assert (given, named["run_name"]) == (("5", 9), "demo")
        assert named["tags"]["t"] == "2"
        assert named["tags"]["liveedit.run"] == "mark"
        assert named["tags"].get("mlflow.parentRunId") == parent
    logged = [p for _, n in client.of("log_batch") for p in n["params"]]
    assert [(p.key, p.value) for p in logged] == [("p", "1")]


def test_versions_are_told_from_the_newest_on(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = ["9", "10", "2"]
    client.answers["search_model_versions"] = [SimpleNamespace(version=n) for n in numbers]
    monkeypatch.setattr(registry, "find_version", lambda reference, uri: (reference, uri))
    assert registry.versions("mine", "http://m") == [
        (f"models:/mine/{number}", "http://m") for number in ("10", "9", "2")
    ]
    assert client.of("search_model_versions") == [(("name = 'mine'",), {})]

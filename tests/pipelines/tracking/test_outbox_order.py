"""An outbox before a stand-in for MLflow that does what it is told: down, silent, refusing."""

from __future__ import annotations

import importlib.abc
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from pipelines.tracking import outbox as module
from pipelines.tracking.outbox import Outbox, Run
from tests.pipelines.tracking.stand_in import LONG, Server


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def boxes(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], tuple[Outbox, Server]]]:
    monkeypatch.setattr(module, "Sender", Server)
    monkeypatch.setattr(module, "RETRY_S", 20 * LONG)  # only who asks for a try gets one
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    servers: list[Server] = []

    def make() -> tuple[Outbox, Server]:
        box = Outbox(tmp_path, "http://mlflow", "liveedit", said.append)
        servers.append(box._sender)  # type: ignore[arg-type]
        return box, servers[-1]

    yield make
    for server in servers:
        server.gate.set()
    for thread in threading.enumerate():
        if thread.name == "mlflow":
            thread.join(LONG)


Boxes = Callable[[], tuple[Outbox, Server]]


def state(folder: Path) -> int:
    sent: int = json.loads((folder / "tracking" / "state.json").read_text())["sent"]
    return sent


def test_who_waits_gets_one_more_try_at_once_and_is_warned_once(
    boxes: Boxes, said: list[str]
) -> None:
    box, server = boxes()
    with box:
        server.down = True
        run = box.start_pipeline("demo", {})
        run.log_metrics({"loss": 1.0}, 3)
        run.finish()
        assert [box.flush(LONG), box.flush(LONG), server.order] == [False, False, []]
        assert ["nobody listens" in line for line in said] == [True]
        server.down = False
        assert box.flush(LONG)
        assert server.order == ["start", "metrics", "end"]
    assert len(said) == 1


def test_who_asks_for_a_run_s_name_is_told_ours_once_mlflow_has_failed(
    boxes: Boxes, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    box, server = boxes()
    server.down = True
    with box:
        run = box.start_pipeline("demo", {})
        while not said:  # which the first failure does
            time.sleep(0.01)
        monkeypatch.setattr(module, "PATIENCE_S", LONG)
        before = time.monotonic()
        assert (run.run_id, run.experiment_id) == (run.mark, None)
        assert time.monotonic() - before < LONG / 2
        monkeypatch.setattr(module, "PATIENCE_S", 0.05)


def test_what_failed_is_tried_again_now_and_then_and_nothing_is_where_all_is_sent(
    boxes: Boxes, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    box, server = boxes()
    server.down = True
    with box:
        run = box.start_pipeline("demo", {})
        while not said:
            time.sleep(0.01)
        server.asked.clear()
        assert server.asked.wait(LONG), "nobody waits for it"
        server.down = False
        until = time.monotonic() + LONG
        while server.order != ["start"]:
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(0.05)  # longer than between two tries
        run.finish()
        assert box.flush(LONG)
    assert server.order == ["start", "end"]


def test_who_waits_goes_on_with_the_last_answer_and_the_thread_ends_with_the_outbox(
    boxes: Boxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    box, server = boxes()
    before = time.monotonic()
    with box:
        box.start_pipeline("demo", {}).finish()
        assert box.flush(LONG)
        (sending,) = [thread for thread in threading.enumerate() if thread.name == "mlflow"]
        while not box._changed._waiters:  # type: ignore[attr-defined]  # it has nothing to do
            time.sleep(0.01)
        monkeypatch.setattr(box, "flush", lambda patience: True)  # which would wake it as well
    sending.join(5)
    assert not sending.is_alive()
    assert sending.daemon, "nor does a process wait for it, should a server be silent"
    assert server.order == ["start", "end"]
    assert time.monotonic() - before < LONG / 2


@pytest.mark.parametrize("told", [True, False])  # whether there is something to send
def test_what_mlflow_s_import_takes_is_nobody_s_patience(
    told: bool, boxes: Boxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seconds, in which no server was asked anything."""
    gate, asking = threading.Event(), threading.Barrier(2 + told)

    class Slow(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
            return ModuleSpec(name, self) if name == "mlflow" else None

        def exec_module(self, module: object) -> None:
            assert gate.wait(LONG)

    monkeypatch.delitem(sys.modules, "mlflow")
    monkeypatch.setattr(sys, "meta_path", [Slow(), *sys.meta_path])
    box, server = boxes()
    found: list[object] = []

    def ask(question: Callable[[], object]) -> None:
        asking.wait(LONG)
        found.append(question())

    with box:
        questions: list[Callable[[], object]] = [lambda: box.flush(0.05)]
        answers: set[object] = {True}
        if told:
            run = box.start_pipeline("demo", {})
            questions.append(lambda: run.run_id)
            answers.add(f"run of {run.mark}")
        threads = [threading.Thread(target=ask, args=[q], daemon=True) for q in questions]
        for thread in threads:
            thread.start()
        asking.wait(LONG)
        threads[0].join(0.5)
        assert found == [] == server.taken
        gate.set()
        for thread in threads:
            thread.join(LONG)
        assert set(found) == answers
        if told:
            run.finish()


def test_a_silent_server_is_waited_for_as_long_as_patience_says(
    boxes: Boxes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 2 * LONG)  # the end's, and not who asks
    box, server = boxes()
    with box:
        assert box.flush(LONG)  # MLflow is imported
        server.gate.clear()
        box.start_pipeline("demo", {})
        done: list[bool] = []
        waiting = threading.Thread(target=lambda: done.append(box.flush(0.05)), daemon=True)
        waiting.start()
        waiting.join(LONG)
        assert done == [False]
        server.gate.set()
        assert box.flush(LONG)


def test_what_was_refused_is_put_back_once(boxes: Boxes, tmp_path: Path) -> None:
    box, server = boxes()
    aside = tmp_path / "tracking" / "refused.jsonl"
    with box:
        server.refuses = {"metrics"}
        run = box.start_pipeline("demo", {})
        run.log_metrics({"loss": 1.0}, 3)
        run.finish()
        assert box.flush(LONG)
        assert server.order == ["start", "end"]
        assert len(box.refused) == len(aside.read_text().splitlines()) == 1
        server.refuses = set()
        box.put_refused_back()
        assert not aside.exists()
        box.put_refused_back()
        assert box.flush(LONG)
        assert server.order == ["start", "end", "metrics"]
        box.refused.clear()


def finish(run: Run) -> None:
    run.finish()


def fail(run: Run) -> None:
    run.stop(RuntimeError("out of memory"))


def kill(run: Run) -> None:
    """Nothing is written down."""


@pytest.mark.parametrize(
    ("end", "key", "what"),
    [
        (finish, "key", "start"),
        (fail, "key", "resume"),
        (kill, "key", "resume"),
        (fail, "another", "start"),
        (kill, "another", "start"),
    ],
)
def test_a_stage_goes_on_in_the_run_that_was_begun_for_it_and_did_not_finish(
    end: Callable[[Run], None], key: str, what: str, boxes: Boxes
) -> None:
    box, server = boxes()
    with box:
        parent = box.start_pipeline("demo", {})
        first = parent.start_stage("vae", {"steps": 2}, "key")
        end(first)
        again = parent.start_stage("vae", {"steps": 2}, key)
        assert (again.mark == first.mark) == (what == "resume")
        assert box.flush(LONG)
    assert [server.taken[-1][name] for name in ("what", "run")] == [what, again.mark]


def test_what_fails_after_the_end_is_not_said_once_more(boxes: Boxes, said: list[str]) -> None:
    box, server = boxes()
    with box:
        assert box.flush(LONG)
        server.gate.clear()
        server.asked.clear()
        box.start_pipeline("demo", {}).finish()
        assert server.asked.wait(LONG)
        (sending,) = [thread for thread in threading.enumerate() if thread.name == "mlflow"]
        server.down = True
    server.gate.set()
    sending.join(LONG)
    assert ["does not have all of this yet (no answer)" in line for line in said] == [True]


def test_what_is_under_way_when_an_outbox_closes_is_the_next_ones(
    boxes: Boxes, tmp_path: Path
) -> None:
    """The late answer must not move the mark of what is sent in a journal that is another's."""
    box, server = boxes()
    with box:
        run = box.start_pipeline("demo", {})
        run.finish()
        assert box.flush(LONG)
        before = state(tmp_path)
        server.gate.clear()
        server.asked.clear()
        run.log_metrics({"loss": 1.0}, 3)
        assert server.asked.wait(LONG)
        (sending,) = [thread for thread in threading.enumerate() if thread.name == "mlflow"]
    server.gate.set()
    sending.join(LONG)
    assert state(tmp_path) == before
    box, server = boxes()
    with box:
        assert box.flush(LONG)
    assert server.order == ["metrics"]

"""What a pipeline has to tell MLflow, kept on disk until it is told.

The pipeline only appends to `OUTPUT/tracking/journal.jsonl`; a thread sends what is there, in order
and again until it is taken. An MLflow that is dead, dies or hangs therefore holds nothing up and
nothing is lost: the next pipeline in this output, or `liveedit send OUTPUT`, sends the rest.

A run has a name of ours from the start (`Run.mark`, tag `liveedit.run` in MLflow), so that sending
the same entry twice makes nothing twice.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from infra.runtime.environment import environment, unless_set
from pipelines.tracking.describe import note
from pipelines.tracking.records import digest_of, fingerprint_of, write_json
from pipelines.tracking.sender import Sender, files_of, will_never_take
from pipelines.tracking.tracker import CHECK_ENV, code_tags, flatten, root_cause

RETRY_S = 10.0
PATIENCE_S = 10.0  # how long the end of a pipeline waits for an MLflow that takes nothing
STOPPED_S = 3.0  # the same after an error or Ctrl-C


class Outbox:
    """A context manager; the thread lives as long as it. One at a time in an output."""

    def __init__(
        self, output: Path, uri: str, experiment: str, warn: Callable[[str], None]
    ) -> None:
        self.output, self.uri, self.warn = output, uri, warn
        self.folder = output / "tracking"
        self.journal = self.folder / "journal.jsonl"
        self._sender = Sender(uri, experiment)
        self._changed = threading.Condition()
        self._written = 0  # bytes of the journal
        self._sent = 0  # of them
        self._end = 0  # of the entry that is being sent
        self._failures = 0
        self._error = ""
        self._warned = self._closed = self._ready = False
        self._short_waits = environment(unless_set(CHECK_ENV))
        self.refused: list[str] = []
        self._versions: dict[str, str] = {}  # registered models -> number in the registry

    def __enter__(self) -> Outbox:
        (self.folder / "files").mkdir(parents=True, exist_ok=True)
        self._read_state()
        for mark in self._open_runs():  # of a process that was killed
            self.add("end", mark, status="KILLED")
        if self._sent == self._written:
            self.journal.write_bytes(b"")
            self._sent = self._written = 0
            self._write_state()
        self._short_waits.__enter__()
        threading.Thread(target=self._work, name="mlflow", daemon=True).start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            done = self.flush(PATIENCE_S if error is None else STOPPED_S)
        finally:
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            self._short_waits.__exit__(None, None, None)
        again = f"`liveedit send {self.output}` sends it"
        if not done:
            cause = self._error or "no answer"
            self.warn(f"MLflow at {self.uri} does not have all of this yet ({cause}); {again}")
        elif self.refused:
            self.warn(
                f"MLflow at {self.uri} did not take {len(self.refused)} of the entries, the first "
                f"because of {self.refused[0]}; when that is mended, {again}"
            )

    def start_pipeline(self, name: str, params: Mapping[str, Any]) -> Run:
        """A new parent run."""
        run = Run(self, uuid.uuid4().hex)
        params = {key: str(value) for key, value in flatten(params).items()}
        self.add("start", run.mark, name=name, params=params, tags=code_tags() | note())
        return run

    def start_stage(self, parent: str, stage: str, params: Mapping[str, Any], key: str) -> Run:
        """A child run of `parent`; the one that was begun for the same `key` if it was not done."""
        begun = self._begun(stage)
        found = json.loads(begun.read_text()) if begun.is_file() else {}
        if found.get("key") == key:
            run = Run(self, found["run"], begun)
            self.add("resume", run.mark, parent=parent, tags=code_tags())
            return run
        run = Run(self, uuid.uuid4().hex, begun)
        params = {key: str(value) for key, value in flatten(params).items()}
        tags = code_tags() | note(stage)
        self.add("start", run.mark, parent=parent, name=stage, params=params, tags=tags)
        write_json(begun, {"key": key, "run": run.mark})
        return run

    def add(self, what: str, mark: str, **values: Any) -> None:
        """Write an entry down; it is sent in its turn."""
        entry = {"what": what, "run": mark, "at": int(time.time() * 1000), **values}
        line = json.dumps(entry).encode() + b"\n"
        with self._changed:
            with self.journal.open("ab") as file:
                file.write(line)
            self._written += len(line)
            self._changed.notify_all()

    def keep_file(self, path: Path) -> str:
        """A copy of a small file as it is now; the name under which it waits."""
        name = f"{uuid.uuid4().hex}/{path.name}"
        (self.folder / "files" / name).parent.mkdir()
        shutil.copyfile(path, self.folder / "files" / name)
        return name

    def flush(self, patience: float = PATIENCE_S) -> bool:
        """Wait until all is sent; False once sending fails, or nothing is sent for `patience`."""
        with self._changed:
            failures = self._failures
            self._changed.wait_for(lambda: self._ready)
            self._error, waiting = "", self._sent < self._written
            self._changed.notify_all()  # one more try now
            while waiting:
                sent = self._sent
                self._changed.wait_for(
                    lambda sent=sent: self._sent > sent or self._failures > failures,  # type: ignore[misc]
                    timeout=patience,
                )
                waiting = self._sent < self._written
                if waiting and (self._failures > failures or self._sent == sent):
                    return False
            return True

    def run_id(self, mark: str) -> str:
        """MLflow's own name of a run, or ours as long as that is not known."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready)
            self._changed.wait_for(
                lambda: mark in self._sender.runs or self._failures > 0, timeout=PATIENCE_S
            )
            return self._sender.runs.get(mark, mark)

    def experiment_id(self, mark: str) -> str | None:
        """MLflow's number of the experiment that holds a run; None as long as it is not known."""
        known = self.run_id(mark) != mark
        return self._sender.experiment_id if known else None  # which sending the run has asked for

    def version(self, name: str, fingerprint: str) -> str | None:
        """The number of the version of `name` that was registered from here with these files."""
        return self._versions.get(self._known_as(name, fingerprint))

    def put_refused_back(self) -> None:
        """Try once more what MLflow did not take."""
        aside = self.folder / "refused.jsonl"
        if aside.is_file():
            entries = [json.loads(line) for line in aside.read_text().splitlines()]
            aside.unlink()
            for entry in entries:
                self.add(entry.pop("what"), entry.pop("run"), **entry)

    def _known_as(self, name: str, fingerprint: str) -> str:
        return f"{self.uri} {name} {fingerprint}"

    def _begun(self, stage: str) -> Path:
        return self.folder / "begun" / f"{stage}.json"

    def _open_runs(self) -> list[str]:
        marks: dict[str, None] = {}
        for line in self.journal.read_bytes().splitlines():
            entry = json.loads(line)
            if entry["what"] in ("start", "resume"):
                marks[entry["run"]] = None
            elif entry["what"] == "end":
                marks.pop(entry["run"], None)
        return list(marks)

    def _work(self) -> None:
        try:
            # For seconds, which say nothing about the server; of a database's the first call would
            # import half.
            import mlflow

            if not self.uri.startswith(("http:", "https:")):
                import mlflow.store.model_registry.sqlalchemy_store
                import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
        finally:
            with self._changed:
                self._ready = True
                self._changed.notify_all()
        while (entry := self._next()) is not None:
            try:
                number = self._sender.send(entry, self.folder / "files")
            except Exception as error:  # whatever MLflow, requests and SQLAlchemy let through
                if not will_never_take(error):
                    self._fail(error)
                    continue
                self._put_aside(entry, error)
                number = None
            with self._changed:
                if self._closed:
                    return  # another outbox may be at work here; it sends this once more
                if number is not None:
                    self._versions[self._known_as(entry["name"], entry["fingerprint"])] = number
                self._sent = self._end
                self._write_state()
                self._changed.notify_all()
            for name in files_of(entry):
                shutil.rmtree((self.folder / "files" / name).parent, ignore_errors=True)

    def _next(self) -> dict[str, Any] | None:
        """The next entry, when there is one; None when this outbox is closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or (self._sent < self._written and not self._error),
                timeout=RETRY_S if self._error else None,
            )
            if self._closed:
                return None
            self._error = ""
            with self.journal.open("rb") as file:
                file.seek(self._sent)
                line = file.readline()
            self._end = self._sent + len(line)
        entry: dict[str, Any] = json.loads(line)
        return entry

    def _fail(self, error: Exception) -> None:
        with self._changed:
            self._failures += 1
            self._error = root_cause(error)
            first, self._warned = not (self._warned or self._closed), True
            self._changed.notify_all()
        if first:
            self.warn(
                f"MLflow at {self.uri} does not answer ({self._error}); nothing waits for it, what "
                f"it misses is kept in {self.folder}"
            )

    def _put_aside(self, entry: dict[str, Any], error: Exception) -> None:
        self.refused.append(root_cause(error))
        with (self.folder / "refused.jsonl").open("a") as file:
            file.write(json.dumps(entry) + "\n")

    def _read_state(self) -> None:
        self.journal.touch()
        data = self.journal.read_bytes()
        if (torn := len(data) - data.rfind(b"\n") - 1) > 0:  # the machine went down
            with self.journal.open("r+b") as file:
                file.truncate(len(data) - torn)
        self._written = len(data) - torn
        state = self.folder / "state.json"
        if state.is_file():
            values = json.loads(state.read_text())
            self._sent, self._versions = min(values["sent"], self._written), values["versions"]

    def _write_state(self) -> None:
        write_json(self.folder / "state.json", {"sent": self._sent, "versions": self._versions})


class Run:
    """One MLflow run of a pipeline, written down; `begun` is the note of a stage's beginning."""

    def __init__(self, outbox: Outbox, mark: str, begun: Path | None = None) -> None:
        self.outbox, self.mark, self._begun = outbox, mark, begun
        self.logged: set[str] = set()  # names of metrics

    @property
    def run_id(self) -> str:
        return self.outbox.run_id(self.mark)

    @property
    def experiment_id(self) -> str | None:
        return self.outbox.experiment_id(self.mark)

    def start_stage(self, stage: str, params: Mapping[str, Any], key: str) -> Run:
        return self.outbox.start_stage(self.mark, stage, params, key)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        self.logged |= metrics.keys()
        self.outbox.add("metrics", self.mark, values=dict(metrics), step=step)

    def log_artifact(self, path: Path, folder: str = "") -> None:
        """A small file (a card, a picture, a table), as it is now, into a folder of the run's."""
        self.outbox.add("artifact", self.mark, file=self.outbox.keep_file(path), folder=folder)

    def log_input(self, name: str, source: str, context: str) -> None:
        """A dataset that the run reads, for `context` (training, evaluation)."""
        digest = digest_of(source)
        self.outbox.add(
            "input", self.mark, name=name, source=source, digest=digest, context=context
        )

    def used(self, models: Mapping[str, Path]) -> None:
        """Model directories that the run reads, by name, as they are now."""
        known = {name: (str(place), fingerprint_of(place)) for name, place in models.items()}
        self.outbox.add("used", self.mark, models=known)

    def made(self, name: str, model: Path, step: int) -> None:
        """The model directory that came out after `step` steps."""
        of = {"name": name, "place": str(model), "fingerprint": fingerprint_of(model)}
        self.outbox.add("made", self.mark, step=step, **of)

    def reused(self, stage: str, run_id: str) -> None:
        """Link to the run that made a stage's output."""
        self.outbox.add("reused", self.mark, stage=stage, of=run_id)

    def register(
        self,
        name: str,
        location: Path,
        *,
        fingerprint: str,
        metrics: Mapping[str, float],
        aliases: list[str],
        judged_on: tuple[str, str] | None = None,
        shown: Sequence[Path] = (),
    ) -> None:
        """A new version of the model `name`, of this run: see `registry.register`."""
        self.outbox.add(
            "register",
            self.mark,
            name=name,
            location=str(location),
            fingerprint=fingerprint,
            metrics=dict(metrics),
            aliases=aliases,
            judged_on=judged_on,
            files=[self.outbox.keep_file(path) for path in shown],
        )

    def finish(self) -> None:
        if self._begun is not None:
            self._begun.unlink(missing_ok=True)
        self.outbox.add("end", self.mark, status="FINISHED")

    def stop(self, error: BaseException) -> None:
        """It ended because of `error`; a stage that begins again goes on in this run."""
        killed = isinstance(error, KeyboardInterrupt)
        self.outbox.add("end", self.mark, status="KILLED" if killed else "FAILED")

"""Which stages are finished, and for which inputs: one small JSON file a stage.

A stage's key is the hash of everything that decides its result: its resolved configuration, the
fingerprints of its inputs, and the version of the code's meaning. A finished stage with the same
key and an unchanged output is not run again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from data.manifest import dataset_hash, read_dataset_info
from data.store import DatasetError
from infra.runtime.errors import UserError
from modeling.fingerprint import model_fingerprint


@dataclass
class StageRecord:
    """What a finished stage leaves behind."""

    stage: str
    key: str  # hash of the inputs
    fingerprint: str | None  # hash of the output; None when the output lies in the registry
    output: str  # folder or file the stage wrote, a path or a URI
    run_id: str  # its MLflow run
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    finished: str = ""  # ISO time
    inputs: dict[str, Any] = field(default_factory=dict)  # what the key is the hash of


class Records:
    """The stage records of one output folder. What lies in it is written relative to it, so that a
    folder that was moved or copied means what is in itself."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.folder = output / "stages"

    def read(self, stage: str) -> StageRecord | None:
        """The record of `stage`; None when it never finished, or the file is of another make."""
        try:
            record = StageRecord(**json.loads((self.folder / f"{stage}.json").read_text()))
        except (FileNotFoundError, json.JSONDecodeError, TypeError):
            return None
        if "://" not in record.output:
            record.output = str(self.output / record.output)
        return record

    def write(self, record: StageRecord) -> None:
        output, here = record.output, self.output.absolute()
        if "://" not in output and (place := Path(output).absolute()).is_relative_to(here):
            output = str(place.relative_to(here))
        write_json(self.folder / f"{record.stage}.json", asdict(replace(record, output=output)))


def version_folder(fingerprint: str) -> str:
    """The name of a registered version's folder, which says what is in it."""
    return fingerprint[:16]


@contextmanager
def taken_along(model: Path) -> Iterator[None]:
    """While entered, `model` is changed on purpose: the record of a stage that made it goes along,
    so that it is not made again. Raises UserError where it is a version, which is for ever."""
    before = model_fingerprint(model)
    if model.resolve().name == version_folder(before):
        raise UserError(
            f"{model} is a registered version and stays as it is; change the model that it was "
            "made of, or a copy"
        )
    yield
    made = model.resolve()
    records = Records(made.parent.parent)
    record = records.read(made.name)
    if record is not None and record.fingerprint == before:
        records.write(replace(record, fingerprint=model_fingerprint(model)))


def key_of(parts: Mapping[str, Any]) -> str:
    """The hash of plain JSON values, whatever their order."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint_of(output: str | Path) -> str | None:
    """The hash of what a stage left: a model directory, a dataset or a file; None if incomplete.

    A dataset on disk is incomplete when a shard is missing or of another size than it says.
    """
    path = Path(output)
    if (path / "config.json").is_file():
        return model_fingerprint(path)
    if path.is_file():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        info = read_dataset_info(str(output))
    except DatasetError:
        return None
    if path.is_dir():
        for shard in info.shards:
            file = path / shard.name
            if not file.is_file() or file.stat().st_size != shard.bytes:
                return None
    return dataset_hash(info)


def digest_of(dataset: str | Path) -> str:
    """The beginning of a dataset's hash, as MLflow's pages show it."""
    return str(fingerprint_of(dataset))[:12]


def write_json(path: Path, value: Any) -> None:
    """Write atomically: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)

"""`dataset.json`: what a dataset holds and the checksums of its shards."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.store import DatasetError, open_store

FORMAT_VERSION = 1
MANIFEST = "dataset.json"


@dataclass(frozen=True)
class Shard:
    name: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class DatasetInfo:
    """What `dataset.json` says. Sizes are those of the videos, in pixels, also when encoded."""

    format_version: int
    kind: str  # "pairs" (videos) or "encoded" (latents and text embeddings)
    samples: int
    fps: float
    frames: int
    height: int
    width: int
    shards: tuple[Shard, ...]
    made_by: dict[str, Any]  # how it was made: whatever the writer wants to be remembered


def read_dataset_info(uri: str | Path) -> DatasetInfo:
    """Reads `dataset.json`.

    Raises:
        DatasetError: no dataset, one that was cut off while written, one of another format
            version, or a place that cannot be reached.
    """
    store = open_store(uri)
    if not store.exists(MANIFEST):
        tars = [name for name in store.names() if name.endswith(".tar")]
        if tars:
            raise DatasetError(
                f"{uri}: was cut off while being written ({len(tars)} shards but no {MANIFEST}); "
                "write it again"
            )
        raise DatasetError(f"{uri}: no dataset here ({MANIFEST} is missing); check the path")
    try:
        fields = json.loads(store.read(MANIFEST))
        version = fields["format_version"]
        if version != FORMAT_VERSION:
            raise DatasetError(
                f"{uri}: has format version {version}, this code reads {FORMAT_VERSION}; "
                "write the dataset again with this version"
            )
        fields["shards"] = tuple(Shard(**shard) for shard in fields["shards"])
        return DatasetInfo(**fields)
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(
            f"{uri}: {MANIFEST} is damaged ({type(error).__name__}: {error}); "
            "write the dataset again"
        ) from error


def dataset_hash(info: DatasetInfo) -> str:
    """Hex digest of the content: shards and shape, whoever wrote them and wherever they lie."""
    content = asdict(info)
    del content["made_by"]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

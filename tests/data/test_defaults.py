"""What is taken where nobody asks for anything, of all that callers leave out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest

from data.bench.clip import make_clip
from data.footage.pair import make_footage_pair
from data.ingest import ingest
from data.loader import Split, loader
from data.shards import write_dataset
from data.synthetic import make_pair
from data.video import VideoWriter, read_frames, read_timed
from data.video.source.upright import Scaler


def left_out(function: Callable[..., Any]) -> dict[str, Any]:
    given = inspect.signature(function).parameters.values()
    plain = (int, float, str, bool, tuple, type(None))
    return {p.name: p.default for p in given if isinstance(p.default, plain)}


@pytest.mark.parametrize(
    ("function", "defaults"),
    [
        (
            make_pair,
            {"height": 128, "width": 192, "frames": 33, "fps": 16, "split": "train"},
        ),
        (make_footage_pair, {"height": 128, "width": 224, "frames": 33, "fps": 16}),
        (make_clip, {"size": (128, 224)}),
        (write_dataset, {"samples_per_shard": 16, "workers": 0, "overwrite": False}),
        (ingest, {"samples_per_shard": 16, "overwrite": False}),
        (
            Split,
            {"rank": 0, "world_size": 1, "seed": 0, "workers": 0, "shuffle": True, "epochs": None},
        ),
        (loader, {"state": None, "cache": None, "clip_frames": None}),
        (
            VideoWriter,
            {
                "codec": "h264", "crf": 18, "preset": "medium", "audio_from": None, "tick": None,
                "damage": None, "fragmented": False, "pixel_format": None, "reproducible": False,
            },
        ),
        (read_timed, {"fps": None, "size": None, "damage": None, "strict": False}),
        (read_frames, {"fps": None, "size": None, "start": 0, "count": None, "untagged": None}),
        (Scaler, {"untagged": None, "page": 0}),
    ],
    ids=lambda of: getattr(of, "__name__", ""),
)  # fmt: skip
def test_what_is_left_out(function: Callable[..., Any], defaults: dict[str, Any]) -> None:
    assert left_out(function) == defaults

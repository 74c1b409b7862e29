from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.video import VideoWriter
from pipelines.tracking.preview import preview


def test_a_small_film_has_the_frames_and_the_pace_of_the_large_one(tmp_path: Path) -> None:
    levels = [40, 120, 200]
    with VideoWriter(tmp_path / "a.mp4", 800, 20, 4) as writer:
        writer.write(np.stack([np.full((20, 800, 3), level, np.uint8) for level in levels]))
    small = preview(tmp_path / "a.mp4", tmp_path)
    assert small.name == "a-small.webp"
    with Image.open(small) as film:
        assert film.size == (720, 18)
        assert getattr(film, "n_frames", 1) == len(levels)
        assert film.info["loop"] == 0  # for ever
        for n, level in enumerate(levels):
            film.seek(n)
            film.load()
            assert film.info["duration"] == 250
            assert np.asarray(film.convert("RGB")).mean() == pytest.approx(level, abs=4)

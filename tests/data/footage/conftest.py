"""A little footage, prepared once."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from data.footage.kinds import Filmed
from data.footage.material import Footage, prepare
from data.footage.objects import Thing
from data.footage.pair import make_footage_pair
from data.sample import Pair
from data.video import VideoWriter

SIZE = {"height": 48, "width": 80}


@pytest.fixture(scope="session")
def footage(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Footage]:
    """Two photos and a clip to train on, one photo held out."""
    folder = tmp_path_factory.mktemp("footage")
    rng = np.random.default_rng(0)
    for name in ("a.jpg", "b.png", "kept.jpg"):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 15, 3), np.uint8))
        coarse.resize((240, 144), Image.Resampling.BICUBIC).save(folder / name)
    frames = rng.integers(0, 256, (24, 96, 128, 3), np.uint8)
    with VideoWriter(folder / "c.mp4", 128, 96, 16) as writer:
        writer.write(frames)
    (folder / "heldout.txt").write_text("# not for training\nkept.jpg\n")
    return prepare(folder, tmp_path_factory.mktemp("prepared"), fps=16, **SIZE)


def made(footage: Footage, seed: int) -> Pair:
    return make_footage_pair(seed, footage, frames=9, **SIZE)


def scene(things: list[Thing], video: np.ndarray, seed: int) -> Filmed:
    return Filmed(video, things, np.random.default_rng(seed))

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest

from data.bench.cases import Case
from data.bench.clip import BenchClip, make_clip
from data.footage.material import Footage


@pytest.fixture(scope="module", autouse=True)
def _drawn_clips_are_made_once() -> Iterator[None]:
    """What a case and a size are drawn as is always the same (`tests/data/bench`), and takes longer
    than to judge it. Nobody who gets one may write on it."""

    @cache
    def drawn(case: Case, size: tuple[int, int]) -> BenchClip:
        clip = make_clip(case, None, size)
        for values in (clip.source, clip.truth, clip.camera, clip.edited):
            values.setflags(write=False)
        return clip

    def once(case: Case, footage: Footage | None, size: tuple[int, int]) -> BenchClip:
        return drawn(case, size) if footage is None else make_clip(case, footage, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.evaluation.bench.run.make_clip", once)
        yield

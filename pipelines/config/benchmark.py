"""Which clips of LiveEdit-Bench are run, and how."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from data.bench.cases import CASES
from modeling.geometry import TOKEN_PIXELS
from pipelines.config.merge import ConfigError
from pipelines.config.rules import at_least

HALVES = ("both", "natural", "drawn")
NAMES = tuple(dict.fromkeys(name for case in CASES for name in (case.kind, *case.traits[1:])))


@dataclass
class BenchConfig:
    """`liveedit evaluate MODEL bench key=value ...`; the defaults are the published benchmark."""

    SECTION: ClassVar[str] = "bench"

    half: str = "both"  # or natural, drawn
    every: int = 1  # only every n-th clip of a half, for trying
    long: bool = True  # the four clips of 60 s too
    only: str | None = None  # clips of one kind or trait: hue, fast, occluded, scene cut, 60 s
    size: str = "224x128"  # width x height; checksums are published for this size
    footage: str | None = None  # folder to film instead of the shipped one (its held-out files)
    published: bool = True  # refuse clips that are not the published ones to the pixel
    seed: int = 0  # of the streams' noise
    work_size: str = "native"  # at which the model sees the clips (modeling.detail.work_size)
    detail: bool = True  # give edits the source's own detail
    mask_cache: bool | None = None  # null: as the model directory says; true, false: on, off
    clip: str | None = None  # folder of a CLIP model's weights, for text alignment
    dilate: int = 8  # pixels around the edited region that count neither as edit nor background
    success_db: float = 4.0  # a clip whose gain reaches this is a successful edit
    resamples: int = 2000  # of the bootstrap

    def __post_init__(self) -> None:
        at_least(self, every=1, dilate=0, resamples=1)
        if self.half not in HALVES:
            raise ConfigError(f"half={self.half} is none of {', '.join(HALVES)}")
        if self.only is not None and self.only not in NAMES:
            raise ConfigError(f"only={self.only} is none of {', '.join(NAMES)}")
        whole = re.fullmatch(r"\d+x\d+", self.size)
        if not whole or any(n % TOKEN_PIXELS or not n for n in self.shape):
            raise ConfigError(
                f"size={self.size} must be width x height in multiples of {TOKEN_PIXELS}, e.g. "
                "224x128"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        width, _, height = self.size.partition("x")
        return int(height), int(width)

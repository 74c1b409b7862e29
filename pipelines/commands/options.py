"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

from infra.runtime.errors import UserError
from modeling.geometry import frames_of, latents_of

MAX_FPS = 1000

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Settings over the configuration's."),
]


def parse_size(size: str, least: int = 1) -> tuple[int, int]:
    """Width x height, as in "832x480", to (height, width), neither below `least`."""
    width, _, height = size.partition("x")
    numbers = height.isdecimal() and width.isdecimal()
    if not numbers or min(int(height), int(width)) < least:
        raise UserError(
            f"--size {size} must be width x height in pixels, both at least {least}, e.g. 192x128"
        )
    return int(height), int(width)


def parse_numbers(option: str, text: str, least: int) -> tuple[int, ...]:
    """With commas between them, as in "1,2,4"."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) >= least for part in parts):
        raise UserError(f"{option} {text} must be numbers from {least} on, e.g. 1,2")
    return tuple(int(part) for part in parts)


def check_clip(frames: int, fps: float) -> None:
    """Raises UserError for clips that no model can be trained on."""
    if frames != frames_of(latents_of(frames)):
        near = frames_of(latents_of(frames)), frames_of(latents_of(frames) + 1)
        raise UserError(
            f"--frames {frames} is no whole number of latents, which is 4n-3 frames: "
            f"{near[0]} or {near[1]}"
        )
    if not 0 < fps <= MAX_FPS:
        raise UserError(f"--fps {fps:g} must lie above 0 and be at most {MAX_FPS}")

"""What synthetic edits there are: a line each in `EDITS`.

Another entry, another order or another weight changes which pair a seed gives: raise `VERSION` in
`data.synthetic` with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from data.drawing import SHAPES

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 34, 38),
    "orange": (250, 138, 20),
    "yellow": (250, 224, 40),
    "green": (30, 150, 52),
    "cyan": (40, 214, 220),
    "blue": (32, 70, 214),
    "purple": (122, 36, 160),
    "pink": (250, 130, 196),
}
ACCENTS: dict[str, tuple[int, int, int]] = {"white": (248, 248, 248), "black": (14, 14, 14)}
PAINTS = COLOURS | ACCENTS


@dataclass(frozen=True)
class Figure:
    """One drawn object and its way through the picture."""

    shape: str
    color: str
    radius: float
    centres: np.ndarray  # [F, 2]
    angles: np.ndarray  # [F] radians
    stripes: str | None = None
    outline: str | None = None


@dataclass(frozen=True)
class EditKind:
    """`phrases` may name the {color} and {shape} of the thing, and {to}, the edit's argument."""

    weight: float  # share of the pairs; all sum to 1
    phrases: tuple[str, ...]
    arguments: Callable[[str, str], list[str]]  # what {to} may be, of a shape and a colour
    edit: Callable[[Figure, str], Figure | None]  # the thing afterwards, None if it is gone


def _recolor(thing: Figure, to: str) -> Figure:
    return replace(thing, color=to)


def _reshape(thing: Figure, to: str) -> Figure:
    return replace(thing, shape=to)


def _remove(thing: Figure, to: str) -> None:
    return None


def _stripes(thing: Figure, to: str) -> Figure:
    return replace(thing, stripes=to)


def _outline(thing: Figure, to: str) -> Figure:
    return replace(thing, outline=to)


def _other_colours(shape: str, color: str) -> list[str]:
    return [c for c in COLOURS if c != color]


# Recolouring is what people ask for most and what a small model learns first.
EDITS = {
    "recolor": EditKind(
        0.40,
        (
            "make the {color} {shape} {to}",
            "turn the {color} {shape} {to}",
            "paint the {color} {shape} {to}",
            "change the color of the {color} {shape} to {to}",
        ),
        _other_colours,
        _recolor,
    ),
    "reshape": EditKind(
        0.20,
        (
            "turn the {color} {shape} into a {to}",
            "change the {color} {shape} into a {to}",
            "replace the {color} {shape} with a {color} {to}",
        ),
        lambda shape, color: [s for s in SHAPES if s != shape],
        _reshape,
    ),
    "remove": EditKind(
        0.14,
        (
            "remove the {color} {shape}",
            "delete the {color} {shape}",
            "erase the {color} {shape} from the video",
        ),
        lambda shape, color: [""],
        _remove,
    ),
    "stripes": EditKind(
        0.14,
        (
            "give the {color} {shape} {to} stripes",
            "add {to} stripes to the {color} {shape}",
            "put {to} stripes on the {color} {shape}",
        ),
        lambda shape, color: list(ACCENTS),
        _stripes,
    ),
    "outline": EditKind(
        0.12,
        (
            "give the {color} {shape} a {to} outline",
            "draw a {to} outline around the {color} {shape}",
            "outline the {color} {shape} in {to}",
        ),
        lambda shape, color: [*ACCENTS, *_other_colours(shape, color)],
        _outline,
    ),
}

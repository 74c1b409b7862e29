"""The 120 clips of LiveEdit-Bench as a table: what is asked for, how fast it moves, what hinders.

A clip is a camera on a backdrop (half of them drawn, half natural footage that no training saw)
with objects in front. `CASES` names every clip; `data.bench.clip` makes one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle

from data.footage.wordings import GENTLE, PLAIN, STRONG

VERSION = 1  # raise it when any clip changes, and write `checksums.json` anew
FPS = 16
FRAMES = 57  # 15 latents: five chunks
LONG_FRAMES = 60 * FPS
CUT_AT = 26  # frame of a scene cut: no chunk begins there
LONG_CUT_EVERY = 15 * FPS - 2
HALVES = ("drawn", "natural")
SPEEDS = ("still", "slow", "fast")


@dataclass(frozen=True)
class Case:
    """One clip. `what` is the edit within its `kind`, `words` its instruction with `{color}`,
    `{shape}`, `{to}`, `{place}` left open; `amount` is a look's strength."""

    number: int  # in its half, from 0: also its seed
    half: str
    kind: str
    what: str
    words: str
    amount: float = PLAIN
    speed: str = "slow"
    occluded: bool = False  # something passes in front of the edited object
    cut: bool = False  # the scene changes in the middle
    long: bool = False  # 60 s

    @property
    def name(self) -> str:
        return f"{self.half}-{self.number:02d}-{self.kind.replace(' ', '-')}"

    @property
    def frames(self) -> int:
        return LONG_FRAMES if self.long else FRAMES

    @property
    def traits(self) -> tuple[str, ...]:
        """Names of the groups that the clip belongs to besides its kind."""
        named = {"occluded": self.occluded, "scene cut": self.cut, "60 s": self.long}
        return (self.half, self.speed, *(name for name, has in named.items() if has))


Instruction = tuple[str, str, float]  # what, words, amount
NATURAL: dict[str, tuple[Instruction, ...]] = {
    "tone": (
        ("night", "make it night", PLAIN),
        ("sunset", "turn it into a sunset", PLAIN),
        ("warm", "make it a little warmer", GENTLE),
        ("cold", "make it colder", PLAIN),
        ("faded", "make it look faded", PLAIN),
        ("contrast", "make it very high contrast", STRONG),
    ),
    "black and white": (
        ("colourless", "make it black and white", PLAIN),
        ("sepia", "make it sepia", PLAIN),
        ("colourless", "remove the color", PLAIN),
        ("sepia", "give it a sepia tone", PLAIN),
    ),
    "fog": (
        ("fog", "add fog", PLAIN),
        ("fog", "add a little fog", GENTLE),
        ("fog", "add thick fog", STRONG),
    ),
    "weather": (
        ("snow", "make it snow", PLAIN),
        ("rain", "make it rain", PLAIN),
        ("snow", "add heavy snow", STRONG),
        ("rain", "add a little rain", GENTLE),
    ),
    "style": (
        ("sketch", "turn it into a pencil sketch", PLAIN),
        ("cartoon", "make it a cartoon", PLAIN),
        ("mosaic", "make it a mosaic", PLAIN),
        ("sketch", "make it a sketch", PLAIN),
        ("cartoon", "make it look like a comic", PLAIN),
        ("mosaic", "make it a coarse mosaic", STRONG),
    ),
    "light": (
        ("light left", "add light from the left", PLAIN),
        ("light right", "light up the right", PLAIN),
        ("light top", "add strong light from the top", STRONG),
    ),
    "hue": (
        ("hue", "make the {color} things {to}", PLAIN),
        ("hue", "turn everything {color} {to}", PLAIN),
        ("drain", "remove the color {color}", PLAIN),
        ("hue", "make everything that is {color} {to}", PLAIN),
    ),
    "recolor": (
        ("recolor", "make the {color} {shape} {to}", PLAIN),
        ("recolor", "paint the {color} {shape} {to}", PLAIN),
        ("recolor", "turn the {color} {shape} {to}", PLAIN),
        ("recolor", "change the color of the {color} {shape} to {to}", PLAIN),
        ("recolor", "make the {color} {shape} {to}", PLAIN),
    ),
    "replace": (
        ("replace", "turn the {color} {shape} into a {to}", PLAIN),
        ("replace", "replace the {color} {shape} with a {to}", PLAIN),
        ("replace", "change the {color} {shape} into a {to}", PLAIN),
        ("replace", "turn the {color} {shape} into a {to}", PLAIN),
    ),
    "remove": (
        ("remove", "remove the {color} {shape}", PLAIN),
        ("remove", "erase the {color} {shape}", PLAIN),
        ("remove", "delete the {color} {shape}", PLAIN),
        ("remove", "take away the {color} {shape}", PLAIN),
        ("remove", "remove the {color} {shape}", PLAIN),
    ),
    "add": (
        ("add", "add a {color} {shape} {place}", PLAIN),
        ("add", "put a {color} {shape} {place}", PLAIN),
        ("add", "draw a {color} {shape} {place}", PLAIN),
        ("add", "add a {color} {shape} {place}", PLAIN),
    ),
    "background": (
        ("blur_background", "blur the background", PLAIN),
        ("dark_background", "darken the background", PLAIN),
        ("gray_background", "make the background black and white", PLAIN),
        ("blur_background", "blur everything but the {color} {shape}", PLAIN),
    ),
    "two edits": (
        ("recolor night", "make the {color} {shape} {to} and make it night", PLAIN),
        ("remove colourless", "remove the {color} {shape} and make it black and white", PLAIN),
        ("recolor fog", "paint the {color} {shape} {to}, then add fog", PLAIN),
    ),
    "nothing": (
        ("nothing", "make the {color} {shape} {to}", PLAIN),
        ("nothing", "remove the {color} {shape}", PLAIN),
        ("nothing hue", "make the {color} things {to}", PLAIN),
        ("nothing", "turn the {color} {shape} into a {other}", PLAIN),
        ("nothing", "paint the {color} {shape} {to}", PLAIN),
    ),
}  # fmt: skip

_DRAWN_WORDS: dict[str, tuple[int, tuple[str, ...]]] = {  # how many, worded in turn
    "recolor": (14, ("make the {color} {shape} {to}", "paint the {color} {shape} {to}")),
    "reshape": (10, ("turn the {color} {shape} into a {to}",
                     "change the {color} {shape} into a {to}")),
    "remove": (10, ("remove the {color} {shape}", "delete the {color} {shape}")),
    "stripes": (8, ("give the {color} {shape} {to} stripes",
                    "add {to} stripes to the {color} {shape}")),
    "outline": (8, ("give the {color} {shape} a {to} outline",
                    "outline the {color} {shape} in {to}")),
    "nothing": (10, ("make the {color} {shape} {to}", "remove the {color} {shape}")),
}  # fmt: skip
DRAWN: dict[str, tuple[Instruction, ...]] = {
    kind: tuple((kind, words[n % len(words)], PLAIN) for n in range(count))
    for kind, (count, words) in _DRAWN_WORDS.items()
}

# (half, kind): numbers within the kind
OCCLUDED = {
    ("natural", "recolor"): (1, 3), ("natural", "replace"): (1,), ("natural", "remove"): (1, 4),
    ("natural", "two edits"): (0,), ("natural", "nothing"): (1,),
    ("drawn", "recolor"): (1, 4, 7), ("drawn", "reshape"): (1, 4), ("drawn", "remove"): (1, 4),
    ("drawn", "stripes"): (1,), ("drawn", "outline"): (1,), ("drawn", "nothing"): (1,),
}  # fmt: skip
CUT = {
    ("natural", "tone"): (0, 1), ("natural", "fog"): (1,), ("natural", "recolor"): (0, 2),
    ("natural", "remove"): (3,), ("natural", "nothing"): (4,), ("natural", "style"): (4,),
    ("drawn", "recolor"): (2, 8), ("drawn", "reshape"): (2,), ("drawn", "remove"): (2, 0),
    ("drawn", "nothing"): (2,),
}  # fmt: skip
LONG = {
    ("natural", "tone"): (0,), ("natural", "recolor"): (0,),
    ("drawn", "recolor"): (0,), ("drawn", "remove"): (0,),
}  # fmt: skip


def _cases() -> tuple[Case, ...]:
    cases = []
    for half, table in zip(HALVES, (DRAWN, NATURAL), strict=True):
        speeds = cycle(SPEEDS)
        rows = [(kind, n, row) for kind, rows in table.items() for n, row in enumerate(rows)]
        for number, (kind, n, (what, words, amount)) in enumerate(rows):
            at = (half, kind)
            cases.append(
                Case(
                    number,
                    half,
                    kind,
                    what,
                    words,
                    amount,
                    speed=next(speeds),
                    occluded=n in OCCLUDED.get(at, ()),
                    cut=n in CUT.get(at, ()),
                    long=n in LONG.get(at, ()),
                )
            )
    return tuple(cases)


CASES = _cases()

"""At which size a stream's frames are edited; what goes out has the source's size in any case."""

from __future__ import annotations

import math
import re
from collections.abc import Collection

from infra.runtime.errors import UserError
from modeling.geometry import TOKEN_PIXELS

WORK_SIZES = ("full", "3/4", "1/2", "native")
FAR = 2.0  # times as many pixels as in training, or as few: a model then does less well
_PIXELS = re.compile(r"(\d{1,5})x(\d{1,5})")


def work_size(
    choice: str, height: int, width: int, trained: tuple[int, int] | None = None
) -> tuple[int, int]:
    """(height, width) that `choice` means for frames of `height` x `width`.

    "full" is the frames' own size, "3/4", "1/2" (any fraction up to 1) that part of both sides,
    "native" the area that the model was `trained` at in the frames' shape, and "416x240" a width
    and a height. All but the frames' own size become multiples of 16, so that what `in_words` says
    of the answer means the same again. UserError for anything else.
    """
    if choice == "full":
        return height, width
    if _PIXELS.fullmatch(choice):
        asked = in_pixels(choice)
        if min(asked) < TOKEN_PIXELS:
            raise UserError(
                f"work size {choice} is too small; both sides need at least {TOKEN_PIXELS} pixels"
            )
        return asked if asked == (height, width) else (_whole(asked[0]), _whole(asked[1]))
    if choice == "native" and trained is not None:
        scale = math.sqrt(trained[0] * trained[1] / (height * width))
        return _whole(height * scale), _whole(width * scale)
    part = re.fullmatch(r"(\d{1,3})/(\d{1,3})", choice)
    if part and 0 < int(part[1]) <= int(part[2]):
        scale = int(part[1]) / int(part[2])
        return _whole(height * scale), _whole(width * scale)
    raise UserError(
        f"work size {choice!r} is none; choose one of {', '.join(WORK_SIZES)}, another fraction up "
        "to 1, or width x height in pixels such as 416x240"
    )


def in_words(size: tuple[int, int]) -> str:
    """(height, width) as WIDTHxHEIGHT."""
    return f"{size[1]}x{size[0]}"


def in_pixels(words: str) -> tuple[int, int]:
    """What `in_words` said."""
    found = _PIXELS.fullmatch(words)
    if found is None:
        raise UserError(f"{words!r} is no size; write WIDTHxHEIGHT, such as 416x240")
    return int(found[2]), int(found[1])


def unlike_training(work: tuple[int, int], trained: Collection[tuple[int, int]]) -> str:
    """What there is to say against `work` for a model that was `trained` at these; or nothing."""
    area = work[0] * work[1]
    ratios = [area / (height * width) for height, width in trained]
    if any(1 / FAR <= ratio <= FAR for ratio in ratios):
        return ""
    sizes = ", ".join(in_words(size) for size in trained)
    return f"it edits at {in_words(work)}, far from the {sizes} that this model was trained at"


def _whole(pixels: float) -> int:
    """The nearest whole number of tokens, which the transformer edits without padding."""
    return max(TOKEN_PIXELS, round(pixels / TOKEN_PIXELS) * TOKEN_PIXELS)

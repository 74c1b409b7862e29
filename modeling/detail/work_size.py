"""At which size a stream's frames are edited; what goes out has the source's size in any case."""

from __future__ import annotations

import math
import re

from infra.runtime.errors import UserError
from modeling.geometry import TOKEN_PIXELS

WORK_SIZES = ("full", "3/4", "1/2", "native")


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
    if pixels := re.fullmatch(r"(\d{1,5})x(\d{1,5})", choice):
        asked = int(pixels[2]), int(pixels[1])
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


def _whole(pixels: float) -> int:
    """The nearest whole number of tokens, which the transformer edits without padding."""
    return max(TOKEN_PIXELS, round(pixels / TOKEN_PIXELS) * TOKEN_PIXELS)

"""At which size a session's frames are edited: as its client asks, or as the server does."""

from __future__ import annotations

from dataclasses import dataclass

from infra.runtime.errors import UserError
from modeling.detail.work_size import in_words, work_size
from serve.admission.admission import Sizes
from serve.limits import Limits
from serve.wire.protocol import Detail, Open, WireError
from serve.wire.work import Opening

LONGEST = 60  # characters of a choice that are read: what is longer is none, and is told so far


@dataclass(frozen=True)
class WorkSizes:
    """`choice` and `detail` hold where an open says nothing."""

    limits: Limits
    choice: str = "native"
    detail: Detail = "source"

    def of(self, message: Open, trained: tuple[int, int]) -> tuple[str, Detail]:
        """Size, as WIDTHxHEIGHT, and detail of a new session with a model that was trained at this
        (height, width).

        Raises WireError `bad_request` for a choice that is none, in the words of `work_size`, and
        `unsupported_size` for one beyond the limits.
        """
        choice = (message.work_size or self.choice)[:LONGEST]
        try:
            size = work_size(choice, message.height, message.width, trained)
        except UserError as error:
            raise WireError("bad_request", str(error)) from error
        self.limits.check_work_size(choice, *size)
        return in_words(size), message.detail or self.detail

    def usual(self, frame: tuple[int, int], trained: tuple[int, int]) -> Sizes:
        """Of frames (height, width) whose client says nothing."""
        return Sizes(frame, work_size(self.choice, *frame, trained), self.detail)


def sizes_of(opening: Opening) -> Sizes:
    """What a chunk of it costs depends on these."""
    frame = opening.height, opening.width
    return Sizes(frame, work_size(opening.work_size, *frame), opening.detail, model=opening.version)

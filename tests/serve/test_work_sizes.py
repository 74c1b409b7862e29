"""At which size a session is edited: the client's word, the server's, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from infra.runtime.errors import UserError
from modeling.detail.work_size import work_size
from serve.admission.admission import Sizes
from serve.limits import Limits
from serve.wire.protocol import Open, WireError
from serve.wire.work import Opening
from serve.work_sizes import WorkSizes, sizes_of

LIMITS = Limits(max_side=1000, max_work_pixels=640 * 480)
TRAINED = (128, 224)
USUAL = WorkSizes(LIMITS)
CHOSEN = WorkSizes(LIMITS, "1/2", "off")


def asked(**fields: Any) -> Open:
    return Open("red", 832, 480, 16.0, "live", "jpeg", **fields)


@pytest.mark.parametrize(
    ("server", "fields", "answer"),
    [
        (USUAL, {}, ("224x128", "source")),
        (USUAL, {"work_size": "416x240", "detail": "off"}, ("416x240", "off")),
        (USUAL, {"detail": "off"}, ("224x128", "off")),
        (CHOSEN, {}, ("416x240", "off")),
        (CHOSEN, {"work_size": "native", "detail": "source"}, ("224x128", "source")),
        (CHOSEN, {"work_size": "640x480"}, ("640x480", "off")),  # the border
    ],
)
def test_who_says_nothing_gets_the_server_s(
    server: WorkSizes, fields: dict[str, Any], answer: tuple[str, str]
) -> None:
    assert server.of(asked(**fields), TRAINED) == answer


@pytest.mark.parametrize(
    ("server", "work", "detail"), [(USUAL, TRAINED, "source"), (CHOSEN, (240, 416), "off")]
)
def test_an_editor_is_warmed_up_for_who_says_nothing(
    server: WorkSizes, work: tuple[int, int], detail: str
) -> None:
    """It costs what that costs, with the detail that it is going to have."""
    assert server.usual((480, 832), TRAINED) == Sizes((480, 832), work, detail)


@pytest.mark.parametrize("choice", ["half", "0/2", "15x64", "64X64", "1/2 ", "x" * 60])
def test_what_is_none_is_refused_in_the_command_line_s_words(choice: str) -> None:
    with pytest.raises(UserError) as there:
        work_size(choice, 480, 832, (128, 224))
    with pytest.raises(WireError) as here:
        USUAL.of(asked(work_size=choice), TRAINED)
    assert (here.value.code, here.value.message) == ("bad_request", str(there.value))


def test_a_long_choice_is_not_sent_back() -> None:
    with pytest.raises(WireError) as raised:
        USUAL.of(asked(work_size="1" * 60_000), TRAINED)
    assert len(raised.value.message) < 300


@pytest.mark.parametrize("choice", ["656x480", "640x496", "16x1008", "1008x16", "full"])
def test_more_than_the_model_may_see_is_refused(choice: str) -> None:
    with pytest.raises(WireError, match=f"work size {choice} is .*choose a smaller") as raised:
        USUAL.of(asked(work_size=choice), TRAINED)
    assert raised.value.code == "unsupported_size"


@pytest.mark.parametrize(
    ("choice", "work"), [("full", (481, 833)), ("833x481", (481, 833)), ("416x240", (240, 416))]
)
def test_a_cost_is_of_the_frames_and_of_what_the_model_sees(
    choice: str, work: tuple[int, int]
) -> None:
    opening = Opening("s", "red", 833, 481, 16.0, "live", work_size=choice, detail="source")
    assert sizes_of(opening) == Sizes((481, 833), work, "source")
    opening = replace(opening, version="liveedit version 3")
    assert sizes_of(opening).model == "liveedit version 3"

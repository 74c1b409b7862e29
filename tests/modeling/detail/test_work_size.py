from __future__ import annotations

import pytest

from modeling.detail.work_size import in_words, work_size

TRAINED = (128, 224)


@pytest.mark.parametrize(
    ("choice", "size", "wanted"),
    [
        ("full", (481, 833), (481, 833)),
        ("1/2", (480, 832), (240, 416)),
        ("1/2", (720, 1280), (352, 640)),  # 360 is as near to 368; the even one
        ("3/4", (480, 832), (352, 624)),  # 360 again
        ("1/4", (480, 832), (128, 208)),
        ("1/1", (481, 833), (480, 832)),
        ("1/2", (20, 33), (16, 16)),
        ("416x240", (480, 832), (240, 416)),
        ("413x235", (480, 832), (240, 416)),
        ("413x235", (235, 413), (235, 413)),  # the frames' own
        ("1000x16", (480, 832), (16, 992)),
        ("native", (480, 832), (128, 224)),
        ("native", (832, 480), (224, 128)),
        ("native", (80, 1920), (32, 832)),
        ("native", (33, 51), (144, 208)),  # larger than the frames
    ],
)
def test_what_a_choice_means(choice: str, size: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert work_size(choice, *size, TRAINED) == wanted
    assert work_size(in_words(wanted), *size) == wanted  # as a server hands it on


@pytest.mark.parametrize(
    "choice", ["", "half", "0/2", "3/2", "1/0", "0x0", "15x64", "64x15", "64X64", "-64x64", "1/2 "]
)
def test_what_is_none_is_refused_in_words(choice: str) -> None:
    with pytest.raises(ValueError, match="work size"):
        work_size(choice, 480, 832, TRAINED)


def test_native_needs_a_model() -> None:
    with pytest.raises(ValueError, match="work size 'native' is none"):
        work_size("native", 480, 832)

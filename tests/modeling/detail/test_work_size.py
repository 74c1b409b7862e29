from __future__ import annotations

import pytest

from modeling.detail.work_size import in_pixels, in_words, unlike_training, work_size

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


@pytest.mark.parametrize("words", ["", "full", "416", "416x", "416x240x3", "416X240"])
def test_words_that_are_no_size(words: str) -> None:
    assert in_pixels("416x240") == (240, 416)
    with pytest.raises(ValueError, match="is no size; write WIDTHxHEIGHT"):
        in_pixels(words)


def test_a_size_far_from_training_is_said() -> None:
    trained = [(128, 224), (256, 448)]
    for close in ((128, 224), (224, 128), (64, 224), (256, 896), (181, 317)):
        assert unlike_training(close, trained) == ""
    for far in ((64, 208), (256, 912)):
        words = f"at {in_words(far)}, far from the 224x128, 448x256 that"
        assert words in unlike_training(far, trained)


def test_native_needs_a_model() -> None:
    with pytest.raises(ValueError, match="work size 'native' is none"):
        work_size("native", 480, 832)

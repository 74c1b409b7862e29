from __future__ import annotations

from modeling.text.words import unknown_words
from tests.known_editors import known_editor

KNOWN = {"make", "it", "the", "red"}


def test_words_that_were_never_taught_are_named_once_in_order() -> None:
    assert unknown_words("Make it snow, SNOW on the (red) Monet!", KNOWN) == ["snow", "on", "monet"]
    assert unknown_words("make it red", KNOWN) == []
    assert unknown_words("make it snow", ()) == []


def test_an_editor_asks_its_card() -> None:
    editor = known_editor()
    assert editor.unknown_words("make it snow") == []
    editor.card["words"] = sorted(KNOWN)
    assert editor.unknown_words("make it snow") == ["snow"]

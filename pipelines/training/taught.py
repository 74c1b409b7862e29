"""What a model was taught, for its card: the words that it was asked with, and some to try.

The page's chips and every warning of an unknown word come from there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from data.manifest import DatasetInfo
from modeling.text.words import split_words

PROMPTS = 8  # of a card
OFTEN = 24  # instructions that a dataset remembers, with how often each is there
OWN = 4  # of a card's prompts, those that come before what was there already


def summary(asked: Counter[str]) -> dict[str, Any]:
    """Of all instructions of a dataset, as JSON values."""
    words = {word for instruction in asked for word in split_words(instruction)}
    often = [[text, count] for text, count in asked.most_common(OFTEN)]
    return {"words": sorted(words), "instructions": often}


def taught(parent: Mapping[str, Any], data: DatasetInfo) -> dict[str, Any]:
    """`prompts`, `words` and `sample` of a model's card, made of its parent's on this dataset.

    A VAE learns no words, from pairs. Words are told where all are: not of a model that was trained
    elsewhere, nor of data that was encoded before datasets said what is in them.
    """
    kept = {name: parent[name] for name in ("prompts", "words", "sample") if name in parent}
    if data.kind == "pairs":
        return kept
    found = data.made_by.get("taught")
    if found is None:
        return {name: value for name, value in kept.items() if name != "words"}
    often = [text for text, count in found["instructions"] if count > 1][:OWN]
    rest = [text for text, _ in found["instructions"]]
    prompts = list(dict.fromkeys([*often, *kept.get("prompts", ()), *rest]))[:PROMPTS]
    if "words" in kept:
        kept["words"] = sorted({*kept["words"], *found["words"]})
    return kept | {"prompts": prompts}

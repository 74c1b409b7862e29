from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from data.manifest import DatasetInfo
from pipelines.training.taught import OWN, PROMPTS, summary, taught


def dataset(*instructions: str, kind: str = "encoded") -> DatasetInfo:
    made_by: dict[str, Any] = {"taught": summary(Counter(instructions))}
    return DatasetInfo(1, kind, len(instructions), 16, 33, 128, 224, (), made_by)


def test_a_dataset_remembers_its_words_and_what_is_asked_most() -> None:
    found = summary(Counter(["Make it red!", "make it RED", "add fog", "add fog"]))
    assert found["words"] == ["add", "fog", "it", "make", "red"]
    assert found["instructions"][0] == ["add fog", 2]


def test_a_model_knows_what_its_parent_knew_and_what_it_was_taught_since() -> None:
    parent = {"name": "p", "prompts": ["add fog"], "words": ["add", "fog"], "sample": "flower"}
    card = taught(parent, dataset("paint it", "paint it", "once"))
    assert card == {
        "prompts": ["paint it", "add fog", "once"],  # often, before, and what else there is
        "words": ["add", "fog", "it", "once", "paint"],
        "sample": "flower",
    }
    many = [f"edit {n}" for n in range(9)]
    crowded = taught(parent | {"prompts": list("abcdefghi")}, dataset(*many, *many))
    assert crowded["prompts"] == [*many[:OWN], *"abcdefghi"][:PROMPTS]


def test_a_model_from_scratch_knows_what_it_was_taught() -> None:
    card = taught({"words": []}, dataset("add fog"))
    assert card == {"prompts": ["add fog"], "words": ["add", "fog"]}


@pytest.mark.parametrize("parent", [{"words": ["fog"]}, {"words": ["fog"], "prompts": ["fog"]}])
def test_a_vae_learns_no_words(parent: dict[str, Any]) -> None:
    assert taught(parent, dataset("add snow", kind="pairs")) == parent


def test_words_are_not_told_where_not_all_of_them_are_known() -> None:
    assert "words" not in taught({"name": "imported"}, dataset("add fog"))
    untold = DatasetInfo(1, "encoded", 1, 16, 33, 128, 224, (), {})
    assert taught({"words": ["fog"], "prompts": ["fog"]}, untold) == {"prompts": ["fog"]}

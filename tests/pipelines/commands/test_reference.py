"""What the page of settings finds said of a field, in each of the places where it may be."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipelines.commands.reference import comments


@dataclass
class Sample:
    """`named` is what is said above. More is not."""

    beside: int = 1  # on its line
    going_on: int = 2  # begun there,
    # and told in
    # two more

    # before it,
    # in two
    long: dict[str, int] = field(
        default_factory=dict,
    )
    named: int = 3
    silent: int = 4
    # the last one's
    last: int = 5


def test_what_is_said_of_a_field_is_its_own() -> None:
    assert comments(Sample) == {
        "beside": "on its line",
        "going_on": "begun there, and told in two more",
        "long": "before it, in two",
        "named": "what is said above",
        "silent": "",
        "last": "the last one's",
    }

"""What a stranger sends stands in our log lines, and is not one of them."""

from __future__ import annotations

import logging

import pytest

from serve.logs import LONGEST, event, one_line


def test_a_line_stays_one_line_whatever_a_stranger_sends(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("tests.logs")
    with caplog.at_level(logging.INFO, log.name):
        event(log, "refused", "%s: %s, %d", code="x", reason="a\r\n\x1b[31m\u2028\u202eb", size=3)
    (record,) = caplog.records
    assert record.getMessage() == "x: a???[31m??b, 3"
    assert (record.event, record.reason, record.size) == ("refused", "a???[31m??b", 3)  # type: ignore[attr-defined]


def test_a_long_value_is_cut_and_letters_of_all_people_stay() -> None:
    assert one_line("é字" * 250) == "é字" * 250
    cut = one_line("x" * (LONGEST + 1))
    assert (len(cut), cut[-4:]) == (LONGEST, "x...")

"""What a stranger sends stands in our log lines, and is not one of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from serve.logs import LONGEST, event, join_serve_log, one_line


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


@pytest.fixture
def loggers() -> Iterator[tuple[logging.Logger, logging.Logger, logging.Logger]]:
    """Ours, Ray Serve's and the process's own, which are afterwards what they were."""
    all_ = logging.getLogger("serve"), logging.getLogger("ray.serve"), logging.getLogger()
    before = [(log, log.handlers, log.propagate, log.level) for log in all_]
    for log in all_[1:]:
        log.handlers = list(log.handlers)
    yield all_
    for log, log.handlers, log.propagate, level in before:
        log.setLevel(level)


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def test_ours_stand_in_the_replicas_log_once(
    loggers: tuple[logging.Logger, logging.Logger, logging.Logger],
) -> None:
    _, theirs, root = loggers
    replica, process = Lines(), Lines()
    theirs.addHandler(replica)
    root.addHandler(process)
    join_serve_log()
    log = logging.getLogger("serve.hub.placement")
    log.debug("a detail")
    log.info("a session")
    log.warning("a loss")
    assert replica.said == ["a session", "a loss"]
    assert process.said == []

"""How the command line ends: by signals, by errors, and with which code."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest

import pipelines.cli
from infra.runtime.errors import UserError
from pipelines import __main__ as entry
from pipelines.exits import TryAgainError, exit_code

ENDINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def handlers(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """What is installed, of signals that do what they do by themselves."""
    made: dict[int, Any] = dict.fromkeys(ENDINGS, signal.SIG_DFL)
    monkeypatch.setattr(signal, "getsignal", made.__getitem__)
    monkeypatch.setattr(signal, "signal", made.__setitem__)
    return made


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bytes]]:
    written: list[tuple[int, bytes]] = []
    monkeypatch.setattr(os, "write", lambda where, text: written.append((where, text)))
    return written


class Left(BaseException):
    """Instead of the process's end."""


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    codes: list[int] = []

    def leave(code: int) -> None:
        codes.append(code)
        raise Left

    monkeypatch.setattr(os, "_exit", leave)
    return codes


def test_every_ending_is_heard_while_the_imports_run(
    handlers: dict[int, Any],
    told: list[tuple[int, bytes]],
    left: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registered: list[Any] = []
    monkeypatch.setattr("atexit.register", registered.append)
    monkeypatch.setattr(pipelines.cli, "main", lambda: None)
    entry.main()
    assert len({*handlers.values()}) == 1, "INT, TERM and HUP"
    with pytest.raises(Left):
        handlers[signal.SIGHUP](signal.SIGHUP, None)
    assert (told, left) == ([(2, b"\nStopping.\n")], [130])
    registered[0]()  # the interpreter itself ends where nothing was said
    assert left == [130]


def test_an_ending_that_is_ignored_stays_so(
    handlers: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by nohup, or in a shell's background."""
    monkeypatch.setattr("atexit.register", lambda leave: None)
    monkeypatch.setattr(pipelines.cli, "main", lambda: None)
    for number in ENDINGS:
        handlers.update(dict.fromkeys(ENDINGS, signal.SIG_DFL) | {number: signal.SIG_IGN})
        entry.main()
        assert [n for n in ENDINGS if handlers[n] is signal.SIG_IGN] == [number]


@pytest.mark.parametrize(("end", "code"), [(3, 3), (0, 0), (None, 0), ("words", None)])
def test_the_process_ends_with_the_command_s_code(
    end: Any,
    code: int | None,
    handlers: dict[int, Any],
    left: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registered: list[Any] = []
    monkeypatch.setattr("atexit.register", registered.append)
    monkeypatch.setattr(pipelines.cli, "main", lambda: sys.exit(end))
    with pytest.raises(SystemExit):
        entry.main()
    if code is None:
        registered[0]()
        assert left == []
    else:
        with pytest.raises(Left):
            registered[0]()
        assert left == [code]


def test_impatient_fingers_are_heard_once(
    told: list[tuple[int, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(pipelines.cli.time, "monotonic", lambda: now[0])
    stop = pipelines.cli._Stop()
    assert not stop.heard
    with pytest.raises(KeyboardInterrupt):
        stop(2, None)
    assert stop.heard
    for later in (0.1, 4.9):
        now[0] += later
        stop(2, None)
    now[0] += 0.1
    with pytest.raises(KeyboardInterrupt):
        stop(2, None)
    assert told == [(2, b"\nStopping.\n")] * 2


def commanded(app: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipelines.cli, "app", app)
    monkeypatch.setattr(sys, "argv", ["liveedit", "demo"])
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    pipelines.cli.main()


@pytest.mark.parametrize("ignored", [None, signal.SIGINT, signal.SIGHUP])
def test_a_command_hears_every_ending_and_none_after_the_first(
    ignored: signal.Signals | None,
    handlers: dict[int, Any],
    told: list[tuple[int, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if ignored is not None:
        handlers[ignored] = signal.SIG_IGN
    during: list[dict[int, Any]] = []

    def app() -> None:
        during.append(dict(handlers))
        handlers[signal.SIGTERM](signal.SIGTERM, None)

    with pytest.raises(KeyboardInterrupt):
        commanded(app, monkeypatch)
    heard = {n: h for n, h in during[0].items() if isinstance(h, pipelines.cli._Stop)}
    assert set(heard) == set(ENDINGS) - {ignored}
    assert set(handlers.values()) == {signal.SIG_IGN}, "while things are put away"


@pytest.mark.parametrize("debug", ["1", "0", None])
@pytest.mark.usefixtures("handlers")
def test_an_error_s_traceback_is_for_those_who_ask(
    debug: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app() -> None:
        raise UserError("mend me")

    monkeypatch.delenv("LIVEEDIT_DEBUG", raising=False)
    if debug is not None:
        monkeypatch.setenv("LIVEEDIT_DEBUG", debug)
    with pytest.raises(UserError if debug == "1" else SystemExit):
        commanded(app, monkeypatch)
    assert capsys.readouterr().err == ("" if debug == "1" else "Error: mend me\n")


def test_a_command_that_is_done_leaves_its_handlers(
    handlers: dict[int, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    commanded(lambda: None, monkeypatch)
    assert signal.SIG_IGN not in handlers.values()


@pytest.mark.parametrize(
    ("error", "code"),
    [(TryAgainError("a"), 75), (ConnectionError("a"), 75), (TimeoutError("a"), 75),
     (OSError("a"), 1), (ValueError("a"), 1)],
)  # fmt: skip
def test_the_code_of_an_error(error: Exception, code: int) -> None:
    assert exit_code(error) == code

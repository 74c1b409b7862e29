"""`liveedit serve`: where its files are, until when it runs and how it ends; what it serves is
scripted."""

from __future__ import annotations

from contextlib import contextmanager
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from infra.runtime.errors import UserError
from pipelines.commands import serve


def test_files_of_a_server_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replicas have another working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serve, "chosen_model", lambda model: "m")
    settings = serve.serve_settings(["token_file=t", "log_dir=logs"])
    assert settings.token_file == str(tmp_path / "t")
    assert settings.log_dir == str(tmp_path / "logs")
    assert serve.serve_settings([]).log_dir is None


@pytest.mark.parametrize(
    ("https", "given", "trust"),
    [(False, None, None), (True, None, Path("c")), (False, Path("k"), None)],
)
def test_a_server_runs_until_it_is_stopped_and_then_hurries(
    https: bool, given: Path | None, trust: Path | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients must be told of a certificate that it made, and of no other; while it starts a line
    turns, which is still when others are printed."""
    events: list[Any] = []
    running: Any = SimpleNamespace(hurry=None)

    @contextmanager
    def application(settings: Any, **given: Any) -> Any:
        events.append((given["host"], given["port"]))
        yield running
        events.append("stopped")

    def pause() -> None:
        events.append("pause")
        if events.count("pause") == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(serve, "application", application)
    monkeypatch.setattr(serve, "serve_settings", lambda words: SimpleNamespace(stop_s=7.0))
    monkeypatch.setattr("serve.tls.own_certificate", lambda f: SimpleNamespace(certificate=trust))
    monkeypatch.setattr(serve.signal, "pause", pause)
    monkeypatch.setattr(serve, "print_running", lambda *_, trust: events.append(trust))
    monkeypatch.setattr(serve, "_hurry_when_asked", lambda of: events.append(of is running))
    page = StringIO()
    console = Console(file=page, width=20)
    turning = SimpleNamespace(
        start=lambda: events.append("turns"), stop=lambda: events.append("still")
    )
    monkeypatch.setattr(console, "status", lambda text: turning)
    monkeypatch.setattr(serve, "console", console)
    serve.serve(port=81, https=https, tls_cert=given, tls_key=given)
    host = "0.0.0.0" if https else "127.0.0.1"
    assert events == [
        "turns", (host, 81), "still", trust, "pause", "pause", "pause", True, "stopped", "still",
    ]  # fmt: skip
    assert "sessions have 7 s to finish, Ctrl-C ends them at once" in page.getvalue()


def test_a_second_stop_cuts_and_ends_in_any_case(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers: dict[int, Any] = {}
    timers: list[Any] = []

    class Timer:
        def __init__(self, seconds: float, then: Any) -> None:
            timers.append((seconds, then))

        def start(self) -> None:
            timers.append(self.daemon)

    import threading

    monkeypatch.setattr(serve.signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(serve.threading, "Timer", Timer)
    running: Any = SimpleNamespace(hurry=threading.Event(), abandon="abandon")
    serve._hurry_when_asked(running)
    assert set(handlers) == {2, 15}
    for number in (2, 15, 2):
        handlers[number](number, None)
        assert running.hurry.is_set()
    assert timers == [(12.0, "abandon"), True], "once"


@pytest.mark.parametrize(("port", "taken"), [(None, 5), (81, 81)])
def test_an_application_is_stopped_whatever_happens(
    port: int | None, taken: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[Any] = []
    running = SimpleNamespace(stop=lambda: events.append("stop"))
    monkeypatch.setattr("serve.run.free_port", lambda: 5)
    monkeypatch.setattr(
        "serve.run.start", lambda *given, **named: (events.append(named), running)[1]
    )
    settings: Any = "settings"
    with serve.application(settings, host="h", port=port, registry="r") as found:
        assert (found, len(events)) == (running, 1)
    failing = serve.application(settings, host="h", port=port, registry="r")
    with pytest.raises(UserError), failing:
        raise UserError("x")
    assert events == [{"host": "h", "port": taken, "registry": "r", "tls": None}, "stop"] * 2

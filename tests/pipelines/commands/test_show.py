"""What all commands print alike: names, the model that is meant, bars."""

from __future__ import annotations

from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from pipelines.commands import import_model, show
from tests.pipelines.commands.test_printed import told


def test_names_as_a_person_would_type_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", str(tmp_path / "env" / "python"))
    for there, name in (("env", "liveedit"), ("other", "env/liveedit")):
        monkeypatch.setattr("shutil.which", lambda _, t=there: str(tmp_path / t / "liveedit"))
        assert show.command_name("liveedit") == name
    assert show.short(tmp_path / "a" / "b") == "a/b"
    assert show.short(tmp_path.parent / "a") == str(tmp_path.parent / "a")
    assert show.item("a", 5, 4).plain == "  a   5"
    assert show.examples("a") == "Example:\n\na"
    assert show.examples("a", "b") == "Examples:\n\na\n\nb"


def test_a_model_that_nobody_named_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    page = told(monkeypatch, show)
    for why, line in (("which ships", "model: m, which ships\n"), ("as asked", "")):
        chosen = SimpleNamespace(path=tmp_path / "m", why=why)
        monkeypatch.setattr("pipelines.tracking.registry.choose", lambda _, c=chosen: c)
        assert show.chosen_model(None) == str(tmp_path / "m")
        assert page.getvalue() == line
        page.truncate(0)
        page.seek(0)


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_drawn_where_somebody_watches(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a log they would be a line for every step."""
    page = StringIO()
    for module in (show, import_model):
        monkeypatch.setattr(
            module, "console", Console(file=page, width=120, force_terminal=terminal)
        )
    with show.bar("clips", 7) as (progress, task):
        progress.update(task, completed=3, note="2.5 fps")
        progress.refresh()
    with import_model._progress() as progress:
        progress.update(progress.add_task("weights", total=4_000_000), completed=2_500_000)
        progress.refresh()
    words = ("3/7", "clips", "2.5 fps", "weights", "2.5/4.0 MB")
    assert [word in page.getvalue() for word in words] == [terminal] * len(words)


def test_a_name_is_no_markup_and_a_number_no_colour() -> None:
    for console in (show.console, show.errors):
        text = console.render_str("[red]clip.mp4: 5 frames")
        assert (text.plain, text.spans) == ("[red]clip.mp4: 5 frames", [])

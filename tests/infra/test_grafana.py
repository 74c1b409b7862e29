"""Where the Grafana that is installed has its own files."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from infra.stack import servers
from infra.stack.servers import Missing, Settings


def test_grafana_s_own_files_are_beside_it_or_where_packages_put_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the file that a link on the PATH leads to, not beside the link."""
    asked: list[str] = []
    place = tmp_path / "package"
    monkeypatch.setattr(servers, "Path", lambda path: asked.append(path) or place)
    unpacked, linked = tmp_path / "grafana-13", tmp_path / "local" / "bin" / "grafana"
    for folder in (unpacked / "bin", linked.parent):
        folder.mkdir(parents=True)
    linked.symlink_to(unpacked / "bin" / "grafana")
    assert servers._grafana_home(linked) is None
    for home in (place, unpacked / "share" / "grafana", unpacked):  # each goes before the last
        (home / "conf").mkdir(parents=True)
        (home / "conf" / "defaults.ini").touch()
        assert servers._grafana_home(linked) == home
    assert set(asked) == {"/usr/share/grafana"}
    monkeypatch.setattr(servers.shutil, "which", lambda name: str(linked))
    shutil.rmtree(unpacked)
    shutil.rmtree(place)  # a binary without them is no Grafana
    assert isinstance(servers.grafana(Settings(tmp_path, "x:1", 1, 2, 3, 4)), Missing)

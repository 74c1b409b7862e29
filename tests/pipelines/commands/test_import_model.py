from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from modeling.model_dir import read_config
from modeling.presets import VaeConfig
from modeling.vae.build import build_vae
from pipelines.cli import app

WIDTHS = (16, 8, 8, 8)


@pytest.fixture
def taehv(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    file = tmp_path / "taew2_1.pth"
    torch.save(build_vae(VaeConfig("tiny", widths=WIDTHS)).state_dict(), file)
    return file


def test_import_and_its_summary(taehv: Path, tmp_path: Path) -> None:
    to = tmp_path / "models" / "tiny"
    result = CliRunner().invoke(app, ["import", str(taehv), "--to", str(to), "--dtype", "bf16"])
    assert result.exit_code == 0, result.output
    for part in ("video VAE", "taew2_1.pth", "TAEHV", "bfloat16", "no transformer (PATH)"):
        assert part in result.output
    assert read_config(to).vae.widths == WIDTHS
    again = CliRunner().invoke(app, ["import", str(taehv), "--to", str(to)])
    assert again.exit_code == 1
    assert "add --overwrite" in again.output


def test_errors_keep_their_lines(taehv: Path, tmp_path: Path) -> None:
    state = torch.load(taehv, weights_only=True)
    del state["decoder.1.bias"], state["encoder.0.bias"]
    torch.save(state, taehv)
    result = CliRunner().invoke(app, ["import", str(taehv), "--to", str(tmp_path / "to")])
    assert result.exit_code == 1
    assert "  missing decoder.1.bias [16]\n" in result.output
    assert "  missing encoder.0.bias [8]\n" in result.output
    assert not (tmp_path / "to").exists()

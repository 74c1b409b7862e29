from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from modeling.config import VaeConfig
from modeling.diffusion.transformer import Transformer
from modeling.model_dir import read_config
from modeling.presets import PRESETS
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


@pytest.mark.parametrize(
    ("asked", "written"),
    [("keep", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)],
)
def test_numbers_are_written_in_the_type_that_was_asked_for(
    taehv: Path, tmp_path: Path, asked: str, written: torch.dtype
) -> None:
    state = {name: value.half() for name, value in torch.load(taehv, weights_only=True).items()}
    torch.save(state, taehv)
    to = tmp_path / "to"
    result = CliRunner().invoke(app, ["import", str(taehv), "--to", str(to), "--dtype", asked])
    assert result.exit_code == 0, result.output
    assert str(written).removeprefix("torch.") in result.output
    found = load_file(to / "vae.safetensors")
    assert {value.dtype for value in found.values()} == {written}
    for name, value in found.items():
        assert torch.equal(value, state[name].to(written))


def test_an_older_directory_is_replaced_when_asked_and_other_files_never(
    taehv: Path, tmp_path: Path
) -> None:
    to = tmp_path / "to"
    command = ["import", str(taehv), "--to", str(to)]
    assert CliRunner().invoke(app, command).exit_code == 0
    before = load_file(to / "vae.safetensors")
    other = {name: value + 1 for name, value in torch.load(taehv, weights_only=True).items()}
    torch.save(other, taehv)
    assert CliRunner().invoke(app, command).exit_code == 1
    assert torch.equal(
        load_file(to / "vae.safetensors")["decoder.1.bias"], before["decoder.1.bias"]
    )
    assert CliRunner().invoke(app, [*command, "--overwrite"]).exit_code == 0
    after = load_file(to / "vae.safetensors")["decoder.1.bias"]
    assert torch.equal(after, before["decoder.1.bias"] + 1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    mine = ["import", str(taehv), "--to", str(tmp_path / "mine"), "--overwrite"]
    assert CliRunner().invoke(app, mine).exit_code == 1
    assert (tmp_path / "mine" / "file").read_text() == "mine"


def test_the_average_of_a_training_is_taken_when_asked(tmp_path: Path) -> None:
    """Self-Forcing's .pt holds both, side by side."""
    small = {"dim": 128, "ffn_dim": 16, "num_heads": 1, "num_layers": 1}
    weights = Transformer(replace(PRESETS["demo"].transformer, **small)).state_dict()
    average = {name: value + 1 for name, value in weights.items()}
    file = tmp_path / "both.pt"
    torch.save({"generator": weights, "generator_ema": average}, file)
    for name, options, wanted in (("a", [], weights), ("b", ["--ema"], average)):
        command = ["import", str(file), "--to", str(tmp_path / name), *options]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        found = load_file(tmp_path / name / "transformer.safetensors")
        for key, value in wanted.items():
            assert torch.equal(found[key], value)


def test_the_summary_counts_the_parameters_and_says_what_is_missing(
    taehv: Path, tmp_path: Path
) -> None:
    state = torch.load(taehv, weights_only=True)
    count = sum(value.numel() for value in state.values())
    result = CliRunner().invoke(app, ["import", str(taehv), "--to", str(tmp_path / "to")])
    assert f"{count / 1e6:,.1f} M" in result.output
    assert f"{4 * count / 1e9:.2f} GB" in result.output
    assert f"Wrote {tmp_path / 'to'}" in result.output.replace("\n", "")
    assert "no transformer (PATH) and no UMT5 text encoder (--text)" in result.output

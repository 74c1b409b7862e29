"""Making, checking and ingesting data, as commands."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from PIL import Image

from data.manifest import read_dataset_info
from data.synthetic import VERSION
from tests.pipelines.commands.entry import Liveedit


def test_data_make_from_footage(liveedit: Liveedit, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    Image.effect_noise((160, 96), 80).convert("RGB").save(tmp_path / "mine" / "photo.png")
    (tmp_path / "mine" / "heldout.txt").write_text("")
    wanted = ("--from", "mine", "--pairs", "2", "--size", "48x32", "--frames", "5")
    for target, workers in (("here", "0"), ("there", "2")):
        result = liveedit("data", "make", target, *wanted, "--workers", workers)
        assert result.returncode == 0, result.stderr
    here, there = (read_dataset_info(str(tmp_path / name)) for name in ("here", "there"))
    assert here.made_by["files"] == ["photo.png"]
    assert here.shards == there.shards
    assert "holds no photo" in liveedit("data", "make", "x", "--from", "here").stderr
    assert "gone: is no folder" in liveedit("data", "make", "x", "--from", "gone").stderr


def test_data_make_check_and_damage(liveedit: Liveedit, tmp_path: Path) -> None:
    made = liveedit(
        *("data", "make", "[red]pairs", "--pairs", "3", "--size", "48x32", "--frames", "9"),
        *("--samples-per-shard", "2", "--workers", "0", "--fps", "8", "--seed", "7"),
        *("--split", "heldout"),
    )
    assert made.returncode == 0, made.stderr
    assert "[red]pairs: 3 pairs of 9 frames, 48x32, 8 fps, 2 shards" in made.stdout
    info = read_dataset_info(str(tmp_path / "[red]pairs"))
    assert info.samples == 3
    assert info.made_by == {
        "generator": "synthetic", "version": VERSION, "seed": 7, "split": "heldout",
        "height": 32, "width": 48, "frames": 9, "fps": 8.0,
    }  # fmt: skip
    assert "every shard is as it was written" in liveedit("data", "check", "[red]pairs").stdout
    again = liveedit("data", "make", "[red]pairs", "--pairs", "3")
    assert again.returncode == 1
    assert "finished dataset" in again.stderr
    shard = sorted((tmp_path / "[red]pairs").glob("*.tar"))[1]
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    damaged = liveedit("data", "check", "[red]pairs")
    assert damaged.returncode == 1
    assert shard.name in damaged.stderr


def test_ingest_names_what_it_leaves_out(liveedit: Liveedit, tmp_path: Path) -> None:
    liveedit("data", "make", "pairs", "--pairs", "1", "--frames", "9", "--workers", "0")
    shard = next((tmp_path / "pairs").glob("*.tar"))
    subprocess.run(["tar", "-xf", shard, "-C", tmp_path], check=True)
    source, edited = (sorted(tmp_path.glob(f"*.{kind}.mp4"))[0] for kind in ("source", "target"))
    entry = {"instruction": "x", "source_path": source.name, "edited_path": edited.name}
    pairs = [entry, {**entry, "edited_path": "lost.mp4"}]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    result = liveedit(
        "data", "ingest", "pairs.json", "real", "--frames", "9", "--size", "96x64", "--fps", "16"
    )
    assert result.returncode == 0, result.stderr
    assert "lost.mp4" in result.stdout
    assert "1 pairs of 9 frames, 96x64" in result.stdout
    assert "1 left out" in result.stdout

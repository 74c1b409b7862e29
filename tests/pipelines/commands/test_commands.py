"""What the command line's words do, seen in the files that they leave."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from data.loader import Split, loader
from data.manifest import read_dataset_info
from data.sample import Pair
from data.shards import write_dataset
from data.synthetic import make_pair
from infra.runtime.errors import UserError
from pipelines.commands.serve import serve_settings
from tests.known_editors import block_clip, expected_edit, write_known_model
from tests.pipelines.commands.entry import Liveedit
from tests.pipelines.stages.test_edit_file import assert_same, exact, read


@pytest.mark.parametrize("prompt", ["paint it red", "make it blue"])
def test_edit_does_what_the_prompt_says(liveedit: Liveedit, tmp_path: Path, prompt: str) -> None:
    write_known_model(tmp_path / "known")
    video = block_clip(21, 48, 64)
    exact(tmp_path / "in.mkv", video)
    words = ["edit", "in.mkv", "out.mp4", "--prompt", prompt, "--model", "known"]
    assert liveedit(*words, "--work-size", "full").returncode == 0
    assert_same(read(tmp_path / "out.mp4"), expected_edit(video, prompt))
    beside = liveedit(*words, "--work-size", "48x32", "--side-by-side")
    assert "out.mp4: 21 frames" in beside.stdout
    assert "edited at 48x32" in beside.stdout
    assert_same(read(tmp_path / "out.mp4")[:, :, :64], video)


def test_edit_names_words_and_sizes_that_the_model_does_not_know(
    liveedit: Liveedit, tmp_path: Path
) -> None:
    card = write_known_model(tmp_path / "known") / "card.json"
    told = {"name": "known", "words": ["paint", "it", "red"], "trained_at": ["224x128"]}
    prompts = {"prompts": ["paint it red", "paint it", "red", "it", "paint red"]}
    card.write_text(json.dumps(told | prompts))
    exact(tmp_path / "in.mkv", block_clip(9, 48, 64))
    words = ["edit", "in.mkv", "out.mp4", "--model", "known", "--prompt"]
    warned = liveedit(*words, "paint it Red, like Monet")
    assert warned.returncode == 0, warned.stderr
    line = "this model does not know: like, monet; it edits by the rest. It knows, for example: "
    assert line + "paint it red, paint it, red, it\n" in warned.stdout
    assert "edits at 96x64, far from the 224x128 that this model was trained at" in warned.stdout
    quiet = liveedit(*words, "paint it red", "--work-size", "160x96").stdout
    assert "does not know" not in quiet
    assert "far from" not in quiet


def test_evaluate_judges_as_it_is_told(
    liveedit: Liveedit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    write_known_model(tmp_path / "known")
    source = block_clip(9, 32, 48)
    target = expected_edit(source, "red")
    pair = Pair(source, target, (source != target).any(-1), "paint it red", 16.0, {})
    write_dataset(tmp_path / "set", [pair, pair], made_by={})
    options = ["clips=1", "mask_cache=false", "dilate=3", "--out", "report.json"]
    result = liveedit("evaluate", "known", "set", *options)
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["model"], report["dataset"]) == ("known", "set")
    assert (report["settings"]["dilate"], report["mask_cache"]) == (3, None)
    assert [clip["instruction"] for clip in report["clips"]] == ["paint it red"]
    assert report["mean"]["gain"] > 12
    assert f"{report['mean']['gain']:.1f} dB" in result.stdout
    assert "background_psnr" in result.stdout


def test_data_make_draws_what_is_asked_for(liveedit: Liveedit, tmp_path: Path) -> None:
    size = ["--size", "48x32", "--frames", "5", "--fps", "8", "--workers", "0"]
    made = liveedit(
        "data", "make", "set", "--pairs", "2", "--seed", "3", "--split", "heldout", *size
    )
    assert made.returncode == 0, made.stderr
    (batch,) = list(loader(tmp_path / "set", Split(batch_size=2, shuffle=False, epochs=1)))
    for n in range(2):
        pair = make_pair(3_000_000 + n, height=32, width=48, frames=5, fps=8, split="heldout")
        assert batch["instruction"][n] == pair.instruction
        assert np.array_equal(batch["mask"][n], pair.mask)
    assert liveedit("data", "make", "set", "--pairs", "3", *size).returncode == 1
    assert liveedit("data", "make", "set", "--pairs", "3", "--overwrite", *size).returncode == 0
    assert read_dataset_info(tmp_path / "set").samples == 3


def test_ingest_keeps_before_and_after_apart(liveedit: Liveedit, tmp_path: Path) -> None:
    source = block_clip(16, 48, 64)
    exact(tmp_path / "before.mkv", source)
    exact(tmp_path / "after.mkv", expected_edit(source, "green"))
    entry = {"instruction": "go green", "source_path": "before.mkv", "edited_path": "after.mkv"}
    entries = [entry, {**entry, "source_path": "lost.mkv"}, entry]
    (tmp_path / "pairs.json").write_text(json.dumps(entries))
    size = ["--size", "64x48", "--frames", "9", "--fps", "16", "--samples-per-shard", "1"]
    result = liveedit("data", "ingest", "pairs.json", "set", *size)
    assert result.returncode == 0, result.stderr
    info = read_dataset_info(tmp_path / "set")
    assert [shard.count for shard in info.shards] == [1, 1]
    assert (info.made_by["ingest"], info.made_by["left_out"]) == ("pairs.json", 1)
    for batch in loader(tmp_path / "set", Split(batch_size=1, shuffle=False, epochs=1)):
        assert batch["instruction"] == ["go green"]
        assert_same(batch["source"][0].numpy(), source[:9])
        assert_same(batch["target"][0].numpy(), expected_edit(source, "green")[:9])
    assert liveedit("data", "ingest", "pairs.json", "set", *size).returncode == 1
    assert liveedit("data", "ingest", "pairs.json", "set", "--overwrite", *size).returncode == 0


def test_models_that_are_named_before_the_settings_are_all_served(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By absolute paths, as a token file's: replicas have another working directory."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(tiny_model)
    one = serve_settings(["a", "token_file=tokens"])
    assert (one.model, one.models) == (str(tmp_path / "a"), ())
    for arguments in (["a", "b", "models:/c@d"], ["models=[a,b,models:/c@d]"]):
        several = serve_settings([*arguments, "token_file=tokens"])
        assert several.models == (str(tmp_path / "a"), str(tmp_path / "b"), "models:/c@d")
        assert several.model is None
        assert several.token_file == str(tmp_path / "tokens")
    for wrong, told in (
        (["a", "nowhere"], "nowhere is no model directory"),
        (["a", "models=[b]"], "leave a out"),
        (["a", "fronts=1", "b"], "'b' is not key=value; write for example max_sessions=4"),
    ):
        with pytest.raises(UserError, match=re.escape(told)):
            serve_settings(wrong)

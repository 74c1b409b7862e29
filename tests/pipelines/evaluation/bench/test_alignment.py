"""CLIP text alignment on a CLIP of a few numbers, whose folder is what a user has."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from infra.runtime.errors import UserError
from pipelines.evaluation.bench import alignment
from pipelines.evaluation.bench.alignment import Alignment

SIDE = 16
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel  # a second of a core

    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
             "num_attention_heads": 1}  # fmt: skip
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**sizes, **ends, "vocab_size": 60, "max_position_embeddings": 32},
        vision_config={**sizes, "image_size": SIDE, "patch_size": 8},
        projection_dim=4,
    )
    model = CLIPModel(config)
    model.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    ).save_pretrained(folder)
    names = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{x}</w>" for x in LETTERS)]
    (folder / "vocab.json").write_text(json.dumps({name: n for n, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    about = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 32}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def video(level: int, frames: int) -> np.ndarray:
    y, x = np.mgrid[0:24, 0:40]
    picture = np.stack([x * 6, y * 9, np.full_like(x, level)], axis=-1).astype(np.uint8)
    return np.stack([np.roll(picture, n, axis=1) for n in range(frames)])


def test_it_is_the_cosine_of_the_frames_of_every_second(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CLIPImageProcessor, CLIPModel

    source, edit = video(20, 40), video(240, 40)
    found = Alignment(folder).measure("make it night", source, edit, fps=16)
    model = CLIPModel.from_pretrained(folder).eval()
    letters = [*"mak", "e</w>", "i", "t</w>", *"nigh", "t</w>"]
    vocabulary = json.loads((folder / "vocab.json").read_text())
    tokens = torch.tensor([[0, *(vocabulary[letter] for letter in letters), 1]])
    prepare = CLIPImageProcessor.from_pretrained(folder)

    def toward(frames: list[np.ndarray]) -> float:
        """By CLIP's own head, whose logits are cosines times a scale."""
        pixels = prepare(images=frames, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            out = model(input_ids=tokens, pixel_values=pixels)
            return float((out.logits_per_image / model.logit_scale.exp()).mean())

    wanted = [toward([clip[8], clip[24]]) for clip in (edit, source)]  # and none at 40
    assert found["clip_text"] == pytest.approx(wanted[0], abs=1e-5)
    assert found["clip_text_gain"] == pytest.approx(wanted[0] - wanted[1], abs=1e-5)
    assert abs(found["clip_text_gain"]) > 1e-4
    monkeypatch.setattr(alignment, "BATCH", 1)
    again = Alignment(folder).measure("make it night", source, edit, fps=16)
    assert again == pytest.approx(found, abs=1e-5)  # however many at once
    long = Alignment(folder).measure("make it night " * 9, source, edit, fps=16)
    assert np.isfinite(list(long.values())).all()  # more words than CLIP takes: it reads the first


def test_versions_hand_features_out_bare_or_as_a_pooled_part() -> None:
    features = torch.ones(2, 4)
    assert alignment._features(features) is features
    assert alignment._features(SimpleNamespace(pooler_output=features)) is features


def test_what_is_no_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone holds no CLIP model: no config\.json is there"):
        Alignment(tmp_path / "gone")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"holds no CLIP model in .*give the folder of config\.json"
    ):
        Alignment(tmp_path)

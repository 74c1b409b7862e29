from __future__ import annotations

import json
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from data.manifest import DatasetInfo, dataset_hash
from data.sample import EncodedPair
from data.shards import write_dataset
from infra.runtime.errors import UserError
from modeling import fingerprint
from modeling.fingerprint import model_fingerprint
from modeling.model_dir import set_guide
from pipelines.stages.running.choice import is_intact
from pipelines.tracking.records import (
    Records,
    StageRecord,
    fingerprint_of,
    key_of,
    taken_along,
    write_json,
)


def test_key_depends_on_values_and_not_on_their_order() -> None:
    assert key_of({"a": 1, "b": [1, 2]}) == key_of({"b": [1, 2], "a": 1})
    # Of a text that the records on people's disks are compared with.
    assert key_of({"b": [1, 2], "a": 1}) == sha256(b'{"a":1,"b":[1,2]}').hexdigest()
    assert key_of({"a": 1}) != key_of({"a": 2})
    assert key_of({"a": 1}) != key_of({"a": "1"})


@pytest.mark.parametrize("found", ['{"stage": "va', "{}", '{"stage": "vae"}', "[1]", "1"])
def test_record_comes_back_and_a_torn_one_or_of_another_make_counts_as_none(
    found: str, tmp_path: Path
) -> None:
    kept = Records(tmp_path)
    assert kept.read("vae") is None
    out = str(tmp_path / "out")
    record = StageRecord("vae", "key", "fingerprint", out, "run", {"loss": 0.5}, 1.0, "now")
    kept.write(record)
    assert kept.read("vae") == record
    file = tmp_path / "stages" / "vae.json"
    newer = json.loads(file.read_text()) | {"what a later make has": 1}
    for text in (found, json.dumps(newer)):
        file.write_text(text)
        assert kept.read("vae") is None


@pytest.mark.parametrize("absolute", [True, False])
def test_a_moved_folder_means_what_lies_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, absolute: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    first = tmp_path / "first" if absolute else Path("first")
    record = StageRecord("vae", "key", "fingerprint", str(first / "models" / "vae"), "run")
    Records(first).write(record)
    assert Records(first).read("vae") == record
    first.rename("second")
    moved = Records(tmp_path / "second").read("vae")
    assert moved is not None
    assert moved.output == str(tmp_path / "second" / "models" / "vae")


@pytest.mark.parametrize("output", ["/elsewhere/data", "s3://bucket/data"])
def test_what_lies_elsewhere_stays_there(tmp_path: Path, output: str) -> None:
    record = StageRecord("encode", "key", "fingerprint", output, "run")
    Records(tmp_path).write(record)
    assert Records(tmp_path).read("encode") == record


def test_writing_leaves_no_draft(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with (tmp_path / "a.json").open() as before:
        write_json(tmp_path / "a.json", {"x": 2})
        assert json.load(before) == {"x": 1}, "who reads it meanwhile has the old one"
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_model_fingerprint_sees_weights_and_not_the_card(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    (copy / "card.json").write_text('{"name": "another"}')
    assert model_fingerprint(copy) == model_fingerprint(tiny_model)
    weights = copy / "transformer.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert model_fingerprint(copy) != model_fingerprint(tiny_model)


def files(folder: Path, **contents: str) -> Path:
    for name, text in contents.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


PARTS = {
    "config_json": "sizes",
    "transformer_safetensors": "network",
    "vae_safetensors": "pictures",
    "text__model_safetensors": "words",
    "text__tokenizer_json": "letters",
}


@pytest.mark.parametrize("part", PARTS)
def test_every_part_of_a_model_is_in_its_fingerprint(tmp_path: Path, part: str) -> None:
    model = files(tmp_path / "model", **PARTS, card_json="lineage")
    before = model_fingerprint(model)
    assert fingerprint_of(model) == before
    value = PARTS[part]
    assert model_fingerprint(files(model, **{part: value[::-1]})) != before  # as long
    assert model_fingerprint(files(model, **{part: value + " "})) != before
    assert model_fingerprint(files(model, **{part: value})) == before
    path = model / part.replace("__", "/").replace("_", ".")
    path.rename(path.with_name("other.name"))
    assert model_fingerprint(model) != before
    path.with_name("other.name").unlink()
    assert model_fingerprint(model) != before


def test_a_fingerprint_does_not_know_where_a_model_lies_and_what_its_card_says(
    tmp_path: Path,
) -> None:
    one = files(tmp_path / "one", **PARTS, card_json="lineage")
    two = files(tmp_path / "deep" / "two", **PARTS, card_json="another")
    assert model_fingerprint(one) == model_fingerprint(two)
    (two / "card.json").unlink()
    assert model_fingerprint(one) == model_fingerprint(two)


@pytest.mark.parametrize("size", [500, 3000, 256 << 10, (600 << 10) + 5])
def test_a_file_is_hashed_at_blocks_spread_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """Whole up to 256 blocks, else in every third block of 600, for example."""
    block = 1 << 10  # a thousandth of the real one
    monkeypatch.setattr(fingerprint, "_BLOCK", block)
    file = tmp_path / "weights.safetensors"
    file.write_bytes(bytes(size))
    before = model_fingerprint(tmp_path)
    blocks = -(-size // block)
    step = -(-blocks // 256)
    places = {0, min(block, size) - 1, (blocks - 1) // step * step * block}
    places |= {min(size - 1, step * block)} | ({size - 1, size // 2} if step == 1 else set())
    for place in places:
        changed = bytearray(size)
        changed[place] = 1
        file.write_bytes(changed)
        assert model_fingerprint(tmp_path) != before, place
    file.write_bytes(bytes(size))
    assert model_fingerprint(tmp_path) == before


def test_a_dataset_is_known_by_the_content_of_its_shards(tmp_path: Path) -> None:
    """Shards of other content are other data, though each is as large and holds as much."""

    def written(name: str, level: int) -> DatasetInfo:
        latent = np.full((1, 16, 4, 6), level, np.float16)
        sample = EncodedPair(latent, latent, np.zeros((4, 8)), "x", 16.0, (1, 32, 48))
        return write_dataset(tmp_path / name, [sample], made_by={"name": name})

    one, two, same = written("one", 1), written("two", 2), written("same", 1)
    assert [(s.name, s.count, s.bytes) for s in one.shards] == [
        (s.name, s.count, s.bytes) for s in two.shards
    ]
    assert fingerprint_of(tmp_path / "one") == fingerprint_of(tmp_path / "same")
    assert fingerprint_of(tmp_path / "one") != fingerprint_of(tmp_path / "two")
    hashes = {
        dataset_hash(replace(one, **{field: value}))
        for field, value in (
            ("kind", "pairs"), ("samples", 2), ("fps", 8.0), ("frames", 2), ("height", 1),
            ("width", 1), ("format_version", 2), ("shards", ()), ("fps", 16.0),
        )
    }  # fmt: skip
    assert len(hashes) == 9
    assert dataset_hash(one) == dataset_hash(same) in hashes


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    one, two, same = (tmp_path / name for name in ("one", "two", "same"))
    one.write_text("a")
    two.write_text("b")
    same.write_text("a")
    assert fingerprint_of(one) == fingerprint_of(same) != fingerprint_of(two)


def test_dataset_with_a_lost_or_cut_shard_has_no_fingerprint(heldout: str, tmp_path: Path) -> None:
    assert fingerprint_of(heldout) is not None
    copy = tmp_path / "copy"
    shutil.copytree(heldout, copy)
    assert fingerprint_of(copy) == fingerprint_of(heldout)
    shard = sorted(copy.glob("*.tar"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole + bytes(512))
    assert fingerprint_of(copy) is None
    shard.write_bytes(whole[:-512])
    assert fingerprint_of(copy) is None
    shard.unlink()
    assert fingerprint_of(copy) is None


def test_nothing_has_no_fingerprint(tmp_path: Path) -> None:
    assert fingerprint_of(tmp_path / "nothing") is None


def test_a_model_that_is_changed_on_purpose_is_not_made_again(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "models" / "distill")
    made = model_fingerprint(model)
    records = Records(tmp_path)
    records.write(StageRecord("distill", "key", made, str(model), "run", {}, 1.0, "now"))
    way = tmp_path / "elsewhere"
    way.symlink_to(model)
    with taken_along(way):
        set_guide(model, 0.5, {})
    record = records.read("distill")
    assert record is not None
    assert is_intact(record)
    assert record.fingerprint != made
    set_guide(model, 0.6, {})  # by somebody else
    changed = model_fingerprint(model)
    with taken_along(model):
        set_guide(model, 0.7, {})
    assert records.read("distill") == record
    set_guide(model, 0.6, {})
    version = model.rename(tmp_path / changed[:16])  # as it is published
    link = tmp_path / "current"
    link.symlink_to(version)
    with pytest.raises(UserError, match="is a registered version"), taken_along(version):
        pass
    with pytest.raises(UserError, match="current is a registered version"), taken_along(link):
        raise AssertionError("it was let in")

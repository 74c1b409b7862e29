from __future__ import annotations

import shutil
from pathlib import Path

from pipelines.tracking.records import (
    Records,
    StageRecord,
    fingerprint_of,
    key_of,
    model_fingerprint,
    write_json,
)


def test_key_depends_on_values_and_not_on_their_order() -> None:
    assert key_of({"a": 1, "b": [1, 2]}) == key_of({"b": [1, 2], "a": 1})
    assert key_of({"a": 1}) != key_of({"a": 2})
    assert key_of({"a": 1}) != key_of({"a": "1"})


def test_record_comes_back_and_a_torn_one_counts_as_none(tmp_path: Path) -> None:
    records = Records(tmp_path)
    assert records.read("vae") is None
    record = StageRecord("vae", "key", "fingerprint", "out", "run", {"loss": 0.5}, 1.0, "now")
    records.write(record)
    assert records.read("vae") == record
    (tmp_path / "stages" / "vae.json").write_text('{"stage": "va')
    assert records.read("vae") is None


def test_writing_leaves_no_draft(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    write_json(tmp_path / "a.json", {"x": 2})
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


def test_large_file_is_hashed_at_blocks_spread_to_its_end(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    size = 600 << 20  # sparse
    with file.open("wb") as out:
        out.truncate(size)
    before = model_fingerprint(tmp_path)
    with file.open("r+b") as out:
        out.seek(3 << 20)  # the second hashed block: every third of 600
        out.write(b"x")
    assert model_fingerprint(tmp_path) != before


def test_dataset_with_a_lost_or_cut_shard_has_no_fingerprint(heldout: str, tmp_path: Path) -> None:
    assert fingerprint_of(heldout) is not None
    copy = tmp_path / "copy"
    shutil.copytree(heldout, copy)
    assert fingerprint_of(copy) == fingerprint_of(heldout)
    shard = sorted(copy.glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes()[:-512])
    assert fingerprint_of(copy) is None
    shard.unlink()
    assert fingerprint_of(copy) is None


def test_nothing_has_no_fingerprint(tmp_path: Path) -> None:
    assert fingerprint_of(tmp_path / "nothing") is None

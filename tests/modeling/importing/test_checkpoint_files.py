from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from modeling.importing.checkpoint_files import WeightsError, find_weights, read_file, sha256

STATE = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


class Bomb:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def same(found: dict[str, Tensor]) -> bool:
    return found.keys() == STATE.keys() and all(torch.equal(found[k], STATE[k]) for k in STATE)


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "legacy.pt", "x.bin"])
def test_every_format_is_read_whatever_its_name(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    if name == "x.safetensors":
        save_file(STATE, file)
    else:
        torch.save(STATE, file, _use_new_zipfile_serialization=name != "legacy.pt")
    found = read_file(file)
    assert same(found)
    # Opening 50 GB costs no memory, unless torch wrote them long ago.
    assert (str(file) in Path("/proc/self/maps").read_text()) == (name != "legacy.pt")
    assert same(read_file(file.rename(tmp_path / "another.name")))


def test_shards_are_one_network(tmp_path: Path) -> None:
    save_file({"a": STATE["a"]}, tmp_path / "m-1.safetensors")
    save_file({"b": STATE["b"]}, tmp_path / "m-2.safetensors")
    torch.save(STATE, tmp_path / "m.bin")  # the older copy that hubs keep beside
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}))
    (tmp_path / "tf_model.h5.index.json").write_text('{"weight_map": {"a": "absent.h5"}}')
    for path in (tmp_path, index):
        (found,) = find_weights(path)
        assert found.name == index
        assert same(found.read())
    (tmp_path / "m-2.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"lists 2 shards, .* missing: m-2\.safetensors"):
        find_weights(tmp_path)


def test_an_index_cannot_reach_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "m.bin.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.pt"}}))
    with pytest.raises(WeightsError, match="files outside its folder"):
        find_weights(tmp_path)
    (tmp_path / "m.bin.index.json").write_text("[]")
    with pytest.raises(WeightsError, match="no index of weight shards"):
        find_weights(tmp_path)


@pytest.mark.parametrize("archive", [True, False])
def test_code_is_never_run(tmp_path: Path, archive: bool) -> None:
    mark, file = tmp_path / "ran", tmp_path / "evil.pt"
    content = {"weights": STATE, "config": Bomb(mark)}
    torch.save(content, file, _use_new_zipfile_serialization=archive)
    with pytest.raises(WeightsError, match=r"evil\.pt holds \w+\.system, which is no tensor"):
        read_file(file)
    assert not mark.exists()


def test_a_bare_pickle_is_not_run(tmp_path: Path) -> None:
    mark, file = tmp_path / "ran", tmp_path / "evil.pth"
    file.write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    with pytest.raises(WeightsError, match="It could run code, so it was not loaded"):
        read_file(file)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html>Sign in</html>", "is a web page, not weights"),
        (b"<html><body>Not found</body></html>", "is a web page, not weights"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "is a web page, not weights"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"GGUF\x03\x00\x00\x00\x00\x00", "neither a safetensors nor a torch file"),
        (b"PK\x03\x04 and then nothing", "is cut off"),
        (
            (1 << 20).to_bytes(8, "little") + b'{"a":',
            "alone is 1048584 bytes and the file 13;",
        ),
        (b"\x80\x02}q\x00", "damaged or incomplete torch file"),
    ],
)
def test_files_that_are_not_what_they_claim(tmp_path: Path, content: bytes, message: str) -> None:
    for name in ("model.pth", "model.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(WeightsError, match=message) as error:
            read_file(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)


@pytest.mark.parametrize("name", ["m.safetensors", "m.pt", "legacy.pt"])
@pytest.mark.parametrize("left", [0.3, 0.9])
def test_truncated_files(tmp_path: Path, name: str, left: float) -> None:
    file, state = tmp_path / name, {"a": torch.randn(500)}
    if name == "m.safetensors":
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=name == "m.pt")
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * left)])
    with pytest.raises(WeightsError, match=r"cut off|damaged or incomplete"):
        read_file(file)


def test_other_archives_and_objects(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("readme.txt", "hello")
    (tmp_path / "weights.pt").write_bytes(buffer.getvalue())
    with pytest.raises(WeightsError, match="damaged or incomplete torch file"):
        read_file(tmp_path / "weights.pt")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    with pytest.raises(WeightsError, match="holds a Tensor, not named tensors"):
        read_file(tmp_path / "tensor.pt")
    with pytest.raises(WeightsError, match=r"absent\.pt cannot be read"):
        read_file(tmp_path / "absent.pt")


def test_sha256(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    for file in files:
        file.write_bytes(file.name.encode() * 5_000_000)
    heard: list[int] = []
    digests = sha256(files, heard.append)
    assert digests == [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert sum(heard) == 10_000_000

"""Videos through a real server: `liveedit edit --url`, the demo's camera, `bench serve --url`."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.video import probe, read_frames
from infra.runtime.errors import UserError
from modeling.editor import StreamingEditor
from pipelines.cli import main
from pipelines.exits import MEND, TRY_AGAIN
from pipelines.stages.edit_file import edit_video
from pipelines.stages.edit_remote import (
    edit_remote,
    film_file,
    live_numbers,
    unlike_taught,
    untaught,
    within,
)
from serve.client import WireError, edit_frames, served_model
from serve.limits import Limits
from serve.wire.protocol import Chunk, Opened
from tests.known_editors import block_clip, expected_edit, write_known_model
from tests.pipelines.stages.test_edit_file import (
    assert_same,
    exact,
    frames,
    read,
    with_sound,
    write,
)
from tests.serve.conftest import Server, serving
from tests.serve.tokens import write_tokens


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Server]:
    with serving(tiny_model) as running:
        yield running


def liveedit(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setenv("COLUMNS", "120")  # a busy machine's figures are wide
    monkeypatch.setattr(sys, "argv", ["liveedit", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def test_length_rate_size_and_sound_are_kept(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, out = with_sound(tmp_path / "in.mkv", 2.0), tmp_path / "out.mp4"
    arguments = ["edit", str(source), str(out), "--prompt", "x", "--url", server.url]
    assert liveedit(monkeypatch, *arguments, "--work-size", "1/2", "--detail", "source") == 0
    assert "edited at 32x32" in capsys.readouterr().out
    before, after = probe(source), probe(out)
    assert (after.width, after.height, after.fps) == (before.width, before.height, before.fps)
    assert after.has_audio
    assert len(list(read_frames(out))) == 60


@pytest.mark.parametrize("detail", ["source", "off"])
def test_the_edit_is_the_one_that_the_model_makes_here(
    server: Server, tiny_model: Path, tmp_path: Path, detail: str
) -> None:
    source = write(tmp_path / "in.mp4", frames(23, 32, 48), Fraction(16))
    asked: dict[str, Any] = {"work_size": "32x16", "detail": detail, "seed": 3}
    there = edit_remote(server.url, source, tmp_path / "there.mp4", "x", side_by_side=True, **asked)
    here = edit_video(
        StreamingEditor.load(tiny_model),
        source, tmp_path / "here.mp4", "x", side_by_side=True, **asked,
    )  # fmt: skip
    assert (here.height, here.width) == (16, 32)
    assert (there.frames, there.height, there.width) == (here.frames, here.height, here.width)
    assert there.recomputed == pytest.approx(here.recomputed)
    remote, local = (
        np.stack(list(read_frames(tmp_path / name))).astype(int)
        for name in ("there.mp4", "here.mp4")
    )
    assert remote.shape == (23, 32, 96, 3)
    assert np.abs(remote - local).mean() < 3  # JPEG on the way, twice


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose edits are known: of what is sent, without its detail."""
    model = write_known_model(tmp_path_factory.mktemp("known") / "model")
    card = {
        "name": "known", "prompts": ["paint it red"], "words": ["paint", "it", "red"],
        "trained_at": ["224x128"],
    }  # fmt: skip
    (model / "card.json").write_text(json.dumps(card))
    with serving(model, work_size="full", detail="off") as running:
        yield running


def test_a_server_s_model_says_which_words_and_sizes_it_was_not_taught(
    known: Server,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    source = exact(tmp_path / "in.mkv", block_clip(9, 48, 64))
    words = ["edit", str(source), str(tmp_path / "out.mp4"), "--url", known.url, "--prompt"]
    assert liveedit(monkeypatch, *words, "paint it Red, like Monet") == 0
    told = capsys.readouterr().out
    assert "does not know: like, monet; it edits by the rest. It knows, for" in told
    assert "example: paint it red\n" in told
    assert "it edits at 64x48, far from the 224x128 that this model was trained at" in told
    assert liveedit(monkeypatch, *words, "paint it red", "--work-size", "192x112") == 0
    quiet = capsys.readouterr().out
    assert "does not know" not in quiet
    assert "far from" not in quiet


def test_a_work_size_is_meant_of_what_a_server_takes_of_a_frame() -> None:
    model: dict[str, Any] = {"width": 224, "height": 128, "work_size": "1/2", "max_side": 448}
    assert unlike_taught(model, 512, 896, None) == ""  # 448x256 is sent, of which half
    assert "448x256" in unlike_taught(model, 512, 896, "full")
    assert unlike_taught(model, 512, 896, "native") == ""
    assert unlike_taught({"width": 224, "height": 128}, 256, 448, "1/2") == ""
    taught = model | {"card": {"trained_at": ["448x256"]}}
    assert unlike_taught(taught, 512, 896, "full") == ""


@pytest.mark.parametrize("prompt", ["leave it", "paint it red", "make it blue"])
def test_a_file_comes_back_edited_in_its_place_time_and_colours(
    known: Server, tmp_path: Path, prompt: str
) -> None:
    video = block_clip(23, 48, 64, seed=1)
    source, out = exact(tmp_path / "in.mkv", video), tmp_path / "out.mp4"
    heard: list[int] = []
    report = edit_remote(known.url, source, out, prompt, side_by_side=True, progress=heard.append)
    both = read(out)
    assert_same(both[:, :, :64], video)
    assert_same(both[:, :, 64:], expected_edit(video, prompt))
    assert (report.frames, report.height, report.width) == (23, 48, 64)
    assert heard == list(range(1, 24))


def test_a_filmed_file_comes_back_edited(known: Server, tmp_path: Path) -> None:
    video = block_clip(21, 48, 64, seed=2)
    source, out = exact(tmp_path / "in.mkv", video), tmp_path / "out.mp4"
    report = film_file(known.url, source, out, "paint it green")
    assert (report.edited, report.dropped) == (21, 0)
    assert_same(read(out), expected_edit(video, "paint it green"))


def test_a_mistake_is_seen_before_a_server_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.stages.edit_remote.served_model", pytest.fail)
    source = tmp_path / "in.mp4"
    source.touch()
    with pytest.raises(UserError, match="is the source itself"):
        edit_remote("ws://there", source, source, "paint it")


@pytest.mark.parametrize(("said", "size"), [("32x16", (32, 16)), (None, (32, 24))])
def test_what_a_server_is_asked_for(
    said: str | None, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that does not say at which size it works does so at that of what it is sent."""
    source = exact(tmp_path / "in.mkv", block_clip(3, 48, 64), Fraction(25))
    told: dict[str, Any] = {}

    def model(url: str, name: str | None, *, token: str | None) -> dict[str, Any]:
        told["model"] = (url, name, token)
        return {"fps": 12.0, "max_side": 32}

    def edit(url: str, given: Iterator[np.ndarray], prompt: str, **named: Any) -> Any:
        images = list(given)
        told["edit"] = (url, prompt, {image.shape for image in images}, len(images))
        heard = named.pop("on_event")
        told["named"] = named
        heard(Opened("s", "r", "second", 12, 9, 32, 24, 0, work_size=said))
        heard(Chunk(0, 0, 3, latency_ms=1.0, compute_ms=1.0, recomputed=0.25, steps=4))
        return images

    monkeypatch.setattr("pipelines.stages.edit_remote.served_model", model)
    monkeypatch.setattr("pipelines.stages.edit_remote.edit_frames", edit)
    options: dict[str, Any] = {
        "work_size": "1/2", "detail": "off", "seed": 7, "model": "second", "token": "secret",
    }  # fmt: skip
    report = edit_remote("ws://there", source, tmp_path / "out.mp4", "paint it", **options)
    assert told["model"] == ("ws://there", "second", "secret")
    assert told["edit"] == ("ws://there", "paint it", {(24, 32, 3)}, 3)
    assert told["named"] == options | {"fps": 12.0}
    assert (report.frames, report.recomputed) == (3, 0.25)
    assert (report.width, report.height) == size
    del told["model"]
    monkeypatch.setattr(
        "pipelines.stages.edit_remote.unlike_taught", lambda *given: given[0]["fps"]
    )
    named = {"model": "third", "token": "other"}
    assert untaught("ws://there", "paint", 48, 64, None, **named) == ([], {}, 12.0)
    assert told["model"] == ("ws://there", "third", "other")


@pytest.mark.parametrize(
    ("said", "size"),
    [
        ({}, (1080, 1920)),  # a server that does not say
        ({"max_pixels": 1920 * 1080, "max_side": 1920}, (1080, 1920)),
        ({"max_pixels": 1280 * 720, "max_side": 1920}, (720, 1280)),
        ({"max_pixels": 10**9, "max_side": 960}, (540, 960)),
        ({"max_pixels": 1280 * 720 - 1, "max_side": 1920}, (719, 1279)),
    ],
)
def test_frames_are_sent_as_large_as_the_server_takes(
    said: dict[str, int], size: tuple[int, int]
) -> None:
    assert within(1080, 1920, said) == size


def test_a_long_file_is_read_no_further_than_its_edit_comes_back(server: Server) -> None:
    read = 0

    def counted() -> Iterator[np.ndarray]:
        nonlocal read
        for frame in frames(200, 32, 48):
            read += 1
            yield frame

    ahead = [
        read - done
        for done, _ in enumerate(edit_frames(server.url, counted(), "x", fps=16), start=1)
    ]
    assert len(ahead) == 200
    assert max(ahead) < 150  # 36 frames on their way, 64 messages unread, one chunk


def test_a_camera_films_a_file_at_its_rate(server: Server, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.mp4", frames(33, 32, 48), Fraction(16)), tmp_path / "o.mp4"
    report = film_file(server.url, source, out, "x")
    assert report.sent == 33
    assert report.edited + report.dropped == 33
    assert len(list(read_frames(out))) == 33
    assert probe(out).fps == 16
    numbers = live_numbers(report)
    assert numbers["edited"] == report.edited
    assert numbers["first_chunk_s"] > 0.5  # nine frames have to be filmed first
    assert numbers["latency_s"] > 0


def test_a_running_server_is_measured(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["bench", "serve", "--url", server.url, "--sessions", "1,2", "--seconds", "3"]
    report = tmp_path / "now.json"
    assert liveedit(monkeypatch, *arguments, "--mode", "lossless", "--json", str(report)) == 0
    assert "overhead P50 / P95 / P99" in capsys.readouterr().out
    runs = json.loads(report.read_text())["runs"]
    assert [run["sessions_held"] for run in runs] == [1, 2]
    assert [run["frames_edited"] for run in runs] == [48, 96]
    assert all(run["frames_lost"] == run["frames_repeated"] == 0 for run in runs)
    assert all(run["overhead_ms_p50"] < run["chunk_latency_ms_p50"] for run in runs)
    few = ["bench", "serve", "--url", server.url, "--sessions", "1", "--seconds", "1"]
    assert liveedit(monkeypatch, *few, "--work-size", "9/8") == 1
    assert "work size '9/8' is none" in capsys.readouterr().err
    assert liveedit(monkeypatch, *few, "--work-size", "9008x9008") == 0
    out = capsys.readouterr().out
    assert "edited at 9008x9008" in out
    assert "unsupported_size" in out  # the server heard it


def test_a_token_and_limits_of_the_server(tiny_model: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.mp4", frames(9, 32, 48), Fraction(16))
    tokens = write_tokens(tmp_path / "tokens")
    limits = Limits(max_pixels=1000, max_work_pixels=4000)
    with serving(tiny_model, limits, token_file=str(tokens)) as guarded:
        with pytest.raises(WireError, match="Authorization"):
            edit_remote(guarded.url, source, tmp_path / "out.mp4", "x")
        with pytest.raises(WireError, match="choose a smaller"):
            edit_remote(
                guarded.url, source, tmp_path / "out.mp4", "x", work_size="96x64", token="secret"
            )
        with pytest.raises(WireError, match="no model 'x' is served; choose tiny"):
            edit_remote(guarded.url, source, tmp_path / "out.mp4", "x", model="x", token="secret")
        assert served_model(guarded.http, "tiny", token="secret")["name"] == "tiny"
        report = edit_remote(
            guarded.url, source, tmp_path / "out.mp4", "x", work_size="full", token="secret"
        )
        assert (report.height, report.width) == (25, 38)  # as large as it takes them
    info = probe(tmp_path / "out.mp4")
    assert (info.height, info.width) == (32, 48)
    assert len(list(read_frames(tmp_path / "out.mp4"))) == 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["edit", "in.mp4", "out.mp4", "-p", "x", "--url", "ws://127.0.0.1:9"],
            "cannot be reached",
        ),
        (["edit", "in.mp4", "out.mp4", "-p", "x", "--url", "127.0.0.1:9"], "write ws://HOST:PORT"),
        (["bench", "serve", "--url", "ws://127.0.0.1:9", "--kills", "2"], "leave --url out"),
        (["bench", "serve", "--sessions", "1,x"], "--sessions 1,x"),
        (["serve", "nowhere"], "nowhere is no model directory"),
        (["serve", "MODEL", "max_sesions=2"], "no setting max_sesions"),
        (["serve", "MODEL", "max_sessions=0"], "max_sessions must be 1 or more"),
        (["serve", "MODEL", "max_sessions=many"], "max_sessions must be int"),
        (["serve", "MODEL", "limits.max_fsp=30"], "no setting limits.max_fsp"),
        (["serve", "MODEL", "token_file=nowhere"], "nowhere cannot be read"),
        (["serve", "BROKEN"], "transformer.safetensors cannot be read"),
    ],
)
def test_mistakes_are_one_line(
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    weights = broken / "transformer.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    write(tmp_path / "in.mp4", frames(9, 32, 48), Fraction(16))
    places = {"MODEL": str(tiny_model), "BROKEN": str(broken)}
    code = TRY_AGAIN if "ws://127.0.0.1:9" in arguments and "bench" not in arguments else MEND
    assert liveedit(monkeypatch, *(places.get(word, word) for word in arguments)) == code
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert message in said
    assert not (tmp_path / "out.mp4").exists()

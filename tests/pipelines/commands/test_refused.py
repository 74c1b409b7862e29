"""Words of the command line that exclude each other or say nothing: refused before anything is
done, in words that name them. Each on its border, with what is just right beside it."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from infra.runtime.errors import UserError
from pipelines.cli import app
from pipelines.commands import doctor
from pipelines.commands.measure.reports import check_folders
from pipelines.commands.measure.stream import parse_guide
from pipelines.commands.options import check_clip, parse_numbers, parse_size
from pipelines.commands.serve import _tls
from serve.tls import Tls
from tests.pipelines.commands.calls import parameters

AT = "bench serve --url ws://h:1"
SIMULATED = "--simulate takes one number of --sessions and starts no server; leave --url, --attack"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("data make s3://b/x --bench", "s3://b/x: the benchmark's videos are written to a folder"),
        ("data make x --fps 0", "--fps 0 must lie above 0 and be at most 1000"),
        ("data ingest p.json x --fps 1000.5", "--fps 1000.5 must lie above 0"),
        ("evaluate m d --outputs o", "--outputs and --beside belong to bench"),
        ("evaluate m d --beside b.json", "--outputs and --beside belong to bench"),
        ("evaluate m bench --beside b.json", "--beside b.json cannot be read"),
        ("ablate m steps=1,2 clips=3", "steps=1,2 is no dataset; name one after the model"),
        ("bench detail f --write", "--write records a guide in a model directory; name it with"),
        ("bench detail f --model m --picture p.png", "--picture shows what --model does not make"),
        ("bench detail f --size 64", "--size 64 must be width x height in pixels"),
        (f"{AT} --kills 1", "--kills kills replicas of an application started here; leave --url"),
        (f"{AT} --soak 90s", "--soak looks at the memory of an application started here; leave"),
        (f"{AT} fronts=2", "--url measures what runs there; leave fronts=2 out"),
        ("bench serve --chaos", "--chaos draws who is killed; say how many with --kills"),
        (f"{AT} --simulate r.json --sessions 1", SIMULATED),
        ("bench serve --simulate r.json --sessions 1,2", SIMULATED),
        ("bench serve --simulate r.json --sessions 1 --attack all", SIMULATED),
        ("bench serve --json no/r.json", "folder no does not exist; make it first"),
        ("bench stream --json no/r.json", "folder no does not exist; make it first"),
        ("bench stream --plot no/p.png", "folder no does not exist; make it first"),
        ("bench train --json no/r.json", "folder no does not exist; make it first"),
        ("bench stream --plot p.pdf", "--plot p.pdf must end in .png, .jpg or .webp"),
        ("bench stream --pruned-steps 1,x", "--pruned-steps 1,x must be numbers from 0 on"),
        ("bench stream --guide sharp", "--guide sharp must be decoded, or pixels such as 0.5"),
        ("bench stream --check s.json", "s.json does not exist; write it with --json s.json"),
        ("bench serve --sessions 0", "--sessions 0 must be numbers from 1 on"),
        ("bench serve --url ws://h:1 --size 64", "--size 64 must be width x height in pixels"),
        ("bench stream --size 64x", "--size 64x must be width x height in pixels"),
        ("bench train demo --gpus 0", "--gpus 0 must be numbers from 1 on"),
        ("bench train demo --zero 1,-1", "--zero 1,-1 must be numbers from 0 on"),
        ("bench train demo --kills 1 --gpus 0", "--gpus 0 must be numbers from 1 on"),
        ("trace .", "holds no whole chunk; serve with traces="),
        ("trace . --session a", "holds no whole chunk of session a; serve with traces="),
        ("serve --https --tls-cert c", "--https makes a certificate; leave it out beside"),
        ("serve --https --tls-key k", "--https makes a certificate; leave it out beside"),
        ("serve --tls-cert c", "TLS needs a certificate and its key; give --tls-key, too"),
        ("serve --tls-key k", "TLS needs a certificate and its key; give --tls-cert, too"),
        ("token a/b", "'a/b' is no tenant's name; letters, digits, . _ and - are"),
        ("send .", ". is no output folder of a pipeline: it has no folder tracking"),
        ("edit in.mp4 in.mp4 -p x", "in.mp4 is the source itself; give another output file"),
        ("edit in.mp4 out.mp4 -p {empty}", "the prompt is empty; say what to change"),
    ],
)
def test_what_is_refused_is_named(
    words: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.mp4").write_bytes(b"")
    found: Any = SimpleNamespace(height=16, width=16, fps=1.0, work_size="full")
    model = {"height": 16, "width": 16, "fps": 1.0, "work_size": "full", "device": "cpu"}
    monkeypatch.setattr("serve.client.served_model", lambda *_, **__: model)
    monkeypatch.setattr("pipelines.commands.serve.chosen_model", lambda model: found)
    given = [word.replace("{empty}", " ") for word in words.split()]
    result = CliRunner().invoke(app, given, standalone_mode=False)
    assert isinstance(result.exception, UserError), result.exception or result.output
    assert told in str(result.exception)
    assert [file.name for file in tmp_path.iterdir()] == ["in.mp4"]


COUNT, FROM_0, PORT = (1, None), (0, None), (1, 65535)
RANGES: dict[tuple[str, str], tuple[float | None, float | None]] = {
    ("data make", "--pairs"): COUNT, ("data make", "--frames"): COUNT,
    ("data make", "--seed"): FROM_0, ("data make", "--samples-per-shard"): COUNT,
    ("data make", "--workers"): FROM_0,  # in this process
    ("data ingest", "--frames"): COUNT, ("data ingest", "--samples-per-shard"): COUNT,
    ("data ingest", "--workers"): COUNT,
    ("bench detail", "--frames"): COUNT,
    ("bench serve", "--seconds"): COUNT, ("bench serve", "--kills"): FROM_0,
    ("bench serve", "--kill-every"): COUNT, ("bench serve", "--hours"): COUNT,
    ("bench serve", "--cold"): FROM_0,
    ("models promote", "--share"): (0, 1),
    ("edit", "--seed"): FROM_0, ("edit", "--fps"): (0.1, 1000),
    ("serve", "--port"): PORT, ("doctor", "--port"): PORT,
    ("token", "--sessions"): COUNT, ("token", "--opens"): COUNT,
    ("token", "--minutes"): (0.1, None),
    ("trace", "--nth"): COUNT,
}  # fmt: skip


def test_numbers_are_taken_from_where_they_mean_something() -> None:
    """Counts from one, seeds and what may be left out from nothing, shares up to all."""
    found = {
        (command, max(one.opts, key=len)): (one.min, one.max)
        for command, one in parameters()
        if getattr(one, "min", None) is not None or getattr(one, "max", None) is not None
    }
    assert found == RANGES


def test_all_that_a_command_takes_is_explained() -> None:
    assert [
        (command, one.name) for command, one in parameters() if not getattr(one, "help", None)
    ] == []


def test_sizes_in_words() -> None:
    assert parse_size("192x16", 16) == (16, 192)
    assert parse_size("16x192", 16) == (192, 16)
    assert parse_size("1x2") == (2, 1)
    for wrong in ("15x16", "16x15", "16", "x16", "16x", "16x-16", "1.5x16"):
        with pytest.raises(UserError, match=re.escape(f"--size {wrong} must be")):
            parse_size(wrong, 16)
    for wrong in ("8", "x8", "8x", "-8x8", "8x1.5", "0x8", "8x0"):
        with pytest.raises(UserError, match=re.escape(f"--size {wrong} must be")):
            parse_size(wrong)


@pytest.mark.parametrize(("frames", "fps"), [(1, 1000.0), (5, 0.001), (33, 16.0)])
def test_clips_that_a_model_can_be_trained_on(frames: int, fps: float) -> None:
    check_clip(frames, fps)


@pytest.mark.parametrize(
    ("frames", "near"), [(2, "1 or 5"), (4, "1 or 5"), (6, "5 or 9"), (32, "29 or 33")]
)
def test_clips_between_whole_latents(frames: int, near: str) -> None:
    with pytest.raises(UserError, match=rf"--frames {frames} is no whole .*: {near}$"):
        check_clip(frames, 16)


@pytest.mark.parametrize("fps", [0.0, -1.0, 1000.5, float("nan")])
def test_rates_that_are_none(fps: float) -> None:
    with pytest.raises(UserError, match=f"--fps {fps:g} must lie above 0 and be at most 1000"):
        check_clip(5, fps)


def test_numbers_in_words() -> None:
    assert parse_numbers("--gpus", "1, 2,16", 1) == (1, 2, 16)
    assert parse_numbers("--zero", "0", 0) == (0,)
    assert (parse_guide("decoded"), parse_guide("0.5")) == ("decoded", 0.5)
    for wrong in ("", "1,", "a", "1.5", "0"):
        with pytest.raises(UserError, match=re.escape(f"--gpus {wrong} must be numbers from 1 on")):
            parse_numbers("--gpus", wrong, 1)


def test_a_report_is_written_only_where_there_is_a_folder(tmp_path: Path) -> None:
    check_folders(None, tmp_path / "a.json", Path("here.json"))
    with pytest.raises(UserError, match=r"folder .*nowhere does not exist"):
        check_folders(tmp_path / "a.json", tmp_path / "nowhere" / "b.png")
    with pytest.raises(UserError, match=r"folder .*nowhere does not exist"):
        check_folders(None, tmp_path / "nowhere" / "b.png")


def test_a_certificate_is_given_or_made_or_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.tls.own_certificate", lambda folder: folder)
    given = Path("c"), Path("k")
    assert _tls(False, *given) == Tls(*given)
    assert _tls(False, None, None) is None
    made: Any = _tls(True, None, None)
    assert made == Path("runs", "https")


@pytest.mark.parametrize(
    ("free_gb", "shared_gb", "disk", "shared"),
    [(5.0, 2.0, "ok", "ok"), (4.9, 1.9, "broken", "absent")],
)
def test_room_that_a_demo_needs(
    free_gb: float, shared_gb: float, disk: str, shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def usage(path: Path) -> Any:
        return SimpleNamespace(free=(shared_gb if str(path) == "/dev/shm" else free_gb) * 1e9)

    monkeypatch.setattr("shutil.disk_usage", usage)
    found = {finding.name: finding for finding in doctor._room()}
    assert (found["disk"].state, found["/dev/shm"].state) == (disk, shared)
    assert found["disk"].what.startswith(f"{free_gb:.0f} GB free in {Path.cwd()}")
    assert found["disk"].what.endswith("; a demo wants 5") == (disk == "broken")
    assert found["/dev/shm"].what.startswith(f"{shared_gb:.1f} GB of shared memory")
    assert found["CPU"].state == "ok"
    monkeypatch.setattr("os.access", lambda *_: False)
    assert {f.name: f.state for f in doctor._room()}["folder"] == "broken"


def test_ports_are_those_of_who_listens_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_obstacle", lambda port: "taken" if port == 81 else "")
    assert [(f.name, f.state, f.what) for f in doctor._ports(81)] == [
        ("port 81", "absent", "taken: `liveedit serve` needs another --port"),
        ("port 5000", "ok", "free for `mlflow ui`"),
    ]


@pytest.mark.parametrize("there", [True, False])
def test_a_database_is_there_or_will_be_made(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr("pipelines.tracking.tracker.check_reachable", asked.append)
    file = tmp_path / "mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{file}")
    if there:
        file.touch()
    (found,) = doctor._mlflow()
    assert (found.state, found.what) == (
        "ok",
        f"{file}, {'there' if there else 'made when needed'}",
    )
    assert asked == ([f"sqlite:///{file}"] if there else [])
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://m")
    assert [f.what for f in doctor._mlflow()] == ["http://m answers"]


def test_where_s3_is_not_asked_for_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_PROFILE")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    assert [(f.name, f.state) for f in doctor._s3()] == [("S3", "absent")]
    monkeypatch.setattr("data.store.s3_buckets", lambda: ["a", "b"])
    for name in names:
        with monkeypatch.context() as patch:
            patch.setenv(name, "http://x")
            where = "http://x" if "ENDPOINT" in name else "AWS"
            (found,) = doctor._s3()
            assert found.what == f"{where} answers, and these keys open 2 buckets"


def test_who_asks_for_the_version_gets_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.show_version(False)
    assert capsys.readouterr().out == ""
    with pytest.raises(typer.Exit) as end:
        doctor.show_version(True)
    assert end.value.exit_code == 0

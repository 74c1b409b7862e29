"""What commands print of what was found, each figure in its place and by hand; nothing is run."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from rich.table import Table

from infra.runtime.registry import FINGERPRINT, LOCATION, RegistryError
from modeling.fingerprint import FingerprintError
from pipelines.commands import import_model, models, run, serve
from pipelines.commands.measure import benchmark, reports, train
from pipelines.config.pipeline import PipelineConfig

ALL = "0.0.0.0"


def told(monkeypatch: pytest.MonkeyPatch, *modules: Any, width: int = 20) -> StringIO:
    """What the `console` of these modules is told from here on; a narrow one breaks no line but a
    table's, so that what is copied or searched for is whole."""
    page = StringIO()
    for module in modules:
        monkeypatch.setattr(module, "console", Console(file=page, width=width, highlight=False))
    return page


def cells(table: Table) -> list[list[str]]:
    """The rows of a table."""
    return [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]


def heads(table: Table) -> list[str]:
    return [str(column.header) for column in table.columns]


CASE = {"name": "causal, 2 workers, ZeRO-2", "out_of_memory": False, "seconds": 2.5,
        "tflops": 123.4, "mfu": 0.4, "data_wait_s": 0.25, "reserved_gib": 12.34,
        "start_s": 7.06}  # fmt: skip


def test_a_training_s_steps() -> None:
    plain = CASE | {"name": "plain", "mfu": None, "reserved_gib": None}
    full = {"name": "full", "out_of_memory": True}
    table = train.table({"cases": [CASE, plain, full]})
    assert heads(table)[1:] == ["s a step", "TFLOP/s", "MFU", "data wait", "peak GiB", "start s"]
    assert cells(table) == [
        ["causal, 2 workers, ZeRO-2", "2.5", "123", "40.0%", "10.0%", "12.3", "7.1"],
        ["plain", "2.5", "123", "-", "10.0%", "-", "7.1"],
        ["full", "out of memory", *[""] * 5],
    ]


@pytest.mark.parametrize(("gpu", "machine"), [("H100", "H100"), (None, "EPYC")])
def test_what_a_training_was_measured_on(gpu: str | None, machine: str) -> None:
    report = {
        "config": {"model": "demo", "frames": 33, "width": 224, "height": 128,
                   "compute": {"precision": "bf16"}},
        "hardware": {"gpu": gpu, "cpu": "EPYC", "torch": "2.8"},
        "yardstick": {"tflops": 654.3},
    }  # fmt: skip
    assert train.fact(report).startswith(
        f"demo, 33 frames at 224x128, bf16; {machine}, torch 2.8, which multiplies matrices at "
        "654 TFLOP/s."
    )


def test_workers_that_were_killed() -> None:
    kill = {"step": 4, "worker": 1, "signal": "term", "from_step": 3, "lost": 1.26}
    table = train.kills_table({"kills": [kill, kill | {"lost": None}]})
    assert heads(table) == ["at step", "worker", "by", "went on from step", "s lost"]
    assert cells(table) == [["4", "1", "term", "3", "1.3"], ["4", "1", "term", "3", "-"]]


def part(name: str, parameters: int, size: int, *notes: str) -> Any:
    return SimpleNamespace(
        weights=SimpleNamespace(name=Path("folder", name)), layout="diffusers",
        parameters=parameters, bytes=lambda dtype: size // (2 if dtype else 1), notes=notes,
        state={"a": torch.zeros(1)},
    )  # fmt: skip


WHOLE = {"transformer": part("t.pt", 1_300_000_000, 5_200_000_000, "one", "two"),
         "vae": part("v.pt", 2_500_000, 10_000_000), "text": part("u.pt", 1, 10)}  # fmt: skip
NO_TEXT = {name: WHOLE[name] for name in ("transformer", "vae")}


@pytest.mark.parametrize(
    ("parts", "is_editor", "preset", "ends"),
    [
        (WHOLE, True, "wan-1.3b", ['Next: liveedit edit IN OUT --prompt "..." --model to']),
        (WHOLE, False, "wan-1.3b", ["Next: liveedit train wan-1.3b model.start=to"]),
        (WHOLE, False, None, ["Next: liveedit train CONFIG model.start=to"]),
        (NO_TEXT, False, None, ["It has no UMT5 text encoder (--text): import again with all "
                                "parts to edit or train."]),
        ({"text": WHOLE["text"]}, False, None,
         ["It has no transformer (PATH) and no video VAE (--vae): import again with all parts to "
          "edit or train."]),
    ],
)  # fmt: skip
def test_what_was_imported_and_what_comes_next(
    parts: dict[str, Any],
    is_editor: bool,
    preset: str | None,
    ends: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    page = told(monkeypatch, import_model)
    plan: Any = SimpleNamespace(parts=parts, dtype=None, preset=preset, is_editor=is_editor)
    import_model._print_summary(plan, Path("to"))
    lines = page.getvalue().splitlines()
    assert lines[-1:] == ends
    assert lines[-2] == ("Wrote to, with the sizes of wan-1.3b." if preset else "Wrote to.")
    notes = [line for line in lines if line.startswith("transformer: ")]
    assert notes == (["transformer: one", "transformer: two"] if "transformer" in parts else [])


@pytest.mark.parametrize(
    ("dtype", "kind", "sizes"),
    [(None, "float32", ["5.20 GB", "0.01 GB"]), (torch.bfloat16, "bfloat16", ["2.60 GB"])],
)
def test_an_import_is_as_large_as_it_is_written(
    dtype: torch.dtype | None, kind: str, sizes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = told(monkeypatch, import_model, width=200)
    plan: Any = SimpleNamespace(parts=NO_TEXT, dtype=dtype, preset=None, is_editor=False)
    import_model._print_summary(plan, Path("to"))
    rows = [line.split("│")[1:-1] for line in page.getvalue().splitlines() if "diffusers" in line]
    found = [[cell.strip() for cell in row] for row in rows]
    assert found[0] == ["transformer", "t.pt", "diffusers", "1,300.0 M", kind, sizes[0]]
    assert found[1][:5] == ["video VAE", "v.pt", "diffusers", "2.5 M", kind]
    assert [row[-1] for row in found][: len(sizes)] == sizes


def version(**given: Any) -> Any:
    tags = {LOCATION: "/m", FINGERPRINT: "f" * 64, "metric.gain": "4.5", "metric.a": "1"}
    usual = {"name": "liveedit", "version": 7, "aliases": ["candidate", "canary"], "tags": tags,
             "run_id": "r1", "creation_timestamp": 1_767_323_045_999}  # fmt: skip
    return SimpleNamespace(**usual | given)


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (None, "as registered"),
        (FingerprintError("other"), "CHANGED since it was registered"),
        (RegistryError("gone"), "not here"),
    ],
)
def test_versions_and_one_of_them(
    error: Exception | None, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look(*_: object) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr("pipelines.tracking.registry.check_files", look)
    monkeypatch.setattr(models, "_registry", str)
    tags = version().tags | {LOCATION: str(tmp_path)}
    found = version(tags=tags)
    monkeypatch.setattr("pipelines.tracking.registry.versions", lambda *_: [found])
    monkeypatch.setattr(models, "find_version", lambda *_: found)
    page = told(monkeypatch, models, width=200)
    models.list_versions()
    assert re.split("  +", page.getvalue().splitlines()[1].strip()) == [
        "7", "candidate, canary", "2026-01-02 03:04 UTC", "4.5", state,
    ]  # fmt: skip
    teacher = None if error is None else "t"  # as of a stage that had none, and of one that had
    card = {"stage": "distill", "parent": "p", "dataset": "d", "teacher": teacher, "commit": "c",
            "trained_at": ["64x32", "224x128"], "words": ["x"]}  # fmt: skip
    (tmp_path / "card.json").write_text(json.dumps(card))
    page = told(monkeypatch, models)
    models.show("models:/liveedit/7")
    lines = {line[2:26].rstrip(): line[26:] for line in page.getvalue().splitlines()}
    assert lines == {
        "version": "liveedit version 7", "aliases": "candidate, canary",
        "registered": "2026-01-02 03:04 UTC", "files": f"{tmp_path} ({state})",
        "fingerprint": "f" * 64, "run": "r1", "stage": "distill", "parent": "p", "dataset": "d",
        "commit": "c", "trained at": "64x32, 224x128", "metric.a": "1", "metric.gain": "4.5",
    } | ({"teacher": teacher} if teacher else {})  # fmt: skip
    assert list(lines)[-2:] == ["metric.a", "metric.gain"]
    models._say(found, "production")
    assert page.getvalue().endswith(f"liveedit@production is version 7, {tmp_path}\n")


def result(**given: Any) -> Any:
    usual = {"version": "7", "experiment_id": "3", "run_id": "r", "aliases": ["a"],
             "model": Path("/m"), "metrics": {}, "table": Path("/t.md"), "report": Path("/r.json"),
             "picture": Path("/p.png"), "shortfalls": []}  # fmt: skip
    return SimpleNamespace(**usual | given)


@pytest.fixture
def config() -> PipelineConfig:
    made = PipelineConfig()
    made.tracking.model_name, made.tracking.uri = "mine", "http://m:5000"
    return made


SIDE = "?workflowType=machine_learning"


@pytest.mark.parametrize("missing", [{"version": None}, {"experiment_id": None}])
def test_addresses_of_what_mlflow_does_not_have_yet(
    missing: dict[str, None], config: PipelineConfig
) -> None:
    assert run.mlflow_pages("http://m", config, result()) == {
        "runs": f"http://m/#/experiments/3/runs/r{SIDE}",
        "version": f"http://m/#/models/mine/versions/7{SIDE}",
    }
    assert run.mlflow_pages("http://m", config, result(**missing)) == {
        "runs": f"http://m/#/experiments{SIDE}"
    }


def test_a_result_that_is_not_in_the_registry_yet(config: PipelineConfig) -> None:
    page = StringIO()
    run.print_result(config, result(version=None, aliases=["a", "b"]), Console(file=page, width=99))
    lines = page.getvalue().splitlines()
    assert "  model    /m  (not in the registry yet: models:/mine@a, models:/mine@b)" in lines
    names = [line.split()[0] for line in lines if line.startswith("  ")]
    assert names == ["model", "runs", "metrics", "picture"]  # a server is no database to look into


def test_numbers_of_a_live_stream_and_of_one_that_had_few_chunks() -> None:
    live = {"edited": 90.0, "dropped": 2.0, "first_chunk_s": 1.26, "fps": 15.96, "latency_s": 0.304}
    assert run._live_numbers(live) == (
        "90 frames edited, 2 dropped, first chunk after 1.3 s, 16.0 fps, latency 0.30 s"
    )
    assert run._live_numbers({"edited": 3.0, "dropped": 0.0}) == "3 frames edited, 0 dropped"


MODEL = {"name": "tiny", "model": "/served", "width": 64, "height": 48, "fps": 12.0,
         "editors": 1, "device": "cpu", "chunk_seconds": 0.256, "chunk_frames": 12}  # fmt: skip


def running(**given: Any) -> Any:
    usual = {"url": "http://127.0.0.1:8000", "stream_url": "ws://127.0.0.1:8000", "port": 8000,
             "host": "127.0.0.1", "folder": None, "models": lambda: [MODEL]}  # fmt: skip
    return SimpleNamespace(**usual | given)


def served(
    monkeypatch: pytest.MonkeyPatch, at: Any, trust: Path | None = None, **settings: Any
) -> tuple[dict[str, str], list[str]]:
    """The lines with a name, and those without."""
    monkeypatch.setattr("serve.tls.addresses", lambda: ["10.0.0.1", "10.0.0.2"])
    monkeypatch.setattr(serve, "command_name", str)
    page = StringIO()
    given: Any = SimpleNamespace(**{"model": None, "token_file": None, "log_dir": None} | settings)
    serve.print_running(Console(file=page, width=20, highlight=False), at, given, trust)
    lines = page.getvalue().splitlines()
    words = [line for line in lines if line[2:12].strip() in NAMES]
    return {w[2:12].strip(): w[12:] for w in words}, [x.strip() for x in lines if x not in words]


NAMES = ("page", "elsewhere", "client", "model", "model 1", "model 2", "stop", "logs")


def test_a_server_says_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    lines, more = served(monkeypatch, running())
    assert lines == {
        "page": "http://127.0.0.1:8000",
        "client": "liveedit edit IN.mp4 OUT.mp4 --prompt 'make it night' --url ws://127.0.0.1:8000",
        "model": "tiny (/served), 64x48 at 12 fps on cpu, 0.26 s a chunk of 12 frames",
        "stop": "Ctrl-C",
    }
    assert more == []
    lines, _ = served(monkeypatch, running(folder="/ray"), model="models:/a@b")
    assert lines["model"].startswith("tiny (models:/a@b), 64x48")
    assert lines["logs"] == "/ray/session_latest/logs/serve"
    assert served(monkeypatch, running(folder="/ray"), log_dir="/l")[0]["logs"] == "/l"


def test_a_server_says_who_may_come(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere = running(host=ALL)
    lines, more = served(monkeypatch, everywhere)
    assert lines["elsewhere"] == "http://10.0.0.1:8000, http://10.0.0.2:8000"
    assert more == [
        "everybody who reaches this machine may use it; with a token only who has one: liveedit "
        "token ME >> tokens, then token_file=tokens"
    ]
    lines, more = served(monkeypatch, running(host=ALL, url="https://127.0.0.1:8000", port=8443))
    assert lines["elsewhere"] == "https://10.0.0.1:8443, https://10.0.0.2:8443"
    lines, more = served(monkeypatch, everywhere, token_file="t")
    assert (lines["client"].split()[-2:], more) == (["--token", "TOKEN"], [])
    lines, more = served(monkeypatch, running(), Path("/own cert.pem"))
    assert lines["client"].startswith("SSL_CERT_FILE='/own cert.pem' liveedit edit")
    assert more == ["a browser asks once whether it may trust this machine's own certificate"]


def test_a_server_of_several_models_names_each(monkeypatch: pytest.MonkeyPatch) -> None:
    other = MODEL | {"name": "late", "editors": 0, "card": {"prompts": ["x"]}}
    first = MODEL | {"card": {"prompts": ["add fog", "x"]}}
    lines, _ = served(monkeypatch, running(models=lambda: [first, other]))
    assert "--prompt 'add fog' --url" in lines["client"]
    assert lines["model 1"].startswith("tiny (/served), 64x48 at 12 fps on cpu")
    assert lines["model 2"] == "late (/served), 64x48 at 12 fps, loaded when it is asked for"


def test_clips_that_need_not_be_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    page = told(monkeypatch, benchmark)
    config: Any = None
    monkeypatch.setattr("pipelines.evaluation.bench.run.chosen", lambda config: "abcd")
    kept: Any = SimpleNamespace(folder=Path("runs/m/clips"), read=lambda case: None)
    benchmark._say_what_is_kept(kept, config)
    assert page.getvalue() == ""
    kept.read = {"a": 1, "c": 2}.get
    benchmark._say_what_is_kept(kept, config)
    assert page.getvalue() == (
        "2 of 4 clips were measured before, by the same code and settings; remove runs/m/clips to "
        "measure them anew\n"
    )


def test_a_table_s_columns_are_as_wide_as_their_widest(monkeypatch: pytest.MonkeyPatch) -> None:
    page = told(monkeypatch, benchmark)
    benchmark.print_table(["a", "bcd", "e"], [["long", "b", ""], ["x", "yyyy", "z"]])
    assert page.getvalue() == "a     bcd   e\nlong  b\nx     yyyy  z\n"


def ratio(value: float, tolerance: float = 0.1) -> dict[str, Any]:
    return {"value": value, "tolerance": tolerance}


def test_a_report_beside_an_earlier_one(monkeypatch: pytest.MonkeyPatch) -> None:
    page = told(monkeypatch, reports)
    reports.judge({}, None, None)
    assert page.getvalue() == ""
    work = {"config": {}, "hardware": {"device": "cpu"}}
    stored = work | {"ratios": {"a": ratio(1.0), "b": ratio(1.0)}}
    now = work | {"ratios": {"a": ratio(1.05), "b": ratio(1.2)}}
    with pytest.raises(typer.Exit) as end:
        reports.judge(now, stored, Path("s.json"))
    assert end.value.exit_code == 1
    first, second, last = page.getvalue().splitlines()
    assert (first[:6], second[:6]) == ("   ok ", "worse ")
    assert last == "Regressed against s.json: b"
    reports.judge(stored, stored, Path("s.json"))  # and goes on


def test_a_report_says_by_which_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/x/liveedit", "bench", "stream", "a b"])
    report: dict[str, Any] = {"x": 1}
    reports.write_report(report, None)
    reports.write_report(report, tmp_path / "r.json")
    assert report == {"x": 1, "command": "liveedit bench stream 'a b'"}
    assert json.loads((tmp_path / "r.json").read_text()) == report
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]

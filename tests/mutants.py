"""Change the core's code on purpose, one small fault at a time, and see whether a test notices.

    python -m tests.mutants [--sample 300] [--seed 0] [--processes 2]

Cosmic Ray finds the places, makes the change and keeps the session; here is which tests lie nearest
to a module, the drawing, and a forking runner: torch and Ray are imported once, not once a mutant.
The session is runs/mutants/SEED-SAMPLE: the tree as it was when drawn and `session.sqlite`. The
same command goes on where it was stopped; delete the folder to draw from the present tree.
docs/testing.md says how to read the report.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import importlib
import os
import py_compile
import random
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter
from difflib import unified_diff
from pathlib import Path

import pytest
from cosmic_ray.commands.init import init
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import OPERATOR_PROVIDERS, get_operator
from cosmic_ray.work_db import WorkDB
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkItem, WorkResult

from tests.mutants_operators import OPERATORS

OPERATOR_PROVIDERS.clear()
OPERATOR_PROVIDERS["mutants"] = OPERATORS

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 180  # the slowest of the tests below take a third of it on a busy machine
LATE = "still running"
HEAVY = "pytest hypothesis numpy torch safetensors.torch av ray ray.serve mlflow fastapi httpx"
NEAREST = {  # the first pattern that fits a module names the tests that it answers to
    "modeling/streaming/kv_cache.py": "modeling/streaming/test_kv_cache.py modeling/streaming",
    "modeling/streaming/mask_cache.py": "modeling/streaming/test_mask_cache.py modeling/streaming",
    "modeling/streaming/*.py": "modeling/streaming modeling/test_editor_arguments.py",
    "pipelines/training/methods/base.py": (
        "pipelines/training/methods pipelines/training/test_what_is_made.py "
        "pipelines/training/test_on_a_gpu.py"
    ),
    "pipelines/training/methods/table.py": "pipelines/training/test_what_is_made.py",
    "pipelines/training/methods/*.py": "pipelines/training/methods",
    "pipelines/evaluation/scores.py": "pipelines/evaluation/test_scores.py",
    "pipelines/tracking/registry.py": (
        "pipelines/tracking/test_registry_cut_short.py pipelines/tracking/test_requests.py "
        "pipelines/tracking/test_failures.py "
        "pipelines/tracking/test_registry.py pipelines/tracking/test_versions.py"
    ),
    "pipelines/tracking/records.py": "pipelines/tracking/test_records.py",
    "pipelines/tracking/outbox.py": (
        "pipelines/tracking/test_outbox_order.py pipelines/tracking/test_outbox_written.py "
        "pipelines/tracking/test_outbox.py"
    ),
    "data/loader.py": "data/test_loader_model.py data/test_loader.py",
    "serve/delivery/session.py": "serve/delivery/test_session.py serve/delivery serve/front",
    "serve/delivery/pacing.py": "serve/test_small_parts.py serve/delivery serve/front",
    "serve/hub/records.py": "serve/hub serve/front serve/test_small_parts.py serve/test_bounds.py",
    "serve/editor/capacity.py": "serve/test_small_parts.py serve/editor",
    "serve/limits.py": "serve/test_limits.py test_docs.py serve/wire serve/front/test_http.py",
    "serve/tenants.py": "serve/test_tenants.py serve/front/test_http.py",
    "serve/wire/protocol.py": "serve/wire",
}


def tests_of(module: Path) -> list[str]:
    """The tests nearest to `module`, a path from the root."""
    found = next(tests for pattern, tests in NEAREST.items() if module.match(pattern))
    return [f"tests/{name}" for name in found.split()]


def core() -> list[Path]:
    found = {path.relative_to(ROOT) for pattern in NEAREST for path in ROOT.glob(pattern)}
    return sorted(path for path in found if path.name != "__init__.py")


def is_fault(item: WorkItem) -> bool:
    """Not `*` between parameters, nor `frozen` of a decorator, which guards against ourselves."""
    line, column = item.mutations[0].start_pos
    text = (ROOT / item.mutations[0].module_path).read_text().splitlines()[line - 1]
    return not (text.lstrip().startswith("@") or text[column : column + 2] == "*,")


def draw(folder: Path, sample: int, seed: int) -> None:
    """Copy the tree and draw `sample` mutants, the same ones for the same tree and seed."""
    listed = "git ls-files -z --cached --others --exclude-standard"
    names = subprocess.run(listed.split(), cwd=ROOT, check=True, capture_output=True, text=True)
    source = folder / "source"
    for name in filter(None, names.stdout.split("\0")):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    # By hash, because a mutant of equal length in the same second must not meet old bytecode.
    checked = py_compile.PycInvalidationMode.CHECKED_HASH
    compileall.compile_dir(source, quiet=1, invalidation_mode=checked)
    everything = WorkDB(":memory:", WorkDB.Mode.create)
    init(core(), everything, {})
    items = sorted(filter(is_fault, everything.work_items), key=lambda item: str(item.mutations))
    print(f"{len(items)} mutants in {len(core())} modules, {sample} drawn by seed {seed}")
    session = WorkDB(folder / "drawing.sqlite", WorkDB.Mode.create)
    session.add_work_items(random.Random(seed).sample(items, min(sample, len(items))))
    session.close()
    (folder / "drawing.sqlite").rename(folder / "session.sqlite")


def worker(number: int, processes: int) -> None:
    """In a tree of its own (the working folder): every `processes`th mutant that has no result."""
    for name in ["tests.conftest", *HEAVY.split()]:
        importlib.import_module(name)
    sys.dont_write_bytecode = True  # whatever the first of them says: of a mutant nothing is kept
    session = WorkDB("../session.sqlite", WorkDB.Mode.open)
    for item in sorted(session.pending_work_items, key=lambda item: item.job_id):
        if int(item.job_id, 16) % processes == number:
            session.set_result(item.job_id, result_of(item, number))


def result_of(item: WorkItem, number: int) -> WorkResult:
    """Change one file, run the tests nearest to it, change it back."""
    change = item.mutations[0]
    path, before = change.module_path, change.module_path.read_text()
    after = mutate_code(before, get_operator(change.operator_name)(), change.occurrence)
    diff = "".join(unified_diff(before.splitlines(True), after.splitlines(True), n=0))
    tests = tests_of(path)
    path.write_text(after)
    try:
        said = failure(tests, number)
    finally:
        path.write_text(before)
    green = Path("../" + "+".join(tests).replace("/", "-") + ".green")
    if said and not green.exists() and (broken := failure(tests, number)):
        sys.exit(f"{' '.join(tests)} fails before anything is changed:\n{broken}")
    green.touch()
    outcome = TestOutcome.KILLED if said else TestOutcome.SURVIVED
    return WorkResult(WorkerOutcome.NORMAL, said, outcome, diff)


def failure(tests: list[str], number: int) -> str:
    """What pytest says last if it fails or takes longer than TIMEOUT_S; "" if it passes."""
    log = Path(f"../log-{number}")
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
            options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp=../tmp-{number}"]
            code = int(pytest.main([*options, *tests]))
        except BaseException:
            code = 1
        os._exit(code)
    deadline, status = time.monotonic() + TIMEOUT_S, None
    try:
        while status is None and time.monotonic() < deadline:
            time.sleep(0.05)
            done, waited = os.waitpid(child, os.WNOHANG)
            status = waited if done else None
    finally:  # what the tests started must not run on beside the next ones
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        if status is None:
            os.waitpid(child, 0)
    if status is None:
        return f"{LATE} after {TIMEOUT_S} s"
    return log.read_text(errors="replace")[-2000:] + f"\nstatus {status}" if status else ""


def report(folder: Path) -> None:
    """Survivors with file, line and change; those that are known to be equal only counted."""
    known = tomllib.loads((ROOT / "tests/mutants_equal.toml").read_text())["equal"]
    equal = {(entry["module"], entry["was"], entry["now"]) for entry in known}
    session, counts, survivors = WorkDB(folder / "session.sqlite", WorkDB.Mode.open), Counter(), []
    for item, result in session.completed_work_items:
        change = item.mutations[0]
        lines = str(result.diff).splitlines()[2:]
        was, now = (" ".join(s[1:].strip() for s in lines if s[:1] == sign) for sign in "-+")
        known_equal = (str(change.module_path), was, now) in equal
        outcome = "found" if result.is_killed else "equal" if known_equal else "survived"
        if str(result.output).startswith(LATE):
            outcome = "timed out"  # on a busy machine that says nothing of the mutant
        counts[outcome] += 1
        if outcome == "survived":
            survivors.append((str(change.module_path), change.start_pos[0], was, now))
    for module, line, was, now in sorted(survivors):
        print(f"{module}:{line}\n  - {was}\n  + {now}")
    run = counts.total()
    share = (counts["found"] + counts["equal"]) / max(run, 1)
    print(f"{run} of {session.num_work_items} run: {dict(counts)}; {share:.0%} found or equal")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="only print what is known so far")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        worker(given.worker, given.processes)
        return
    folder = ROOT / "runs" / "mutants" / f"{given.seed}-{given.sample}"
    if not (folder / "session.sqlite").exists():
        shutil.rmtree(folder, ignore_errors=True)
        draw(folder, given.sample, given.seed)
    started = []
    for number in range(0 if given.report else given.processes):
        tree = folder / f"tree-{number}"
        shutil.rmtree(tree, ignore_errors=True)  # a killed run leaves its last change in it
        shutil.copytree(folder / "source", tree)
        command = [sys.executable, "-m", "tests.mutants", "--worker", str(number)]
        command += ["--processes", str(given.processes)]
        paths = {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(command, cwd=tree, env={**os.environ, **paths}))
    failed = [process for process in started if process.wait() != 0]
    report(folder)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

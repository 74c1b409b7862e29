"""The rules of the house: who imports whom, and that the folder names are ours alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = {"data", "infra", "modeling", "pipelines", "serve", "tests"}
CODE = FOLDERS - {"tests"}
MANY = 15  # files in a folder
# Files of one name in two rooms, which say the same of two things, and types that two walls spell
# alike.
SAME = {
    *("data", "edit", "evaluate", "ingest", "serve", "stream", "train"),  # command, stage, bench
    *("ablation", "benchmark", "detail", "pipeline"),  # its settings, what it does, its command
    *("guide", "training", "transfer", "transformer", "vae"),  # plain, on a GPU, as imported
    *("build", "errors", "job", "kinds", "plan", "records", "registry", "replica", "run"),
    *("Detail", "Size"),
}
# Declared for what they do without being imported: forms of HTTP requests, WebSockets of uvicorn,
# and tools that are programs.
UNSEEN = {
    *("python-multipart", "pytest-timeout", "pytest-xdist"),
    *("ruff", "mypy", "import-linter", "nanio"),
}
COMES_WITH_TORCH = {"cuda", "triton"}  # of the one version that fits it
COMES_WITH_TRANSFORMERS = {"tokenizers"}
# The named doors: what a library does not promise to keep is used in one file each.
DOORS = {("ray", "infra/runtime/ray_private.py"), ("torch", "pipelines/training/saver.py")}
_SDPA = "_scaled_dot_product"
PRIVATE = {
    "data/processes.py": {"_exit", "_result_queue", "_writer"},
    "infra/runtime/ray.py": {"_exit"},
    "infra/runtime/ray_private.py": {"_create_default_callbacks"},
    "modeling/diffusion/recompute.py": {  # attention whose result is kept, and its gradient
        "_fused_sdp_choice",
        *(
            f"{_SDPA}_{kind}{end}"
            for kind in ("cudnn_attention", "flash_attention", "flash_attention_for_cpu")
            for end in ("", "_backward")
        ),
    },
    "modeling/gpu/graphs.py": {"_foreach_copy_"},
    "modeling/gpu/transformer.py": {"_addmm_activation", f"{_SDPA}_cudnn_attention"},
    "pipelines/__main__.py": {"_exit"},
    "pipelines/training/watch/watchdog.py": {"_current_frames", "_exit"},
    "pipelines/training/zero/inside.py": {
        *("_config", "_hp_mapping"),
        "_convert_to_deepspeed_param",  # a share of a network at a time
    },
    "serve/run.py": {"_create_unverified_context", "_exit"},
}


def imports(*folders: str) -> Iterator[tuple[str, str]]:
    """(file, dotted name) of all that is imported from outside of this tree."""
    for path in (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                if name.partition(".")[0] not in FOLDERS | sys.stdlib_module_names:
                    yield str(path.relative_to(ROOT)), name


def declared(*, dev: bool) -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + (project["optional-dependencies"]["dev"] if dev else [])
    return {re.split(r"[\[<>=;]", entry)[0].strip() for entry in wanted}


def imported(*folders: str) -> set[str]:
    """Distributions, by the name that they are declared with."""
    owners = packages_distributions()
    tops = {name.partition(".")[0] for _, name in imports(*folders)}
    tops -= COMES_WITH_TORCH | COMES_WITH_TRANSFORMERS
    found = {top: {re.sub("[-_.]+", "-", o).lower() for o in owners[top]} for top in tops}
    return {top if top in names else min(names) for top, names in found.items()}


def test_what_is_imported_is_declared_and_the_other_way_round() -> None:
    product = imported(*CODE)
    assert product - declared(dev=False) == set()
    assert imported("tests") - declared(dev=True) == set()
    used = product | imported("tests") | UNSEEN | COMES_WITH_TORCH
    assert declared(dev=True) - used == set()


def test_private_parts_of_libraries_are_used_behind_one_door_each() -> None:
    private = {
        (name.partition(".")[0], file)
        for file, name in imports(*CODE)
        if any(part.startswith("_") for part in name.split("."))
    }
    assert private == DOORS


def test_what_is_private_to_libraries_is_known_in_few_places() -> None:
    """Attributes that begin with one underscore and that nothing in this tree defines."""
    trees = {
        str(path.relative_to(ROOT)): ast.parse(path.read_text())
        for folder in CODE
        for path in sorted((ROOT / folder).rglob("*.py"))
    }
    nodes = [(file, node) for file, tree in trees.items() for node in ast.walk(tree)]
    ours = {n.name for _, n in nodes if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)}
    ours |= {n.id for _, n in nodes if isinstance(n, ast.Name)}
    used: dict[str, set[str]] = {}
    for file, n in nodes:
        foreign = isinstance(n, ast.Attribute) and n.attr not in ours
        if foreign and re.match("_[^_]", n.attr) and ast.unparse(n.value) not in ("self", "cls"):
            used.setdefault(file, set()).add(n.attr)
    assert used == PRIVATE


def test_the_environment_is_read_in_one_place() -> None:
    files = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    readers = [str(f.relative_to(ROOT)) for f in files if "os.environ" in f.read_text()]
    assert readers == ["infra/runtime/environment.py"]


def test_imports_point_one_way() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_tree_of_errors_is_the_one_that_is_drawn() -> None:
    bases, found = {"UserError"}, set()
    files = [path for folder in CODE for path in (ROOT / folder).rglob("*.py")]
    classes = {
        (".".join(path.relative_to(ROOT).with_suffix("").parts), node.name, ast.unparse(base))
        for path in files
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef)
        for base in node.bases
    }
    while added := {c for c in classes if c[2] in bases} - found:
        found |= added
        bases |= {name for _, name, _ in added}
    drawn = re.findall(r"── (\w+) +([\w.]+):", ast.get_docstring(errors_module()) or "")
    assert sorted(drawn) == sorted((name, module) for module, name, _ in found)
    assert len(found) > 10


def test_doors_that_users_come_in_by_raise_what_becomes_a_line() -> None:
    doors = [f"pipelines/{room}" for room in ("commands", "config", "stages", "tracking")]
    files = [file for door in doors for file in (ROOT / door).rglob("*.py")]
    files += (ROOT / "serve").glob("*.py")
    raised = {
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and ast.unparse(node.exc.func) == "ValueError"
    }
    assert not raised, "raise infra.runtime.errors.UserError or a kind of it"


def errors_module() -> ast.Module:
    return ast.parse((ROOT / "infra" / "runtime" / "errors.py").read_text())


def test_a_folder_is_small_and_says_what_it_may_import() -> None:
    for start in sorted(path for folder in CODE for path in (ROOT / folder).rglob("__init__.py")):
        folder = start.parent
        files = [file for file in folder.glob("*.py") if file != start]
        assert len(files) <= MANY, f"{folder}: cut out a room"
        says = ast.get_docstring(ast.parse(start.read_text())) or ""
        assert re.search(r"\b[Ii]mport", says), f"{start} does not say what it may import"


def test_a_word_means_one_thing() -> None:
    """A file's name, and a type's: what a reader meets in two rooms and takes for one thing."""
    meant: dict[str, set[str]] = {}
    for file in sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py")):
        names = {file.stem} - {"__init__"}
        for node in ast.parse(file.read_text()).body:
            names |= {node.name} if isinstance(node, ast.ClassDef) else set()
            if isinstance(node, ast.Assign):
                names |= set(filter(re.compile("[A-Z][a-z]").match, map(ast.unparse, node.targets)))
        for name in names:
            meant.setdefault(name, set()).add(str(file.relative_to(ROOT)))
    twice = {name: places for name, places in meant.items() if len(places) > 1}
    assert twice.keys() == SAME, {name: twice.get(name) for name in twice.keys() ^ SAME}


def test_no_installed_distribution_owns_our_folder_names() -> None:
    owned = {
        f"{distribution.metadata['Name']}: {path}"
        for distribution in distributions(path=[p for p in sys.path if "site-packages" in p])
        for path in distribution.files or []
        if path.parts[0] in FOLDERS
    }
    assert not owned, f"uninstall what puts these into the environment: {sorted(owned)}"


def test_our_folders_are_packages_of_this_tree() -> None:
    for folder in FOLDERS:
        assert (ROOT / folder / "__init__.py").is_file()
        if folder != "tests":
            spec = __import__(folder)
            assert Path(spec.__file__ or "").parent == ROOT / folder


def test_command_line_starts_without_heavy_packages() -> None:
    heavy = ["torch", "ray", "mlflow", "deepspeed", "transformers", "av"]
    code = (
        "import sys\nfrom pipelines import cli\n"
        "from typer.testing import CliRunner\n"
        "result = CliRunner().invoke(cli.app, ['--help'])\n"
        "assert result.exit_code == 0, result.output\n"
        f"print(*[name for name in {heavy!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_a_hub_and_a_front_start_without_pytorch() -> None:
    """It takes most of a start, and while a hub is started again sessions are less safe."""
    code = "import serve.hub.hub, serve.front.replica, sys; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout.strip(), result.stderr) == ("False", "")

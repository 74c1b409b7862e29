"""The rules of the house: who imports whom, and that the folder names are ours alone."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = {"data", "infra", "modeling", "pipelines", "serve", "tests"}


def test_imports_point_one_way() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


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
    heavy = ["torch", "ray", "mlflow", "deepspeed", "transformers", "torchmetrics", "av"]
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

"""Where the files of a registered version lie: one folder a version, named by what is in it.

Training writes `models/STAGE` anew each time; a version is a copy of it that nobody writes again.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from modeling.fingerprint import check_fingerprint, model_fingerprint


def publish(model: Path, target: Path) -> None:
    """Make `target` a read-only copy of the model directory `model`, whole or not at all.

    Raises FingerprintError where `target` is there and holds something else by now.
    """
    fingerprint = model_fingerprint(model)
    if target.exists():
        check_fingerprint(f"the version in {target}", target, fingerprint)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=target.parent))
    try:
        shutil.copytree(model, draft / "model")
        for file in (draft / "model").rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o444)
        check_fingerprint(f"the copy of {model}", draft / "model", fingerprint)
        (draft / "model").rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)

"""A file of tenants, for servers that ask for tokens."""

from __future__ import annotations

from pathlib import Path

from serve.tenants import hash_token


def write_tokens(path: Path, tokens: dict[str, str] | None = None, **limits: float) -> Path:
    """`tokens` by their tenants' names, all with these `limits`; by default ours: "secret"."""
    sections = []
    for name, token in (tokens or {"ours": "secret"}).items():
        lines = [f"[{name}]", f'tokens = ["{hash_token(token)}"]']
        sections.append("\n".join([*lines, *(f"{key} = {limits[key]}" for key in limits)]))
    path.write_text("\n".join(sections) + "\n")
    return path

"""Every setting as a page: `python -m pipelines.commands.reference > docs/configuration.md`.

Keys and defaults are the dataclasses', meanings are the comments beside their fields.
"""

from __future__ import annotations

import ast
import inspect
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from textwrap import dedent
from typing import Any

from modeling.presets import PRESETS
from pipelines.config.benchmark import BenchConfig
from pipelines.config.load import recipes
from pipelines.config.pipeline import EvaluateConfig, PipelineConfig
from serve.settings import ServeSettings

REQUIRED = "(required)"
HEAD = """# Configuration

Made by `python -m pipelines.commands.reference > docs/configuration.md` from the dataclasses; a
test compares the two. A key is given as `key=value` on the command line, or in a YAML file by its
parts. An unknown key, a value of the wrong type or out of its range is refused with the key's name
before anything starts. `null` is nothing, lists are `[1,2]`.
"""


@dataclass(frozen=True)
class Described:
    key: str
    default: str
    meaning: str


def settings_of(kind: type, prefix: str = "") -> Iterator[Described]:
    """Every key of a dataclass, those of nested ones after a dot."""
    meanings: dict[str, str] = {}
    for part in reversed(kind.__mro__):
        if is_dataclass(part):
            meanings |= {name: text for name, text in comments(part).items() if text}
    for entry in fields(kind):
        if entry.default is not MISSING:
            value: Any = entry.default
        elif entry.default_factory is not MISSING:
            value = entry.default_factory()
        else:
            value = REQUIRED
        key = prefix + entry.name
        if is_dataclass(value):
            yield from settings_of(type(value), f"{key}.")
        else:
            yield Described(key, shown(value), meanings.get(entry.name, ""))


def shown(value: Any) -> str:
    """A default as one would write it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(shown(one) for one in value)}]"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def comments(kind: type) -> dict[str, str]:
    """What is said of each field: the comment on its line, going on in the lines below, or the
    one above it, or the docstring's paragraph that begins with its name in backquotes."""
    source = dedent(inspect.getsource(kind))
    told: dict[int, str] = {}
    alone: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            told[token.start[0]] = token.string.lstrip("# ").strip()
            if token.line.strip().startswith("#"):
                alone.add(token.start[0])
    found: dict[str, str] = {}
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    for part in body.body:
        if not isinstance(part, ast.AnnAssign) or not isinstance(part.target, ast.Name):
            continue
        assert part.end_lineno is not None
        words = [told[n] for n in range(part.lineno, part.end_lineno + 1) if n in told]
        if not words:  # a comment of its own, before a long field
            above = part.lineno - 1
            while above in alone:
                words.insert(0, told[above])
                above -= 1
        line = part.end_lineno + 1
        while words and line in alone:
            words.append(told[line])
            line += 1
        found[part.target.id] = " ".join(words)
    for name, text in re.findall(r"`(\w+)` is ([^.]*)\.", " ".join((kind.__doc__ or "").split())):
        found[name] = found.get(name) or text
    return found


def page() -> str:
    parts = [HEAD]
    for title, text, kind in (
        ("Training", f"`liveedit train CONFIG key=value ...`; CONFIG is a YAML file or one of "
         f"{', '.join(recipes())}. `model.preset` is one of {', '.join(PRESETS)}.", PipelineConfig),
        ("Judging", "`liveedit evaluate MODEL DATASET key=value ...`", EvaluateConfig),
        ("LiveEdit-Bench", "`liveedit evaluate MODEL bench key=value ...`", BenchConfig),
        ("Serving", "`liveedit serve [MODEL] key=value ...`, or `args` of a Serve config file.",
         ServeSettings),
    ):  # fmt: skip
        rows = [f"| `{s.key}` | {s.default} | {s.meaning} |" for s in settings_of(kind)]
        table = ["| key | default | meaning |", "| --- | --- | --- |", *rows]
        parts.append("\n".join([f"## {title}", text, "", *table]))
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    print(page(), end="")

"""Pages that say what the code says: settings, the wire, messages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from pipelines.commands.reference import page
from serve.limits import Limits
from serve.wire.codes import CODES
from serve.wire.protocol import CLIENT_TYPES, SERVER_TYPES

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
HOUSE = DOCS / "house.md"
WEB = ROOT / "serve" / "web"


def sections(name: str) -> dict[str, str]:
    """Heading -> text of a page in docs/."""
    parts = re.split(r"^## (.+)\n", (DOCS / name).read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def rows(text: str) -> list[list[str]]:
    """The cells of a page's table rows, headings and rulers left out."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return [row for row in cells if not set(row[0]) <= set("- ")][1:] if cells else []


def test_the_page_of_settings_is_what_the_dataclasses_say() -> None:
    made = page()
    assert (DOCS / "configuration.md").read_text() == made, "make it again: its first lines say how"
    without = [line for line in made.splitlines() if line.startswith("| `") and "|  |" in line]
    assert without == [], "a field needs a comment that says what it means"
    assert "| `model` | null | a model directory" in made
    assert "| `foundation.steps` | 200 | updates of the weights" in made


def test_the_page_of_the_wire_has_every_message_field_and_code() -> None:
    told = sections("wire.md")
    sent = told["What you send"]
    opening = {name for row in rows(sent) for name in re.findall(r"`(\w+)`", row[0])}
    assert opening == {"type", *(field.name for field in fields(CLIENT_TYPES["open"]))}
    for name in set(CLIENT_TYPES) - {"open"}:
        assert f'"type":"{name}"' in sent
    heard = {row[0].strip("`"): row[1] for row in rows(told["What you hear"])}
    assert {name for name in heard if not name.startswith("(")} == set(SERVER_TYPES)
    for name, kind in SERVER_TYPES.items():
        named = re.findall(r"`(\w+)`", heard[name])
        assert named == [field.name for field in fields(kind)], name
    codes = {row[0].strip("`"): int(row[1]) for row in rows(told["Errors"])}
    assert codes == {code: fate.close for code, fate in CODES.items()}


def test_the_page_of_the_wire_has_the_limits_and_headers_of_the_code() -> None:
    """The limits that a server has if nobody sets others."""
    limits, page = Limits(), (DOCS / "wire.md").read_text()
    for said in (
        f"at most {limits.max_prompt} characters",
        f"of the source, {limits.min_fps:g} to {limits.max_fps:g};",
        f"First `open`, within {limits.open_timeout_s:g} s",
        f"{limits.idle_timeout_s:g} s without a source frame end a session",
        f"you did not take edited frames for {limits.stalled_reader_s:g} s",
        f"unknown or older than {limits.resume_s:g} s",
        f"Within {limits.resume_s:g} s open again",
    ):
        assert said in page
    headers = set(re.findall(r"X-LiveEdit-[\w-]+", sources("serve/**/*.py")))
    assert headers == set(re.findall(r"X-LiveEdit-[\w-]+", page))


def sources(*patterns: str) -> str:
    """All of our text, with string literals that go on in the next line joined."""
    found = [path.read_text() for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    joined = re.sub(r'"\s*\+?\s*\n\s*f?"', "", "\n".join(found))
    return re.sub(r"\$?\{[^{}\n]*\}", "...", joined)


OURS = tuple(f"{room}/**/*.py" for room in ("data", "infra", "modeling", "pipelines", "serve"))


def told_messages(section: str) -> Iterator[str]:
    for row in rows(sections("troubleshooting.md")[section]):
        yield from re.findall(r'`([^`]{12,})`|"([^"]{12,})"', row[0])


@pytest.mark.parametrize(
    ("section", "patterns"),
    [
        ("On the command line", OURS),
        ("Videos, datasets and downloads", OURS),
        ("In training", OURS),
        ("On the page", ("serve/web/*.js",)),
    ],
)
def test_messages_that_are_explained_are_said(section: str, patterns: tuple[str, ...]) -> None:
    said = sources(*patterns)
    messages = ["".join(found) for found in told_messages(section)]
    assert len(messages) >= 3
    for message in messages:
        parts = [part.strip() for part in message.split("...") if len(part.strip()) > 3]
        assert parts, message
        for part in parts:
            assert part in said, f"nothing says {part!r}"


def test_every_error_that_the_page_says_is_explained() -> None:
    explained = " ".join(row[0] for row in rows(sections("troubleshooting.md")["On the page"]))
    said = re.findall(r'^  \w+: "([^".]+)', (WEB / "errors.js").read_text(), flags=re.MULTILINE)
    assert len(said) > 10
    for message in said:
        beginning = " ".join(message.split()[:4])
        assert beginning in explained, f"{beginning!r} is not on the page"


@pytest.mark.parametrize("name", ["performance.md", "serving.md"])
def test_pages_of_results_begin_with_one_short_table(name: str) -> None:
    parts = (DOCS / name).read_text().split("\n\n")
    first = next(part for part in parts if not part.startswith("#"))
    assert first.startswith("| ")
    assert len(first.splitlines()) <= 10
    assert f"log/{name}" in (DOCS / name).read_text(), "no way to the diary"
    assert (DOCS / "log" / name).is_file()


def test_tables_have_a_heading_and_one_width() -> None:
    for file in (ROOT / "README.md", *DOCS.rglob("*.md")):
        for table in re.findall(r"(?:^\|.*\n)+", file.read_text(), flags=re.MULTILINE):
            lines = table.splitlines()
            assert len(lines) > 2, f"{file.name}: {lines[0]}"
            assert set(lines[1]) <= set("|- :"), f"{file.name}: {lines[0]}"
            widths = {len(re.split(r"(?<!\\)\|", re.sub(r"`[^`]*`", "", line))) for line in lines}
            assert len(widths) == 1, f"{file.name}: {lines[0]}"


def test_links_between_pages_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *DOCS.rglob("*.md"), *ROOT.glob("*/README.md")]
    for file in pages:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", file.read_text()):
            if "://" not in target:
                assert (file.parent / target).exists(), f"{file.relative_to(ROOT)}: {target}"


def test_the_files_that_the_house_names_are_there() -> None:
    """A name without a folder is a file beside the one named before it. What a model directory and
    a dataset hold are no files of the tree."""
    text = re.sub(r"^\| (model directory|dataset) \|.*", "", HOUSE.read_text(), flags=re.MULTILINE)
    named = re.findall(r"`([\w./]+(?:/|\.(?:py|cu|toml|yaml|json)))`", text)
    assert len(named) > 100
    folder = ROOT
    for name in named:
        if "/" in name:
            folder = (ROOT / name).parent
        file = ROOT / name if "/" in name else folder / name
        assert file.exists(), f"docs/house.md names {name}; there is no {file.relative_to(ROOT)}"


def test_the_four_ways_are_as_long_as_the_house_says() -> None:
    ways = rows(sections(HOUSE.name)["The four ways, counted"])
    assert len(ways) == 4
    for what, _, count, files in ways:
        assert int(count) == len(re.findall(r"`[^`]+`", files)), what

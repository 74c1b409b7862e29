"""What MLflow's pages say of a registered version: its card as text, and what goes in and out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modeling.model_dir import read_card, read_config

LONG = 300  # characters of a value of the card, above which it is left to card.json


def description(
    reference: str,
    location: Path,
    metrics: Mapping[str, float],
    model_id: str,
    shown: Sequence[tuple[str, str]] = (),
) -> str:
    """Markdown for the version's page: use, signature, example, what it made, metrics, card.

    `shown` are names of pictures and videos among the files of the logged model `model_id`, each
    with that of its preview.
    """
    stream, card = read_config(location).stream, read_card(location)
    prompt = (card.get("prompts") or ["make it night"])[0]
    figures = [f"| {name} | {value:.4g} |" for name, value in sorted(metrics.items())]
    return "\n".join(
        [
            f"Edits video live, {stream.chunk_latents} latents at a time, made for "
            f"{stream.width}x{stream.height} at {stream.fps:g} frames a second.",
            "",
            "**In** `prompt` text, `frames` uint8 RGB [n, height, width, 3], any n; "
            "**out** the same number of frames, of the same size.",
            "",
            "```sh",
            f"liveedit serve {reference}",
            f'liveedit edit in.mp4 out.mp4 --prompt "{prompt}" --model {reference}',
            "```",
            "",
            *(line for names in shown for line in (_linked(model_id, *names), "")),
            "| held-out pairs, mean | |",
            "| --- | --- |",
            *figures,
            "",
            "| card | |",
            "| --- | --- |",
            *(f"| {name} | {text.replace('|', '/')} |" for name, text in in_words(card).items()),
            "",
            f"Files: `{location}`",
        ]
    )


def in_words(card: Mapping[str, Any]) -> dict[str, str]:
    """The card as a person would read it, without its long values."""
    return {name: text for name, value in card.items() if len(text := _words(value)) <= LONG}


def _words(value: object) -> str:
    """A value of the card as a person would write it in a table."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _linked(model_id: str, name: str, small: str) -> str:
    """The preview, which leads to the file itself; both from the page's own server."""
    place = f"ajax-api/2.0/mlflow/logged-models/{model_id}/artifacts/files?artifact_file_path="
    return f"[![{name}]({place}{small})]({place}{name})"

"""What MLflow's pages say of a run, and of a registered version: its card as text, what goes in
and out, and whose it is."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modeling.model_dir import read_card, read_config
from pipelines.tracking.tracker import NOTE

LONG = 300  # characters of a value of the card, above which it is left to card.json
HASH = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{28}(?:[0-9a-f]{24})?\b")  # SHA-1, SHA-256
PIPELINE = (
    "From pairs to a registered model: each stage is a child run, with its data, its models and "
    "its figures. The parameters here are all settings."
)
STAGES = {
    "data": "Makes the pairs to train on: source, instruction and right edit.",
    "heldout": "Makes the pairs to judge by, of footage that no training sees.",
    "start": "Lays out the networks as model.* says, from model.start or from random weights.",
    "vae": "Trains the VAE, which makes latents of pixels and pixels of latents.",
    "encode": "Makes latents and text embeddings of the pairs, once for all that train on them.",
    "foundation": "Trains the editor that sees a whole clip at once, by velocity matching.",
    "causal": "Trains it to see the past alone, chunk by chunk, by teacher forcing.",
    "distill": "Trains it to need few steps over its own history, by DMD: the foundation model and "
    "a critic score what it makes.",
    "evaluate": "Edits held-out pairs through the stream that serving uses, and compares.",
    "register": "Keeps the model as a version for ever, and gives it its aliases.",
    "edit": "Edits the demo's clip with the version that was registered.",
    "live": "Serves that version, and streams the clip through it.",
}


def note(stage: str | None = None) -> dict[str, str]:
    """The tag with the description of a run: a pipeline's, or of one of its stages."""
    text = PIPELINE if stage is None else STAGES.get(stage)
    return {NOTE: text} if text else {}


def description(
    reference: str,
    location: Path,
    metrics: Mapping[str, float],
    model_id: str,
    shown: Sequence[tuple[str, str]] = (),
    made_by: Mapping[str, str] | None = None,
) -> str:
    """Markdown for the version's page: use, signature, example, what it made, metrics, card.

    `made_by` are the tags of the logged model that say who made it, with what.

    `shown` are names of pictures and videos among the files of the logged model `model_id`, each
    with that of its preview.
    """
    stream, card = read_config(location).stream, read_card(location)
    prompt = (card.get("prompts") or ["make it night"])[0]
    maker = [f"Made by {whose}.", ""] if (whose := _maker(made_by or {})) else []
    figures = [f"| {name} | {value:.4g} |" for name, value in sorted(metrics.items())]
    return "\n".join(
        [
            f"Edits video live, {stream.chunk_latents} latents at a time, made for "
            f"{stream.width}x{stream.height} at {stream.fps:g} frames a second.",
            "",
            *maker,
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


def _maker(tags: Mapping[str, str]) -> str:
    """`ann with liveedit train demo, code 4f04172`, of what is known."""
    commit = _words(tags.get("mlflow.source.git.commit", "unknown"))
    parts = (
        tags.get("mlflow.user", ""),
        f"with `{source}`" if (source := tags.get("mlflow.source.name")) else "",
    )
    made = " ".join(part for part in parts if part)
    return f"{made}, code {commit}" if made else ""


def _words(value: object) -> str:
    """A value of the card as a person would write it in a table, of a hash the beginning."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_words(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(map(_words, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return HASH.sub(r"\1", value) if isinstance(value, str) else json.dumps(value)


def _linked(model_id: str, name: str, small: str) -> str:
    """The preview, which leads to the file itself; both from the page's own server."""
    place = f"ajax-api/2.0/mlflow/logged-models/{model_id}/artifacts/files?artifact_file_path="
    return f"[![{name}]({place}{small})]({place}{name})"

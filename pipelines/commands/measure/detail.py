"""`liveedit bench detail`: what the transfer of detail is worth, on footage of one's own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from infra.runtime.errors import UserError
from pipelines.commands.measure.reports import JsonFile
from pipelines.commands.options import parse_size
from pipelines.commands.show import console

if TYPE_CHECKING:
    from data.sample import Pair

KINDS = "night,sepia,colourless,bright,cold,recolor,add,remove,dark_background,hue,sketch,cartoon"
FIGURES = (
    "psnr",
    "inside",
    "outside",
    "ssim",
    "ssim inside",
    "ssim outside",
    "sharpness",
    "flicker",
)

Rows = dict[str, dict[str, Any]]  # kind -> way -> figures


def bench_detail(
    footage: Annotated[Path, typer.Argument(help="A folder of photos and clips.")],
    kinds: Annotated[str, typer.Option(help="Kinds of edit and looks, with commas.")] = KINDS,
    size: Annotated[str, typer.Option(metavar="WIDTHxHEIGHT", help="Pixels.")] = "832x480",
    frames: Annotated[int, typer.Option(help="Of each pair.", min=1)] = 13,
    json_file: JsonFile = None,
    picture: Annotated[
        Path | None, typer.Option(help="A picture of the first kind: truth, enlarged, detail.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="A model directory: which guide its VAE needs.")
    ] = None,
    work_size: Annotated[str, typer.Option(help="With --model: as of a stream.")] = "1/2",
    device: Annotated[Literal["auto", "cuda", "cpu"], typer.Option(help="Of the VAE.")] = "auto",
    write: Annotated[
        bool, typer.Option("--write", help="Record the guide in the model directory.")
    ] = False,
) -> None:
    """Full, half and quarter size, with and without the source's detail, against exact truth.

    The pairs are made from the held-out part of the footage; the editor is an ideal one that blurs.
    With --model it loses what that model's VAE loses, and two guides are compared: the source
    decoded again, and the source blurred, which costs no decoding.
    """
    import tempfile

    from data.footage.material import prepare
    from pipelines.bench.sharpness.detail import pairs_by_kind, table

    if model is None and write:
        raise UserError("--write records a guide in a model directory; name it with --model")
    if model is not None and picture is not None:
        raise UserError("--picture shows what --model does not make; leave one of them out")
    height, width = parse_size(size)
    with tempfile.TemporaryDirectory(prefix="liveedit-footage-") as folder:
        held = prepare(footage, folder, height=height, width=width, fps=16)["heldout"]
        made = pairs_by_kind(
            held, tuple(kinds.split(",")), height=height, width=width, frames=frames
        )
        if model is None:
            rows, said = _sizes(made, picture), ""
        else:
            rows, said = _guides(made, model, (height, width), work_size, device, write)
    for figure in FIGURES:
        console.print(table(rows, figure), "", sep="\n", soft_wrap=True)
    console.print(said, soft_wrap=True)
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=1) + "\n")


def _sizes(made: Iterator[tuple[str, Pair]], picture: Path | None) -> Rows:
    import torch

    from pipelines.bench.sharpness.detail import compare, save_picture

    rows: Rows = {}
    for kind, pair in made:
        shown = [torch.from_numpy(pair.target[0])]
        rows[kind] = compare(
            pair,
            lambda way, out, shown=shown: (  # type: ignore[misc]
                shown.append(out[0]) if way.startswith("1/4") else None
            ),
        )
        if picture is not None and len(rows) == 1:
            save_picture(picture, shown)
    return rows


def _guides(
    made: Iterator[tuple[str, Pair]],
    path: Path,
    size: tuple[int, int],
    choice: str,
    device: str,
    write: bool,
) -> tuple[Rows, str]:
    import torch

    from modeling.detail.work_size import in_words, work_size
    from modeling.model_dir import load_model, set_guide
    from pipelines.bench.sharpness.guides import BACKGROUND, LOSS, compare_guides
    from pipelines.tracking.records import taken_along

    where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    loaded = load_model(path, device=where)
    stream = loaded.config.stream
    if loaded.vae is None:
        raise UserError(f"{path} holds no vae.safetensors; import one with liveedit import --vae")
    work = work_size(choice, *size, (stream.height, stream.width))
    guides = compare_guides(loaded.vae, made, work)
    chosen = guides.blur if guides.serves else None
    said = (
        f"blurred by {guides.blur} pixels the source is {guides.near:.1f} dB from what the VAE "
        f"makes of it at {in_words(work)}; as the guide it loses {guides.loss:.1f} dB (at most "
        f"{LOSS:g}) and keeps {guides.background:.1f} dB of an unedited source (at least "
        f"{BACKGROUND:g}): " + (f"guide_blur {chosen}" if guides.serves else "decode it again")
    )
    if write:
        with taken_along(path):
            set_guide(path, chosen, guides.told() | {"work_size": in_words(work)})
        said += f"; recorded in {path}"
    return guides.rows, said

"""`liveedit bench detail`: what the transfer of detail is worth, on footage of one's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipelines.commands.measure.reports import JsonFile
from pipelines.commands.options import parse_pixels
from pipelines.commands.show import console

KINDS = "night,sepia,colourless,bright,cold,recolor,add,remove,dark_background,hue,sketch,cartoon"


def bench_detail(
    footage: Annotated[Path, typer.Argument(help="A folder of photos and clips.")],
    kinds: Annotated[str, typer.Option(help="Kinds of edit and looks, with commas.")] = KINDS,
    size: Annotated[str, typer.Option(metavar="WIDTHxHEIGHT", help="Pixels.")] = "832x480",
    frames: Annotated[int, typer.Option(help="Of each pair.", min=1)] = 13,
    json_file: JsonFile = None,
    picture: Annotated[
        Path | None, typer.Option(help="A picture of the first kind: truth, enlarged, detail.")
    ] = None,
) -> None:
    """Full, half and quarter size, with and without the source's detail, against exact truth.

    The pairs are made from the held-out part of the footage; the editor is an ideal one that blurs.
    """
    import tempfile

    import torch

    from data.footage.material import prepare
    from pipelines.bench.detail import compare, pairs_by_kind, save_picture, table

    height, width = parse_pixels(size)
    rows = {}
    with tempfile.TemporaryDirectory(prefix="liveedit-footage-") as folder:
        held = prepare(footage, folder, height=height, width=width, fps=16)["heldout"]
        made = pairs_by_kind(
            held, tuple(kinds.split(",")), height=height, width=width, frames=frames
        )
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
    ssim = ("ssim", "ssim inside", "ssim outside")
    for figure in ("psnr", "inside", "outside", *ssim, "sharpness", "flicker"):
        console.print(table(rows, figure), "", sep="\n", soft_wrap=True, markup=False)
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=1) + "\n")

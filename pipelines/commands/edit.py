"""`liveedit edit`: a video file edited here, or on a server."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipelines.commands.show import bar, chosen_model, console

if TYPE_CHECKING:
    from pipelines.stages.edit_file import EditReport

SUGGESTED = 4  # prompts of a model's card, where it does not know a word


def edit(
    source: Annotated[Path, typer.Argument(metavar="IN", help="The video to edit; any codec.")],
    output: Annotated[
        Path, typer.Argument(metavar="OUT", help="The edited video; .mp4, .mov or .mkv.")
    ],
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to change.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="A model directory or models:/NAME@ALIAS (default: the last demo's, else the one "
            "that ships); beside --url one of the server's, by name (default: its first)."
        ),
    ] = None,
    work_size: Annotated[
        str | None,
        typer.Option(
            help="Size the model works at: native (the area it was trained at), full, 3/4, 1/2, "
            "or WIDTHxHEIGHT. The result has the source's size in any case.",
            show_default="native; beside --url what the server says",
        ),
    ] = None,
    detail: Annotated[
        Literal["source", "off"] | None,
        typer.Option(
            help="Give the edit the source's own detail, or only enlarge it.",
            show_default="source; beside --url what the server says",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Another seed gives another result.", min=0)] = 0,
    fps: Annotated[
        float | None,
        typer.Option(
            help="A constant rate instead of each frame at its own time.", min=0.1, max=1000
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse a damaged source instead of going past it.")
    ] = False,
    side_by_side: Annotated[
        bool, typer.Option("--side-by-side", help="Put source and edit next to each other.")
    ] = False,
    url: Annotated[
        str | None,
        typer.Option(
            metavar="ws://HOST:PORT", help="Edit on this server, with a model of its own."
        ),
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(help="The server's bearer token.", envvar="LIVEEDIT_TOKEN"),
    ] = None,
) -> None:
    """Edit a video file as a prompt says.

    Memory does not grow with the video's length. Every frame keeps its time; size, sound, subtitles
    and chapters are kept too. What will differ is said in a line each before the work begins.
    """
    from data.video import check_whole, differences, probe
    from pipelines.stages.edit_file import check_edit, edit_video, expected_frames

    check_edit(source, output, prompt)
    info = probe(source)
    if strict:
        check_whole(source)
    for line in differences(source, output, fps=fps):
        console.print(f"{source}: {line}", style="yellow", soft_wrap=True)
    run: Callable[..., EditReport]
    if url is not None:
        from pipelines.stages.edit_remote import edit_remote, untaught

        size = info.height, info.width
        strange, card, unlike = untaught(url, prompt, *size, work_size, model=model, token=token)
        run = partial(edit_remote, url, model=model, token=token)
        place = url if model is None else f"{model} at {url}"
    else:
        from modeling.detail.work_size import unlike_training
        from modeling.detail.work_size import work_size as work_size_in_pixels
        from pipelines.evaluation.evaluate import load_editor

        place = chosen_model(model)
        editor = load_editor(place)
        strange, card = editor.unknown_words(prompt), editor.card
        run = partial(edit_video, editor)
        work_size, detail = work_size or "native", detail or "source"
        settings = editor.settings
        work = work_size_in_pixels(
            work_size, info.height, info.width, (settings.height, settings.width)
        )
        unlike = unlike_training(work, editor.trained_at)
    if unlike:
        console.print(unlike, style="yellow", soft_wrap=True)
    if strange:
        line = f"this model does not know: {', '.join(strange)}; it edits by the rest"
        if known := card.get("prompts"):
            line += f". It knows, for example: {', '.join(known[:SUGGESTED])}"
        console.print(line, style="yellow", soft_wrap=True)
    with bar("frames", expected_frames(info, fps)) as (progress, task):

        def show(done: int) -> None:
            speed = progress.tasks[task].speed or 0.0
            progress.update(task, completed=done, note=f"{speed:.1f} fps")

        report = run(
            source,
            output,
            prompt,
            work_size=work_size,
            detail=detail,
            seed=seed,
            fps=fps,
            strict=strict,
            side_by_side=side_by_side,
            progress=show,
        )
    if report.damage:
        console.print(f"{source}: damaged: {report.damage}", style="yellow", soft_wrap=True)
    console.print(
        f"{output}: {report.frames} frames in {report.seconds:.1f} s ({report.fps:.1f} fps), "
        f"edited at {report.width}x{report.height}, {report.recomputed:.0%} of tokens computed, "
        f"model {place}",
        soft_wrap=True,
    )

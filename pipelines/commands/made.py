"""What the demo made, as a page to look at, opened where there is a browser and a screen."""

from __future__ import annotations

import html
import sys
import webbrowser
from pathlib import Path

from rich.console import Console

from infra.runtime.environment import variable
from pipelines.evaluation.evaluate import table_rows
from pipelines.stages.edit import PROMPT
from pipelines.stages.register import PipelineResult

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>What the demo made</title>
<style>
  :root {{ color-scheme: light dark; }}
  body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem;
         padding: 0 1rem; }}
  figure {{ display: inline-block; margin: 0 1rem 1rem 0; max-width: 100%; }}
  video, img {{ max-width: 100%; }}
  td, th {{ padding: 0 1rem 0 0; text-align: left; }}
</style>
<h1>What the demo made</h1>
<p>A clip that the model never saw, under &ldquo;{prompt}&rdquo;:</p>
<figure><video src="source.mp4" autoplay loop muted playsinline controls></video>
  <figcaption>source</figcaption></figure>
<figure><video src="edited.mp4" autoplay loop muted playsinline controls></video>
  <figcaption>edited, as by <code>liveedit edit</code></figcaption></figure>
<figure><video src="live.mp4" autoplay loop muted playsinline controls></video>
  <figcaption>streamed to a server, live: frames that came too late are
  missing</figcaption></figure>
<h2>Held-out clips: a typical one, the best and the worst</h2>
<p><img src="{picture}" alt="source, edit, ground truth and recomputed tokens of three clips"></p>
<table>
<tr><th>mean of all held-out clips<th>value<th>what it says
{rows}
</table>
<p>The model: <code>{model}</code></p>
</html>
"""


def write_page(result: PipelineResult) -> Path:
    """Write the page beside what it shows; where it lies."""
    rows = "\n".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}" for cell in row)
        for row in table_rows(result.metrics)
    )
    page = result.output / "index.html"
    text = PAGE.format(
        prompt=html.escape(PROMPT),
        picture=html.escape(result.picture.name),
        rows=rows,
        model=html.escape(str(result.model)),
    )
    page.write_text(text, encoding="utf-8")
    return page


def open_page(page: Path, console: Console) -> bool:
    """Open `page` if a person sits before a screen; whether a browser took it."""
    screen = sys.platform in ("darwin", "win32") or any(
        variable(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    )
    return console.is_terminal and screen and webbrowser.open(page.absolute().as_uri())

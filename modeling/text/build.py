"""The text encoders by name; a new one is a `TextEncoder` and a line in `TEXT_ENCODERS`.

`words` is built in and has no weights; `umt5` is the encoder of UMT5-XXL, as Wan uses it.
"""

from __future__ import annotations

from modeling.config import TextConfig
from modeling.tables import Table
from modeling.text.encoder import TextEncoder
from modeling.text.umt5 import Umt5Encoder
from modeling.text.words import WordsEncoder

TEXT_ENCODERS: Table[type[TextEncoder]] = Table(
    "text encoder", {"words": WordsEncoder, "umt5": Umt5Encoder}
)


def build_text_encoder(config: TextConfig) -> TextEncoder:
    """The text encoder a config names; UserError if its files are not there."""
    return TEXT_ENCODERS[config.kind](config)

"""The text encoders behind one interface: `build_text_encoder` makes the one that a config names.

`words` is built in and has no weights; `umt5` is the encoder of UMT5-XXL, as Wan uses it.
"""

from __future__ import annotations

from modeling.presets import TextConfig
from modeling.text.encoder import TextEncoder
from modeling.text.words import WordsEncoder

from .umt5_encoder import Umt5Encoder

__all__ = ["TextEncoder", "Umt5Encoder", "WordsEncoder", "build_text_encoder"]


def build_text_encoder(config: TextConfig) -> TextEncoder:
    """The text encoder a config names; ValueError if its files are not there."""
    return WordsEncoder(config) if config.kind == "words" else Umt5Encoder(config)

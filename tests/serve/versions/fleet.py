"""Versions and editors for the tests of rolling and of the catalog."""

from __future__ import annotations

from serve.admission.admission import Editor, Seat, Sizes, Warm
from serve.versions.rolling import Offer, Version

SIZES = Sizes((64, 96), (64, 96))
WARM = Warm(12)
V = {key: Version(key, (64, 96), 10, "vae") for key in ("v1", "v2", "v3", "other")}
ROLLING = Offer("m", "v1", "v2")


def editor(name: str, *models: str, busy: str = "", loading: str = "", load: float = 0.1) -> Editor:
    """With a session of `busy`, if that is a model."""
    streams = {f"{name}-s": Seat(f"{name}-session", load, model=busy)} if busy else {}
    return Editor(name, 12, 8, streams, models=dict.fromkeys(models, WARM), loading=loading)

"""A session without a socket: frames that are fed to it, work that it gives out, answers."""

from __future__ import annotations

import json

import numpy as np

from serve.delivery.session import Session
from serve.hub.records import Entry
from serve.wire.codec import parse_frame
from serve.wire.protocol import Mode
from serve.wire.split_state import SplitState
from serve.wire.work import Edited, Opening, Ready, Work

READY = Ready(model="m", chunk_frames=12, first_chunk_frames=9, chunks=0)


PIXELS = np.zeros((32, 48, 3), np.uint8)


def make(mode: Mode = "lossless", *, opened: bool = True) -> Session:
    session = Session(Opening("s", "red", 48, 32, 16.0, mode, mask=True))
    if opened:
        session.opened(READY)
    return session


def feed(session: Session, count: int) -> list[Entry]:
    entries = []
    for _ in range(count):
        index = session.next_frame
        entries += session.feed(index, 1000 + index, PIXELS)
    return entries


def edited(work: Work) -> Edited:
    mask = np.zeros((3, 2, 3), bool)
    mask[0, 0, 1] = True
    return Edited(work.number, work.number, 0.5, 4, 40.0, 5.0, 1.0, mask, SplitState(b"state"))


def answer(session: Session, work: Work) -> list[Entry]:
    delivery = session.deliver(edited(work))
    return session.entries(delivery, [b"image"] * len(work.frames))


def indices(entries: list[Entry]) -> list[int]:
    return [parse_frame(e.data).index for e in entries if isinstance(e.data, bytes)]


def messages(entries: list[Entry]) -> list[dict[str, object]]:
    return [json.loads(e.data) for e in entries if isinstance(e.data, str)]

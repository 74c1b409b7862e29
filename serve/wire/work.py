"""What passes between a session at the front and the editor that works for it."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from serve.wire.protocol import Detail, Mode, Open
from serve.wire.split_state import SplitState


@dataclass(frozen=True)
class Opening:
    """Starts a stream at an editor, or goes on with one (the whole `state`, of either form)."""

    session: str
    prompt: str
    width: int
    height: int
    fps: float
    mode: Mode
    seed: int = 0
    mask: bool = False
    state: SplitState | None = None
    stream: str = ""  # a name of this stream among all of the application
    epoch: int = 0  # of the session's holder: a newer one's stream ends an older one's
    waits: bool = False  # the client wants to hear of its place when there is no room
    again: bool = False  # the session had an editor before
    tenant: str = ""  # whose session it is
    work_size: str = "full"  # that the model edits at; from a client's open always WIDTHxHEIGHT
    detail: Detail = "off"
    model: str = ""  # name of the model that was chosen
    version: str = ""  # and key of the version that edits

    @classmethod
    def of(
        cls, message: Open, session: str, tenant: str, work_size: str, detail: Detail,
        model: str, version: str,
    ) -> Opening:  # fmt: skip
        """A new session's."""
        return cls(
            session=session,
            prompt=message.prompt,
            width=message.width,
            height=message.height,
            fps=float(message.fps),
            mode=message.mode,
            seed=message.seed or 0,
            mask=bool(message.mask),
            waits=bool(message.queue),
            tenant=tenant,
            work_size=work_size,
            detail=detail,
            model=model,
            version=version,
        )


def new_session() -> str:
    """A name of its own for a session."""
    return secrets.token_hex(6)


@dataclass(frozen=True)
class Work:
    """One chunk's `frames`, uint8 [n, height, width, 3], fewer (or none) when `last`.

    With `more` they are only its first ones: another work of the same number brings more, so that
    the VAE need not wait for the chunk to be complete.
    """

    number: int
    prompt: str
    frames: np.ndarray
    last: bool
    more: bool = False


@dataclass(frozen=True)
class Queued:
    """No editor has room yet; `place` counts from 1."""

    place: int
    expected_s: float


@dataclass(frozen=True)
class Ready:
    """The stream is open at an editor."""

    model: str
    chunk_frames: int
    first_chunk_frames: int
    chunks: int  # edited before, according to the state it was opened with
    unknown: str = ""  # words of the opening's prompt that the model was never taught


@dataclass(frozen=True)
class Frames:
    """The edited frames of a chunk, ahead of its `Edited`: until that is here they are only good to
    be coded. Should the editor die between, another one makes them again."""

    frames: np.ndarray  # uint8 [n, height, width, 3]


@dataclass(frozen=True)
class Edited:
    """The answer to one chunk's `Work`, after its `Frames`; `state` is the compact form after it,
    None after the last, without the parts that were in the state before it.

    `compute_ms` is from when all its frames were there, `ahead_ms` what was computed before.
    """

    number: int
    index: int  # of the chunk
    recomputed: float
    steps: int
    compute_ms: float
    ahead_ms: float
    wait_ms: float  # for the accelerator
    mask: np.ndarray | None  # bool [latents, rows, columns], if the opening asked for it
    state: SplitState | None
    unknown: str = ""  # words of the work's prompt that the model was never taught
    rung: str = "full"  # of the degrade ladder (`serve.admission.rungs`)
    work_size: str = ""  # that it was edited at
    held_ms: float = 0.0  # from when the work was at the editor until this leaves

    @property
    def device_s(self) -> float:
        """Seconds of the accelerator that the chunk took."""
        return (self.compute_ms + self.ahead_ms) / 1000


@dataclass(frozen=True)
class Moved:
    """The editor, or its version of the model, is going away and gives the stream back.

    `state` is the exact form and holds the first `ahead` frames of a chunk that is not complete;
    it comes without the parts that were in the state before it.
    """

    state: SplitState
    ahead: int
    why: str = "drain"


@dataclass(frozen=True)
class Asks:
    """The editor has room for another Work."""


@dataclass(frozen=True)
class Superseded:
    """The editor has a newer stream of the session."""


EditorEvent = Queued | Ready | Frames | Edited | Moved
Take = Callable[[], Awaitable[Work]]


class EditorLostError(Exception):
    """The editor died, or cannot be reached; the stream can go on at another."""


class SupersededError(Exception):
    """The client came back on another socket, which holds the session now."""


class Backend(Protocol):
    """Where streams are edited: in this process, or on Ray."""

    def edit(self, opening: Opening, take: Take) -> AsyncGenerator[EditorEvent]:
        """One stream: Queued while there is no room, Ready, then for every chunk its Frames and its
        Edited, until the last one or a Moved.

        The editor asks for work with `take` when it has room. Raises WireError (`at_capacity`,
        `internal`), EditorLostError and SupersededError.
        """
        ...

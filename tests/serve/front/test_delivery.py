"""What a client must see, whatever dies: the whole front against a plain list of frames.

Source frame n has to come back once, in its place, edited by the prompt that was the newest when it
came and by an editor that has edited all the frames before its chunk and no others.
"""

from __future__ import annotations

import zlib
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import invariant, precondition, run_state_machine_as_test

from serve.hub.records import HOLDER_BEAT_S
from serve.wire.codec import Frame
from tests.serve.front.arithmetic import CHUNK, FIRST, edit, source
from tests.serve.front.client import LONGEST_RECOVERY_S, MOST_UNSENT, RECOVERY_S, Client, complete


class Delivery(Client):
    """What must be so after each step, whatever happened."""

    def teardown(self) -> None:
        try:
            self.all_comes_in_the_end()
        finally:
            self.world.clock.stop()

    def all_comes_in_the_end(self) -> None:
        """However it went: who comes back in time and reads gets the rest."""
        self.world.commits_go_on.set()
        if self.wire is None or self.must_be_taken() is not True:
            return
        if not self.talks():
            self.resume(silent=False, reading=True)
        self.wire.reading.set()
        self.world.advance(RECOVERY_S)
        if self.talks() and not self.said_close:
            self.finish()
        self.world.advance(30.0)
        self.the_client_sees_the_list()
        self.one_connection_holds_the_session()
        self.a_connection_ends_only_for_a_reason()
        if self.wire.code == 1000:
            assert self.mode == "live" or len(self.seen_frames()) == self.sent
        else:
            assert self.wire.code == 1011

    @invariant()
    def the_client_sees_the_list(self) -> None:
        self.take_in()
        checksum = chunks = 0
        chunk: list[Frame] = []
        announced = "prompt 0"
        dropped: set[int] = set()
        index = -1  # the last frame
        told_after: list[dict[str, Any]] = []  # since the last frame
        for item in self.seen:
            if item in told_after and self.cut_once:
                continue  # told again, to a client that came back with no frame more
            if isinstance(item, dict):
                told_after.append(item)
            if isinstance(item, Frame):
                told_after.clear()
                assert item.index > index, "repeated, or out of order"
                assert self.mode == "live" or item.index == index + 1, "lost"
                assert item.index not in dropped
                assert item.time_us == 1000 + item.index
                index = item.index
                wanted = edit(source(index), announced, checksum)
                assert item.image == wanted.tobytes(), (index, bytes(item.image[:3]), wanted[0, 0])
                chunk.append(item)
            elif item["type"] == "resumed":  # what was told of as dropped stays dropped
                continue
            elif item["type"] == "prompt_applied":
                assert not chunk, "within a chunk"
                announced = item["prompt"]
            elif item["type"] == "dropped":
                first = item["first_frame"]
                told = set(range(first, first + item["frames"]))
                assert self.mode == "live"
                assert max(told) < self.sent
                assert not dropped & told, "told twice"
                dropped |= told
            elif item["type"] == "chunk":
                assert item["index"] == chunks
                assert (item["first_frame"], item["frames"]) == (chunk[0].index, len(chunk))
                assert len(chunk) == (CHUNK if chunks else FIRST) or self.said_close
                assert announced == f"prompt {self.prompt_of[chunk[-1].index]}"
                for frame in chunk:
                    checksum = zlib.crc32(source(frame.index).tobytes(), checksum)
                chunk, chunks = [], chunks + 1
            else:
                over = {"type": "closed", "frames": len(self.seen_frames()), "reason": "close"}
                assert item == over or item["code"] == "internal", item
                if item == over:
                    shown_indices = {frame.index for frame in self.seen_frames()}
                    assert dropped | shown_indices == set(range(self.sent))

    @invariant()
    def nothing_is_shown_before_it_is_safe(self) -> None:
        assert len(self.seen_frames()) <= self.world.committed

    @invariant()
    def no_more_is_edited_than_the_client_takes(self) -> None:
        most = max(self.edited_before, len(self.seen_frames()) + MOST_UNSENT)
        assert self.world.committed <= most

    @precondition(lambda self: self.talks() and self.mode == "lossless")
    @invariant()
    def a_healthy_session_is_never_behind(self) -> None:
        healthy = (
            self.wire.reading.is_set()
            and self.world.commits_go_on.is_set()
            and self.world.clock.now > self.trouble_until
        )
        if healthy:
            wanted = self.sent if self.said_close else complete(self.sent)
            assert len(self.seen_frames()) == wanted

    @invariant()
    def one_connection_holds_the_session(self) -> None:
        for since, wire in self.old:
            if self.world.clock.now - since > HOLDER_BEAT_S + 2:
                assert wire.task.done(), "a holder that was superseded lives on"

    @invariant()
    def a_connection_ends_only_for_a_reason(self) -> None:
        self.take_in()
        if self.wire is None or self.wire.cut or self.wire.code is None:
            return
        if self.wire.code == 1011:  # for a minute no editor brought anything
            assert self.world.clock.now - self.lost_since > LONGEST_RECOVERY_S
            return
        assert (self.said_close, self.wire.code) == (True, 1000)
        assert "closed" in [item["type"] for item in self.seen if isinstance(item, dict)]


def test_what_a_client_sees_is_a_plain_list_whatever_dies() -> None:
    run_state_machine_as_test(
        Delivery,
        settings=settings(
            max_examples=60,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            phases=[Phase.generate],  # add Phase.shrink for a shorter story, in minutes
            suppress_health_check=list(HealthCheck),
        ),
    )

"""A client of the whole front, and what may happen to it: the rules of a state machine."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from serve.hub.records import HOLDER_BEAT_S
from serve.wire.codec import Frame
from tests.serve.front.arithmetic import CHUNK, FIRST, SIDE
from tests.serve.front.world import OPEN, Wire, World, frames

RESUME_S = 60.0
LONGEST_RECOVERY_S = 60.0
RECOVERY_S = 5.0  # in which a lost editor is replaced by one that is there
# 24 frames that the client has not taken yet are the most for which another chunk is begun.
MOST_UNSENT = 23 + CHUNK


def complete(count: int) -> int:
    """Frames of the chunks that `count` frames make up."""
    return 0 if count < FIRST else FIRST + (count - FIRST) // CHUNK * CHUNK


class Client(RuleBasedStateMachine):
    """One client, with all that it ever sent and saw, and its connections."""

    mode: str

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.new_client()

    # --- the client

    def new_client(self) -> None:
        self.sent = 0  # source frames
        self.prompt = self.prompts = 0  # the newest and how many there were
        self.prompt_of: dict[int, int] = {}
        self.seen: list[dict[str, Any] | Frame] = []  # over all connections
        self.token = ""
        self.wire: Wire | None = None
        self.taken_from_wire = 0
        self.old: list[tuple[float, Wire]] = []  # connections that a newer one took over from
        self.dead_at: float | None = None
        self.finished = self.said_close = self.cut_once = False
        self.trouble_until = self.lost_since = 0.0
        self.committed_at_loss = -1
        self.world.committed = 0
        self.edited_before = 0

    def take_in(self) -> None:
        """What the connection brought since the last look."""
        if self.wire is not None:
            self.seen += self.wire.heard[self.taken_from_wire :]
            self.taken_from_wire = len(self.wire.heard)

    def seen_frames(self) -> list[Frame]:
        self.take_in()
        return [item for item in self.seen if isinstance(item, Frame)]

    def talks(self) -> bool:
        wire = self.wire
        return wire is not None and not wire.cut and wire.code is None and not wire.task.done()

    # --- what happens

    @initialize(mode=st.sampled_from(["lossless", "live"]))
    def begin(self, mode: str) -> None:
        self.mode = mode
        self.open()

    def open(self) -> None:
        self.wire = self.world.connect(OPEN | {"mode": self.mode})
        self.taken_from_wire = 1
        opened = self.wire.messages[0]
        assert opened["type"] == "opened", opened
        assert opened["next_frame"] == 0
        self.token = opened["resume"]
        self.edited_before = 0

    @precondition(lambda self: self.talks() and not self.said_close)
    @rule(count=st.integers(1, 15))
    def send(self, count: int) -> None:
        for data in frames(self.sent, count):
            self.wire.say(data)
        for index in range(self.sent, self.sent + count):
            self.prompt_of[index] = self.prompt
        self.sent += count
        self.world.settle()

    @precondition(lambda self: self.talks() and not self.said_close)
    @rule(count=st.sampled_from([12, 24, 33]))
    def send_chunks(self, count: int) -> None:
        self.send(count)

    @precondition(lambda self: self.talks() and not self.said_close)
    @rule()
    def change_prompt_between_chunks(self) -> None:
        self.change_prompt()
        self.send(24)

    @precondition(lambda self: self.talks() and not self.said_close)
    @rule(reading=st.booleans())
    def fall_behind_and_come_back(self, reading: bool) -> None:
        self.stop_reading()
        self.send(33)
        self.connection_is_cut(0)
        if self.must_be_taken():
            self.resume(silent=True, reading=reading)
            self.send(33)

    @precondition(lambda self: self.talks() and not self.said_close)
    @rule()
    def change_prompt(self) -> None:
        self.prompts += 1
        self.prompt = self.prompts
        self.wire.say({"type": "prompt", "prompt": f"prompt {self.prompt}"})
        self.world.settle()

    @precondition(lambda self: self.talks() and not self.said_close and self.sent > 15)
    @rule()
    def finish(self) -> None:
        self.said_close = True
        self.wire.say({"type": "close"})
        self.world.settle()

    @precondition(lambda self: self.talks())
    @rule()
    def stop_reading(self) -> None:
        self.wire.reading.clear()

    @precondition(lambda self: self.talks() and not self.wire.reading.is_set())
    @rule()
    def read_on(self) -> None:
        self.wire.reading.set()
        self.world.settle()

    @rule(seconds=st.sampled_from([0.1, 0.7, 3.0, 15.0, 59.0, 61.0]))
    def time_goes_by(self, seconds: float) -> None:
        self.world.advance(seconds)

    @rule()
    def commits_hang(self) -> None:
        self.world.commits_go_on.clear()

    @precondition(lambda self: not self.world.commits_go_on.is_set())
    @rule()
    def commits_go_on(self) -> None:
        self.world.commits_go_on.set()
        self.world.settle()

    @rule(how=st.sampled_from(["die", "leave"]))
    def editor_ends(self, how: str) -> None:
        getattr(self.world.editors, how)()
        if self.world.committed != self.committed_at_loss or not self.lost_since:
            self.lost_since, self.committed_at_loss = self.world.clock.now, self.world.committed
        self.trouble_until = self.world.clock.now + RECOVERY_S
        self.world.settle()

    @precondition(lambda self: self.talks())
    @rule(how=st.sampled_from(["die", "leave"]), seconds=st.sampled_from([1.0, 20.0]))
    def editors_are_full_for_a_while(self, how: str, seconds: float) -> None:
        self.world.editors.full = True
        self.editor_ends(how)
        self.world.advance(seconds)
        self.world.editors.full = False
        self.trouble_until = self.world.clock.now + RECOVERY_S

    @precondition(lambda self: self.talks())
    @rule(lost=st.integers(0, 20))
    def connection_is_cut(self, lost: int) -> None:
        """With what the last `lost` frames bring still on the way."""
        self.wire.disconnect()
        self.lose(lost)
        self.world.settle()

    @precondition(lambda self: self.talks())
    @rule(lost=st.integers(0, 20))
    def front_dies(self, lost: int) -> None:
        self.wire.kill_front()
        self.dead_at = self.world.clock.now
        self.lose(lost)
        self.world.settle()

    def lose(self, lost: int) -> None:
        self.take_in()
        self.cut_once = True
        self.edited_before = self.world.committed
        frames_left = max(0, len(self.seen_frames()) - lost)
        kept: list[dict[str, Any] | Frame] = []
        for item in self.seen:
            frames_left -= isinstance(item, Frame)
            if frames_left < 0:
                break
            kept.append(item)
        if lost:
            self.seen = kept

    @precondition(lambda self: self.token)
    @rule(silent=st.booleans(), reading=st.booleans())
    def resume(self, silent: bool, reading: bool) -> None:
        """On another front; the old connection may not know yet that it is gone."""
        self.take_in()
        old, before = self.wire, self.world.committed
        assert old is not None
        received = len(self.seen_frames())
        applied = [m for m in self.seen if isinstance(m, dict) and m["type"] == "prompt_applied"]
        known = applied[-1]["prompt"] if applied else "prompt 0"
        silent = silent and known == f"prompt {self.prompt}"
        expected = self.must_be_taken()
        wire = Wire(self.world, subprotocols=["liveedit.v1"])
        if not reading:
            wire.reading.clear()
        wire.say(OPEN | {"mode": self.mode, "resume": self.token, "received": received})
        self.world.settle()
        answer = wire.messages[0]
        if answer["type"] == "error":
            assert not expected, answer
            assert (answer["code"], wire.code) == ("bad_request", 1008)
            self.world.advance(RECOVERY_S)  # until the old connection has found out, too
            old.disconnect()
            self.world.settle()
            self.new_client()
            self.open()
            return
        assert expected is not False, "a token that is over was taken"
        assert answer["type"] == "opened"
        assert answer["resume"] == self.token
        assert (answer["width"], answer["height"]) == (SIDE, SIDE)
        assert answer["next_frame"] <= self.sent
        if not old.task.done():
            self.old.append((self.world.clock.now, old))
        self.wire, self.dead_at, self.cut_once = wire, None, True
        self.edited_before = before
        self.taken_from_wire = 1
        self.seen.append({"type": "resumed", "next_frame": answer["next_frame"]})
        if not silent and self.prompts:
            wire.say({"type": "prompt", "prompt": f"prompt {self.prompt}"})
        for index in range(answer["next_frame"], self.sent):
            self.prompt_of[index] = self.prompt
            wire.say(frames(index, 1)[0])
        if self.said_close:
            wire.say({"type": "close"})
        self.trouble_until = self.world.clock.now + RECOVERY_S
        self.world.settle()

    def must_be_taken(self) -> bool | None:
        """Whether the token is good; None where a dead front's last beat decides."""
        assert self.wire is not None
        if self.dead_at is not None:
            gone = self.world.clock.now - self.dead_at
            if gone <= RESUME_S:
                return True
            return False if gone > RESUME_S + 2 * HOLDER_BEAT_S + 1 else None
        if self.wire.ended_at is None:
            return True
        return self.world.clock.now - self.wire.ended_at <= RESUME_S

    @precondition(lambda self: any(not wire.task.done() for _, wire in self.old))
    @rule(bytes_=st.sampled_from([b"noise", b""]))
    def old_connection_says_something_wrong(self, bytes_: bytes) -> None:
        for _, wire in self.old:
            if bytes_:
                wire.say(bytes_)
            else:
                wire.disconnect()
        self.world.settle()

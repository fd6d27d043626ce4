"""A relay that is killed, or frozen, exactly between two of its calls: `python -m faults.victim PLACE N WHAT [deaf]`.

It is the relay of the command line, with the ports of its shard wrapped: at the Nth passing of PLACE (counted once it
holds the shard) it sends itself WHAT (`KILL`, `STOP`). A deaf one falls asleep without its second look.
The settings come from the environment, as for `outbox relay`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from outbox.batch import Batch
from outbox.config import resolve
from outbox.kafka.shard_log import ShardLog
from outbox.logs import configure
from outbox.message import Message
from outbox.reader import Reader
from outbox.relay import Relay
from outbox.shard import Shard
from outbox.wake import Wake

PLACES = (
    "after read",
    "after begin",
    "in the middle of sending",
    "after the position record",
    "before commit",
    "after commit",
    "before the next read",
)
"""Between the calls of one step, in their order."""

BEFORE_THE_BELL = "before the bell"
"""Between a read that found nothing and the attempt to hold the doorbell."""


class Trigger:
    """Sends the signal at the Nth passing of a place."""

    def __init__(self, place: str, number: int, what: signal.Signals) -> None:
        if place not in {*PLACES, BEFORE_THE_BELL}:
            raise SystemExit(f"There is no place {place!r}; there are: {', '.join(PLACES)}.")
        self._place, self._left, self._what = place, number, what
        self.armed = False

    def passes(self, place: str) -> None:
        """It passes a place."""
        if not self.armed or place != self._place:
            return
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), self._what)


class VictimReader(Reader):
    """A reader whose batches pass two places."""

    trigger: Trigger

    def read(self, position: Any, wanted: Any = None) -> Batch:
        """As the relay's; only a batch that holds something counts."""
        self.trigger.passes("before the next read")
        batch = super().read(position, wanted)
        if batch.entries:
            self.trigger.passes("after read")
        return batch

    def try_bell(self) -> bool:
        """As the relay's."""
        self.trigger.passes(BEFORE_THE_BELL)
        return super().try_bell()


class VictimLog(ShardLog):
    """A log whose transactions pass the others. The transaction that takes the shard over does not count."""

    trigger: Trigger

    def begin(self, *, watched: bool = False) -> None:
        """As the relay's."""
        super().begin(watched=watched)
        self.trigger.passes("after begin")

    def send_all(self, messages: Sequence[Message]) -> None:
        """In two halves."""
        half = len(messages) // 2
        super().send_all(messages[:half])
        self.trigger.passes("in the middle of sending")
        super().send_all(messages[half:])

    def send_position(self, value: bytes) -> None:
        """As the relay's."""
        super().send_position(value)
        self.trigger.passes("after the position record")

    def commit(self) -> None:
        """As the relay's; the first one is that of the take-over."""
        self.trigger.passes("before commit")
        super().commit()
        self.trigger.passes("after commit")
        self.trigger.armed = True


def main() -> None:
    """Run it until it is stopped."""
    place, number, what = sys.argv[1], int(sys.argv[2]), signal.Signals[f"SIG{sys.argv[3]}"]
    if sys.argv[4:] == ["deaf"]:
        Shard.look_again = lambda self: False  # type: ignore[method-assign]  # the rule that is left out
    trigger = Trigger(place, number, what)
    VictimReader.trigger = VictimLog.trigger = trigger
    config = resolve({}, dict(os.environ), None).config
    configure(config)
    wake = Wake()
    stop: Callable[..., None] = lambda *_: wake.set()  # noqa: E731  a signal handler
    signal.signal(signal.SIGTERM, stop)
    Relay(config, wake=wake, reader=VictimReader, shard_log=VictimLog).run()


if __name__ == "__main__":
    main()

"""A relay that is killed, or frozen, exactly between two of its calls: `python -m faults.victim PLACE N WHAT [LACK]`.

It is the relay of the command line, with the ports of its shard wrapped: at the Nth passing of PLACE (counted once it
holds the shard; 0 is never) it sends itself WHAT (`KILL`, `STOP`). Within a transaction what was sent is on the broker
by then. LACK is the rule that is left out, to show that the harness sees it: `deaf` falls asleep without its second
look, `hasty` publishes what is not yet on the database's disk.
The settings come from the environment, as for `outbox relay`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

from confluent_kafka import KafkaException

from outbox import relay
from outbox.adoption import adopt_log
from outbox.batch import Batch
from outbox.config import resolve
from outbox.errors import OutboxError
from outbox.kafka.shard_log import ShardLog
from outbox.logs import configure
from outbox.message import Message
from outbox.position import Position
from outbox.reader import Reader
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

SENT = ("in the middle of sending", "after the position record", "before commit")
"""Those at which Kafka holds an open transaction with records of states in it."""

BEFORE_THE_BELL = "before the bell"
"""Between a read that found nothing and the attempt to hold the doorbell."""


ADOPTED = "right after it adopted"
"""Between the return of `adopt` and whatever the relay makes of it."""

NEW_EPOCH = "with the new epoch's position uncommitted"
"""In the transaction that starts anew after an adoption."""

Lack = Literal["deaf", "hasty"]


class Trigger:
    """Sends the signal at the Nth passing of a place."""

    def __init__(self, place: str, number: int, what: signal.Signals) -> None:
        if place not in {*PLACES, BEFORE_THE_BELL, ADOPTED, NEW_EPOCH}:
            raise SystemExit(f"There is no place {place!r}; there are: {', '.join(PLACES)}.")
        self._place, self._left, self._what = place, number, what
        self.armed = False

    def passes(self, place: str, before: Callable[[], None] = lambda: None) -> None:
        """It passes a place; `before` is done before the signal."""
        if not self.armed or place != self._place:
            return
        self._left -= 1
        if self._left == 0:
            before()
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
    epoch: int | None = None

    def begin(self, *, watched: bool = False) -> None:
        """As the relay's."""
        super().begin(watched=watched)
        self.trigger.passes("after begin")

    def send_all(self, messages: Sequence[Message]) -> None:
        """In two halves; a transaction without records of states has no middle."""
        half = (len(messages) + 1) // 2
        super().send_all(messages[:half])
        if messages:
            self.trigger.passes("in the middle of sending", self._flush)
        super().send_all(messages[half:])

    def send_position(self, value: bytes) -> None:
        """As the relay's."""
        super().send_position(value)
        self.trigger.passes("after the position record", self._flush)
        epoch = Position.decode(value).epoch
        if self.epoch is not None and epoch > self.epoch:
            self.trigger.passes(NEW_EPOCH, self._flush)
        VictimLog.epoch = epoch

    def commit(self) -> None:
        """As the relay's; the first one is that of the take-over."""
        self.trigger.passes("before commit", self._flush)
        super().commit()
        self.trigger.passes("after commit")
        self.trigger.armed = True

    def _flush(self) -> None:
        """Let the broker have what was sent: the client alone would take it into its grave."""
        producer = self._open()._producer  # the client itself
        try:
            left = producer.flush(30)
        except KafkaException:
            return  # fenced, which the commit will tell
        assert left == 0, f"{left} records did not get to the broker"


def _adopt(trigger: Trigger, adopt: Callable[..., Any]) -> Callable[..., Any]:
    def adopts(*arguments: Any, **more: Any) -> Any:
        done = adopt(*arguments, **more)
        trigger.passes(ADOPTED)
        return done

    return adopts


def main() -> None:
    """Run it until it is stopped."""
    place, number, what = sys.argv[1], int(sys.argv[2]), signal.Signals[f"SIG{sys.argv[3]}"]
    if sys.argv[4:] == ["deaf"]:
        Shard.look_again = lambda self: False  # type: ignore[method-assign]  # the rule that is left out
    if sys.argv[4:] == ["hasty"]:
        VictimReader.wait_flushed = lambda self, lsn: None  # type: ignore[method-assign]  # the rule that is left out
    trigger = Trigger(place, number, what)
    relay.adopt_log = _adopt(trigger, adopt_log)  # type: ignore[attr-defined]  # where the relay looks it up
    VictimReader.trigger = VictimLog.trigger = trigger
    config = resolve({}, dict(os.environ), None).config
    configure(config)
    wake = Wake()
    stop: Callable[..., None] = lambda *_: wake.set()  # noqa: E731  a signal handler
    signal.signal(signal.SIGTERM, stop)
    try:
        relay.Relay(config, wake=wake, reader=VictimReader, shard_log=VictimLog).run()
    except OutboxError as error:
        # As the command line does.
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

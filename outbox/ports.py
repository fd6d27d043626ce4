"""What a shard needs of PostgreSQL and of Kafka. The edges are that; so is the world that tests/model explores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from outbox.batch import Batch
from outbox.dead_letter import DeadLetter
from outbox.entity_type import EntityType
from outbox.errors import TopicError
from outbox.lineage import Head
from outbox.message import Message
from outbox.position import Position
from outbox.request import Request, Wanted


@dataclass(frozen=True, slots=True)
class Identity:
    """What identifies an outbox; read once a connection.

    `retention` in seconds; `system` is the cluster's identifier, None where the server hides it.
    """

    name: str
    shards: int
    doorbell: bool
    retention: float
    system: str | None


class Database(Protocol):
    """The outbox's database. Every method may raise `DatabaseUnavailableError`: then `close`, `open`, again."""

    @property
    def connected(self) -> bool:
        """Whether a connection is open, as far as is known."""

    @property
    def identity(self) -> Identity | None:
        """Of the outbox that was opened last."""

    def open(self) -> Identity:
        """Connect, and refuse a server that cannot be published from."""

    def close(self) -> None:
        """Give the connection back."""

    def read(
        self, position: Position, wanted: Callable[[Sequence[Request], Mapping[str, EntityType]], Wanted]
    ) -> Batch:
        """Read the next batch after a position; `wanted` says what open requests want to be read, given the types."""

    def look(self, position: Position) -> tuple[Head, Mapping[str, EntityType]]:
        """A batch without its entries."""

    def wait_flushed(self, lsn: str) -> None:
        """Wait until everything up to an LSN is on the server's disk."""

    @property
    def announced(self) -> str | None:
        """The token of the relay that was heard last to have taken this shard, if any was."""

    def announce(self, token: str) -> None:
        """Tell the other relays of this shard, which may sleep, that it was taken."""

    def report(self, request: int, outcome: Mapping[str, Any]) -> None:
        """Say what became of a request."""

    def show(self, state: str) -> None:
        """Show a state to whoever asks for the status."""


class Log(Protocol):
    """One shard's topics and its transactional producer.

    Every method may raise `BrokerUnavailableError`, and within a transaction the faults of `outbox.kafka.faults`;
    then the log is discarded, or, after a refusal, renewed.
    """

    @property
    def limits(self) -> Mapping[str, int]:
        """Of each state topic its `max.message.bytes`."""

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction was begun and neither committed nor aborted."""

    @property
    def outdated(self) -> bool:
        """Whether `check` has found limits that the producer was not made for: it is to be renewed."""

    def check(self, types: Mapping[str, EntityType], *, shards: int) -> Mapping[str, TopicError]:
        """Look at all topics; by topic, what is wrong with those of states. The outbox's own: `TopicError`."""

    def take(self) -> None:
        """Fence any other holder, and end what it left open."""

    def renew(self) -> None:
        """Take a fresh producer. As `take`, it fences every other holder: the position tells whether there was one."""

    def probe(self, messages: Sequence[Message]) -> Mapping[int, str]:
        """Find out which of some messages are refused, by their places, and why; renew it afterwards."""

    def read_position(self) -> bytes | None:
        """The last committed position of this shard."""

    def unmarked(self) -> int:
        """How many of this shard's positions Kafka has neither committed nor aborted; right after `take`, none."""

    def read_all_positions(self) -> list[bytes | None]:
        """That of every shard."""

    def read_dead_letters(self) -> list[DeadLetter]:
        """The dead letters of this shard."""

    def begin(self, *, watched: bool = False) -> None:
        """Begin a transaction; when it is `watched`, `Refused` names the records that the broker names."""

    def send_all(self, messages: Sequence[Message]) -> None:
        """Send state records."""

    def send_dead_letter(self, letter: DeadLetter) -> None:
        """Send a dead letter."""

    def clear_dead_letter(self, type_name: str, key: str) -> None:
        """Remove an entity's dead letter."""

    def send_position(self, value: bytes) -> None:
        """Send the position."""

    def commit(self) -> None:
        """Commit."""

    def discard(self) -> None:
        """Throw the producer away, whatever state it is in."""

    def close(self) -> None:
        """Abort what is open and close."""


class OpenLog(Protocol):
    """Makes the log of a shard; `stop` is asked within long waits whether to give up."""

    def __call__(self, name: str, shard: int, *, stop: Callable[[], bool]) -> Log:
        """The log of one shard of the outbox `name`."""


class Adopt(Protocol):
    """Makes the retained log new, unless somebody did already; see `outbox.adoption.adopt_log`."""

    def __call__(self, *, expected_epoch: int, positions: Sequence[Position]) -> int:
        """The epoch in force afterwards."""

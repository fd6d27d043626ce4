"""The relay's own code, moved from one call of its ports to the next.

`outbox.shard.Shard` is deterministic between two calls. So where it is within a step is told by its fields as they were
at the step's start and by the answers since: it is run again from there, and interrupted at the first call that has no
answer yet. What the world then answers is one of the things that may happen next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, Protocol, TypeVar

from model.world import SYSTEM, Record
from outbox.batch import Batch
from outbox.config import Config
from outbox.dead_letter import DeadLetter
from outbox.entity_type import EntityType
from outbox.errors import BrokerUnavailableError, DatabaseUnavailableError, OutboxError, TopicError
from outbox.kafka.faults import Aborted, Fault, Fenced, Refused, Unknown
from outbox.lineage import Head
from outbox.message import Message
from outbox.ports import Identity
from outbox.position import Position
from outbox.request import Entity, Request, Wanted
from outbox.shard import Shard

TYPE = "t"
TYPES = {TYPE: EntityType(TYPE, "topic")}
T = TypeVar("T")


class Interrupted(BaseException):
    """The next call of a port; not an `Exception`, so that no handler takes it for a failure."""

    def __init__(self, name: str, arguments: tuple[Any, ...]) -> None:
        super().__init__(name)
        self.name = name
        self.arguments = arguments


_ERROR: Any = SimpleNamespace(name=lambda: "MODEL", str=lambda: "as the model has it")
FAULTS: Mapping[str, Callable[[], Fault]] = {
    "fenced": lambda: Fenced(_ERROR),
    "unknown": lambda: Unknown(_ERROR),
    "aborted": lambda: Aborted(_ERROR),
    "refused": lambda: Refused(_ERROR),
    # Of a transaction that was watched: the first record, or its batch.
    "culprit": lambda: Refused(_ERROR, culprits={0: "as the model has it"}),
    "suspect": lambda: Refused(_ERROR, suspects=[0]),
}
"""What Kafka may say to a commit."""


def fault(word: str) -> Fault:
    """One of them, made anew."""
    return FAULTS[word]()


@dataclass(frozen=True, slots=True)
class Fields:
    """A shard's fields between two steps. `producer`: its own name while it has a producer, else None."""

    token: str
    number: int = 0
    producer: str | None = None
    position: Position | None = None
    dead: tuple[tuple[Entity, int], ...] = ()
    ahead: Batch | None = None
    inherited: bool = False
    held: bool = False
    generation: int | None = None
    over: str = ""


@dataclass(frozen=True, slots=True)
class Holder:
    """One relay: its fields at the step's start, the answers since, and the call that waits for one.

    `key` tells two holders apart as far as what they may do is concerned.
    """

    fields: Fields
    answers: tuple[Any, ...] = ()
    call: str = ""
    arguments: tuple[Any, ...] = ()
    key: str = ""
    idle: bool = False

    @property
    def over(self) -> str:
        """Why it has ended; empty while it runs."""
        return self.fields.over


def start(token: str, number: int, *, batch_rows: int) -> Holder:
    """A relay that has just been started."""
    return _run(Fields(token, number), (), batch_rows=batch_rows)


def answer(holder: Holder, given: Any, *, batch_rows: int) -> Holder:
    """Give the call that waits its answer, and run to the next."""
    return _run(holder.fields, (*holder.answers, given), batch_rows=batch_rows)


def _run(fields: Fields, answers: tuple[Any, ...], *, batch_rows: int) -> Holder:
    while True:
        run = _Run(fields, answers)
        shard = run.shard(batch_rows)
        idle = False
        try:
            step = shard.step()
            idle = not step.more
        except Interrupted as call:
            return Holder(fields, answers, call.name, call.arguments, repr((fields, answers)))
        except DatabaseUnavailableError:
            shard.forget(database=True)
        except BrokerUnavailableError:
            shard.forget()
        except OutboxError as error:
            return Holder(replace(fields, over=type(error).__name__), (), "", (), f"over {fields.token} {error}")
        after = run.fields(shard)
        if idle and after == fields:
            # As it was: whatever it does next, it has done before.
            return replace(_run_first(after, batch_rows), idle=True)
        fields, answers = after, ()


def _run_first(fields: Fields, batch_rows: int) -> Holder:
    run = _Run(fields, ())
    try:
        run.shard(batch_rows).step()
    except Interrupted as call:
        return Holder(fields, (), call.name, call.arguments, repr((fields, ())))
    raise AssertionError("a step without a call")


class Asked(Protocol):
    """Whoever answers the calls of a port."""

    def ask(self, name: str, *arguments: Any) -> Any:
        """The answer to a call: a value, or what is raised."""


class _Run:
    """One run of a step: the ports, which replay the answers and interrupt at the call that has none."""

    def __init__(self, fields: Fields, answers: Sequence[Any]) -> None:
        self._fields = fields
        self._answers = answers
        self._used = 0
        self._interrupted = False
        self.source = _Source(self, fields.generation)

    def ask(self, name: str, *arguments: Any) -> Any:
        """The answer to a call: a value, or what is raised."""
        if self._interrupted:
            return None  # a handler that cleans up on the way out
        if self._used == len(self._answers):
            self._interrupted = True
            raise Interrupted(name, arguments)
        given = self._answers[self._used]
        self._used += 1
        if given == "database":
            self.source.generation = None
            raise DatabaseUnavailableError("as the model has it")
        if given == "kafka":
            raise BrokerUnavailableError("as the model has it")
        if isinstance(given, str) and given in FAULTS:
            raise fault(given)
        return given

    def shard(self, batch_rows: int) -> Shard:
        """The shard as it was at the step's start."""
        fields = self._fields
        made = Shard(
            Config(shard=fields.number, batch_rows=batch_rows),
            self.source,
            lambda name, shard, stop: LogPort(self, None),
            lambda expected_epoch, positions: self.ask("adopt", expected_epoch, tuple(positions)),
            stop=lambda: False,
            read_ahead=AtOnce(),
            now_ms=lambda: 0,
            token=fields.token,
            grace=0.0,
        )
        hold = made._hold
        # No look at the topics by the clock of whoever runs this.
        made._topics.looked_at = math.inf
        hold.kafka = LogPort(self, fields.producer) if fields.producer is not None else None
        hold.position = fields.position
        hold.dead = dict(fields.dead)
        hold.inherited = fields.inherited
        made._topics.seen = 1
        hold.has_held = fields.held
        if fields.ahead is not None:
            made._ahead.keep(fields.ahead)
        return made

    def fields(self, shard: Shard) -> Fields:
        """The shard's fields at the end of a step."""
        hold, ahead = shard._hold, shard._ahead.batch
        return Fields(
            self._fields.token,
            self._fields.number,
            hold.kafka.producer if isinstance(hold.kafka, LogPort) else None,
            hold.position,
            tuple(sorted(hold.dead.items())),
            ahead.result() if ahead is not None and ahead.exception() is None else None,
            hold.inherited,
            hold.has_held,
            self.source.generation,
        )


class AtOnce(Executor):
    """Reads ahead at once: before the commit that it is meant to overlap."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


class _Source:
    """The outbox's database, as `outbox.ports.Source` has it."""

    def __init__(self, run: _Run, generation: int | None) -> None:
        self._run = run
        self.generation = generation

    @property
    def connected(self) -> bool:
        return self.generation is not None

    @property
    def identity(self) -> Identity | None:
        return Identity("m", 1, True, 1e9, SYSTEM)

    def open(self) -> Identity:
        self.generation = self._run.ask("open")
        return Identity("m", 1, True, 1e9, SYSTEM)

    def close(self) -> None:
        self.generation = None

    def read(
        self, position: Position, wanted: Callable[[Sequence[Request], Mapping[str, EntityType]], Wanted]
    ) -> Batch:
        batch: Batch = self._run.ask("read", position, wanted, self.generation)
        return batch

    def look(self, position: Position) -> tuple[Head, Mapping[str, EntityType]]:
        return self._run.ask("look", position, self.generation), TYPES

    def wait_flushed(self, lsn: str) -> None:
        self._run.ask("wait_flushed", lsn, self.generation)

    @property
    def announced(self) -> str | None:
        """Nobody is heard: who relied on it would be wrong."""
        return None

    def announce(self, token: str) -> None:
        """Nobody hears it."""

    def report(self, request: int, outcome: Mapping[str, Any]) -> None:
        self._run.ask("report", request, self.generation)

    def show(self, state: str) -> None:
        """Nobody looks."""


class LogPort:
    """A shard's topics and producer, as `outbox.ports.Log` has it; what they answer is asked for."""

    limits: Mapping[str, int] = {"topic": 1_000_000}

    def __init__(self, run: Asked, producer: str | None) -> None:
        self._run = run
        self.producer = producer
        self.in_transaction = self._watched = False
        self._records: list[Record] = []
        self._letters: dict[Entity, int | None] = {}
        self._position: bytes | None = None

    @property
    def outdated(self) -> bool:
        """Whether somebody has changed a topic's limit, and the look at the topics has found it."""
        return bool(self._run.ask("outdated"))

    def check(self, types: Mapping[str, EntityType], *, shards: int) -> Mapping[str, TopicError]:
        return {}

    def take(self) -> None:
        self.producer = self._run.ask("take")

    def renew(self) -> None:
        self.take()

    def probe(self, messages: Sequence[Message]) -> Mapping[int, str]:
        found: Mapping[int, str] = self._run.ask("probe")
        return found

    def read_position(self) -> bytes | None:
        found: bytes = self._run.ask("read_position")
        return found or None

    def unmarked(self) -> int:
        return 0  # the world's broker ends a transaction as a whole

    def read_all_positions(self) -> list[bytes | None]:
        return list(self._run.ask("read_all_positions"))

    def read_dead_letters(self) -> list[DeadLetter]:
        found = self._run.ask("read_dead_letters") or ()
        return [DeadLetter(number, of, key, "topic", "", "", 0, 1, 0) for (of, key), number in found]

    def begin(self, *, watched: bool = False) -> None:
        self.in_transaction, self._watched = True, watched
        self._records, self._letters, self._position = [], {}, None

    def send_all(self, messages: Sequence[Message]) -> None:
        for message in messages:
            version, timeline = (message.value or b"0 0").split()
            value = int(version), int(timeline)
            self._records.append(Record(message.key.decode(), message.entry[0], value, 0))

    def send_dead_letter(self, letter: DeadLetter) -> None:
        self._letters[letter.type, letter.key] = letter.id

    def clear_dead_letter(self, type_name: str, key: str) -> None:
        self._letters[type_name, key] = None

    def send_position(self, value: bytes) -> None:
        self._position = value

    def commit(self) -> None:
        letters = tuple(sorted(self._letters.items(), key=str))
        self._run.ask("commit", self.producer, tuple(self._records), letters, self._position, self._watched)
        self.in_transaction = False

    def discard(self) -> None:
        self.in_transaction = False

    def close(self) -> None:
        self.discard()

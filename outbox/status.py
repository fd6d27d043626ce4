"""Status: what is not published yet, what was, and what holds it up."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from outbox import sql
from outbox.config import Config
from outbox.database import Connection, place, translated
from outbox.errors import OutboxError
from outbox.position import Position, start
from outbox.pruning import Slot, slots
from outbox.schema import quote

# A relay that cannot log in looks like one that is not there.
_AWAY = "no relay is connected; unpublished entries wait"


@dataclass(frozen=True, slots=True)
class TypeStatus:
    """One entity type in one shard. `oldest_seconds`: the age of the oldest unpublished entry, None without one.

    `published`, `records` and `dead` are totals since the position began; `collapse_ratio` is entries for each record.
    What only Kafka knows, `unpublished` too, is None when it could not be asked.
    """

    type: str
    shard: int
    topic: str | None
    unpublished: int | None
    oldest_seconds: float | None
    published: int | None
    records: int | None
    dead_letters: int | None

    @property
    def collapse_ratio(self) -> float | None:
        """Entries published for each record written."""
        return round(self.published / self.records, 2) if self.published and self.records else None


@dataclass(frozen=True, slots=True)
class ShardStatus:
    """One shard: `state` is idle, working, waiting, stuck or not running; `on` says what it waits for or sticks at."""

    shard: int
    state: str
    on: str | None
    epoch: int | None
    position_age_seconds: float | None


@dataclass(frozen=True, slots=True)
class Status:
    """All of it. `kafka` is None when Kafka was asked and answered, else why it could not be."""

    name: str
    epoch: int
    shards: Sequence[ShardStatus]
    types: Sequence[TypeStatus]
    ring: Sequence[Slot]
    pins: Sequence[str]
    kafka: str | None = None
    at: float = field(default_factory=time.time)

    def as_json(self) -> dict[str, Any]:
        """For scripts."""
        raw = asdict(self)
        for shown, one in zip(raw["types"], self.types, strict=True):
            shown["collapse_ratio"] = one.collapse_ratio
        return raw


def look(config: Config, connection: Connection) -> Status:
    """Look at the database and, if it answers, at Kafka."""
    schema = quote(config.schema)
    with translated(place(config.database_url)):
        # As in reading: the queries are written for their indexes, and statistics may be missing or old.
        connection.execute("SET enable_seqscan = off")
    queries = {name: text.replace("{schema}", schema) for name, text in sql.load("status").items()}
    with translated(place(config.database_url)):
        head = connection.execute(queries["outbox"].encode()).fetchone()
        name, shards, epoch, removed_id = head or ("", 1, 1, 0)
        relays = running(connection, name)
        types: dict[str, str] = dict(connection.execute(queries["types"].encode()).fetchall())
        ring = slots(connection, config.schema)
    found: dict[int, Position] = {}
    letters: dict[tuple[str, int], int] = {}
    kafka: str | None = None
    try:
        found, letters = _from_kafka(config, name)
    except OutboxError as error:
        kafka = error.message
    shard_rows: list[ShardStatus] = []
    type_rows: list[TypeStatus] = []
    pins: list[str] = []
    for shard in range(shards):
        position = found.get(shard)
        current = position if position is not None and position.epoch == epoch else None
        judged_from = current or start(name, shard, "", epoch, None, 0, removed_id)
        rows: list[tuple[Any, ...]] = []
        if kafka is None:
            with translated(place(config.database_url)):
                rows = connection.execute(queries["unpublished"].encode(), position_arguments(judged_from)).fetchall()
        unpublished = {row[0]: (row[1], row[2]) for row in rows}
        totals = position.totals if position else {}
        for type_name in sorted({*types, *unpublished, *totals}):
            count, oldest = unpublished.get(type_name, (0, None))
            total = totals.get(type_name)
            type_rows.append(
                TypeStatus(
                    type_name,
                    shard,
                    types.get(type_name),
                    None if kafka else count,
                    None if kafka or oldest is None else round(float(oldest), 3),
                    total.entries if total else (None if kafka else 0),
                    total.records if total else (None if kafka else 0),
                    None if kafka else letters.get((type_name, shard), 0),
                )
            )
        shard_rows.append(_shard(shard, relays, position, kafka, waiting=bool(unpublished)))
        if kafka is None and current is None:
            pins.append(f"shard {shard} has no position of this epoch: every slot is kept")
        elif current is not None and current.reached.anchor is not None:
            pins.append(f"the anchor of shard {shard} is entry {current.reached.anchor.id}: its slot is kept")
    return Status(name, epoch, shard_rows, type_rows, ring, pins, kafka)


def running(connection: Connection, name: str) -> dict[str, int]:
    """The relays that are connected to the database, as they call themselves, and their server processes."""
    query = sql.load("status")["relays"]
    return dict(connection.execute(query.encode(), {"name": f"outbox-relay {name[:30]}/%"}).fetchall())


def _shard(
    shard: int, relays: dict[str, int], position: Position | None, kafka: str | None, *, waiting: bool
) -> ShardStatus:
    mine = [name for name in relays if name.split(" ")[1].endswith(f"/{shard}")]
    age = None if position is None or not position.at_ms else max(0.0, round(time.time() - position.at_ms / 1000, 3))
    epoch = position.epoch if position else None
    if not mine:
        return ShardStatus(shard, "not running", _AWAY if waiting else None, epoch, age)
    state, _, on = mine[0].split(" ", 2)[2].partition(":")
    if state == "idle" and waiting and kafka is None:
        state = "working"
    return ShardStatus(shard, state, on or None, epoch, age)


def _from_kafka(config: Config, name: str) -> tuple[dict[int, Position], dict[tuple[str, int], int]]:
    if not config.kafka_bootstrap_servers:
        raise OutboxError("No Kafka is named; what was published is not known.")
    try:
        from outbox.kafka.shard_log import read_dead_letters, read_positions  # noqa: PLC0415  the extra may be missing
    except ImportError as error:
        raise OutboxError("The Kafka client is not installed; what was published is not known.") from error
    positions = [Position.decode(value) for value in read_positions(config, name) if value is not None]
    counts: dict[tuple[str, int], int] = {}
    for letter, shard in read_dead_letters(config, name):
        counts[letter.type, shard] = counts.get((letter.type, shard), 0) + 1
    return {position.shard: position for position in positions}, counts


def position_arguments(position: Position) -> dict[str, Any]:
    """A position as the query `unpublished` takes it."""
    cut, point = position.cut, position.point
    most = str(2**63 - 1)
    reached = position.reached
    return {
        "shard": position.shard,
        "floor": point.floor,
        "xmax": str(point.snapshot.xmax) if point.snapshot else most,
        "xip": "{" + ",".join(map(str, point.xip)) + "}",
        # Without a cut nothing was done beyond the point: no id is at or below this one.
        "last_id": cut.last_id if cut else 0,
        "to_xmax": str(reached.snapshot.xmax) if reached.snapshot else most,
        "to_xip": "{" + ",".join(map(str, reached.xip)) + "}",
    }

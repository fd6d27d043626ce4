"""The larger worlds: the database is real, and so are its reader, its adoption and its pruning.

`Place` is a database with an outbox, used by one world after another. `Relay` is `outbox.shard.Shard` with the real
`outbox.reader.Reader`, paused before each call of its ports: it goes on when the world says so, is told how the call
ends, or is killed there. Kafka is that of `model.world`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import orjson
import psycopg
from greenlet import greenlet  # type: ignore[import-untyped]  # it has no types

from model.holder import TYPE, AtOnce, LogPort
from outbox import schema
from outbox.adoption import adopt_log
from outbox.batch import Batch
from outbox.config import Config
from outbox.entity_type import EntityType
from outbox.errors import BrokerUnavailableError, DatabaseUnavailableError, OutboxError
from outbox.lineage import Head
from outbox.ports import Identity
from outbox.position import Position
from outbox.reader import Reader
from outbox.request import Request, Wanted
from outbox.shard import Did, Shard

T = TypeVar("T")

SLOTS = 4
WRITERS = 3
# Every entry is older than the retention, so that of the reasons not to prune only those are left that matter here.
BEGIN = "2020-01-01T00:00:00Z"
DAY_US = 86_400_000_000


class Copy(NamedTuple):
    """All that a database held when a transaction had committed: what a standby that follows so far takes over with."""

    entries: Sequence[tuple[Any, ...]]
    things: Sequence[tuple[Any, ...]]
    epoch: int
    removed_id: int
    base_id: int
    last_id: int


class Place:
    """A database with an outbox of so many shards, a table of entities, and the sessions of the owning service."""

    def __init__(self, url: str, shards: int) -> None:
        self.url = url
        self.shards = shards
        self.admin = psycopg.connect(url, autocommit=True)
        settings = schema.Settings(name="worlds", shards=shards, slots=SLOTS, retention="2 days")
        with self.admin.transaction():
            schema.install(self.admin, settings)
        self.admin.execute("CREATE TABLE things (key text PRIMARY KEY, state bytea NOT NULL)")
        self.admin.execute("INSERT INTO outbox.entity_types (name, topic) VALUES (%s, 'topic')", [TYPE])
        self.writers = [psycopg.connect(url) for _ in range(WRITERS)]
        for writer in self.writers:
            # The world lets nobody write what another holds; should it, this is an error and no endless wait.
            writer.execute("SET lock_timeout = '20s'")
            writer.commit()
        # Four keys, and each shard has its share.
        rows = self.admin.execute(
            "SELECT chr(65 + n), outbox.shard_of(%s, chr(65 + n)) FROM generate_series(0, 25) n", [TYPE]
        ).fetchall()
        by_shard = [[key for key, shard in rows if shard == number][: 4 // shards] for number in range(shards)]
        self.shard_of = {key: shard for shard, keys in enumerate(by_shard) for key in keys}
        self.keys = sorted(self.shard_of)

    def reset(self, *, collapse: bool) -> None:
        """Nothing is there, as in the beginning."""
        self.admin.execute(
            f"""TRUNCATE outbox.entries, things, outbox.requests, outbox.request_outcomes RESTART IDENTITY;
                UPDATE outbox.settings SET epoch = 1, removed_id = 0, base_id = 0;
                UPDATE outbox.entity_types SET collapse = {collapse}""".encode()
        )

    def close(self) -> None:
        """Give the connections back."""
        for connection in (*self.writers, self.admin):
            connection.close()

    # -- what writers do -----------------------------------------------------------------------------------------

    def change(self, writer: psycopg.Connection, key: str, state: bytes | None, at_us: int) -> None:
        """Change an entity (None: delete it), and then write its entry. `at_us`: microseconds since the beginning."""
        if state is None:
            writer.execute("DELETE FROM things WHERE key = %s", [key])
        else:
            writer.execute(
                "INSERT INTO things VALUES (%s, %s) ON CONFLICT (key) DO UPDATE SET state = excluded.state",
                [key, state],
            )
        writer.execute(
            "INSERT INTO outbox.entries (type, key, state, slot, created_at)"
            " VALUES (%s, %s, %s, %s, %s::timestamptz + %s * interval '1 microsecond')",
            [TYPE, key, state, at_us // DAY_US % SLOTS, BEGIN, at_us],
        )

    # -- what it holds -------------------------------------------------------------------------------------------

    @property
    def things(self) -> dict[str, bytes]:
        """The table of entities, as committed."""
        return dict(self.admin.execute("SELECT key, state FROM things").fetchall())

    @property
    def retained(self) -> dict[str, int]:
        """For each key its last entry's id; what pruning went past is left out."""
        rows = self.admin.execute(
            "SELECT e.key, max(e.id) FROM outbox.entries e, outbox.settings s WHERE e.id > s.removed_id GROUP BY e.key"
        )
        return dict(rows.fetchall())

    @property
    def epoch(self) -> int:
        """How often it was adopted, and more."""
        (epoch,) = self.admin.execute("SELECT epoch FROM outbox.settings").fetchone() or (0,)
        return int(epoch)

    @property
    def base(self) -> int:
        """Above which the ids of this epoch lie."""
        (base,) = self.admin.execute("SELECT base_id FROM outbox.settings").fetchone() or (0,)
        return int(base)

    def request(self) -> None:
        """Ask the relay to publish all dead letters again."""
        self.admin.execute("INSERT INTO outbox.requests (kind) VALUES ('retry')")

    # -- misfortunes and the ring --------------------------------------------------------------------------------

    def copy(self) -> Copy:
        """Copy all but the control table."""
        with self.admin.pipeline():
            entries = self.admin.execute(
                "SELECT id, xid::text, slot, type, key, state, created_at FROM outbox.entries ORDER BY id"
            )
            things = self.admin.execute("SELECT key, state FROM things")
            rest = self.admin.execute(
                "SELECT s.epoch, s.removed_id, s.base_id,"
                " CASE WHEN q.is_called THEN q.last_value ELSE q.last_value - 1 END"
                " FROM outbox.settings s, outbox.entries_id_seq q"
            )
        return Copy(entries.fetchall(), things.fetchall(), *(rest.fetchone() or (1, 0, 0, 0)))

    def restore(self, copy: Copy) -> None:
        """Be again as it was. Writers have ended; ids come again, transaction ids do not."""
        with self.admin.transaction(), self.admin.cursor() as cursor:
            cursor.execute("TRUNCATE outbox.entries, things")
            cursor.executemany(
                "INSERT INTO outbox.entries (id, xid, slot, type, key, state, created_at)"
                " VALUES (%s, %s::xid8, %s, %s, %s, %s, %s)",
                copy.entries,
            )
            cursor.executemany("INSERT INTO things VALUES (%s, %s)", copy.things)
            cursor.execute(
                "UPDATE outbox.settings SET epoch = %s, removed_id = %s, base_id = %s",
                [copy.epoch, copy.removed_id, copy.base_id],
            )
            cursor.execute("SELECT setval('outbox.entries_id_seq', %s, false)", [copy.last_id + 1])

    def prune(self, slot: int, positions: Sequence[Position]) -> bool:
        """Empty a slot, if these positions allow it and no writer holds it."""
        known = orjson.dumps([position.for_prune() for position in positions]).decode()
        try:
            with self.admin.transaction():
                self.admin.execute("SET LOCAL lock_timeout = '10ms'")
                (said,) = self.admin.execute(
                    "SELECT outbox.prune_slot(%s::smallint, %s::jsonb)", [slot, known]
                ).fetchone() or ({},)
        except psycopg.errors.LockNotAvailable:
            return False
        return bool(said["pruned"])


# -- relays --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process is no more; no `Exception`, so that no handler takes it for a failure."""


class Surroundings(Protocol):
    """What a relay has around it."""

    place: Place
    limits: dict[str, int]

    def kafka_answers(self, relay: Relay, call: str, arguments: Sequence[Any], how: str) -> Any:
        """Do what a relay asks of Kafka. `how` it ends: see `Relay.go_on`."""

    def read(self, reader: Reader, position: Position, wanted: Callable[..., Any]) -> Batch:
        """Read a batch."""

    def adopted(self) -> None:
        """Told when the log may have been adopted."""


class Relay:
    """One relay of a shard, from its start to its end; `call` is what it is about to do."""

    def __init__(self, around: Surroundings, token: str, shard: int, *, batch_rows: int) -> None:
        self.token = token
        self.shard = shard
        self.around = around
        self.call = ""
        self.idle = False
        self.over: OutboxError | None = None
        self.killed = False
        self.config = Config(
            database_url=around.place.url, shard=shard, batch_rows=batch_rows, lock_timeout=0.01, lock_tries=1
        )
        self.reader = Reader(self.config, shard=shard)
        self._process = greenlet(self._live)
        self.go_on()

    @property
    def ended(self) -> bool:
        """Whether it does nothing any more."""
        return self.killed or self.over is not None

    def go_on(self, how: str = "done") -> None:
        """Do the call, and stop before the next.

        `how` it ends: `done`; `lost`, done and not heard of; `late`, not done (or not yet) and not heard of; `stalled`:
        a commit that takes too long.
        """
        self.call = self._process.switch(how) or ""

    def step(self) -> None:
        """Go on to the end of the step."""
        self.go_on()
        while self.call and self.call != "step":
            self.go_on()

    def kill(self) -> None:
        """End it where it is; the server notices."""
        self.killed = True
        if self._process:
            with contextlib.suppress(Killed):
                self._process.throw(Killed)
        self.reader.close()

    def cut(self) -> None:
        """Its connection to the database is gone, which the next call will tell."""
        connection = self.reader._connection
        if connection is not None:
            connection.close()

    # -- within ------------------------------------------------------------------------------------------------

    def _live(self, _: str) -> None:
        shard = Shard(
            self.config,
            PausedReader(self),
            lambda name, shard, stop: self._log(),
            self._adopt,
            stop=lambda: False,
            read_ahead=AtOnce(),
            token=self.token,
            grace=0.0,
        )
        while self.over is None:
            self.pause("step")
            self.idle = False
            try:
                step = shard.step()
                self.idle = step.did is Did.NOTHING and not step.more
            except DatabaseUnavailableError:
                shard.forget(database=True)
            except BrokerUnavailableError:
                shard.forget()
            except OutboxError as error:
                self.over = error
        self.reader.close()

    def pause(self, call: str) -> str:
        """Stop before a call until the world goes on; how it is to end."""
        how: str = self._process.parent.switch(call)
        return how

    def _log(self) -> LogPort:
        log = LogPort(self, None)
        log.limits = self.around.limits
        return log

    def ask(self, name: str, *arguments: Any) -> Any:
        """A call to Kafka."""
        if name == "outdated":
            return False
        how = self.pause(name)
        if name == "commit":
            return self.around.kafka_answers(self, name, arguments, how)
        if how == "late":
            raise BrokerUnavailableError("as the world has it")
        given = self.around.kafka_answers(self, name, arguments, how)
        if how == "lost":
            raise BrokerUnavailableError("as the world has it")
        return given

    def ask_database(self, name: str, call: Callable[[], T]) -> T:
        """A call to the database; when its answer is lost, so is the connection."""
        how = self.pause(name)
        if how == "late":
            self.reader.close()
            raise DatabaseUnavailableError("as the world has it")
        given = call()
        if how == "lost":
            self.reader.close()
            raise DatabaseUnavailableError("as the world has it")
        return given

    def _adopt(self, *, expected_epoch: int, positions: Sequence[Position]) -> int:
        def adopt() -> int:
            epoch = adopt_log(self.config, expected_epoch=expected_epoch, positions=positions)
            self.around.adopted()
            return epoch

        return self.ask_database("adopt", adopt)


class PausedReader:
    """The real reader, as `outbox.ports.Source` has it."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._reader = relay.reader

    @property
    def connected(self) -> bool:
        return self._reader.connected

    @property
    def identity(self) -> Identity | None:
        return self._reader.identity

    def open(self) -> Identity:
        return self._relay.ask_database("open", self._reader.open)

    def close(self) -> None:
        self._reader.close()

    def read(
        self, position: Position, wanted: Callable[[Sequence[Request], Mapping[str, EntityType]], Wanted]
    ) -> Batch:
        read = self._relay.around.read
        return self._relay.ask_database("read", lambda: read(self._reader, position, wanted))

    def look(self, position: Position) -> tuple[Head, Mapping[str, EntityType]]:
        return self._relay.ask_database("look", lambda: self._reader.look(position))

    def wait_flushed(self, lsn: str) -> None:
        self._relay.ask_database("wait_flushed", lambda: self._reader.wait_flushed(lsn))

    @property
    def announced(self) -> str | None:
        """Nobody is heard: who relied on it would be wrong."""
        return None

    def announce(self, token: str) -> None:
        """Nobody hears it."""

    def report(self, request: int, outcome: Mapping[str, Any]) -> None:
        self._relay.ask_database("report", lambda: self._reader.report(request, outcome))

    def show(self, state: str) -> None:
        """Nobody looks."""

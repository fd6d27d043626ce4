"""The outbox reader: batches by position, from PostgreSQL.

One connection, used by one thread at a time. A batch is one REPEATABLE READ transaction and, without requests, one
round trip; the batches of a backlog, each read while the one before it is committed, are streamed. It writes to no
table: it notifies, has the write-ahead log flushed, and reports by a function of the schema.
"""

from __future__ import annotations

import selectors
import time
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import islice
from operator import itemgetter
from typing import Any, cast

import orjson
import psycopg
from psycopg import errors as pg
from psycopg import sql as psycopg_sql
from psycopg.types.json import set_json_loads

from outbox import sql
from outbox.batch import Batch
from outbox.config import Config
from outbox.database import Connection, connect_as, place, translated
from outbox.entity_type import EntityType
from outbox.entry import Entry
from outbox.errors import RelayError, SchemaError, UnsuitableServerError, WrongOutboxError
from outbox.lineage import Head
from outbox.patience import Patience
from outbox.ports import Identity
from outbox.position import Anchor, Cut, Position, Snapshot
from outbox.request import Entity, Found, Page, Request, Row, Wanted
from outbox.schema import NEWEST, bell_key
from outbox.sourced import Sources
from outbox.wake import Wake

_MOST = 2**63 - 1
# Rows that the client takes in at once, where none of them can be large: what a batch may be larger than its limit
# while it is read, and that many limits at the most.
_CHUNK_ROWS = 64
_CHUNK_LIMITS = 4
# Rows that are asked for beyond those that fill a batch like the one before would have to be taken back.
_LIKELY = 0.95
_VARYING = tuple(map(itemgetter, (2, 3, 6, 7)))
_BACKEND_FLUSHES = 170_000  # from PostgreSQL 17 on, a message can be flushed without a transaction


class Reader:
    """Reads one shard of one outbox. Foreign errors come out as the project's."""

    def __init__(self, config: Config, *, shard: int, stop: Callable[[], bool] = lambda: False) -> None:
        self._config = config
        # The server ends a statement first, where it can.
        self._patience = Patience(config.statement_timeout + 5, stop=stop)
        self._shard = shard
        self._where = place(config.database_url)
        self._connection: Connection | None = None
        self._types_version = 0
        self._types: dict[str, EntityType] = {}
        self.identity: Identity | None = None
        self._ringing = self._to_unlock = False
        # All before this place of the write-ahead log was on the disk when the last batch was read.
        self._flushed_to = 0
        # Of the last batch that was cut: what a row of a backlog is likely to need.
        self._mean_size = 1.0
        identifier = psycopg_sql.Identifier(config.schema).as_string(None)
        self._sql = {
            name: text.replace("{schema}", identifier)
            .replace("{batch_rows}", str(config.batch_rows))
            .replace("{batch_bytes}", str(config.batch_bytes))
            for name, text in sql.load("relay").items()
        }
        self._bell = bell_key(config.schema, shard)
        self._state = ""
        self._sources: Sources | None = None
        # Whether requests were open when it was looked last: then they are likely to be still.
        self._asked = False
        self._taken = f"taken {shard} "
        self._announced: str | None = None

    # -- the connection ----------------------------------------------------------------------------------------

    @property
    def connected(self) -> bool:
        """Whether a connection is open, as far as is known."""
        return self._connection is not None and not self._connection.closed

    def open(self) -> Identity:
        """Connect and check that this server can be published from."""
        self.close()
        connection = connect_as(self._config, self._application_name("connecting"), patience=self._patience)
        try:
            with translated(self._where), self._patience.call(connection):
                identity = self._identify(connection)
                # The relay's queries are written for their indexes; a plan made while the table was small must not
                # stay when it has grown. Planning anew for each batch costs more than reading a few entries.
                # The order that each asks for is that of the index which it is to use.
                for way in ("seqscan", "bitmapscan", "sort", "incremental_sort"):
                    connection.execute(f"SET enable_{way} = off".encode())
                connection.execute("SET plan_cache_mode = force_generic_plan")
                connection.execute("SET jit = off")
                connection.execute(psycopg_sql.SQL("LISTEN {}").format(psycopg_sql.Identifier(self._config.schema)))
        except BaseException:
            connection.close()
            raise
        set_json_loads(orjson.loads, connection)
        self._connection = connection
        self._types_version = 0
        self._state = ""
        self._sources = Sources(self._config.schema, shard=self._shard, shards=identity.shards)
        self.identity = identity
        return identity

    def close(self) -> None:
        """Close the connection, if there is one; the doorbell is released with it."""
        self._patience.close()
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        self._ringing = self._to_unlock = False
        self._flushed_to = 0

    def _identify(self, connection: Connection) -> Identity:
        row = connection.execute(cast("Any", self._sql["identify"])).fetchone()
        if row is None:
            raise SchemaError(
                f"The outbox in {self._where} has no settings.", cure="Create it anew: outbox migrate --name NAME."
            )
        in_recovery, backend, version, name, shards, doorbell, retention = row
        if in_recovery:
            raise UnsuitableServerError(
                f"PostgreSQL at {self._where} is a standby: its snapshots leave out running transactions.",
                cure="Point OUTBOX_DATABASE_URL at the primary.",
            )
        if backend != connection.info.backend_pid:
            # A pooler makes up the process id that it tells its clients.
            raise UnsuitableServerError(
                f"The connection to {self._where} goes through a pooler, which breaks session locks and LISTEN.",
                cure="Point OUTBOX_DATABASE_URL at the server itself; services may go on using the pooler.",
            )
        if version != NEWEST:
            raise SchemaError(
                f"The outbox in {self._where} has schema version {version}, this relay needs {NEWEST}.",
                cure="Upgrade the older one: outbox migrate, or, in a service with Alembic, outbox revision and "
                "alembic upgrade head."
                if version < NEWEST
                else "Run a newer relay.",
            )
        if self._config.name is not None and self._config.name != name:
            raise WrongOutboxError(
                f'The outbox in {self._where} is named "{name}", the settings say "{self._config.name}".',
                cure="Correct OUTBOX_NAME (or --name), or the database URL: one of them points elsewhere.",
            )
        if self._shard >= shards:
            raise WrongOutboxError(
                f"The outbox in {self._where} has {shards} shard(s), numbered from 0, and no shard {self._shard}.",
                cure="Correct OUTBOX_SHARD (or --shard).",
            )
        try:
            system = connection.execute(cast("Any", self._sql["system"])).fetchone()
        except (pg.InsufficientPrivilege, pg.FeatureNotSupported, pg.UndefinedFunction):
            system = None
        sequence = connection.execute(cast("Any", self._sql["sequence"])).fetchone()
        handed_out, greatest = sequence or (0, 0)
        if handed_out < greatest:
            raise UnsuitableServerError(
                f"The id sequence of the outbox in {self._where} stands at {handed_out}, below the greatest entry id "
                f"{greatest}: it is a copy, and newer entries may already have got smaller ids.",
                cure="Stop the writers of the copy, then: outbox adopt.",
            )
        return Identity(name, shards, doorbell, retention, system[0] if system else None)

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """A call to the server: its errors in the project's words, and no longer than patience lasts."""
        with translated(self._where), self._patience.call(self._open()):
            yield

    def _open(self) -> Connection:
        if self._connection is None:
            raise RelayError("The reader has no connection; open() comes first.")
        return self._connection

    # -- reading -----------------------------------------------------------------------------------------------

    def read(
        self, position: Position, wanted: Callable[[Sequence[Request], Mapping[str, EntityType]], Wanted] | None = None
    ) -> Batch:
        """Read the next batch after a position.

        `wanted` is asked, within the batch's transaction, what the open requests want to be read, given the entity
        types; see `Batch.takes_requests`.
        """
        began = time.monotonic()
        if position.cut is not None and position.cut.last_id >= position.point.floor:
            # Nothing can be late any more, and nothing is done for requests.
            return replace(self._stream(position, position.cut), seconds=time.monotonic() - began)
        wanted = wanted or (lambda _requests, _types: Wanted())
        held = self._asked or self._reads
        batch, requests = self._fetch(position, wanted=wanted if held else None)
        if not held and ((batch.takes_requests and requests) or (batch.entries and self._reads)):
            # Once more, and in one transaction with what is read through sources.
            batch, requests = self._fetch(position, wanted=wanted)
        self._asked = bool(requests)
        return replace(batch, seconds=time.monotonic() - began)

    def _fetch(
        self, position: Position, *, wanted: Callable[[Sequence[Request], Mapping[str, EntityType]], Wanted] | None
    ) -> tuple[Batch, Sequence[Request]]:
        """A batch and the open requests, in one round trip; or, with `wanted`, with what they want."""
        connection = self._open()
        point, cut = position.point, position.cut
        head_arguments = self._head_arguments(position)
        last_id = cut.last_id if cut else 0
        arguments = self._range(cut, above=max(point.floor, last_id))
        if point.snapshot is not None:
            arguments |= {
                "xmax1": str(point.snapshot.xmax),
                "xip1": _array(point.snapshot.xip),
                "floor": point.floor,
                "last_id": last_id,
            }
        with self._asking():
            try:
                with connection.pipeline():
                    connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                    head_cursor = connection.execute(self._query("head"), head_arguments, prepare=True)
                    cursor = connection.cursor(binary=True)
                    query = "fresh" if point.snapshot is None else "entries"
                    cursor.execute(self._query(query), arguments, prepare=True)
                    if wanted is None:
                        flush_cursor = self._commit(connection)
                head, requests = self._head(head_cursor.fetchone())
                entries = cast("list[Entry]", cursor.fetchall())
                batch = Batch(position, head, self._types, entries, self._ended_at(entries))
                if batch.cut:
                    self._mean_size = _sizes(entries) / len(entries)
                if wanted is not None:
                    if batch.takes_requests:
                        found = self._found(connection, wanted(requests, self._types), head)
                        batch = replace(batch, requests=requests, found=found)
                    batch = self._with_live(connection, batch)
                    with connection.pipeline():
                        flush_cursor = self._commit(connection)
                self._take_flushed(flush_cursor)
            finally:
                _end(connection)
        return batch, requests

    def _found(self, connection: Connection, asked: Wanted, head: Head) -> Found:
        """What requests want, within the batch's transaction: of the log first, before the sources' settings hold."""
        retained = self._retained(connection, asked.retained, head)
        found = Found()
        if asked.page is not None and asked.page.history is not None:
            found = self._history(connection, asked.page, asked.page.history, found, head)
        if self._sources is not None:
            found = self._sources.find(connection, asked, self._types, retained, found)
        return found

    def _stream(self, position: Position, cut: Cut) -> Batch:
        """The next batch of a backlog: read row by row, while the server goes on, up to the limit in bytes."""
        connection = self._open()
        # A query that is ended before its end is one that the server cancels, and logs.
        rows = min(self._config.batch_rows, max(1, int(self._config.batch_bytes * _LIKELY / self._mean_size)))
        arguments = {**self._range(cut, above=max(position.point.floor, cut.last_id)), "rows": rows}
        entries: list[Entry] = []
        size, more = 0, True
        with self._asking():
            try:
                with connection.pipeline():
                    connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
                    head_cursor = connection.execute(self._query("head"), self._head_arguments(position), prepare=True)
                    connection.execute("SAVEPOINT backlog")
                head, _ = self._head(head_cursor.fetchone())
                at_once = self._chunk_rows()
                read = connection.cursor().stream(self._query("backlog"), arguments, binary=True, size=at_once)
                # Closed before its end, it cancels the query.
                with closing(cast("Generator[Entry]", read)) as stream:
                    while more and (chunk := list(islice(stream, at_once))):
                        entries += chunk
                        size += _sizes(chunk)
                        more = size < self._config.batch_bytes
                if connection.info.transaction_status == psycopg.pq.TransactionStatus.INERROR:
                    # Cancelled; what is read through sources comes in the same snapshot.
                    connection.execute("ROLLBACK TO SAVEPOINT backlog")
                while not more and size - _size(entries[-1]) >= self._config.batch_bytes:
                    size -= _size(entries.pop())
                ended = more and len(entries) < rows
                if entries:
                    self._mean_size = size / len(entries)
                batch = Batch(position, head, self._types, entries, None if ended else entries[-1][0])
                batch = self._with_live(connection, batch)
                with connection.pipeline():
                    flush_cursor = self._commit(connection)
                self._take_flushed(flush_cursor)
            finally:
                _end(connection)
        return batch

    @property
    def _reads(self) -> bool:
        """Whether a type is read through its source."""
        return any(of.reads_source for of in self._types.values())

    def _with_live(self, connection: Connection, batch: Batch) -> Batch:
        """The batch with what sources say of its entries' keys: shorter where that is more than a batch may hold."""
        if self._sources is None or not (batch.entries and self._reads):
            return batch
        live, last_id = self._sources.live(connection, batch.entries, self._types, most=self._config.batch_bytes)
        if last_id is None:
            return replace(batch, live=live)
        entries = batch.entries[: bisect_right(batch.entries, last_id, key=itemgetter(0))]
        self._mean_size = max(self._mean_size, self._config.batch_bytes / len(entries))
        # What is cut takes no requests: they are read for again.
        return replace(batch, entries=entries, live=live, last_id=last_id, requests=(), found=Found())

    def _chunk_rows(self) -> int:
        """How many rows the client may take in at once, whatever is in them."""
        greatest = max((entity_type.max_bytes for entity_type in self._types.values()), default=1)
        return max(1, min(_CHUNK_ROWS, _CHUNK_LIMITS * self._config.batch_bytes // greatest))

    def _range(self, cut: Cut | None, *, above: int) -> dict[str, Any]:
        """What the queries of entries are asked for; of a cut, what lies between it and its end."""
        to = cut.to.snapshot if cut else None
        return {
            "shard": self._shard,
            "above": above,
            "upto": cut.to.floor if cut else _MOST,
            "xmax2": str(to.xmax if to else _MOST),
            "xip2": _array(to.xip if to else ()),
        }

    def _commit(self, connection: Connection) -> psycopg.Cursor[Any]:
        """End the batch's transaction, in a pipeline; the cursor that is to have the flushed LSN."""
        connection.execute("COMMIT")
        # Not before: what comes ahead of a BEGIN in a pipeline would be in its transaction.
        self._unlock(connection)
        return connection.execute(self._query("flush_lsn"), prepare=True)

    def _take_flushed(self, cursor: psycopg.Cursor[Any]) -> None:
        flushed = cursor.fetchone()
        self._flushed_to = _lsn(flushed[0]) if flushed else 0

    def look(self, position: Position) -> tuple[Head, Mapping[str, EntityType]]:
        """What the database says of itself now, given a position, and the entity types: a batch without its entries."""
        with self._asking():
            row = self._open().execute(self._query("head"), self._head_arguments(position)).fetchone()
        return self._head(row)[0], self._types

    def _head_arguments(self, position: Position) -> dict[str, Any]:
        reached = position.reached.anchor
        return {
            "anchor_id": reached.id if reached else None,
            "anchor_xid": str(reached.xid) if reached else None,
            "anchor_created": reached.created_us if reached else None,
            "anchor_shard": reached.shard if reached else None,
            "types_version": self._types_version,
            "shard": self._shard,
        }

    def _query(self, name: str) -> Any:
        # psycopg takes only literal strings; these come from files.
        return self._sql[name]

    def _head(self, row: Sequence[Any] | None) -> tuple[Head, list[Request]]:
        if row is None:
            raise SchemaError(f"The outbox in {self._where} has no settings any more.")
        (snapshot, lsn, timeline, epoch, removed_id, types_version, adopted_from, base_id, found, top_id, top_xid,
         top_created, top_shard, types, requests) = row  # fmt: skip
        if types is not None:
            self._types = {t[0]: EntityType(*t) for t in types}
            self._types_version = types_version
        head = Head(
            snapshot=Snapshot.parse(snapshot),
            insert_lsn=lsn,
            system=self.identity.system if self.identity else None,
            timeline=timeline,
            epoch=epoch,
            removed_id=removed_id,
            types_version=types_version,
            anchor_found=found,
            top=None if top_id is None else Anchor(top_id, int(top_xid), top_created, top_shard),
            adopted_from=adopted_from,
            base_id=base_id,
        )
        return head, [Request(*r) for r in requests or ()]

    def _ended_at(self, entries: Sequence[Entry]) -> int | None:
        if len(entries) >= self._config.batch_rows:
            return entries[-1][0]
        # The query has left out what comes after its sum went over the limit; taken for cut when it was not, a batch is
        # followed by an empty one.
        if entries and sum(map(_most, entries)) >= self._config.batch_bytes:
            return entries[-1][0]
        return None

    def _retained(self, connection: Connection, wanted: Mapping[Entity, int], head: Head) -> list[Entry]:
        if not wanted:
            return []
        # A follower has no entries of its own.
        names: dict[Entity, list[str]] = {}
        for name, key in wanted:
            written_as = self._types[name].written_as if name in self._types else name
            names.setdefault((written_as, key), []).append(name)
        cursor = connection.execute(
            self._query("last_retained"),
            {
                "types": [type_name for type_name, _ in names],
                "keys": [key for _, key in names],
                "shard": self._shard,
                "from_id": min(wanted.values()),
                "removed_id": head.removed_id,
            },
        )
        found = cast("list[Entry]", cursor.fetchall())
        return sorted(Entry(row[0], name, *row[2:]) for row in found for name in names[row[1], row[2]])

    def _history(
        self, connection: Connection, page: Page, chosen: Mapping[str, Any], found: Found, head: Head
    ) -> Found:
        """The entries of a window of the log that a request has chosen: those that this batch sees, in id order."""
        after = int(page.after[0]) if page.after else max(head.removed_id, (chosen.get("first_id") or 1) - 1)
        if after < head.removed_id:
            # Pruning waits for an open history; but for one that was asked for while it looked.
            error = (
                f"entries up to {head.removed_id} were pruned meanwhile, and keys may have an older state as the last: "
                "see outbox reconcile --repair"
            )
            return replace(found, errors={**found.errors, page.type: error})
        began = time.monotonic()
        window = {"shard": self._shard, "after": after, "rows": page.rows}
        row = connection.execute(self._query("window"), window).fetchone()
        there, taken, end = row or (0, 0, None)
        if end is None:
            return replace(found, paged=page, more=False)
        cursor = connection.cursor(binary=True)
        cursor.execute(
            self._query("history"),
            {
                "shard": self._shard,
                "after": after,
                "upto": end,
                "type": chosen["of"],
                "keys": chosen.get("keys"),
            },
        )
        rows = [Row(Entry(one[0], page.type, *one[2:]), (str(one[0]),)) for one in cursor.fetchall()]
        more = there >= page.rows or taken < there
        return replace(
            found,
            page=rows,
            paged=page,
            more=more,
            end=(str(end),),
            scanned=taken,
            page_seconds=time.monotonic() - began,
        )

    # -- durability --------------------------------------------------------------------------------------------

    def wait_flushed(self, lsn: str) -> None:
        """Wait until everything up to an LSN is on the server's disk.

        An asynchronous commit is visible before it is; what a crash loses must not have been published.
        """
        if _lsn(lsn) <= self._flushed_to:
            return  # the read that brought it has seen it there
        connection = self._open()
        with self._asking():
            if self._flushed(connection, lsn):
                return
            # Left alone the server may take its time: it flushes a page that is not full when somebody commits.
            modern = connection.info.server_version >= _BACKEND_FLUSHES
            connection.execute(self._query("flush" if modern else "flush_by_commit"))
            deadline = time.monotonic() + self._config.statement_timeout
            while not self._flushed(connection, lsn):
                if time.monotonic() > deadline:
                    raise pg.QueryCanceled("the write-ahead log was not flushed in time")
                connection.execute(self._query("flush" if modern else "flush_by_commit"))

    def _flushed(self, connection: Connection, lsn: str) -> bool:
        row = connection.execute(self._query("flushed"), {"lsn": lsn}, prepare=True).fetchone()
        return bool(row and row[0])

    # -- the doorbell ------------------------------------------------------------------------------------------

    def try_bell(self) -> bool:
        """Hold the doorbell, so that writers ring; False when a writer holds it (or the outbox has none)."""
        if self.identity is None or not self.identity.doorbell:
            return False
        with self._asking():
            self._unlock(self._open())
            row = self._open().execute(self._query("try_bell"), {"bell": self._bell}, prepare=True).fetchone()
        self._ringing = bool(row and row[0])
        return self._ringing

    def release_bell(self, *, now: bool) -> None:
        """Let writers be silent again: `now`, or in the round trip of the next read, which comes at once.

        A writer that rings meanwhile rings once too often; one that is silent afterwards is seen by the look that comes
        before every sleep, when the bell is held again.
        """
        if not self._ringing:
            return
        self._ringing, self._to_unlock = False, True
        if now:
            with self._asking():
                self._unlock(self._open())

    def _unlock(self, connection: Connection) -> None:
        if self._to_unlock:
            self._to_unlock = False
            connection.execute(self._query("release_bell"), {"bell": self._bell}, prepare=True)

    @property
    def announced(self) -> str | None:
        """The token of the relay that was heard last to have taken this shard, if any was; see `hear`."""
        return self._announced

    def announce(self, token: str) -> None:
        """Tell the other relays of this shard, which may sleep, that it was taken."""
        with self._asking():
            self._open().execute("SELECT pg_notify(%s, %s)", [self._config.schema, f"{self._taken}{token}"])

    def wait_rung(self, seconds: float, wake: Wake) -> bool:
        """Sleep until somebody rings, `wake` is set, or the time is over; whether it was rung."""
        connection = self._open()
        with translated(self._where), selectors.DefaultSelector() as selector:
            if self.hear():
                return True
            selector.register(connection.fileno(), selectors.EVENT_READ)
            selector.register(wake.fileno(), selectors.EVENT_READ)
            if any(key.fd == connection.fileno() for key, _ in selector.select(seconds)):
                return self.hear()
        return False

    def hear(self) -> bool:
        """Take in what was notified: rings of writers, and relays that took a shard; whether there was anything."""
        connection = self._open()
        with translated(self._where):
            # The own announcement comes back, too, and rings for nothing.
            heard = [n for n in connection.notifies(timeout=0) if n.pid != connection.info.backend_pid]
        for notification in heard:
            if notification.payload.startswith(self._taken):
                self._announced = notification.payload.removeprefix(self._taken)
        return bool(heard)

    # -- the functions that the relay may call -----------------------------------------------------------------

    def report(self, request: int, outcome: Mapping[str, Any]) -> None:
        """Say what became of a request; saying it again changes nothing."""
        with self._asking():
            self._open().execute(
                self._query("report"),
                {"request": request, "shard": self._shard, "outcome": orjson.dumps(outcome).decode()},
            )

    def show(self, state: str) -> None:
        """Show a state in `pg_stat_activity`, for `outbox status`; only when it has changed."""
        if state == self._state or not self.connected:
            return
        with self._asking():
            self._open().execute("SELECT set_config('application_name', %s, false)", [self._application_name(state)])
        self._state = state

    def _application_name(self, state: str) -> str:
        name = self.identity.name if self.identity else self._config.name or "?"
        # PostgreSQL cuts it at 63 bytes.
        return f"outbox-relay {name[:30]}/{self._shard} {state}"[:63]


def _size(entry: Sequence[Any]) -> int:
    """As the queries have it: bytes of the state, characters of what else varies, and a share for the rest."""
    return 256 + len(entry[2]) + len(entry[3] or b"") + len(entry[6] or "") + len(entry[7] or "")


def _most(entry: Sequence[Any]) -> int:
    """What the queries may have it for: to a server without an encoding (SQL_ASCII) a byte is a character."""
    return _size(entry) + 3 * (len(entry[2]) + len(entry[6] or "") + len(entry[7] or ""))


def _sizes(entries: Sequence[Sequence[Any]]) -> int:
    """The same of several, without a step of Python for each."""
    varying = sum(sum(map(len, filter(None, map(column, entries)))) for column in _VARYING)
    return 256 * len(entries) + varying


def _end(connection: Connection) -> None:
    """End a transaction that an error left open."""
    if not connection.closed and connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE:
        connection.execute("COMMIT")


def _lsn(text: str) -> int:
    """`16/B374D848` as a number."""
    high, _, low = text.partition("/")
    return int(high, 16) << 32 | int(low, 16)


def _array(xids: Sequence[int]) -> str:
    return "{" + ",".join(map(str, xids)) + "}"

"""What the stores in SQL share: opening, what is known of a model, and rebuilds; by SQLAlchemy Core."""

from __future__ import annotations

import datetime as dt
import secrets
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any

from sqlalchemy import Connection, Engine, MetaData, Table, and_, delete, inspect, or_, select, update
from sqlalchemy import exc as sa
from sqlalchemy.schema import CreateIndex, CreateTable, DropTable, sort_tables

from outbox.errors import ConfigError, SchemaError, StoreError
from outbox.kafka.subscription import Place
from outbox.read_model.declared import Copy, Declared, Follow, Function
from outbox.read_model.dialect import Dialect
from outbox.read_model.replace import is_emptied, replace
from outbox.read_model.store import BadBuildError, Build, Facts, LostBuildError, RefusedError
from outbox.read_model.tables import VERSION, Books, books, shadows_of
from outbox.read_model.transaction import OF_PLACE, SqlTransaction, aware

__all__ = ["SqlStore", "SqlTransaction"]


class SqlStore(Dialect):
    """Base of the stores in SQL; see `outbox.read_model.store.Store`. `insert` is the dialect's own."""

    def __init__(self, insert: Any, *, schema: str | None) -> None:
        super().__init__(insert)
        self._schema = schema
        self._engine: Engine | None = None
        self._declared: Declared | None = None
        self.books: Books = books(MetaData(), schema=schema)
        self._tables: Mapping[Build, Mapping[str, Table]] = {}
        self._token: str | None = None

    # -- where they differ -------------------------------------------------------------------------------------

    def _connect(self) -> Engine:
        raise NotImplementedError

    def builder(self) -> AbstractContextManager[bool]:
        """See `Store.builder`."""
        raise NotImplementedError

    # -- opening -----------------------------------------------------------------------------------------------

    @property
    def declared(self) -> Declared:
        """The model that it was opened for."""
        if self._declared is None:
            raise ConfigError("The store is not open.", cure="Open it: store.open(declared).")
        return self._declared

    @property
    def engine(self) -> Engine:
        """Its engine, once it is open."""
        if self._engine is None:
            raise ConfigError("The store is not open.", cure="Open it: store.open(declared).")
        return self._engine

    def open(self, declared: Declared) -> None:
        """See `Store.open`."""
        self._declared = declared
        self._tables = {
            "live": {table.fullname: table for table in declared.tables},
            "new": shadows_of(declared.tables),
        }
        if self._engine is None:
            self._engine = self._connect()
        with self.translated(), self._engine.connect().execution_options(reads=True) as connection:
            there = inspect(connection)
            for table in [*self.books.all, *declared.tables]:
                if not there.has_table(table.name, schema=table.schema):
                    raise SchemaError(
                        f"The table {table.fullname} of the read model {declared.name} is missing.",
                        cure=f"Make it by a revision: {self._made_by(table)}; or by store.create(declared).",
                    )
                columns = {column["name"] for column in there.get_columns(table.name, schema=table.schema)}
                if missing := [column.name for column in table.columns if column.name not in columns]:
                    raise SchemaError(
                        f"The table {table.fullname} has no column {', '.join(missing)}.",
                        cure="Add it by a revision of the service's.",
                    )

    def _made_by(self, table: Table) -> str:
        """The line of a revision that makes a table."""
        schema = f"schema={table.schema!r}" if table.schema else ""
        if table in self.books.all:
            return f"op.outbox_read_model_create({schema})"
        if any(isinstance(one.into, Copy) and one.into.table is table for one in self.declared.follows):
            return f"op.outbox_read_model_copy({', '.join(filter(None, [repr(table.name), schema]))})"
        return f"op.create_table({table.name!r}, ...)"

    def create(self, declared: Declared) -> None:
        """Make the tables that are missing: for a service without migrations, and for tests."""
        if self._engine is None:
            self._engine = self._connect()
        with self.translated(), self._engine.begin() as connection:
            for table in [*self.books.all, *sort_tables(declared.tables)]:
                table.create(connection, checkfirst=True)

    def close(self) -> None:
        """See `Store.close`."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.dispose()

    # -- transactions ------------------------------------------------------------------------------------------

    @contextmanager
    def transaction(self, build: Build = "live", *, reads: bool = False) -> Iterator[SqlTransaction]:
        """See `Store.transaction`."""
        with self.translated(), self.engine.connect().execution_options(reads=reads) as connection, connection.begin():
            if build == "new":
                self._check_own(connection, read=True)
            if not reads and self.declared.serial:
                self.alone(connection, build)
            yield self._within(connection, build, reads=reads)

    def _within(self, connection: Connection, build: Build, *, reads: bool) -> SqlTransaction:
        return SqlTransaction(self, connection, self.books, self._tables[build], self.declared.name, build, reads=reads)

    @contextmanager
    def translated(self) -> Iterator[None]:
        """Turn the driver's errors into the store's."""
        try:
            yield
        except sa.StatementError as error:
            found = self.translate(error)
            if isinstance(found, RefusedError):
                raise StoreError(
                    f"The read model's database refuses a value: {found}.",
                    cure="Mend what refuses it in the service's schema: a reference, a constraint, a trigger.",
                ) from error
            raise found from error

    # -- facts -------------------------------------------------------------------------------------------------

    def facts(self) -> Facts:
        """See `Store.facts`."""
        models, topics = self.books.models, self.books.topics
        name = self.declared.name
        with self.transaction(reads=True) as transaction:
            connection = transaction.connection
            row = connection.execute(select(models).where(models.c.model == name)).fetchone()
            of_topics = connection.execute(select(topics).where(topics.c.model == name)).fetchall()
            parked = transaction.parked_count()
        if row is not None and row.version != VERSION:
            raise SchemaError(
                f"The read model {name} was kept by version {row.version} of its tables; this library knows {VERSION}.",
                cure="Use the library that wrote it, or migrate the tables: see CHANGELOG.md.",
            )
        return Facts(
            row.fingerprint if row else None,
            aware(row.loaded_at) if row and row.loaded_at else None,
            row.rebuild if row else None,
            row.rebuild_for if row else None,
            {one.topic: one.topic_id for one in of_topics if one.topic_id},
            {one.topic: aware(one.began_at) for one in of_topics if one.began_at},
            {one.topic: aware(one.current_at) for one in of_topics if one.current_at},
            parked,
        )

    def know(
        self,
        *,
        fingerprint: str | None = None,
        loaded_at: dt.datetime | None = None,
        topic_ids: Mapping[str, str] = {},
        began_at: Mapping[str, dt.datetime] = {},
        current_at: Mapping[str, dt.datetime] = {},
    ) -> None:
        """See `Store.know`."""
        given = {"fingerprint": fingerprint, "loaded_at": loaded_at}
        with self.translated(), self.engine.begin() as connection:
            self._know_model(connection, **{name: value for name, value in given.items() if value is not None})
            self._know_topics(connection, topic_ids=topic_ids, began_at=began_at, current_at=current_at)

    def _know_topics(
        self,
        connection: Connection,
        *,
        topic_ids: Mapping[str, str] = {},
        began_at: Mapping[str, dt.datetime] = {},
        current_at: Mapping[str, dt.datetime] = {},
    ) -> None:
        topics = self.books.topics
        for topic in sorted({*topic_ids, *began_at, *current_at}):
            connection.execute(self.ensure(topics, {"model": self.declared.name, "topic": topic}))
            here = update(topics).where(topics.c.model == self.declared.name, topics.c.topic == topic)
            if topic in topic_ids:
                connection.execute(here.values(topic_id=topic_ids[topic]))
            if topic in began_at:
                connection.execute(here.where(topics.c.began_at.is_(None)).values(began_at=began_at[topic]))
            if topic in current_at:
                older = or_(topics.c.current_at.is_(None), topics.c.current_at < current_at[topic])
                connection.execute(here.where(older).values(current_at=current_at[topic]))

    def _know_model(self, connection: Connection, **values: Any) -> None:
        models, name = self.books.models, self.declared.name
        new = {"model": name, "version": VERSION, "fingerprint": self.declared.fingerprint}
        connection.execute(self.ensure(models, new))
        if values:
            # What is known already waits for nobody who holds the row.
            differs = or_(*(models.c[column].is_distinct_from(value) for column, value in values.items()))
            connection.execute(update(models).where(models.c.model == name, differs).values(values))

    def ask_rebuild(self, why: str | None) -> None:
        """See `Store.ask_rebuild`."""
        wanted = None if why is None else self.declared.fingerprint
        with self.translated(), self.engine.begin() as connection:
            self._know_model(connection, rebuild=why, rebuild_for=wanted)

    # -- rebuilds ----------------------------------------------------------------------------------------------

    def begin_build(self) -> str:
        """See `Store.begin_build`."""
        token = secrets.token_hex(16)
        with self.translated(), self.engine.begin() as connection:
            # First: whoever writes an earlier build ends, and writes no more.
            self._know_model(connection, build_token=token)
            self._drop_build(connection)
            for table in sort_tables(list(self._tables["new"].values())):
                # Not `table.create`, which makes types and sequences as well: those of the table itself are there.
                connection.execute(CreateTable(table))
                for index in table.indexes:
                    connection.execute(CreateIndex(index))
        self._token = token
        return token

    def end_build(self) -> None:
        """See `Store.end_build`."""
        if self._token is None:
            return
        with suppress(LostBuildError), self.translated(), self.engine.begin() as connection:
            self._check_own(connection)
            self._know_model(connection, build_token=None)
            self._drop_build(connection)
        self._token = None

    def _check_own(self, connection: Connection, *, read: bool = False) -> None:
        """See that the new build is this store's own; it stays so until the transaction ends."""
        models = self.books.models
        query = select(models.c.build_token).where(models.c.model == self.declared.name)
        token = connection.execute(query.with_for_update(read=read)).scalar()
        if self._token is None or token != self._token:
            raise LostBuildError(f"another process has begun to rebuild the read model {self.declared.name}")

    def _drop_build(self, connection: Connection) -> None:
        for table in reversed(sort_tables(list(self._tables["new"].values()))):
            connection.execute(DropTable(table, if_exists=True))
        for table in (self.books.partitions, self.books.keys, self.books.parked):
            connection.execute(delete(table).where(table.c.model == self.declared.name, table.c.build == "new"))

    def swap(
        self,
        fingerprint: str,
        *,
        anew: Collection[str] = (),
        topic_ids: Mapping[str, str] = {},
        current_at: Mapping[str, dt.datetime] = {},
        may_empty: bool = False,
    ) -> Sequence[Place]:
        """See `Store.swap`."""
        with self.translated(), self.engine.begin() as connection:
            self.unhurried(connection)
            # Before the partitions, as a claim does; after that nobody claims.
            self._check_own(connection)
            live, new = self._lock_partitions(connection)
            behind = [
                place
                for place, row in live.items()
                if place.topic in self.declared.by_topic
                and place.topic not in anew
                and row.next_offset > (new[place].next_offset if place in new else 0)
            ]
            if behind:
                return behind
            self._refuse_emptied(connection, may_empty=may_empty)
            replace(self, connection, self._tables["new"], self.declared.tables)
            self._replace_books(connection, live, new, anew)
            known = {"fingerprint": fingerprint, "loaded_at": dt.datetime.now(dt.UTC)}
            self._know_model(connection, **known, rebuild=None, rebuild_for=None, build_token=None)
            self._know_topics(connection, topic_ids=topic_ids, current_at=current_at)
            self._drop_build(connection)
        self._token = None
        return []

    def _replace_books(
        self, connection: Connection, live: Mapping[Place, Any], new: Mapping[Place, Any], anew: Collection[str]
    ) -> None:
        """Of the live build those of the new one; and nothing of topics that are not followed."""
        name, topics, partitions = self.declared.name, self.books.topics, self.books.partitions
        for table in (self.books.keys, self.books.parked):
            of_model = table.c.model == name
            connection.execute(delete(table).where(of_model, table.c.build == "live"))
            connection.execute(update(table).where(of_model, table.c.build == "new").values(build="live"))
        followed = sorted(self.declared.by_topic)
        connection.execute(delete(topics).where(topics.c.model == name, topics.c.topic.not_in(followed)))
        of_live = and_(partitions.c.model == name, partitions.c.build == "live")
        over = or_(partitions.c.topic.not_in(followed), partitions.c.topic.in_(list(anew)))
        connection.execute(delete(partitions).where(of_live, over))
        # Greater than anybody has claimed, where the new build has read nothing as well.
        connection.execute(update(partitions).where(of_live).values(epoch=partitions.c.epoch + 1))
        statement = self.upsert(partitions, [*OF_PLACE, "next_offset", "epoch"], OF_PLACE)
        for place, row in new.items():
            epoch = max(row.epoch, live[place].epoch if place in live else 0) + 1
            values = dict(zip(OF_PLACE, (name, "live", *place), strict=True))
            connection.execute(statement, {**values, "next_offset": row.next_offset, "epoch": epoch})

    def _lock_partitions(self, connection: Connection) -> tuple[Mapping[Place, Any], Mapping[Place, Any]]:
        """Those of the live build and of the new one: nobody goes on with one until the transaction ends."""
        partitions = self.books.partitions
        by_build: dict[str, dict[Place, Any]] = {"live": {}, "new": {}}
        query = select(partitions).where(partitions.c.model == self.declared.name)
        in_order = query.order_by(*(partitions.c[name] for name in OF_PLACE))
        for row in connection.execute(in_order.with_for_update()):
            by_build[row.build][Place(row.topic, row.partition)] = row
        return by_build["live"], by_build["new"]

    def _refuse_emptied(self, connection: Connection, *, may_empty: bool) -> None:
        """A mapping that fits no message, or a topic that is not filled yet, would take everything that is served."""
        build = self._within(connection, "new", reads=True)
        for follow in self.declared.follows:
            parked = build.parked(follow.topic, limit=1)
            for table in follow.into.writes if parked or not may_empty else ():
                if not is_emptied(connection, table, build[table]):
                    continue
                would = (
                    f"The new build of the read model {self.declared.name} would leave the table {table.fullname} empty"
                )
                if parked:
                    raise BadBuildError(
                        f"{would}: of {follow.topic} {build.parked_count(follow.topic)} messages are parked, the first "
                        f"because {parked[0].reason}.",
                        cure="Mend the mapping of the topic.",
                    )
                raise BadBuildError(
                    f"{would}: {follow.topic} has nothing for it.",
                    cure="Its owner fills the topic (outbox backfill start); or, if it is to be empty: "
                    "outbox read-model rebuild --app MODULE:ATTRIBUTE.",
                )

    # -- for reconcile -----------------------------------------------------------------------------------------

    def rows(self, follow: Follow) -> Generator[tuple[str, Mapping[str, object]]]:
        """See `Store.rows`."""
        into = follow.into
        if isinstance(into, Function):
            raise ConfigError(
                f"What a function makes of {follow.topic} cannot be compared with the topic.",
                cure="Compare a copy, or columns; or rebuild: outbox read-model rebuild.",
            )
        names = list(into.columns)
        with self.translated(), self.engine.connect().execution_options(reads=True) as connection:
            query = select(*(into.table.c[name] for name in names))
            # Closed also where nobody reads it to its end.
            with connection.execution_options(yield_per=2000).execute(query) as found:
                for row in found:
                    yield str(row[0]), dict(zip(names, row, strict=True))

"""Query plans: what the relay, the status and pruning ask costs what is new, not what is retained.

Every statement that they really send is recorded, and then explained and run in the same session, with the same
settings: a query that is added later is judged like the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import psycopg
import pytest

from bench.plans import BATCH, SLACK, everything, explain, judge, recorded, touched
from outbox import pruning, sql, status
from outbox.config import Config
from outbox.position import Point, Position, start
from outbox.reader import Reader

pytestmark = pytest.mark.postgres

SHARDS = 2


@dataclass
class Log:
    """An outbox that retains so many entries, all published but for what a test does."""

    url: str
    rows: int

    @property
    def config(self) -> Config:
        return Config(database_url=self.url, batch_rows=BATCH)

    def sql(self, *statements: str) -> None:
        with psycopg.connect(self.url) as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def put(self, count: int) -> None:
        self.sql(
            "INSERT INTO outbox.entries (type, key, state)"
            f" SELECT 'thing', 'new' || n, '{{}}' FROM generate_series(1, {count}) n"
        )

    def position(self, reader: Reader) -> Position:
        """Everything that is visible now is published."""
        return everything(reader, "test")


@pytest.fixture(
    scope="module",
    params=[(10, 5, False), (10, 5, True), (100_000, 100, False), (100_000, 100, True), (100_000, 1, False)],
    ids=str,
)
def filled(request: pytest.FixtureRequest, postgres: object) -> Iterator[str]:
    """The name of a database whose outbox retains entries in all slots, with statistics or without any."""
    from devstack.postgres import Postgres
    from outbox import schema

    assert isinstance(postgres, Postgres)
    rows, transactions, analyzed = request.param
    name = f"plans_{rows}_{transactions}_{analyzed}".lower()
    with psycopg.connect(postgres.url(), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name}".encode())
    with psycopg.connect(postgres.url(name), autocommit=True) as connection:
        with connection.transaction():
            schema.install(connection, schema.Settings(name="test", shards=SHARDS))
        connection.execute("INSERT INTO outbox.entity_types (name, topic) VALUES ('thing', 'thing')")
        for slot in range(12):
            # Statistics are what this test says that they are.
            connection.execute(f"ALTER TABLE outbox.entries_{slot} SET (autovacuum_enabled = off)".encode())
        # As if by so many transactions, through eleven of the ring's slots, before the one that is being filled; what
        # one large transaction wrote lies in one.
        connection.execute(
            "INSERT INTO outbox.entries (xid, slot, type, key, state, created_at)"
            " SELECT (3 + n * (%(transactions)s - 1) / %(rows)s)::text::xid8,"
            "        (outbox.slot_of(clock_timestamp()) + 1 + (n - 1) * %(slots)s / %(rows)s) %% 12,"
            "        'thing', 'k' || n, convert_to(repeat('x', 100), 'UTF8'), now() - interval '1 hour'"
            " FROM generate_series(1, %(rows)s) n",
            {"rows": rows, "transactions": transactions, "slots": 11 if transactions > 1 else 1},
        )
        if analyzed:
            connection.execute("ANALYZE")
    yield f"{name} {rows}"
    with psycopg.connect(postgres.url(), autocommit=True) as admin:
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
def log(filled: str, make_database: Callable[..., str]) -> Log:
    """The same, for one test."""
    name, rows = filled.split()
    return Log(make_database(name), int(rows))


def reading(log: Log) -> closing[Reader]:
    reader = Reader(log.config, shard=0)
    reader.open()
    return closing(reader)


def read(log: Log, *, position: Position | None, then: Callable[[], None]) -> int:
    """Read one batch after a position (None: after everything) and judge what was asked; how many entries came."""
    with reading(log) as reader:
        after = position or log.position(reader)
        then()
        with recorded() as sent:
            found = len(reader.read(after).entries)
            reader.look(after)
        assert judge(sent, news=found)
    return found


def test_a_look_in_vain_looks_at_nothing(log: Log) -> None:
    """The head and the read, when everything is published."""
    assert read(log, position=None, then=lambda: None) == 0


def test_a_few_new_entries_cost_a_few_rows(log: Log) -> None:
    """However many are retained."""
    assert 0 < read(log, position=None, then=lambda: log.put(20)) < 20


def test_the_first_batch_of_a_backlog_costs_a_batch(log: Log) -> None:
    """Whatever is new may be late by its transaction: that it is not is seen in the index, and no row is fetched."""
    assert read(log, position=None, then=lambda: log.put(20_000)) == 1_000


def test_an_entry_of_a_transaction_that_was_open_is_found_by_it(log: Log) -> None:
    """By the index on transactions: it lies somewhere below the anchor."""
    with psycopg.connect(log.url) as late, reading(log) as reader:
        late.execute(
            "INSERT INTO outbox.entries (type, key, state) SELECT 'thing', 'l' || n, '{}' FROM generate_series(1, 9) n"
        )
        log.put(5)
        position = log.position(reader)
        late.commit()
        log.put(3)
        with recorded() as sent:
            found = len(reader.read(position).entries)
        assert 0 < found <= 12
        assert judge(sent, news=found)


def test_a_large_transaction_that_commits_late_is_read_once(log: Log) -> None:
    """Each batch goes on in it where the one before ended: an import of millions is not walked through for each."""
    with psycopg.connect(log.url) as late, reading(log) as reader:
        late.execute(
            "INSERT INTO outbox.entries (type, key, state)"
            " SELECT 'thing', 'l' || n, '{}' FROM generate_series(1, 8000) n"
        )
        log.put(5)
        position = log.position(reader)
        late.commit()
        found = 0
        while True:
            with recorded() as sent:
                batch = reader.read(position)
            assert judge(sent, news=len(batch.entries))
            found += len(batch.entries)
            if not batch.cut:
                break
            position = batch.next()
    assert found == pytest.approx(4000, rel=0.2)  # of one of the two shards


def test_a_backlog_is_read_in_the_order_of_its_index(log: Log) -> None:
    """From the start of the log, and from the middle of a cut: a batch, not the backlog."""
    begun = start("test", 0, "t", 1, None, 1, 0)
    count = read(log, position=begun, then=lambda: None)
    assert count == min(1_000, count)
    with reading(log) as reader:
        to = log.position(reader).point
    halfway = begun.advanced(to, log.rows // 2)
    assert read(log, position=halfway, then=lambda: None) > 0


def test_the_status_costs_what_is_unpublished(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a cut; and the ring is described by a few probes a slot."""
    with reading(log) as reader:
        position = log.position(reader)
    log.put(20)
    with reading(log) as reader:
        cut = position.advanced(log.position(reader).point, position.point.floor + 10)
    for name, at in (("point", position), ("cut", cut)):
        with monkeypatch.context() as patch:
            patch.setattr(status, "_from_kafka", lambda *_, at=at: ({0: at}, {}))
            with psycopg.connect(log.url, autocommit=True) as connection, recorded() as sent:
                seen = status.look(log.config, connection)
                # The shard without a position: all that is retained is unpublished, and counted.
                known = [one for one in sent if one.arguments.get("shard") != 1]
                ring = [one for one in known if "pg_relation_size" in one.text]
                assert judge([one for one in known if one not in ring], news=20)
                # Small slots are counted, large ones estimated.
                assert len(ring) == 1
                assert touched(explain(ring[0])) <= 30 + 2 * 12 * SHARDS
        assert 0 < next(row.unpublished or 0 for row in seen.types if row.shard == 0) <= 20, name
        assert len(seen.ring) == 12
        assert sum(slot.entries for slot in seen.ring) == pytest.approx(log.rows + 20, rel=0.1)


def test_pruning_finds_in_a_few_probes_that_nothing_is_old(log: Log) -> None:
    """What the server counts as read by sequential scans tells of the statements inside of functions, too."""
    with reading(log) as reader:
        position = log.position(reader)
    before = sequential(log)
    with recorded() as sent:
        pruned = list(pruning.prune_ring(log.config, [position]))
        assert {one.reason for one in pruned} <= {"retained", "empty"}
    assert sequential(log) == before
    queries = pruning_queries()
    with psycopg.connect(log.url, autocommit=True) as connection:
        connection.execute("SET enable_seqscan = off")
        asked = [one._replace(connection=connection) for one in sent if one.text in queries]
        # What is younger by time than by id is looked for in each slot for each slot.
        assert judge(asked, slack=12 * 12 * SHARDS + SLACK)


def pruning_queries() -> set[str]:
    return {text.replace("{schema}", '"outbox"') for text in sql.load("prune").values()}


def sequential(log: Log) -> int:
    """Rows of the log that were read by sequential scans."""
    with psycopg.connect(log.url, autocommit=True) as connection:
        row = connection.execute(
            "SELECT sum(seq_tup_read)::bigint FROM pg_stat_user_tables WHERE relname LIKE 'entries%'"
        ).fetchone()
    assert row is not None
    return int(row[0] or 0)


def test_the_point_of_a_shard_is_the_tables_greatest_entry(log: Log) -> None:
    """One probe a shard finds it (see the plans above), whatever shard it is of."""
    log.put(1)
    with reading(log) as reader, psycopg.connect(log.url) as connection:
        row = connection.execute("SELECT max(id) FROM outbox.entries").fetchone()
        point: Point = log.position(reader).point
        assert row == (point.floor,)

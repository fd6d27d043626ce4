"""The rule of what is published, in its four forms: the arithmetic, the reading, the status, the pruning."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import orjson
import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from model.world import Commit, Database, Row
from outbox import sql
from outbox.adoption import adopt_log
from outbox.config import Config
from outbox.position import Anchor, Point, Position, Snapshot, start
from outbox.reader import Reader
from outbox.status import position_arguments

pytestmark = pytest.mark.postgres

IDS, XIDS = st.integers(1, 12), st.integers(3, 14)
Rows = dict[int, int]
"""By id: the transaction id."""


@pytest.fixture(scope="module")
def url(postgres: object, outbox_template: str) -> Iterator[str]:
    """A database of its own, with an outbox; every example fills it anew."""
    from devstack.postgres import Postgres

    assert isinstance(postgres, Postgres)
    with psycopg.connect(postgres.url(), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE rule TEMPLATE {outbox_template}".encode())
    with psycopg.connect(postgres.url("rule")) as connection:
        connection.execute("SELECT setval('outbox.entries_id_seq', 1000)")
    yield postgres.url("rule")
    with psycopg.connect(postgres.url(), autocommit=True) as admin:
        admin.execute("DROP DATABASE rule WITH (FORCE)")


@st.composite
def points(draw: st.DrawFn, *, after: Point | None = None) -> Point:
    """A snapshot and the greatest entry visible in it; `after` another one."""
    least = after.snapshot.xmax if after is not None and after.snapshot else 3
    xmax = draw(st.integers(least, 15))
    below = list(range(3, xmax))
    # What a later snapshot has in progress, an earlier one had too, or it had not begun.
    if after is not None and after.snapshot:
        below = [xid for xid in below if xid in after.snapshot.xip or xid >= after.snapshot.xmax]
    xip = tuple(sorted(draw(st.sets(st.sampled_from(below), max_size=3)))) if below else ()
    floor = draw(st.integers(after.floor if after else 1, 12))
    return Point(Snapshot(min((*xip, xmax)), xmax, xip), Anchor(floor, 3, 0, 0))


@st.composite
def positions(draw: st.DrawFn) -> Position:
    """A position: at the start of a log, at a point, or in a cut."""
    begun = start("test", 0, "t", 1, None, 1, draw(st.integers(0, 4)))
    if draw(st.booleans()):
        begun = begun.advanced(draw(points()), None)
    if draw(st.booleans()):
        to = draw(points(after=begun.point if begun.point.snapshot else None))
        begun = begun.advanced(to, draw(st.integers(0, to.floor)))
    return begun


def fill(connection: psycopg.Connection, rows: Rows) -> None:
    """Make the log hold these."""
    connection.execute("TRUNCATE outbox.entries")
    connection.execute(
        "INSERT INTO outbox.entries (id, xid, slot, type, key, state)"
        " SELECT r.id, r.xid::text::xid8, 0, 'thing', 'k' || r.id, '{}'"
        " FROM unnest(%s::bigint[], %s::bigint[]) r (id, xid)",
        [list(rows), list(rows.values())],
    )
    connection.commit()


# A cut that begins at the start of a log, with an entry that pruning went past.
PRUNED = start("test", 0, "t", 1, None, 1, 1).advanced(Point(Snapshot(3, 3), Anchor(1, 3, 0, 0)), 0)


@example(position=PRUNED, rows={1: 3})
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=positions(), rows=st.dictionaries(IDS, XIDS, max_size=10))
def test_all_four_forms_agree(url: str, position: Position, rows: Rows) -> None:
    """Python and SQL say the same of every entry, for every position."""
    position = Position.decode(position.encode())
    takes = [number for number in sorted(rows) if position.takes(number, rows[number])]
    unpublished = [number for number in sorted(rows) if not position.published(number, rows[number])]
    with psycopg.connect(url) as connection:
        fill(connection, rows)
        with closing(Reader(Config(database_url=url, batch_rows=1000), shard=0)) as reader:
            reader.open()
            assert [entry[0] for entry in reader.read(position).entries] == takes
        counted = connection.execute(
            sql.load("status")["unpublished"].replace("{schema}", "outbox").encode(), position_arguments(position)
        ).fetchall()
        # At the start of a log the status counts what is retained; what pruning went past is left out by all.
        assert sum(row[1] for row in counted) == len(unpublished)
        connection.rollback()
        connection.execute("UPDATE outbox.entries SET created_at = now() - interval '30 days'")
        (said,) = connection.execute(
            "SELECT outbox.prune_slot(0::smallint, %s::jsonb)",
            # Without the anchor's row: these logs are made up, and few hold it.
            [orjson.dumps([{**position.for_prune(), "row": None}]).decode()],
        ).fetchone() or ({},)
        connection.rollback()
        if not rows:
            assert said["reason"] == "empty"
        elif max(rows) >= position.reached.floor:
            assert "anchor" in said["reason"]
        else:
            assert said["pruned"] == (not unpublished), (said, unpublished)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.dictionaries(IDS, XIDS, max_size=8),
    removed=st.integers(0, 8),
    handed=st.integers(12, 15),
    floor=st.integers(0, 20),
    epoch=st.integers(1, 4),
)
def test_the_models_adoption_is_the_servers(
    url: str, rows: Rows, removed: int, handed: int, floor: int, epoch: int
) -> None:
    """New ids in the order of the old ones, above all that is known; what pruning went past keeps its own."""
    committed = tuple(Commit(xid, ()) for xid in sorted(set(rows.values())))
    before = Database(
        rows=tuple(Row(number, xid, 0, f"k{number}", (1, 1), 0) for number, xid in rows.items()),
        next_id=handed + 1,
        commits=committed,
        flushed=len(committed),
        removed_id=removed,
    )
    known = start("test", 0, "t", epoch, None, 1, 0).advanced(Point(Snapshot(3, 3), Anchor(floor, 3, 0, 0)), None)
    model = before.adopt(floor, epoch + 1)
    with psycopg.connect(url) as connection:
        fill(connection, rows)
        connection.execute("SELECT setval('outbox.entries_id_seq', %s)", [handed])
        connection.execute(
            "UPDATE outbox.settings SET epoch = 1, base_id = 0, removed_id = %s, adopted_from = '{}'", [removed]
        )
        connection.commit()
        try:
            for system in ("1", "2"):
                # Again, for another expectation: nothing is done.
                now = adopt_log(
                    Config(database_url=url), expected_epoch=1, positions=[known], from_systems=["0", system]
                )
            found = connection.execute("SELECT key, id FROM outbox.entries ORDER BY id").fetchall()
            said = connection.execute(
                "SELECT s.epoch, s.base_id, s.adopted_from, nextval('outbox.entries_id_seq') FROM outbox.settings s"
            ).fetchone()
            xids = {row[0] for row in connection.execute("SELECT xid::text FROM outbox.entries")}
            connection.rollback()
            assert adopt_log(Config(database_url=url), expected_epoch=now, positions=[], from_systems=["3"]) == now + 1
            both = connection.execute("SELECT adopted_from FROM outbox.settings").fetchone()
        finally:
            connection.rollback()
            connection.execute("UPDATE outbox.settings SET epoch = 1, base_id = 0, removed_id = 0")
            connection.execute("SELECT setval('outbox.entries_id_seq', 1000)")
            connection.commit()
    assert found == [(row.key, row.id) for row in sorted(model.rows)]
    assert said is not None
    assert (now, *said[:2], said[3]) == (model.epoch, model.epoch, model.base_id, model.next_id)
    assert sorted(said[2]) == ["0", "1"]
    # Nobody's old transaction id is left, which might lie in this cluster's future.
    assert len(xids) <= 1
    assert both is not None
    # A shard that has not started since knows only the first.
    assert sorted(both[0]) == ["0", "1", "3"]

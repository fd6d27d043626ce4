"""A type's source: its columns, its pages, and whether they are cheap."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from outbox import source
from outbox.capture import Capture
from outbox.errors import ConfigError
from outbox.source import Source

pytestmark = pytest.mark.postgres

COMPOSITE = "SELECT tenant || ':' || number AS key, to_jsonb(t)::text AS state, tenant, number FROM item t"


@pytest.fixture
def items(make_database: Callable[..., str]) -> Iterator[psycopg.Connection]:
    """A table with a composite key, whose texts sort otherwise than its columns, and in no C collation."""
    with psycopg.connect(make_database(), autocommit=True) as connection:
        # One in which case and accents do not decide first, where the server has such a collation.
        (collation,) = connection.execute(
            "SELECT coalesce(min(collname), 'default') FROM pg_collation"
            " WHERE collprovider IN ('i', 'c') AND collname ~ '^en'"
        ).fetchone() or ("",)
        connection.execute(
            f'CREATE TABLE item (tenant text COLLATE "{collation}", number int, name text,'
            " PRIMARY KEY (tenant, number))"
        )
        connection.execute(
            "INSERT INTO item SELECT t, n, t || n"
            " FROM unnest(ARRAY['a', 'B', 'c', 'ä', 'Z', 'a''b']) t, generate_series(1, 120) n"
        )
        yield connection


def pages(connection: psycopg.Connection, one: Source, *, rows: int, where: str | None = None) -> list[list[Any]]:
    """All pages, as they are read one after the other."""
    found: list[list[Any]] = []
    after: dict[str, str] = {}
    while True:
        query = one.page(after=bool(after), where=where)
        page = connection.execute(query.encode(), {**after, "rows": rows}).fetchall()
        if not page:
            return found
        found.append(page)
        after = {f"after_{n}": text for n, text in enumerate(source.place_of(page[-1][-1]))}


@pytest.mark.parametrize(
    "query", [COMPOSITE, COMPOSITE.replace(", tenant, number FROM", " FROM")], ids=["made of", "key"]
)
def test_the_pages_have_every_row_once_in_any_collation(items: psycopg.Connection, query: str) -> None:
    """By the columns that the key is made of, or by the key; each page goes on where the one before ended."""
    one = source.look(items, "item", query)
    keys = [row[0] for page in pages(items, one, rows=7) for row in page]
    wanted = {row[0] for row in items.execute("SELECT tenant || ':' || number FROM item")}
    assert len(keys) == len(set(keys))
    assert set(keys) == wanted


def test_a_condition_is_over_the_sources_columns(items: psycopg.Connection) -> None:
    """A comment at its end does no harm, and what the source lacks is null."""
    one = source.look(items, "item", COMPOSITE)
    found = [row for page in pages(items, one, rows=50, where="number <= 3 -- the first ones") for row in page]
    assert len(found) == 18
    assert {row[2:4] for row in found} == {(None, None)}


def test_a_source_without_an_index_for_its_order_is_told(items: psycopg.Connection) -> None:
    """The columns of the primary key have one; an expression has none."""
    assert source.slow_pages(items, source.look(items, "item", COMPOSITE)) is None
    slow = source.slow_pages(items, source.look(items, "item", "SELECT number::text AS key, '' AS state FROM item"))
    assert slow == "no index gives the order of key: each page sorts the whole source"


def test_the_source_of_a_captured_table_is_paged_by_its_key(items: psycopg.Connection) -> None:
    """Whatever the key's text looks like, the unique constraint gives the order."""
    captured = Capture("item", "item", key=("tenant", "number"))
    one = source.look(items, "item", captured.source)
    assert [column.name for column in one.order] == ["key_1", "key_2"]
    assert source.slow_pages(items, one) is None
    assert sum(map(len, pages(items, one, rows=100))) == 720


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("SELECT 1", "has the columns ?column?"),
        ("SELECT '' AS key", "has the columns key"),
        ("SELECT '' AS key, '' AS state, 1 AS state", "specified more than once|has the columns"),
        ("SELECT key FROM nowhere", "does not exist"),
        ("DELETE FROM item", "no query that can be read"),
    ],
)
def test_what_is_no_source_is_refused(items: psycopg.Connection, query: str, words: str) -> None:
    """With what it has, or what the server says; nothing is run."""
    with pytest.raises(ConfigError) as refused:
        source.look(items, "item", query)
    assert any(word in str(refused.value) for word in words.split("|"))
    assert items.execute("SELECT count(*) FROM item").fetchone() == (720,)

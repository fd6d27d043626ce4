"""The outbox comes by a migration: ours, or the service's own; up, down, and out of autogenerate's way."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from psycopg import errors as pg

from outbox import schema as outbox_schema
from outbox.errors import ConfigError, SchemaError, WrongOutboxError
from outbox.revision import migrate, migration_script, write_revision

pytestmark = pytest.mark.postgres

ENV = """
from alembic import context
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool
from models import Base
{register}
engine = create_engine({url!r}, poolclass=NullPool)
with engine.connect() as connection:
    {prepare}
    context.configure(connection=connection, target_metadata=Base.metadata, {options})
    with context.begin_transaction():
        context.run_migrations()
"""
MODELS = """
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
class Base(DeclarativeBase): pass
class Item(Base):
    __tablename__ = "item"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
"""


class Service:
    """A small service with an Alembic environment of its own."""

    def __init__(self, directory: Path, url: str) -> None:
        self.directory, self.url = directory, url.replace("postgresql://", "postgresql+psycopg://")
        self.alembic("init", "-t", "generic", "migrations")
        (directory / "models.py").write_text(MODELS)
        self.env()

    def env(self, *, options: str = "", prepare: str = "pass", register: str = "import outbox.operations") -> None:
        """Write env.py."""
        text = ENV.format(url=self.url, options=options, prepare=prepare, register=register)
        (self.directory / "migrations" / "env.py").write_text(text)

    def alembic(self, *arguments: str, ok: bool = True) -> str:
        """Run Alembic as the service's developer does; what it said."""
        done = subprocess.run(
            [sys.executable, "-m", "alembic", *arguments],
            cwd=self.directory,
            capture_output=True,
            text=True,
            check=False,
        )
        assert not ok or done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    @property
    def ini(self) -> Path:
        """Its alembic.ini."""
        return self.directory / "alembic.ini"

    def first(self) -> None:
        """Its own first revision."""
        self.alembic("revision", "--autogenerate", "-m", "items")
        self.alembic("upgrade", "head")


@pytest.fixture
def service(tmp_path: Path, database_url: str) -> Service:
    """A service that has its own table."""
    made = Service(tmp_path, database_url)
    made.first()
    return made


def catalog(url: str) -> list[tuple[object, ...]]:
    """Everything in the outbox's schema but Alembic's table."""
    with psycopg.connect(url) as connection:
        return connection.execute(
            """SELECT c.relname, c.relkind::text, a.attname, format_type(a.atttypid, a.atttypmod),
                      pg_get_expr(d.adbin, d.adrelid), a.attnotnull, a.attnum
               FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace AND n.nspname = 'outbox'
               LEFT JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum > 0
               LEFT JOIN pg_attrdef d ON d.adrelid = c.oid AND d.adnum = a.attnum
               WHERE c.relname NOT LIKE 'alembic%'
               UNION ALL
               SELECT proname, 'f', pg_get_functiondef(p.oid), NULL, NULL, NULL, NULL
               FROM pg_proc p WHERE pronamespace = 'outbox'::regnamespace
               ORDER BY 1, 2, 7, 3"""
        ).fetchall()


def plain(service: Service) -> str:
    """The URL that psycopg takes."""
    return service.url.replace("+psycopg", "")


def test_our_migrations_a_services_revision_and_install_make_the_same_schema(
    service: Service, make_database: object, postgres: object
) -> None:
    """What is stated in three ways is compared."""
    write_revision(service.ini, name="shop")
    service.alembic("upgrade", "head")
    ours, installed, scripted = make_database(), make_database(), make_database()  # type: ignore[operator]  # a factory
    migrate(ours, name="shop")
    with psycopg.connect(installed) as connection:
        outbox_schema.install(connection, outbox_schema.Settings("shop"))
    with psycopg.connect(scripted) as connection:
        connection.execute(migration_script(name="shop").encode())
    expected = catalog(installed)
    assert len(expected) > 50
    assert catalog(ours) == expected
    assert catalog(plain(service)) == expected
    assert catalog(scripted) == expected


def test_migrate_twice_changes_nothing_and_another_name_is_refused(database_url: str) -> None:
    """A name is fixed when the outbox is created: a mistyped one would mean no fencing."""
    assert migrate(database_url, name="shop").before is None
    again = migrate(database_url, name="shop")
    assert (again.before, again.after) == (1, 1)
    with pytest.raises(WrongOutboxError, match='named "shop", not "ship"'):
        migrate(database_url, name="ship")


def test_migrate_down_removes_everything(database_url: str) -> None:
    """And a new one can be made."""
    migrate(database_url, name="shop")
    migrate(database_url, to="base")
    assert catalog_is_empty(database_url)
    migrate(database_url, name="other")


def catalog_is_empty(url: str) -> bool:
    """Whether there is no outbox."""
    with psycopg.connect(url) as connection:
        return connection.execute("SELECT to_regnamespace('outbox')").fetchone() == (None,)


def test_a_revision_follows_the_services_head_and_works_up_and_down(service: Service) -> None:
    """Create, then a type with a captured table; down says what it deletes."""
    created = write_revision(service.ini)
    service.alembic("upgrade", "head")
    captured = write_revision(service.ini, add_type="item", topic="shop.item", capture="item")
    for path in (created, captured):
        compile(path.read_text(), str(path), "exec")
    service.alembic("upgrade", "head")
    with psycopg.connect(plain(service)) as connection:
        connection.execute("INSERT INTO item VALUES (1, 'one')")
        assert connection.execute("SELECT type, key FROM outbox.entries").fetchall() == [("item", "1")]
    said = service.alembic("downgrade", "-2")
    assert "1 entries and 0 entity types are deleted" in said
    assert catalog_is_empty(plain(service))
    service.alembic("upgrade", "head")


def test_a_second_revision_that_would_create_it_again_is_refused(service: Service) -> None:
    """There is nothing to do."""
    write_revision(service.ini)
    with pytest.raises(ConfigError, match="already bring the outbox to version"):
        write_revision(service.ini)


def test_several_heads_are_refused_until_one_is_named(service: Service) -> None:
    """The revision must have one place."""
    service.alembic("revision", "-m", "left", "--head", "base", "--splice")
    with pytest.raises(ConfigError, match="several heads"):
        write_revision(service.ini)


@pytest.mark.parametrize(
    ("options", "prepare"),
    [
        ("", "pass"),
        ("include_schemas=True", "pass"),
        ("", "connection.execute(text('SET search_path = outbox, public')); connection.commit()"),
    ],
    ids=["plain", "include_schemas", "our schema first"],
)
def test_autogenerate_does_not_want_to_drop_our_tables(service: Service, options: str, prepare: str) -> None:
    """However the service looks at its database; the version table stays where it was."""
    write_revision(service.ini)
    service.alembic("upgrade", "head")
    # The search path hides the service's version table: it must be named then.
    service.env(options=options or "version_table_schema='public'" * ("search_path" in prepare), prepare=prepare)
    said = service.alembic("check", ok=False)
    assert "entries" not in said
    assert "entity_types" not in said
    if "search_path" not in prepare:
        assert "No new upgrade operations detected" in said


def test_without_our_comparator_autogenerate_wants_to_drop_them(service: Service) -> None:
    """The test above can fail."""
    write_revision(service.ini)
    service.alembic("upgrade", "head")
    undo = """
import outbox.operations
outbox.operations._keep_ours.__code__ = (lambda context, upgrade, schemas: None).__code__
"""
    service.env(options="include_schemas=True", register=undo)
    said = service.alembic("check", ok=False)
    assert "entity_types" in said


def test_a_missing_schema_is_said_with_the_migration_to_write(database_url: str) -> None:
    """Every command begins so."""
    with psycopg.connect(database_url) as connection, pytest.raises(SchemaError, match="no outbox") as caught:
        outbox_schema.require(connection, "outbox")
    assert "outbox migrate --name" in caught.value.cure


def test_a_newer_schema_wants_a_newer_library(outbox_database: str) -> None:
    """Never guess at what is not known."""
    with psycopg.connect(outbox_database) as connection:
        connection.execute("UPDATE outbox.settings SET schema_version = 99")
        with pytest.raises(SchemaError, match="version 99"):
            outbox_schema.require(connection, "outbox")


def test_a_writer_may_write_entries_and_nothing_else(outbox_database: str) -> None:
    """Neither the id nor the doorbell can be overridden, nor a partition written to."""
    with psycopg.connect(outbox_database, autocommit=True) as connection:
        connection.execute("DROP ROLE IF EXISTS scribe")
        connection.execute("CREATE ROLE scribe")
        for statement in outbox_schema.grants("outbox", writers=["scribe"]):
            connection.execute(statement.encode())
        connection.execute("INSERT INTO outbox.entity_types (name, topic) VALUES ('item', 'item')")
        connection.execute("SET ROLE scribe")
        connection.execute("SELECT outbox.put('item', '1', '{}', 'made')")
        connection.execute("SELECT outbox.delete('item', '1'), outbox.lock('item', '1')")
        connection.execute("SELECT outbox.put_bytes('item', '1', 'x', 'text/plain')")
        connection.execute("INSERT INTO outbox.entries (type, key, state) VALUES ('item', '2', 'x') RETURNING id")
        for denied in (
            "INSERT INTO outbox.entries (id, type, key) VALUES (7, 'item', '1')",
            "INSERT INTO outbox.entries (type, key, bell) VALUES ('item', '1', NULL)",
            "INSERT INTO outbox.entries (type, key, xid) VALUES ('item', '1', '1')",
            "INSERT INTO outbox.entries_0 (type, key) VALUES ('item', '1')",
            "UPDATE outbox.entries SET key = 'x'",
            "DELETE FROM outbox.entries",
            "SELECT state FROM outbox.entries",
            "UPDATE outbox.settings SET epoch = 9",
            "SELECT outbox.adopt(1, 1)",
        ):
            with pytest.raises(pg.InsufficientPrivilege):
                connection.execute(denied.encode())
        connection.execute("RESET ROLE")
        connection.execute("DROP OWNED BY scribe")
        connection.execute("DROP ROLE scribe")


def test_the_relays_role_reads_and_calls_its_functions_only(outbox_database: str) -> None:
    """Publishing changes no row."""
    with psycopg.connect(outbox_database, autocommit=True) as connection:
        connection.execute("DROP ROLE IF EXISTS carrier")
        connection.execute("CREATE ROLE carrier")
        for statement in outbox_schema.grants("outbox", relay="carrier"):
            connection.execute(statement.encode())
        connection.execute("SET ROLE carrier")
        connection.execute("SELECT count(*) FROM outbox.entries")
        connection.execute("SELECT outbox.adopt(0, 1), outbox.prune_slot(0::smallint, '[]')")
        connection.execute("SELECT outbox.report(1, 0::smallint, '{}')")
        for denied in (
            "INSERT INTO outbox.entries (type, key) VALUES ('item', '1')",
            "DELETE FROM outbox.entries",
            "TRUNCATE outbox.entries_0",
            "INSERT INTO outbox.request_outcomes VALUES (1, 0, '{}')",
            "UPDATE outbox.settings SET epoch = 9",
        ):
            with pytest.raises(pg.InsufficientPrivilege):
                connection.execute(denied.encode())
        connection.execute("RESET ROLE")
        connection.execute("DROP OWNED BY carrier")
        connection.execute("DROP ROLE carrier")

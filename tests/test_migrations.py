"""The outbox comes by a migration: ours, or the service's own; up, down, and out of autogenerate's way."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from psycopg import errors as pg
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from outbox import current, key, operations
from outbox import schema as outbox_schema
from outbox.entity_type import EntityType
from outbox.errors import ConfigError, DatabaseError, SchemaError, UnknownTypeError, WrongOutboxError
from outbox.revision import migrate, migration_script, write_revision
from relays import environment, must, outbox

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


def test_migrate_down_leaves_what_others_put_into_the_schema(database_url: str) -> None:
    """The outbox is gone, the schema stays."""
    migrate(database_url, name="shop")
    with psycopg.connect(database_url) as connection:
        connection.execute("CREATE TABLE outbox.mine (id int)")
    assert migrate(database_url, to="base").after is None
    with psycopg.connect(database_url) as connection:
        rows = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'outbox'").fetchall()
        assert rows == [("mine",)]
    assert migrate(database_url, name="other").before is None


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


def upgrade_of(path: Path) -> list[str]:
    """The statements of a revision's upgrade()."""
    body = path.read_text().split("def upgrade()")[1].split("def downgrade()")[0]
    return [line.strip() for line in body.splitlines() if " op." in line]


def test_a_template_without_a_place_for_imports_gets_ours(service: Service) -> None:
    """Else `op` would not know our operations."""
    template = service.directory / "migrations" / "script.py.mako"
    template.write_text(template.read_text().replace('${imports if imports else ""}', ""))
    service.env(register="")
    path = write_revision(service.ini)
    assert path.read_text().count("import outbox.operations") == 1
    service.alembic("upgrade", "head")
    assert not catalog_is_empty(plain(service))


def by_hand(service: Service, *calls: str) -> Path:
    """A revision of the service's own, with these calls."""
    service.alembic("revision", "-m", "by hand")
    (path,) = (service.directory / "migrations" / "versions").glob("*by_hand.py")
    path.write_text(path.read_text().replace("    pass", "\n".join(f"    {call}" for call in calls), 1))
    return path


def test_a_creation_by_hand_without_a_version_is_said(service: Service) -> None:
    """What a later library would make of it is not what the databases have."""
    path = by_hand(service, "op.outbox_create()")
    with pytest.raises(ConfigError, match="without saying its version") as caught:
        write_revision(service.ini)
    assert path.name in str(caught.value)
    assert "version=1" in caught.value.cure
    write_revision(service.ini, add_type="item", topic="shop.item")


def test_an_outbox_in_another_schema_is_one_of_its_own(service: Service) -> None:
    """Two services that share a database may have one each."""
    write_revision(service.ini)
    other = write_revision(service.ini, schema="other")
    assert "schema='other'" in other.read_text()
    service.alembic("upgrade", "head")
    with pytest.raises(ConfigError, match="already bring the outbox to version"):
        write_revision(service.ini, schema="other")
    with pytest.raises(ConfigError, match='no outbox in the schema "third"'):
        write_revision(service.ini, schema="third", add_type="item", topic="t")


def test_an_outbox_that_was_dropped_is_created_again(service: Service) -> None:
    """The revisions are followed from the first to the last."""
    by_hand(service, "op.outbox_create(version=1)", "op.outbox_drop(version=1)")
    assert "op.outbox_create(" in write_revision(service.ini).read_text()


@pytest.fixture
def published(service: Service) -> Service:
    """A service whose revisions create an outbox and register the type `item`."""
    write_revision(service.ini)
    write_revision(service.ini, add_type="item", topic="shop.item")
    return service


def test_a_type_is_registered_once(published: Service) -> None:
    """The second one would fail in every database."""
    with pytest.raises(ConfigError, match='register the entity type "item" already') as caught:
        write_revision(published.ini, add_type="item", topic="shop.item")
    assert "outbox_change_type" in caught.value.cure
    with pytest.raises(ConfigError, match="cannot be the topic"):
        write_revision(published.ini, add_type="other", topic="shop item")


def test_a_captured_tables_type_is_named_or_has_its_name(published: Service) -> None:
    """Without its schema; and it must be there."""
    captured = write_revision(published.ini, capture="sales.item", key=["tenant", "id"], existing_rows=False)
    assert upgrade_of(captured) == [
        "op.outbox_capture('item', type='item', key=['tenant', 'id'], existing_rows=False, table_schema='sales')"
    ]
    with pytest.raises(ConfigError, match=r"capture sales\.item already"):
        write_revision(published.ini, capture="sales.item", type="other")
    with pytest.raises(ConfigError, match='"item" has the rows of another table'):
        write_revision(published.ini, capture="item")
    with pytest.raises(
        ConfigError, match=r'registers the entity type "order" for the rows of shop\.order\. They'
    ) as caught:
        write_revision(published.ini, capture="shop.order")
    assert "--add-type order --topic TOPIC; or name one that is there: --type NAME" in caught.value.cure
    named = write_revision(published.ini, capture="shop.order", type="purchase")
    assert upgrade_of(named) == ["op.outbox_capture('order', type='purchase', key=['id'], table_schema='shop')"]
    both = write_revision(published.ini, capture="shop.line", add_type="order_line", topic="shop.line")
    assert upgrade_of(both) == [
        "op.outbox_add_type('order_line', topic='shop.line')",
        "op.outbox_capture('line', type='order_line', key=['id'], table_schema='shop')",
    ]


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"topic": "t"}, "alone says nothing"),
        ({"type": "item"}, "alone says nothing"),
        ({"add_type": "x"}, "needs a topic"),
        ({"add_type": "x", "topic": "x", "type": "x"}, "type of a captured table"),
        ({"capture": "item", "topic": "x"}, "belongs to an entity type that is added"),
        ({"capture": ".item"}, "is no table"),
        ({"capture": "sales."}, "is no table"),
    ],
)
def test_options_that_say_nothing_are_refused(published: Service, options: dict[str, Any], why: str) -> None:
    """Nothing is ignored."""
    with pytest.raises(ConfigError, match=why) as caught:
        write_revision(published.ini, **options)
    assert caught.value.cure


def test_the_command_passes_every_option_on(published: Service) -> None:
    """`outbox revision`; what belongs to --capture is refused without it."""
    env = environment(plain(published), "")
    words = ("revision", "--alembic-config", str(published.ini))
    refused = outbox(env, *words, "--key", "id")
    assert refused.returncode == 2
    assert "belong to --capture" in refused.stderr
    folder = published.directory / "migrations" / "versions"
    options = ("--capture", "sales.line", "--type", "item", "--key", "a", "--key", "b", "--no-existing-rows")
    said = json.loads(must(env, *words, *options, "--head", "head", "--version-path", str(folder), "--json"))
    assert upgrade_of(Path(said["path"])) == [
        "op.outbox_capture('line', type='item', key=['a', 'b'], existing_rows=False, table_schema='sales')"
    ]


def test_several_folders_of_versions_are_said(tmp_path: Path, database_url: str) -> None:
    """The head tells the folder; without one it must be named."""
    service = Service(tmp_path, database_url)
    here = "script_location = %(here)s/migrations"
    text = service.ini.read_text().replace(here, f"{here}\nversion_locations = %(here)s/va:%(here)s/vb")
    service.ini.write_text(text)
    folders = tmp_path / "va", tmp_path / "vb"
    for folder in folders:
        folder.mkdir()
    with pytest.raises(ConfigError, match="Multiple version locations") as caught:
        write_revision(service.ini)
    assert f"--version-path {folders[0]} or {folders[1]}" in caught.value.cure
    with pytest.raises(ConfigError, match="not represented"):
        write_revision(service.ini, version_path=tmp_path / "vc")
    assert write_revision(service.ini, version_path=folders[1]).parent == folders[1]
    assert write_revision(service.ini, add_type="item", topic="item").parent == folders[1]


def test_several_heads_are_refused_until_one_is_named(service: Service) -> None:
    """The revision must have one place."""
    service.alembic("revision", "-m", "left", "--head", "base", "--splice")
    with pytest.raises(ConfigError, match="several heads"):
        write_revision(service.ini)


def first_in_path(path: str) -> str:
    """What env.py does, so that the search path is another one."""
    return f"connection.execute(text('SET search_path = {path}')); connection.commit()"


def removed(said: str) -> set[str]:
    """The tables that `alembic check` wants to drop."""
    return set(re.findall(r"\('remove_table', Table\('(\w+)'", said))


@pytest.mark.parametrize("by_migrate", [False, True], ids=["by its own revision", "by outbox migrate"])
@pytest.mark.parametrize(
    ("options", "prepare"),
    [
        ("", "pass"),
        ("include_schemas=True", "pass"),
        ("version_table_schema='public'", first_in_path("outbox, public")),
        ("version_table_schema='public', include_schemas=True", first_in_path("outbox, public")),
        ("", first_in_path("public, outbox")),
    ],
    ids=["plain", "include_schemas", "our schema first", "our schema first, include_schemas", "our schema last"],
)
def test_autogenerate_does_not_want_to_drop_our_tables(
    service: Service, options: str, prepare: str, by_migrate: bool
) -> None:
    """However the service looks at its database; also Alembic's own table, where `outbox migrate` made it."""
    if by_migrate:
        migrate(plain(service), name="shop")
    else:
        write_revision(service.ini)
        service.alembic("upgrade", "head")
    # The search path hides the service's version table: it must be named then.
    service.env(options=options, prepare=prepare)
    said = service.alembic("check", ok=False)
    # Alembic does not know its own table again, where env.py names its schema and the search path shows it without.
    assert removed(said) <= ({"alembic_version"} if "outbox, public" in prepare else set())
    assert "remove_index" not in said
    if "outbox, public" not in prepare:
        assert "No new upgrade operations detected" in said


def test_tables_of_the_services_own_are_not_taken_for_ours(service: Service) -> None:
    """A table may be called captures, entries or settings anywhere; an outbox has more than that."""
    write_revision(service.ini)
    service.alembic("upgrade", "head")
    with psycopg.connect(plain(service)) as connection:
        for table in ("captures", "settings", "entries", "requests"):
            connection.execute(f"CREATE TABLE {table} (id int, xid text)".encode())
        connection.execute("CREATE TABLE outbox.mine (id int)")
    service.env(options="include_schemas=True")
    said = service.alembic("check", ok=False)
    assert removed(said) == {"captures", "settings", "entries", "requests", "mine"}
    assert said.count("remove_table") == 5


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


def operate(url: str, operation: str, /, *arguments: Any, **options: Any) -> None:
    """Call an operation as a revision does."""
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"), poolclass=NullPool)
    with engine.begin() as connection:
        getattr(Operations(MigrationContext.configure(connection)), operation)(*arguments, **options)


@pytest.mark.parametrize(
    ("operation", "name", "options", "why"),
    [
        ("outbox_add_type", "new", {"topic": "bad topic"}, "cannot be the topic"),
        ("outbox_add_type", "new", {"topic": ".."}, "cannot be the topic"),
        ("outbox_add_type", "", {"topic": "t"}, "cannot be the name of an entity type"),
        ("outbox_add_type", "é" * 101, {"topic": "t"}, "cannot be the name of an entity type"),
        ("outbox_add_type", "new", {"topic": "t", "max_bytes": 0}, "cannot have 0 bytes at most"),
        ("outbox_add_type", "new", {"topic": "t", "max_bytes": 2**31}, "cannot have 2147483648 bytes"),
        ("outbox_add_type", "item", {"topic": "t"}, '"item" is there already'),
        ("outbox_add_type", "new", {"topic": "item"}, "the topic item carries another entity type"),
        ("outbox_change_type", "item", {"topic": "bad topic"}, "cannot be the topic"),
        ("outbox_change_type", "item", {"topic": "other"}, "the topic other carries another entity type"),
        ("outbox_change_type", "item", {"max_bytes": -1}, "cannot have -1 bytes at most"),
        ("outbox_add_type", "new", {"topic": "t", "comparison": "mine"}, '"mine" is no comparison'),
        ("outbox_change_type", "item", {"comparison": "a:b:c"}, '"a:b:c" is no comparison'),
        ("outbox_change_type", "item", {}, "is to be changed"),
    ],
)
def test_a_type_that_cannot_be_is_refused_with_the_cure(
    outbox_database: str, operation: str, name: str, options: dict[str, Any], why: str
) -> None:
    """Not by a constraint's name."""
    operate(outbox_database, "outbox_add_type", "item", topic="item")
    operate(outbox_database, "outbox_add_type", "other", topic="other")
    with pytest.raises(ConfigError, match=why) as caught:
        operate(outbox_database, operation, name, **options)
    assert caught.value.cure


def test_a_type_may_be_changed_to_its_own_topic_and_an_unknown_one_is_said(outbox_database: str) -> None:
    """What stays the same is no conflict."""
    operate(outbox_database, "outbox_add_type", "it'em", topic="item", source="SELECT ':x', '%s'", partitions=3)
    operate(outbox_database, "outbox_change_type", "it'em", topic="item", max_bytes=5)
    with psycopg.connect(outbox_database) as connection:
        row = connection.execute("SELECT name, topic, max_bytes, source, topic_settings FROM outbox.entity_types")
        assert row.fetchall() == [("it'em", "item", 5, "SELECT ':x', '%s'", {"partitions": 3})]
    with pytest.raises(UnknownTypeError, match="itme"):
        operate(outbox_database, "outbox_change_type", "itme", max_bytes=5)


@pytest.mark.parametrize(
    ("operation", "arguments"),
    [
        ("outbox_add_type", {"name": "item", "topic": "item"}),
        ("outbox_remove_type", {"name": "item"}),
        ("outbox_release", {"table": "item"}),
        ("outbox_drop", {}),
    ],
)
def test_an_operation_without_an_outbox_says_so(database_url: str, operation: str, arguments: dict[str, Any]) -> None:
    """With the revision to write before."""
    with pytest.raises(SchemaError, match='no outbox in the schema "outbox"') as caught:
        operate(database_url, operation, **arguments)
    assert "op.outbox_create" in caught.value.cure


@pytest.fixture
def developer(database_url: str) -> Iterator[str]:
    """The URL of a role that may not create schemas."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("CREATE ROLE dev LOGIN")
        yield database_url.replace("postgres@", "dev@")
        connection.execute("DROP OWNED BY dev CASCADE; DROP ROLE dev")


def test_a_schema_that_is_there_is_not_created(database_url: str, developer: str) -> None:
    """Its owner needs no right to create schemas: the database's owner made this one."""
    with pytest.raises(DatabaseError, match="denied") as caught:
        migrate(developer, name="shop")
    assert 'CREATE SCHEMA "outbox" AUTHORIZATION' in caught.value.cure
    with pytest.raises(DatabaseError, match="denied") as caught:
        operate(developer, "outbox_create", name="shop")
    assert 'CREATE SCHEMA "outbox" AUTHORIZATION' in caught.value.cure
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("CREATE SCHEMA outbox AUTHORIZATION dev")
    assert migrate(developer, name="shop").name == "shop"
    assert migrate(developer, to="base").after is None


def test_what_is_stated_in_python_and_in_sql_is_equal(outbox_database: str) -> None:
    """Key bytes, reserved headers, the default size of a state."""
    with psycopg.connect(outbox_database, autocommit=True) as connection:
        connection.execute("INSERT INTO outbox.entity_types (name, topic) VALUES ('item', 'item')")
        default = connection.execute("SELECT max_bytes FROM outbox.entity_types").fetchone()
        of_operation = inspect.signature(operations.OutboxAddType.invoke).parameters["max_bytes"].default
        assert default == (of_operation,) == (EntityType("item", "item").max_bytes,)

        insert = "INSERT INTO outbox.entries (type, key, state) VALUES ('item', %s, 'x')"
        check = "SELECT outbox.check_entry('item', %s, 0, NULL)"
        for statement, error in ((insert, pg.CheckViolation), (check, psycopg.Error)):
            for good in ("k", "k" * key.MAX_KEY_BYTES, "é" * (key.MAX_KEY_BYTES // 2)):
                connection.execute(statement, [good])
                assert key.key_text("item", good) == good
            for bad in ("", "k" * (key.MAX_KEY_BYTES + 1), "é" * (key.MAX_KEY_BYTES // 2) + "k"):
                with pytest.raises(error):
                    connection.execute(statement, [bad])

        headers = "SELECT outbox.check_entry('item', 'k', 0, jsonb_build_object(%s::text, 'x'))"
        for reserved in current._RESERVED:
            with pytest.raises(psycopg.Error, match="headers"):
                connection.execute(headers, [reserved])
        for free in ("traceparent", "tenant", "Outbox-Id"):
            connection.execute(headers, [free])
        (body,) = connection.execute("SELECT prosrc FROM pg_proc WHERE proname = 'check_entry'").fetchone() or ("",)
        (listed,) = re.findall(r"h\.key IN \((.*?)\)", body)
        assert set(re.findall(r"'(.*?)'", listed)) == current._RESERVED

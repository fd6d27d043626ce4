"""Migrations: run ours in a database without Alembic, or write a revision into a service's own folder."""

from __future__ import annotations

import ast
import configparser
import io
import re
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from alembic.util import rev_id as new_revision_id
from sqlalchemy import Connection, create_engine, exc, text
from sqlalchemy.pool import NullPool

from outbox.database import libpq_url, place, translate
from outbox.errors import ConfigError, DatabaseError, OutboxError, SchemaError
from outbox.operations import check_name, check_type
from outbox.schema import NAME, NEWEST, create_schema, drop_schema, grants, quote

_IMPORT = "import outbox.operations  # noqa: F401  registers op.outbox_..."
_IMPORTED = re.compile(r"^(?:import outbox\.operations|from outbox import .*\boperations\b)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Migrated:
    """What `migrate` did: the version before and after (None: no outbox), and the outbox's name."""

    before: int | None
    after: int | None
    name: str | None


def migrations_directory() -> Path:
    """Where our Alembic environment is: inside the installed package, or in the checkout of an editable install."""
    package = Path(__file__).parent
    for place_ in (package / "_migrations", package.parent / "migrations"):
        if (place_ / "env.py").is_file():
            return place_
    raise ConfigError("The package's migrations are missing.", cure="Install outbox-publisher again.")


def migrate(
    url: str,
    *,
    name: str | None = None,
    schema: str = "outbox",
    shards: int = 1,
    retention: str = "7 days",
    slots: int = 12,
    doorbell: bool = True,
    writers: Sequence[str] = (),
    relay: str | None = None,
    to: str = "head",
    connect_timeout: int = 10,
) -> Migrated:
    """Make, upgrade or (`to="base"`) remove the outbox of a database that has no Alembic environment of its own.

    A second run changes nothing but grants. An outbox of another name is refused with `WrongOutboxError`; one that a
    service's own migrations made, with `ConfigError`; what is to be removed and is not there, with `SchemaError`.
    `connect_timeout` in seconds.
    """
    config = _config(name, schema, shards, retention, slots, doorbell=doorbell, writers=writers, relay=relay)
    engine = create_engine(
        "postgresql+psycopg://" + libpq_url(url).partition("://")[2],
        poolclass=NullPool,
        connect_args={"connect_timeout": connect_timeout},
    )
    try:
        with engine.begin() as connection:
            before, found = _present(connection, schema)
            if found is None and to == "base":
                raise SchemaError(f'There is no outbox in the schema "{schema}" to remove.', cure="Correct --schema.")
            if found is None:
                _refuse_second(connection, name)
            if found is not None:
                check_name(found, name)
                if not _ours(connection, schema):
                    raise ConfigError(
                        f'The outbox "{found}" was made by a service\'s own migrations.',
                        cure="Upgrade it there: outbox revision, then alembic upgrade head.",
                    )
            connection.exec_driver_sql(create_schema(schema), execution_options={"no_parameters": True})
            config.attributes["connection"] = connection
            if to == "base":
                command.downgrade(config, to)
                # The version table is in our schema: it would keep it alive.
                connection.execute(text(f"DROP TABLE IF EXISTS {quote(schema)}.alembic_version"))
                connection.exec_driver_sql(drop_schema(schema), execution_options={"no_parameters": True})
                return Migrated(before, None, None)
            command.upgrade(config, to)
            if before is not None:
                for statement in grants(schema, writers=writers, relay=relay):
                    connection.exec_driver_sql(statement, execution_options={"no_parameters": True})
            after, made = _present(connection, schema)
            return Migrated(before, after, made)
    except exc.DBAPIError as error:
        raise _translated(error, url, schema) from error
    except CommandError as error:
        raise DatabaseError(f"Alembic cannot migrate: {error}.", cure="See docs/operations.md, Migrations.") from error
    finally:
        engine.dispose()


def _refuse_second(connection: Connection, name: str | None) -> None:
    """Refuse a name that cannot be one, and one that another outbox of this database has: they would share topics."""
    row = connection.execute(text("SELECT current_database()")).one()
    chosen = name or str(row[0])
    if not NAME.fullmatch(chosen):
        raise ConfigError(
            f'The database\'s name "{chosen}" cannot be the name of an outbox.', cure="Give one: --name NAME."
        )
    schemas = connection.execute(
        text(
            # Those that this role may read; of others it cannot know.
            "SELECT n.nspname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
            "WHERE c.relname = 'settings' AND c.relkind = 'r' "
            "AND has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT') "
            "AND (SELECT count(*) FROM pg_class o WHERE o.relnamespace = n.oid "
            "AND o.relname IN ('entity_types', 'entries')) = 2"
        )
    ).scalars()
    for other in schemas.all():
        if connection.exec_driver_sql(f"SELECT name FROM {quote(other)}.settings").scalar() == chosen:
            raise ConfigError(
                f'The schema "{other}" of this database already holds an outbox of the name "{chosen}": they would '
                "share topics and fence each other's relays.",
                cure="Give it another name (--name), or correct --schema.",
            )


def migration_script(
    *,
    name: str | None,
    schema: str = "outbox",
    shards: int = 1,
    retention: str = "7 days",
    slots: int = 12,
    doorbell: bool = True,
    writers: Sequence[str] = (),
    relay: str | None = None,
) -> str:
    """The same as SQL, for somebody else to run."""
    output = io.StringIO()
    config = _config(name, schema, shards, retention, slots, doorbell=doorbell, writers=writers, relay=relay)
    config.output_buffer = output
    command.upgrade(config, "head", sql=True)
    return output.getvalue()


def _scripts(ini: Path) -> ScriptDirectory:
    toml = ini.with_name("pyproject.toml")
    try:
        # Alembic's own template for pyproject.toml keeps the script location there.
        found = ScriptDirectory.from_config(AlembicConfig(str(ini), toml_file=str(toml) if toml.is_file() else None))
        list(found.walk_revisions())
    except (CommandError, SyntaxError, ImportError, OSError, configparser.Error) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else error.__class__.__name__
        raise ConfigError(
            f"The Alembic environment of {ini} cannot be read: {first}.".replace("..", "."),
            cure="See that `alembic history` works there first.",
        ) from error
    return found


class UpToDateError(ConfigError):
    """There is nothing to write: the service's revisions have it."""


def write_revision(
    ini: Path,
    *,
    name: str | None = None,
    schema: str = "outbox",
    add_type: str | None = None,
    topic: str | None = None,
    capture: str | None = None,
    type: str | None = None,
    key: Sequence[str] = ("id",),
    existing_rows: bool = True,
    head: str = "head",
    version_path: Path | None = None,
) -> Path:
    """Write a revision into the service's versions folder, after its head; its path.

    Without `add_type` and `capture` it creates the outbox, or upgrades it when the folder creates an older version.
    `capture` names a table (`item`, `sales.item`); `type` the entity type of its rows, by default `add_type`, else the
    table's name without its schema. `version_path` is the folder, where the service has several and `head` does not
    tell. `ConfigError` when there is nothing to do, or no Alembic environment, or several heads.
    """
    if not ini.is_file():
        raise ConfigError(
            f"There is no Alembic environment here: {ini} is missing.",
            cure="Run this in the service's folder, or give --alembic-config; for a database without Alembic: "
            "outbox migrate --name NAME.",
        )
    scripts = _scripts(ini)
    heads = scripts.get_heads()
    if head == "head" and len(heads) > 1:
        raise ConfigError(f"The service has several heads: {', '.join(heads)}.", cure="Merge them, or give --head ONE.")
    there = _Written(schema)
    for written in reversed(list(scripts.walk_revisions())):
        there.follow(Path(written.path))
    if add_type is None and capture is None:
        if topic is not None or type is not None:
            raise ConfigError(
                "A topic or a type alone says nothing.", cure="Give --add-type NAME --topic TOPIC, or --capture TABLE."
            )
        ups, downs, message = _outbox(there, name=name)
    else:
        ups, downs, message = _published(
            there, add_type=add_type, topic=topic, capture=capture, type=type, key=key, existing_rows=existing_rows
        )
    try:
        # Alembic says on standard output what it does; that belongs to whoever calls this.
        with redirect_stdout(io.StringIO()):
            script = scripts.generate_revision(
                new_revision_id(),
                message,
                refresh=True,
                head=head,
                version_path=None if version_path is None else str(version_path),
                imports=_IMPORT,
                upgrades="\n    ".join(ups),
                downgrades="\n    ".join(downs),
            )
    except CommandError as error:
        folders = [str(place_) for place_ in scripts.version_locations or ()]
        raise ConfigError(
            f"Alembic cannot write the revision: {error}.",
            cure=f"Name one of the folders of versions: --version-path {' or '.join(folders)}."
            if "version locations" in str(error)
            else "Correct --head.",
        ) from error
    if script is None:
        raise ConfigError("Alembic wrote no revision.", cure="Look at the service's env.py and script.py.mako.")
    path = Path(script.path)
    _with_import(path)
    return path


class _Written:
    """What the service's revisions make of one outbox, followed from the first one on.

    Only what is written as plain values is known: in a call with other ones the schema counts as this one, and
    `unclear` says that types are registered whose names are not known.
    """

    def __init__(self, schema: str) -> None:
        self.schema = schema
        self.created = False
        self.version: int | None = None
        self.types: set[str] = set()
        self.tables: dict[tuple[str, str], str | None] = {}
        self.unclear = False
        self.unversioned: Path | None = None

    def follow(self, path: Path) -> None:
        """Take in the calls of a revision's `upgrade()`, in their order."""
        tree = ast.parse(path.read_text("utf-8"))
        constants = {
            target.id: node.value.value
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
            for target in node.targets
            if isinstance(target, ast.Name)
        }

        def value(node: ast.expr | None, default: object = None) -> object:
            if node is None:
                return default
            if isinstance(node, ast.Name):
                return constants.get(node.id)
            return node.value if isinstance(node, ast.Constant) else None

        for function in tree.body:
            if not isinstance(function, ast.FunctionDef) or function.name != "upgrade":
                continue
            calls = [call for call in ast.walk(function) if isinstance(call, ast.Call)]
            for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset)):
                if isinstance(call.func, ast.Attribute) and call.func.attr.startswith("outbox_"):
                    named: dict[str | None, ast.expr] = {keyword.arg: keyword.value for keyword in call.keywords}
                    given = {str(word): value(node) for word, node in named.items()}
                    if given.get("schema", "outbox") in {self.schema, None}:
                        first = value(call.args[0]) if call.args else None
                        self._call(call.func.attr, first, given, path)

    def _call(self, operation: str, first: object, given: Mapping[str, object], path: Path) -> None:
        first = given.get("name", given.get("table")) if first is None else first
        table = (str(given.get("table_schema", "public")), str(first))
        match operation:
            case "outbox_create":
                self.created = True
                self._at(given.get("version"), path)
            case "outbox_upgrade":
                self._at(given.get("to_version"), path)
            case "outbox_drop":
                self.created, self.version, self.unversioned = False, None, None
                self.types.clear()
                self.tables.clear()
            case "outbox_add_type" if isinstance(first, str):
                self.types.add(first)
            case "outbox_add_type":
                self.unclear = True
            case "outbox_remove_type":
                self.types.discard(str(first))
            case "outbox_capture":
                type_ = given.get("type")
                self.tables[table] = type_ if isinstance(type_, str) else None
            case "outbox_release":
                self.tables.pop(table, None)

    def _at(self, version: object, path: Path) -> None:
        self.version = version if isinstance(version, int) else None
        self.unversioned = path if self.version is None else None


def _published(
    there: _Written,
    *,
    add_type: str | None,
    topic: str | None,
    capture: str | None,
    type: str | None,
    key: Sequence[str],
    existing_rows: bool,
) -> tuple[list[str], list[str], str]:
    """What registers a type, captures a table, or both."""
    in_schema = "" if there.schema == "outbox" else f", schema={there.schema!r}"
    ups: list[str] = []
    downs: list[str] = []
    said: list[str] = []
    if not there.created:
        raise ConfigError(
            f'The service\'s revisions create no outbox in the schema "{there.schema}" yet.',
            cure="Write that one first: outbox revision; or name the outbox's schema: --schema NAME.",
        )
    if add_type is not None:
        if topic is None:
            raise ConfigError(f'The entity type "{add_type}" needs a topic.', cure="Give --topic TOPIC.")
        check_type(add_type, topic=topic)
        if add_type in there.types:
            raise ConfigError(
                f'The service\'s revisions register the entity type "{add_type}" already.',
                cure="Change it in a revision of your own: op.outbox_change_type(...).",
            )
        ups.append(f"op.outbox_add_type({add_type!r}, topic={topic!r}{in_schema})")
        downs.insert(0, f"op.outbox_remove_type({add_type!r}{in_schema})")
        said.append(f"publish {add_type}")
    elif topic is not None:
        raise ConfigError("A topic belongs to an entity type that is added.", cure="Give --add-type NAME, too.")
    if capture is None and type is not None:
        raise ConfigError(f'"{type}" would be the type of a captured table.', cure="Give --capture TABLE, too.")
    if capture is not None:
        table_schema, dot, table = capture.rpartition(".")
        if not table or (dot and not table_schema):
            raise ConfigError(f'"{capture}" is no table.', cure="Write TABLE or SCHEMA.TABLE.")
        if (table_schema or "public", table) in there.tables:
            raise ConfigError(
                f"The service's revisions capture {capture} already.",
                cure="To capture it otherwise, call op.outbox_release(...) and op.outbox_capture(...) in a revision of "
                "your own.",
            )
        of_rows = type or add_type or table
        # Named with --type it may have come by `outbox types add`; the migration looks.
        if type is None and add_type is None and table not in there.types and not there.unclear:
            known = f" They register {', '.join(sorted(there.types))}." if there.types else ""
            raise ConfigError(
                f'No revision registers the entity type "{table}" for the rows of {capture}.{known}',
                cure=f"Register it: --add-type {table} --topic TOPIC; or name one that is there: --type NAME.",
            )
        if of_rows in there.tables.values():
            raise ConfigError(
                f'The entity type "{of_rows}" has the rows of another table already.',
                cure="Give this one a type of its own: --add-type NAME --topic TOPIC.",
            )
        of = f", table_schema={table_schema!r}" if table_schema else ""
        rows = "" if existing_rows else ", existing_rows=False"
        ups.append(f"op.outbox_capture({table!r}, type={of_rows!r}, key={list(key)!r}{rows}{of}{in_schema})")
        downs.insert(0, f"op.outbox_release({table!r}{of}{in_schema})")
        said.append(f"capture {capture}")
    return ups, downs, ", ".join(said)


def _outbox(there: _Written, *, name: str | None) -> tuple[list[str], list[str], str]:
    """What creates the outbox, or brings it to the newest version."""
    in_schema = "" if there.schema == "outbox" else f", schema={there.schema!r}"
    if not there.created:
        named = "" if name is None else f"name={name!r}, "
        return (
            [f"op.outbox_create({named}version={NEWEST}{in_schema})"],
            [f"op.outbox_drop(version={NEWEST}{in_schema})"],
            "create the outbox" if there.schema == "outbox" else f"create the outbox {there.schema}",
        )
    add = "To register an entity type: outbox revision --add-type NAME --topic TOPIC."
    if there.version is None:
        raise ConfigError(
            f"The service's revisions create the outbox without saying its version: {there.unversioned}.",
            cure=f"Write version=N there, the one that the databases have (version={NEWEST} if this library made "
            f"them): a later library would create another one. {add}",
        )
    if there.version >= NEWEST:
        raise UpToDateError(
            f"The service's revisions already bring the outbox to version {there.version}, the newest.",
            cure=f"Nothing is to do. {add}",
        )
    return (
        [f"op.outbox_upgrade(from_version={there.version}, to_version={NEWEST}{in_schema})"],
        [f"op.outbox_downgrade(from_version={NEWEST}, to_version={there.version}{in_schema})"],
        f"upgrade the outbox to version {NEWEST}",
    )


def _with_import(path: Path) -> None:
    """Import the operations in a revision whose template has no place for imports."""
    source = path.read_text("utf-8")
    if _IMPORTED.search(source):
        return
    after = 0
    for node in ast.parse(source).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not isinstance(node, ast.Import | ast.ImportFrom) and not docstring:
            break
        after = node.end_lineno or 0
    lines = source.splitlines(keepends=True)
    path.write_text("".join([*lines[:after], f"{_IMPORT}\n", *lines[after:]]), "utf-8")


def _config(
    name: str | None,
    schema: str,
    shards: int,
    retention: str,
    slots: int,
    *,
    doorbell: bool,
    writers: Sequence[str],
    relay: str | None,
) -> AlembicConfig:
    config = AlembicConfig()
    config.set_main_option("script_location", str(migrations_directory()).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes |= {
        "outbox_name": name,
        "outbox_schema": schema,
        "outbox_shards": shards,
        "outbox_retention": retention,
        "outbox_slots": slots,
        "outbox_doorbell": doorbell,
        "outbox_writers": tuple(writers),
        "outbox_relay": relay,
    }
    return config


def _present(connection, schema: str) -> tuple[int | None, str | None]:  # type: ignore[no-untyped-def]
    there = connection.execute(text("SELECT to_regclass(:t)"), {"t": f"{quote(schema)}.settings"}).scalar()
    if there is None:
        return None, None
    row = connection.execute(text(f"SELECT schema_version, name FROM {quote(schema)}.settings")).one()
    return int(row[0]), str(row[1])


def _ours(connection, schema: str) -> bool:  # type: ignore[no-untyped-def]
    table = f"{quote(schema)}.alembic_version"
    if connection.execute(text("SELECT to_regclass(:t)"), {"t": table}).scalar() is None:
        return False
    return bool(connection.execute(text(f"SELECT count(*) FROM {table} WHERE version_num LIKE 'outbox%'")).scalar())


def _translated(error: exc.DBAPIError, url: str, schema: str) -> OutboxError:
    import psycopg  # noqa: PLC0415  the base install has it; only this path needs it by name

    if isinstance(error.orig, psycopg.errors.InsufficientPrivilege):
        return DatabaseError(
            f"PostgreSQL at {place(url)} denied it to the role that migrates: {error.orig.diag.message_primary}.",
            cure=f"Migrate as the owner of the database, or let that one make the schema for you: CREATE SCHEMA "
            f"{quote(schema)} AUTHORIZATION ROLE.",
        )
    if isinstance(error.orig, psycopg.Error):
        return translate(error.orig, place(url))
    return DatabaseError(f"The database answered with an error: {error}.")

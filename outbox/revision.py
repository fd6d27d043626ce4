"""Migrations: run ours in a database without Alembic, or write a revision into a service's own folder."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from alembic import command
from alembic.config import Config as AlembicConfig
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from alembic.util import rev_id as new_revision_id
from sqlalchemy import create_engine, exc, text
from sqlalchemy.pool import NullPool

from outbox.database import libpq_url, place, translate
from outbox.errors import ConfigError, DatabaseError, OutboxError
from outbox.operations import check_name
from outbox.schema import NEWEST, create_schema, grants, quote

_CREATES = re.compile(r"\bop\.outbox_create\(")
_VERSIONS = re.compile(r"\b(?:version|to_version)=(\d+)")


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
) -> Migrated:
    """Make, upgrade or (`to="base"`) remove the outbox of a database that has no Alembic environment of its own.

    A second run changes nothing but grants. An outbox of another name is refused with `WrongOutboxError`; one that a
    service's own migrations made, with `ConfigError`.
    """
    config = _config(name, schema, shards, retention, slots, doorbell=doorbell, writers=writers, relay=relay)
    engine = create_engine("postgresql+psycopg://" + libpq_url(url).partition("://")[2], poolclass=NullPool)
    try:
        with engine.begin() as connection:
            before, found = _present(connection, schema)
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
                connection.execute(text(f"DROP SCHEMA {quote(schema)}"))
                return Migrated(before, None, None)
            command.upgrade(config, to)
            if before is not None:
                for statement in grants(schema, writers=writers, relay=relay):
                    connection.exec_driver_sql(statement, execution_options={"no_parameters": True})
            after, made = _present(connection, schema)
            return Migrated(before, after, made)
    except exc.DBAPIError as error:
        raise _translated(error, url) from error
    except CommandError as error:
        raise DatabaseError(f"Alembic cannot migrate: {error}.", cure="See docs/operations.md, Migrations.") from error
    finally:
        engine.dispose()


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


def write_revision(
    ini: Path,
    *,
    name: str | None = None,
    schema: str = "outbox",
    add_type: str | None = None,
    topic: str | None = None,
    capture: str | None = None,
    key: Sequence[str] = ("id",),
    existing_rows: bool = True,
    head: str = "head",
) -> Path:
    """Write a revision into the service's versions folder, after its head; its path.

    Without `add_type` and `capture` it creates the outbox, or upgrades it when the folder creates an older version;
    `ConfigError` when there is nothing to do, or no Alembic environment, or several heads.
    """
    if not ini.is_file():
        raise ConfigError(
            f"There is no Alembic environment here: {ini} is missing.",
            cure="Run this in the service's folder, or give --alembic-config; for a database without Alembic: "
            "outbox migrate --name NAME.",
        )
    scripts = ScriptDirectory.from_config(AlembicConfig(str(ini)))
    heads = scripts.get_heads()
    if head == "head" and len(heads) > 1:
        raise ConfigError(f"The service has several heads: {', '.join(heads)}.", cure="Merge them, or give --head ONE.")
    ups, downs, message = _body(
        scripts, name=name, schema=schema, add_type=add_type, topic=topic, capture=capture, key=key,
        existing_rows=existing_rows,
    )  # fmt: skip
    try:
        # Alembic says on standard output what it does; that belongs to whoever calls this.
        with redirect_stdout(io.StringIO()):
            script = scripts.generate_revision(
                new_revision_id(),
                message,
                refresh=True,
                head=head,
                imports="import outbox.operations  # noqa: F401  registers op.outbox_...",
                upgrades="\n    ".join(ups),
                downgrades="\n    ".join(downs),
            )
    except CommandError as error:
        raise ConfigError(f"Alembic cannot write the revision: {error}.", cure="Correct --head.") from error
    if script is None:
        raise ConfigError("Alembic wrote no revision.", cure="Look at the service's env.py and script.py.mako.")
    return Path(script.path)


def _body(
    scripts: ScriptDirectory,
    *,
    name: str | None,
    schema: str,
    add_type: str | None,
    topic: str | None,
    capture: str | None,
    key: Sequence[str],
    existing_rows: bool,
) -> tuple[list[str], list[str], str]:
    in_schema = "" if schema == "outbox" else f", schema={schema!r}"
    sources = [Path(script.path).read_text("utf-8") for script in scripts.walk_revisions()]
    present = [source for source in sources if _CREATES.search(source)]
    ups: list[str] = []
    downs: list[str] = []
    said: list[str] = []
    if add_type is not None or capture is not None:
        type_name = add_type or capture or ""
        if add_type is not None:
            if topic is None:
                raise ConfigError(f'The entity type "{add_type}" needs a topic.', cure="Give --topic TOPIC.")
            ups.append(f"op.outbox_add_type({add_type!r}, topic={topic!r}{in_schema})")
            downs.insert(0, f"op.outbox_remove_type({add_type!r}{in_schema})")
            said.append(f"publish {add_type}")
        if capture is not None:
            table_schema, _, table = capture.rpartition(".")
            of = f", table_schema={table_schema!r}" if table_schema else ""
            rows = "" if existing_rows else ", existing_rows=False"
            ups.append(f"op.outbox_capture({table!r}, type={type_name!r}, key={list(key)!r}{rows}{of}{in_schema})")
            downs.insert(0, f"op.outbox_release({table!r}{of}{in_schema})")
            said.append(f"capture {capture}")
        if not present:
            raise ConfigError(
                "The service's revisions create no outbox yet.", cure="Write that one first: outbox revision."
            )
        return ups, downs, ", ".join(said)
    if not present:
        named = "" if name is None else f"name={name!r}, "
        return (
            [f"op.outbox_create({named}version={NEWEST}{in_schema})"],
            [f"op.outbox_drop(version={NEWEST}{in_schema})"],
            "create the outbox",
        )
    version = max(int(number) for source in sources for number in _VERSIONS.findall(source) if "op.outbox_" in source)
    if version >= NEWEST:
        raise ConfigError(
            f"The service's revisions already bring the outbox to version {version}, the newest.",
            cure="Nothing is to do. To register an entity type: outbox revision --add-type NAME --topic TOPIC.",
        )
    return (
        [f"op.outbox_upgrade(from_version={version}, to_version={NEWEST}{in_schema})"],
        [f"op.outbox_downgrade(from_version={NEWEST}, to_version={version}{in_schema})"],
        f"upgrade the outbox to version {NEWEST}",
    )


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


def _translated(error: exc.DBAPIError, url: str) -> OutboxError:
    import psycopg  # noqa: PLC0415  the base install has it; only this path needs it by name

    if isinstance(error.orig, psycopg.Error):
        return translate(error.orig, place(url))
    return DatabaseError(f"The database answered with an error: {error}.")

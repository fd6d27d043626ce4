"""`outbox types`."""

from __future__ import annotations

import re
from typing import Any

import click
import orjson
from psycopg.types.json import Jsonb

from outbox.database import Connection
from outbox.entity_type import EntityType
from outbox.equality import check_comparison
from outbox.errors import ConfigError, UnknownTypeError
from outbox.schema import quote
from outbox.topic import check_settings, dead_letters_topic, positions_topic
from outbox_cli.settings import (
    ENTITY_TYPE,
    Settings,
    confirm,
    find_type,
    json_option,
    print_json,
    printable,
    table,
    with_settings,
)

_ADVICE = "In a service with Alembic write it into a migration instead: outbox revision --add-type NAME --topic TOPIC."


@click.group("types", epilog="Example: outbox types list")
def command() -> None:
    """List, add, change or remove entity types."""


@command.command("list", epilog="Example: outbox types list --json")
@json_option
@with_settings
def list_(settings: Settings, as_json: bool) -> None:
    """List the entity types."""
    with settings.connect() as connection:
        rows = connection.execute(
            f"SELECT name, topic, topic_settings, collapse, max_bytes, source, follows, reads_source, "
            f"comparison FROM {quote(settings.config.schema)}.entity_types ORDER BY name".encode()
        ).fetchall()
    if as_json:
        names = (
            *("name", "topic", "topic_settings", "collapse", "max_bytes", "source", "follows", "reads_source"),
            "comparison",
        )
        print_json([dict(zip(names, row, strict=True)) for row in rows])
        return
    if not rows:
        click.echo("There are no entity types. Add one: outbox types add NAME --topic TOPIC.")
        return
    shown = [
        (
            r[0],
            r[1],
            r[6] or "",
            "source" if r[7] else "entries",
            "yes" if r[3] else "no",
            r[4],
            orjson.dumps(r[2]).decode() if r[2] else "",
        )
        for r in rows
    ]
    click.echo(table(("TYPE", "TOPIC", "FOLLOWS", "STATES OF", "COLLAPSE", "MAX BYTES", "TOPIC SETTINGS"), shown))


def _options(function: Any) -> Any:
    for option in reversed(
        (
            click.option("--collapse/--no-collapse", default=None, help="Publish only the last of several entries."),
            click.option("--max-bytes", type=click.IntRange(1, 100_000_000), help="Greatest size of a state."),
            click.option("--partitions", type=click.IntRange(1, 100_000), help="Partitions of the topic; default 8."),
            click.option("--topic-setting", multiple=True, metavar="NAME=VALUE", help="A setting of the topic."),
            click.option("--source", help="A query of all keys and states."),
            click.option(
                "--comparison",
                metavar="HOW",
                help="When reconcile takes two states for the same: json, bytes, MODULE:ATTRIBUTE (a function of "
                "yours), or content-type: as that says, the default.",
            ),
        )
    ):
        function = option(function)
    return function


def _named(comparison: str | None) -> str | None:
    """What the table says: null for `content-type`."""
    return None if comparison == "content-type" else comparison


def _topic_settings(name: str, pairs: tuple[str, ...], partitions: int | None) -> dict[str, object]:
    found: dict[str, object] = {}
    for pair in pairs:
        key, mark, value = pair.partition("=")
        if not mark or not key or not value:
            raise ConfigError(f'"{pair}" is no topic setting.', cure="Write NAME=VALUE, as in segment.ms=3600000.")
        found[key] = value
    if partitions is not None:
        found["partitions"] = partitions
    check_settings(found, where=f'The entity type "{name}"')
    return found


@command.command(epilog="Example: outbox types add customer --topic shop.customer --partitions 12")
@click.argument("type_name", metavar="NAME")
@click.option("--topic", required=True, help="The topic that carries its states.")
@_options
@json_option
@with_settings
def add(
    settings: Settings,
    type_name: str,
    topic: str,
    collapse: bool | None,
    max_bytes: int | None,
    partitions: int | None,
    topic_setting: tuple[str, ...],
    source: str | None,
    comparison: str | None,
    as_json: bool,
) -> None:
    """Register an entity type."""
    import psycopg.errors

    extra = _topic_settings(type_name, topic_setting, partitions)
    if not 1 <= len(type_name.encode()) <= 200 or not type_name.isprintable():
        raise ConfigError(
            f'"{printable(type_name[:50])}" cannot be the name of an entity type.',
            cure="Use 1 to 200 bytes, without control characters.",
        )
    with settings.connect() as connection:
        s = quote(settings.config.schema)
        check_topic(connection, s, type_name, topic)
        _check_source(connection, type_name, source)
        check_comparison(named := _named(comparison))
        try:
            connection.execute(
                f"INSERT INTO {s}.entity_types (name, topic, topic_settings, collapse, max_bytes, source, comparison) "
                f"VALUES (%s, %s, %s, %s, %s, %s, %s)".encode(),
                [type_name, topic, Jsonb(extra), collapse is not False, max_bytes or 1_000_000, source, named],
            )
        except psycopg.errors.UniqueViolation as error:
            raise ConfigError(
                f'The entity type "{type_name}" is there already.',
                cure=f"Change it: outbox types change {type_name} ...",
            ) from error
    if as_json:
        print_json({"added": type_name, "topic": topic})
    else:
        click.echo(f"Added {type_name} -> {topic}. Make the topic: outbox topics apply.")
        click.echo(_ADVICE, err=True)


@command.command(epilog="Example: outbox types change customer --max-bytes 2000000")
@click.argument("type_name", type=ENTITY_TYPE, metavar="NAME")
@click.option("--topic", help="Another topic. The old one is left as it is.")
@click.option(
    "--reads-source/--no-reads-source",
    default=None,
    help="Publish of a change what the source says of its key, or the state that was written.",
)
@_options
@json_option
@with_settings
def change(
    settings: Settings,
    type_name: str,
    topic: str | None,
    reads_source: bool | None,
    collapse: bool | None,
    max_bytes: int | None,
    partitions: int | None,
    topic_setting: tuple[str, ...],
    source: str | None,
    comparison: str | None,
    as_json: bool,
) -> None:
    """Change an entity type; what is not named stays."""
    extra = _topic_settings(type_name, topic_setting, partitions)
    if not extra and all(given is None for given in (topic, reads_source, collapse, max_bytes, source, comparison)):
        raise click.UsageError("Say what is to change: see outbox types change --help.")
    with settings.connect() as connection:
        _check_source(connection, type_name, source)
        check_comparison(named := _named(comparison))
        if reads_source:
            _check_reads(find_type(connection, settings.config.schema, type_name), source)
        if topic is not None:
            check_topic(connection, quote(settings.config.schema), type_name, topic)
        row = connection.execute(
            f"""UPDATE {quote(settings.config.schema)}.entity_types
                SET topic = coalesce(%s, topic), topic_settings = topic_settings || %s,
                    collapse = coalesce(%s, collapse), max_bytes = coalesce(%s, max_bytes),
                    source = coalesce(%s, source), reads_source = coalesce(%s, reads_source),
                    comparison = CASE WHEN %s THEN %s ELSE comparison END
                WHERE name = %s RETURNING name, topic""".encode(),
            [
                *(topic, Jsonb(extra), collapse, max_bytes, source, reads_source),
                *(comparison is not None, named, type_name),
            ],
        ).fetchone()
    if row is None:
        raise _unknown(type_name)
    if as_json:
        print_json({"changed": row[0], "topic": row[1]})
    else:
        then = " Bring the topic in line: outbox topics apply." if extra or topic or max_bytes else ""
        click.echo(f"Changed {type_name}.{then}")


@command.command(epilog="Example: outbox types remove customer --yes")
@click.argument("type_name", type=ENTITY_TYPE, metavar="NAME")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@with_settings
def remove(settings: Settings, type_name: str, yes: bool, as_json: bool) -> None:
    """Remove an entity type; its topic and its entries stay. Entries not yet published are dead-lettered."""
    confirm(f"Remove the entity type {type_name}? What is not published yet will be dead-lettered.", yes=yes)
    with settings.connect() as connection:
        captured = connection.execute(
            f"SELECT table_schema, table_name FROM {quote(settings.config.schema)}.captures WHERE type = %s".encode(),
            [type_name],
        ).fetchone()
        if captured is not None:
            raise ConfigError(
                f'The entity type "{type_name}" is captured from the table {captured[0]}.{captured[1]}, whose writes '
                "would fail without it.",
                cure="End the capture first: op.outbox_release(...) in a migration.",
            )
        follower = connection.execute(
            f"SELECT topic FROM {quote(settings.config.schema)}.entity_types WHERE follows = %s".encode(), [type_name]
        ).fetchone()
        if follower is not None:
            raise ConfigError(
                f'The topic {follower[0]} follows the entity type "{type_name}".',
                cure=f"End that first: outbox topics retire {follower[0]}.",
            )
        row = connection.execute(
            f"DELETE FROM {quote(settings.config.schema)}.entity_types WHERE name = %s RETURNING topic".encode(),
            [type_name],
        ).fetchone()
    if row is None:
        raise _unknown(type_name)
    if as_json:
        print_json({"removed": type_name, "topic": row[0]})
    else:
        click.echo(f"Removed {type_name}; its topic {row[0]} is left as it is.")


def _check_reads(entity_type: EntityType, source: str | None) -> None:
    """Refuse to read the source of a type that has none and gets none, or whose every entry counts."""
    if not entity_type.collapse:
        raise ConfigError(
            f"Of {entity_type.name} every entry is published, and a source knows the present state alone.",
            cure="Leave --reads-source out.",
        )
    if source is None and entity_type.source is None:
        raise ConfigError(f'The entity type "{entity_type.name}" has no source.', cure="Name it: --source.")


def check_topic(connection: Connection, schema: str, name: str, topic: str) -> None:
    """Refuse a topic that Kafka would refuse, or that carries another entity type; `schema` is quoted."""
    if not re.fullmatch(r"[a-zA-Z0-9._-]{1,249}", topic) or topic in {".", ".."}:
        raise ConfigError(
            f'"{topic[:260]}" cannot be the name of a topic.',
            cure="A topic's name has letters, digits, dot, underscore and hyphen, at most 249.",
        )
    (outbox,) = connection.execute(f"SELECT name FROM {schema}.settings".encode()).fetchone() or ("",)
    if topic in {positions_topic(outbox), dead_letters_topic(outbox)}:
        raise ConfigError(
            f"The topic {topic} is the outbox's own: a state in it would destroy a position or a dead letter.",
            cure="Choose another topic.",
        )
    taken = connection.execute(f"SELECT name FROM {schema}.entity_types WHERE topic = %s".encode(), [topic]).fetchone()
    if taken is not None and taken[0] != name:
        raise ConfigError(
            f'The topic {topic} already belongs to the entity type "{taken[0]}": the topic says the type.',
            cure="Choose another topic.",
        )


def _check_source(connection: Connection, name: str, query: str | None) -> None:
    """Refuse a source that is no query, or lacks its columns; say what makes it slow."""
    from outbox import source

    if query is not None:
        found = source.look(connection, name, query)
        source.check_state(name, found)
        why = source.slow_pages(connection, found)
        if why is not None:
            click.echo(
                f"warning: a backfill of {name} will be slow: {why}. Add the columns that the key is made of to the "
                f"source, in the order of their index: {source.EXAMPLE}.",
                err=True,
            )


def _unknown(name: str) -> UnknownTypeError:
    return UnknownTypeError(f'There is no entity type "{name}".', cure="See them: outbox types list.")

"""Followers: entity types that carry another's changes to a further topic, and the switch from one topic to the other.

A new version of a topic is a follower with a source of its own: it is backfilled like any type, and from its first
moment the relay publishes each change to both topics, in one transaction. The switch is one transaction in the
database: an entry is published as the types are as of its batch's snapshot, to both topics before and after.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from psycopg import errors as pg
from psycopg.types.json import Jsonb

from outbox import requests
from outbox.database import Connection
from outbox.entity_type import EntityType
from outbox.entity_types import read_types
from outbox.errors import ConfigError
from outbox.schema import quote


def of_topic(connection: Connection, schema: str, followed: str, topic: str) -> EntityType | None:
    """The follower of a type that carries its changes to this topic, if there is one."""
    types = read_types(connection, schema)
    return next((of for of in types if of.follows == followed and of.topic == topic), None)


def follow(
    connection: Connection,
    schema: str,
    followed: EntityType,
    topic: str,
    *,
    source: str | None = None,
    topic_settings: Mapping[str, Any] | None = None,
    sourceless: bool = False,
) -> EntityType:
    """Have a further topic follow a type; it is named as its topic. The topic must be there before.

    With a `source` each change is published as what that says of its key, otherwise as it was written. Raises
    `ConfigError` when the type follows another itself, or has no source and none is given; `sourceless`: it needs none,
    for it is filled from the log.
    """
    if followed.follows is not None:
        raise ConfigError(
            f'"{followed.name}" follows "{followed.follows}" itself.',
            cure=f"Have the topic follow that one: outbox backfill start {followed.follows} --to-topic {topic}.",
        )
    if source is None and followed.source is None and not sourceless:
        raise ConfigError(
            f'The entity type "{followed.name}" has no source: what there is to publish to {topic} is not known.',
            cure="Name the query: --source.",
        )
    settings = {**followed.topic_settings, **(topic_settings or {})}
    try:
        connection.execute(
            f"""INSERT INTO {quote(schema)}.entity_types
                    (name, topic, topic_settings, collapse, max_bytes, source, follows, reads_source)
                SELECT %(topic)s, %(topic)s, %(settings)s, t.collapse, t.max_bytes, coalesce(%(source)s, t.source),
                       t.name, %(source)s::text IS NOT NULL
                FROM {quote(schema)}.entity_types t WHERE t.name = %(followed)s""".encode(),
            {"topic": topic, "settings": Jsonb(settings), "source": source, "followed": followed.name},
        )
    except pg.UniqueViolation as error:
        raise ConfigError(
            f'There is an entity type "{topic}", which has the name that the follower would have.',
            cure="Give the topic another name.",
        ) from error
    found = of_topic(connection, schema, followed.name, topic)
    if found is None:
        raise ConfigError(f'There is no entity type "{followed.name}".', cure="See them: outbox types list.")
    return found


def switch(connection: Connection, schema: str, name: str, topic: str, *, shards: int, keep: bool) -> EntityType:
    """Give a type the topic of its follower, which ends; with `keep` the old topic follows from now on.

    Returns the type as it is now. Raises `ConfigError` when nothing follows it with this topic, or when that has not
    been filled.
    """
    s = quote(schema)
    with connection.transaction():
        connection.execute(f"LOCK TABLE {s}.entity_types IN SHARE ROW EXCLUSIVE MODE".encode())
        types = {of.name: of for of in read_types(connection, schema)}
        old, new = types.get(name), of_topic(connection, schema, name, topic)
        if old is None or new is None:
            raise ConfigError(
                f'Nothing carries the changes of "{name}" to the topic {topic}.',
                cure=f"Fill it first: outbox backfill start {name} --to-topic {topic} --watch.",
            )
        _check_filled(connection, schema, new, shards)
        connection.execute(f"DELETE FROM {s}.entity_types WHERE name = %s".encode(), [new.name])
        connection.execute(
            f"""UPDATE {s}.entity_types
                SET topic = %s, topic_settings = %s, source = %s, reads_source = %s, collapse = %s, max_bytes = %s
                WHERE name = %s""".encode(),
            [
                new.topic,
                Jsonb(dict(new.topic_settings)),
                new.source,
                new.reads_source,
                new.collapse,
                new.max_bytes,
                name,
            ],
        )
        if keep:
            # Whatever writers write from now on, the old topic goes on as it was; what it is, its source says.
            connection.execute(
                f"""INSERT INTO {s}.entity_types
                        (name, topic, topic_settings, collapse, max_bytes, source, follows, reads_source)
                    VALUES (%s, %s, %s, %s, %s, %s, %s, %s)""".encode(),
                [
                    old.topic,
                    old.topic,
                    Jsonb(dict(old.topic_settings)),
                    old.collapse,
                    old.max_bytes,
                    old.source or new.source,
                    name,
                    old.source is not None,
                ],
            )
    return next(of for of in read_types(connection, schema) if of.name == name)


def _check_filled(connection: Connection, schema: str, follower: EntityType, shards: int) -> None:
    """Refuse a follower whose topic lacks what was there before it."""
    asked = [
        one
        for one in requests.find(connection, schema, kinds=("backfill",))
        if one.arguments.get("type") == follower.name and not one.cancelled
    ]
    for one in asked:
        if one.state(shards) != "done":
            raise ConfigError(
                f"The backfill of {follower.topic} is not through: request {one.id} ({one.state(shards)}).",
                cure=f"Wait for it: outbox backfill watch {one.id}.",
            )
    whole = [one for one in asked if one.arguments.get("where") is None]
    if not any("error" not in said for one in whole[-1:] for said in one.outcomes.values()) or not whole:
        raise ConfigError(
            f"The topic {follower.topic} has not been filled: it has changes alone, and lacks what was there before.",
            cure=f"Fill it: outbox backfill start {follower.follows} --to-topic {follower.topic} --watch.",
        )


def retire(connection: Connection, schema: str, topic: str) -> str:
    """End a follower by its topic, which stays as it is; the type that it followed."""
    row = connection.execute(
        f"DELETE FROM {quote(schema)}.entity_types WHERE topic = %s AND follows IS NOT NULL RETURNING follows".encode(),
        [topic],
    ).fetchone()
    if row is None:
        raise ConfigError(
            f"The topic {topic} follows no entity type.", cure="See them, with what they follow: outbox types list."
        )
    return str(row[0])

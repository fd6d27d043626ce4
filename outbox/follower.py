"""Followers: entity types that carry another's changes to a further topic, and the switch from one topic to the other.

A new version of a topic is a follower with a source of its own: it is backfilled like any type, and from its first
moment the relay publishes each change to both topics, in one transaction. The switch is one transaction in the
database: an entry is published as the types are as of its batch's snapshot, to both topics before and after.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from psycopg.types.json import Jsonb

from outbox import requests
from outbox.database import Connection
from outbox.entity_type import EntityType
from outbox.entity_types import read_types
from outbox.errors import ConfigError
from outbox.schema import quote
from outbox.source import digest

_MOST_NAME = 200


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
    """Have a further topic follow a type; it is named as its topic, or nearly so. The topic must be there before.

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
    if source is not None and not followed.collapse:
        raise ConfigError(
            f'Of "{followed.name}" every entry is published, and a source knows the present state alone.',
            cure="Leave --source out.",
        )
    names = {of.name for of in read_types(connection, schema)}
    name = _name(topic, names)
    if len(name.encode()) > _MOST_NAME:
        raise ConfigError(
            f"The topic {topic[:60]}... is too long to be the name of an entity type.",
            cure=f"Choose one of at most {_MOST_NAME} characters.",
        )
    settings = {**followed.topic_settings, **(topic_settings or {})}
    connection.execute(
        f"""INSERT INTO {quote(schema)}.entity_types
                (name, topic, topic_settings, collapse, max_bytes, source, follows, reads_source, comparison)
            SELECT %(name)s, %(topic)s, %(settings)s, t.collapse, t.max_bytes, coalesce(%(source)s, t.source),
                   t.name, %(source)s::text IS NOT NULL, t.comparison
            FROM {quote(schema)}.entity_types t WHERE t.name = %(followed)s""".encode(),
        {"name": name, "topic": topic, "settings": Jsonb(settings), "source": source, "followed": followed.name},
    )
    found = of_topic(connection, schema, followed.name, topic)
    if found is None:
        raise ConfigError(f'There is no entity type "{followed.name}".', cure="See them: outbox types list.")
    return found


def switch(connection: Connection, schema: str, name: str, topic: str, *, shards: int, keep: bool) -> EntityType:
    """Give a type the topic of its follower, which ends; with `keep` the old topic follows from now on.

    Returns the type as it is now. Raises `ConfigError` when nothing follows it with this topic, when that has not been
    filled, or while a request of it goes on.
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
        _check_idle(connection, schema, new, shards)
        _check_filled(connection, schema, new)
        connection.execute(f"DELETE FROM {s}.entity_types WHERE name = %s".encode(), [new.name])
        connection.execute(
            f"""UPDATE {s}.entity_types
                SET topic = %s, topic_settings = %s, source = %s, reads_source = %s, collapse = %s, max_bytes = %s,
                    comparison = %s
                WHERE name = %s""".encode(),
            [
                new.topic,
                Jsonb(dict(new.topic_settings)),
                new.source,
                new.reads_source,
                new.collapse,
                new.max_bytes,
                new.comparison,
                name,
            ],
        )
        if keep:
            # Whatever writers write from now on, the old topic goes on as its source says; without one, or where every
            # entry counts, as it is written.
            connection.execute(
                f"""INSERT INTO {s}.entity_types
                        (name, topic, topic_settings, collapse, max_bytes, source, follows, reads_source, comparison,
                         complete)
                    VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, true)""".encode(),
                [
                    _name(old.topic, types.keys() - {new.name}),
                    old.topic,
                    Jsonb(dict(old.topic_settings)),
                    old.collapse,
                    old.max_bytes,
                    old.source,
                    name,
                    old.source is not None and old.collapse,
                    old.comparison,
                ],
            )
    return next(of for of in read_types(connection, schema) if of.name == name)


def _name(topic: str, taken: AbstractSet[str]) -> str:
    """What a follower is called: as its topic, unless a type is."""
    return f"{topic}+" if topic in taken else topic


def _check_idle(connection: Connection, schema: str, follower: EntityType, shards: int) -> None:
    """Refuse a follower of which a request goes on: what that has not published yet would be missing, or be old."""
    for one in requests.find(connection, schema):
        mine = one.arguments.get("type") in {follower.name, None} and one.kind != "app"
        if mine and one.state(shards) in {"running", "paused"}:
            raise ConfigError(
                f"Request {one.id} ({one.kind}, {one.state(shards)}) of {follower.topic} is not through.",
                cure=f"Wait for it: outbox backfill watch {one.id}.",
            )


def _check_filled(connection: Connection, schema: str, follower: EntityType) -> None:
    """Refuse a follower whose topic lacks what was there before it."""
    row = connection.execute(
        f"SELECT complete, date_part('epoch', created_at) FROM {quote(schema)}.entity_types WHERE name = %s".encode(),
        [follower.name],
    ).fetchone()
    complete, created = row or (False, 0.0)
    if complete:
        return
    for one in requests.find(connection, schema, kinds=("backfill", "history")):
        arguments = one.arguments
        whole = not any(arguments.get(some) for some in ("where", "keys", "first_id"))
        # Of the follower as it is: of an earlier one, or with another source, it says nothing.
        same = one.kind == "history" or arguments.get("source") == digest(follower.source)
        if (
            arguments.get("type") == follower.name
            and whole
            and same
            and one.requested_at.timestamp() >= created
            and one.outcomes
            and not any("error" in said for said in one.outcomes.values())
        ):
            return
    raise ConfigError(
        f"The topic {follower.topic} has not been filled: it has changes alone, and lacks what was there before, or "
        "has it as another source said it.",
        cure=f"Fill it: outbox backfill start {follower.follows} --to-topic {follower.topic} --watch."
        if follower.source is not None
        else f"Fill it: outbox replay --type {follower.follows} --history --to-topic {follower.topic}.",
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

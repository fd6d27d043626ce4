"""The table of entity types, read."""

from __future__ import annotations

from outbox.database import Connection
from outbox.entity_type import EntityType
from outbox.schema import quote


def read_types(connection: Connection, schema: str) -> list[EntityType]:
    """All entity types, by name."""
    rows = connection.execute(
        "SELECT name, topic, topic_settings, collapse, max_bytes, source "
        f"FROM {quote(schema)}.entity_types ORDER BY name".encode()
    )
    return [EntityType(*row) for row in rows]

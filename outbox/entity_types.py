"""The table of entity types, read."""

from __future__ import annotations

from outbox.database import Connection
from outbox.entity_type import EntityType
from outbox.schema import quote


def read_types(connection: Connection, schema: str) -> list[EntityType]:
    """All entity types, by name."""
    rows = connection.execute(
        "SELECT t.name, t.topic, t.topic_settings, t.collapse, t.max_bytes, t.source, "
        f"EXISTS (SELECT FROM {quote(schema)}.captures c"
        " WHERE c.type = coalesce(t.follows, t.name) AND c.source = t.source), t.follows, t.reads_source, t.comparison "
        f"FROM {quote(schema)}.entity_types t ORDER BY t.name".encode()
    )
    return [EntityType(*row) for row in rows]

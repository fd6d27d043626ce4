"""Collapse: of several unpublished entries of one key, the last is enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from outbox.entity_type import EntityType
from outbox.entry import Entry


def collapse(entries: Sequence[Entry], types: Mapping[str, EntityType]) -> Sequence[Entry]:
    """Leave out every entry that a later one of the same key supersedes; the others stay in id order.

    Types with collapse off keep all. A type that is not registered collapses: its entries are dead-lettered, one a key.
    """
    keep_all = {name for name, entity_type in types.items() if not entity_type.collapse}
    seen: set[tuple[str, str]] = set()
    kept: list[Entry] = []
    for entry in reversed(entries):
        # By index: this runs once an entry, and the rows are plain tuples.
        entity = (entry[1], entry[2])
        if entity in seen and entry[1] not in keep_all:
            continue
        seen.add(entity)
        kept.append(entry)
    if len(kept) == len(entries):
        return entries
    kept.reverse()
    return kept

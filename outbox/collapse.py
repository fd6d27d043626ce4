"""Collapse: of several unpublished entries of one key, the last is enough."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter

from outbox.entity_type import EntityType
from outbox.entry import Entry

_ENTITY = itemgetter(1, 2)
_ID = itemgetter(0)


def collapse(entries: Sequence[Entry], types: Mapping[str, EntityType]) -> Sequence[Entry]:
    """Leave out every entry that a later one of the same key supersedes; the others stay in id order.

    Types with collapse off keep all. A type that is not registered collapses: its entries are dead-lettered, one a key.
    """
    keep_all = {name for name, entity_type in types.items() if not entity_type.collapse}
    # A dictionary keeps the last of equal keys, and makes no step of Python for each entry.
    last = dict(zip(map(_ENTITY, entries), entries, strict=True))
    if len(last) == len(entries):
        return entries
    if not keep_all:
        return sorted(last.values(), key=_ID)
    return [entry for entry in entries if entry[1] in keep_all or last[_ENTITY(entry)] is entry]

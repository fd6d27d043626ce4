"""Requests: what the control table asks of the relay, what must be read for it, and what was found. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from outbox.entry import Entry

Entity = tuple[str, str]
"""An entity type's name and a key."""

NAMELESS = "(row at "
"""How the name of a row begins that has no usable key."""

DEAD_LETTERS = frozenset({"retry", "drop"})


@dataclass(frozen=True, slots=True)
class Request:
    """A row of the control table: what the command line asks of the relay.

    `retry` and `drop` name dead letters: `arguments` holds `type` (None: of every type) and `keys` (None: all).
    `publish` names keys of a type (`type`, `keys`): the state that each has now is published, or a tombstone.
    `history` means every entry of a type (`of`) that is retained, in order, as one of `type`; `keys`, `since` (ISO
    8601) and `first_id` choose, each may be None. `backfill` means all that the source of a type has (`type`, `where`:
    a condition or None, `rate`: rows a second or None). `paused`: nothing is done for it until somebody resumes it.
    """

    id: int
    kind: str
    arguments: Mapping[str, Any]
    paused: bool = False

    def names(self, dead: Iterable[Entity]) -> list[Entity]:
        """Those of the dead letters that it means."""
        type_name, keys = self.arguments.get("type"), self.arguments.get("keys")
        return [
            (of, key) for of, key in dead if (type_name is None or of == type_name) and (keys is None or key in keys)
        ]


@dataclass(frozen=True, slots=True)
class Page:
    """The next rows of a type's source, in its order, that a backfill wants.

    `after`: where the page before ended, as texts (None: there was none). `rows`: how many at the most. `source`: what
    identifies the source that the page before was read from. `history`: it is of the log, not of a source, and so
    chosen.
    """

    request: int
    type: str
    where: str | None
    after: Sequence[str] | None
    rows: int
    source: str | None = None
    history: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """What open requests want to be read beside a batch, in its snapshot.

    `retained`: the last retained entry of each entity, with an id below which it cannot be. `current`: the state that
    each has in its type's source.
    """

    retained: Mapping[Entity, int] = field(default_factory=dict)
    current: Sequence[Entity] = ()
    page: Page | None = None


class Row(NamedTuple):
    """One row of a source, and where the page would end after it.

    It is like an entry, with id 0, since none was written; or, where it was looked up because of a change, with that
    entry's id, time, cause and headers. `failure` says why there is no state, though there is a row; it is None
    otherwise.
    """

    entry: Entry
    at: Sequence[str] = ()
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What was read for `Wanted`: entries; of each entity its row, without a state where it is gone; a page.

    `source` identifies what the page was read from; `more`: whether it may go on after the page; `end`: where, if
    that is not after its last row, and `scanned`: how many rows it took, if not as many as it has; `page_seconds`: how
    long reading it took. `errors`: by type, why its source could not be read. `elsewhere`: entities that were wanted
    and are another shard's. `looked_for`: those that were wanted. `later`: types whose source could not be read now,
    and may be soon.
    """

    retained: Sequence[Entry] = ()
    current: Sequence[Row] = ()
    page: Sequence[Row] = ()
    source: str | None = None
    paged: Page | None = None
    more: bool = False
    errors: Mapping[str, str] = field(default_factory=dict)
    elsewhere: AbstractSet[Entity] = frozenset()
    end: Sequence[str] | None = None
    scanned: int | None = None
    page_seconds: float = 0.0
    looked_for: AbstractSet[Entity] = frozenset()
    later: AbstractSet[str] = frozenset()

"""Changes: what the records of a topic say, and which of them count. Pure.

An entry's id grows for each key, so a record whose id is not greater than the one that is held is older, or the same:
it came again, after the relay's positions were lost, say. A record with the id 0 comes from no entry (a backfill, a
repair, a hand): the log's order is right for it, and the id that is held stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import orjson

from outbox.message import CAUSE_HEADER, CONTENT_TYPE_HEADER, ID_HEADER

NONE = -1
"""The id of a key of which nothing is held."""
_GREATEST = 2**63 - 1


class Raw(NamedTuple):
    """A record as it lies in the topic. `timestamp_ms`: milliseconds since 1970; `value` None is a tombstone."""

    partition: int
    offset: int
    timestamp_ms: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]


class Change(NamedTuple):
    """What one record says: of which key, its state now (None: the entity is deleted), and of which entry it comes.

    `entry_id` is 0 for what comes from no entry. `updated_ms`: when the owner changed it, milliseconds since 1970.
    """

    key: str
    state: Any
    entry_id: int
    updated_ms: int
    cause: str | None
    raw: Raw

    @property
    def deleted(self) -> bool:
        """Whether the entity is deleted."""
        return self.raw.value is None


class Bad(NamedTuple):
    """A record that cannot be applied, and why; its entry id is 0 where it says none that can be."""

    key: str
    entry_id: int
    reason: str
    raw: Raw

    @property
    def keyed(self) -> bool:
        """Whether `key` is the record's, and not what could be made of one that no row can have."""
        return self.raw.key == self.key.encode()


def refused(key: str, entry_id: int, why: str, raw: Raw) -> Bad:
    """A bad record. Its texts are such as every database takes: PostgreSQL none with NUL."""
    reason = why[:500].encode(errors="backslashreplace").decode()
    return Bad(_without_nul(key), entry_id, _without_nul(reason), raw)


def _without_nul(text: str) -> str:
    return text.replace("\0", "\\x00")


Decode = Callable[[bytes, Mapping[str, bytes]], Any]
"""Of a record's value and headers the state; raises whatever it likes for what it cannot read."""


def decode_json(value: bytes, headers: Mapping[str, bytes]) -> Any:
    """JSON, unless the record says that it is something else."""
    said = headers.get(CONTENT_TYPE_HEADER)
    if said is not None and not _is_json(said):
        raise ValueError(f"it is {said.decode(errors='replace')[:100]}, and no decode= is given for that")
    return orjson.loads(value)


@lru_cache(maxsize=100)
def _is_json(content_type: bytes) -> bool:
    named = content_type.decode(errors="replace").partition(";")[0].strip().lower()
    return named.endswith(("/json", "+json"))


def read(record: Raw, decode: Decode) -> Change | Bad:
    """What a record says."""
    key, entry_id = (record.key or b"").decode(errors="replace"), 0
    try:
        every = dict(record.headers)
        entry_id = _entry_id(every.get(ID_HEADER, b"0"))
        headers = {name: value for name, value in every.items() if value is not None}
        if not record.key:
            raise ValueError("it has no key")
        if "\ufffd" in key:
            record.key.decode()
        if "\0" in key:
            raise ValueError("its key has a NUL, which no text of a database may have")
        state = None if record.value is None else decode(record.value, headers)
    except Exception as error:  # noqa: BLE001  decode is the service's, and whatever it raises is this record's
        return refused(key, entry_id, f"it cannot be decoded: {error.__class__.__name__}: {error}", record)
    cause = headers.get(CAUSE_HEADER)
    return Change(key, state, entry_id, record.timestamp_ms, cause.decode(errors="replace") if cause else None, record)


def _entry_id(said: bytes | None) -> int:
    """Of what comes from no entry 0; raises `ValueError` for what cannot be one."""
    if said is None or not said.isdigit() or len(said) > 19 or int(said) > _GREATEST:
        raise ValueError(f"its header {ID_HEADER} is no entry's id: {said!r:.50}")
    return int(said)


@dataclass
class Decided:
    """What counts of some records.

    `apply`: of each key the last change; `park`: of each key the last bad record, unless a newer change came after it;
    `held`: the greatest entry id of each key that is named, as it will be.
    """

    apply: dict[str, Change] = field(default_factory=dict)
    park: dict[str, Bad] = field(default_factory=dict)
    held: dict[str, int] = field(default_factory=dict)


def decide(records: Iterable[Change | Bad], held: Mapping[str, int]) -> Decided:
    """Which of some records count, given the entry ids that are held; they are in order for each key."""
    decided = Decided()
    for one in records:
        now = decided.held.get(one.key, held.get(one.key, NONE))
        keyed = isinstance(one, Change) or one.keyed
        if keyed and one.entry_id and one.entry_id <= now:
            continue
        parked = decided.park.get(one.key)
        newest = parked is None or not one.entry_id or parked.entry_id <= one.entry_id
        if isinstance(one, Bad):
            if newest:
                decided.park[one.key] = one
            continue
        if newest:
            decided.park.pop(one.key, None)
        decided.apply[one.key] = one
        decided.held[one.key] = max(now, one.entry_id)
    return decided

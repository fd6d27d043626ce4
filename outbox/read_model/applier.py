"""Applying what was fetched: rows, entry ids, parked messages and offsets, in one transaction of the store.

A change that cannot be applied is found by halving, and parked; the rest goes on. A later state of its key supersedes
it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from outbox.kafka.reader import Record
from outbox.kafka.subscription import Fetched, Place
from outbox.read_model.change import Bad, Change, Raw, decide, read, refused
from outbox.read_model.declared import Declared, Follow, Function
from outbox.read_model.store import Build, Claim, Parked, RefusedError, Store, Transaction

_PAGE = 500


class LostPlacesError(Exception):
    """Somebody else has claimed these places since: nothing was applied. They are to be claimed anew, or given up."""

    def __init__(self, places: Sequence[Place]) -> None:
        super().__init__(", ".join(f"{place.topic} {place.partition}" for place in places))
        self.places = places


class GapError(LostPlacesError):
    """What came does not follow on what was applied, and nothing of it was: it is to be fetched again."""


@dataclass
class Applied:
    """What one transaction did.

    `records` came, `changes` of them counted, of which `deleted` were deletions; `parked` could not be applied, and are
    `refused`. `claims` are those of the places as they go on.
    """

    records: int = 0
    changes: int = 0
    deleted: int = 0
    parked: int = 0
    claims: dict[Place, Claim] = field(default_factory=dict)
    refused: list[Bad] = field(default_factory=list)


class Applier:
    """Applies to one build of a store."""

    def __init__(self, declared: Declared, store: Store, build: Build = "live") -> None:
        self._declared = declared
        self._store = store
        self._build: Build = build

    def apply(self, fetched: Fetched, claims: Mapping[Place, Claim]) -> Applied:
        """Apply what was fetched, and go on to where the places are read.

        Raises `LostPlacesError`, and the store's errors; then nothing was applied.
        """
        read_to = {
            place: offset
            for place, offset in fetched.reached.items()
            if place in claims and offset > claims[place].offset
        }
        if gaps := [place for place in read_to if fetched.since.get(place, 0) > claims[place].offset]:
            raise GapError(gaps)
        by_topic: dict[str, list[Change | Bad]] = defaultdict(list)
        applied = Applied()
        for place, records in fetched.records.items():
            if place not in read_to:
                continue
            # What is below the claim was applied before; a seek may bring it again.
            new = [record for record in records if record.offset >= claims[place].offset]
            applied.records += len(new)
            by_topic[place.topic] += self._read(place.topic, new)
        if not read_to:
            return applied
        with self._store.transaction(self._build) as transaction:
            # In one order, whoever applies: nobody waits for one who waits for him.
            lost = [place for place in sorted(read_to) if not transaction.advance(place, claims[place], read_to[place])]
            if lost:
                raise LostPlacesError(lost)
            for topic in sorted(by_topic):
                self._apply(transaction, self._declared.by_topic[topic], by_topic[topic], applied)
        applied.claims = {place: claims[place]._replace(offset=offset) for place, offset in read_to.items()}
        return applied

    def retry(self, topic: str | None = None, keys: Sequence[str] | None = None) -> Applied:
        """Apply what is parked (of a topic, of some keys) once more; what still cannot be stays."""
        applied = Applied()
        # One transaction each: a few, and each may take as long as a function of the service's takes.
        for one in parked(self._store, self._build, topic, keys):
            if (follow := self._declared.by_topic.get(one.topic)) is not None:
                self._retry(follow, one, applied)
                applied.refused.clear()  # as many as there are
        return applied

    def _retry(self, follow: Follow, one: Parked, applied: Applied) -> None:
        with self._store.transaction(self._build) as transaction:
            transaction.lock(Place(one.topic, one.raw.partition))
            # It may have been superseded meanwhile.
            if not any(still.raw == one.raw for still in transaction.parked(one.topic, [one.key])):
                return
            applied.records += 1
            if not self._apply(transaction, follow, [read(one.raw, follow.decode)], applied):
                transaction.unpark(follow, {one.key: one.entry_id})

    def _read(self, topic: str, records: Iterable[Record]) -> list[Change | Bad]:
        decode = self._declared.by_topic[topic].decode
        # A record as it is read has the fields of one as it lies in the topic.
        return [read(cast("Raw", record), decode) for record in records]

    def _apply(
        self, transaction: Transaction, follow: Follow, records: Sequence[Change | Bad], applied: Applied
    ) -> bool:
        """Apply to one table; whether any of them counted."""
        keys = list(dict.fromkeys(one.key for one in records if isinstance(one, Change) or one.keyed))
        known = transaction.held(follow, keys)
        decided = decide(records, known)
        held, changes = decided.held, list(decided.apply.values())

        def put(some: Sequence[Change]) -> None:
            transaction.put(follow, some, held, known)

        def delete(some: Sequence[Change]) -> None:
            transaction.delete(follow, some, held)

        if isinstance(follow.into, Function):
            bad = _write(put, changes)
        else:
            bad = _write(delete, [change for change in changes if change.deleted])
            bad += _write(put, [change for change in changes if not change.deleted])
        not_done = {one.key for one in bad}
        done = [change for change in changes if change.key not in not_done]
        transaction.unpark(follow, {change.key: change.entry_id for change in done})
        # Of a key that has both what came last, or what is newer.
        bad = [one for one in bad if one.key not in decided.park] + list(decided.park.values())
        transaction.park(follow, bad)
        applied.changes += len(done)
        applied.deleted += sum(change.deleted for change in done)
        applied.parked += len(bad)
        applied.refused += bad
        return bool(done or bad)


def _write(write: Callable[[Sequence[Change]], None], changes: Sequence[Change]) -> list[Bad]:
    """Write; those that the store, the mapping or the function refuses."""
    if not changes:
        return []
    try:
        write(changes)
    except RefusedError as error:
        if len(changes) == 1:
            change = changes[0]
            return [refused(change.key, change.entry_id, f"it cannot be applied: {error}", change.raw)]
        half = len(changes) // 2
        return _write(write, changes[:half]) + _write(write, changes[half:])
    return []


def parked(
    store: Store, build: Build = "live", topic: str | None = None, keys: Sequence[str] | None = None
) -> Iterator[Parked]:
    """What is parked (of a topic, of some keys), some at a time: there may be as many as there are messages."""
    after: tuple[str, str] | None = None
    while True:
        with store.transaction(build, reads=True) as transaction:
            page = transaction.parked(topic, keys, after=after, limit=_PAGE)
        yield from page
        if len(page) < _PAGE:
            return
        after = page[-1].topic, page[-1].key

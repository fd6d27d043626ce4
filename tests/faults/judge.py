"""The checker: reads the topics, the tables and the ledger, and says what is lost, doubled, stale or made up."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import orjson
import psycopg

from outbox.kafka.reader import Record, read_topic
from outbox.position import Position

MOST = 10


@dataclass
class Judgement:
    """What a `read_committed` reader of the topics finds wrong, compared with the tables and the ledger.

    `entries` were written, `records` are in the topics. `lost`: entries that no record covers, and entities whose last
    record is not what the table holds. `doubled`: records whose entry was published before. `stale`: records that are
    older than the one before them, or in another partition than their key's. `ghosts`: records of entries that the
    service did not commit, or that say something else than their entry. `examples` are the first of them, in words;
    `unjudged` names the counts that were not looked at. `torn`: how often Kafka's own log says that it ended a
    transaction without marking it everywhere; `excused`: how many records may be doubled, or stale, for that.
    """

    entries: int = 0
    records: int = 0
    lost: int = 0
    doubled: int = 0
    stale: int = 0
    ghosts: int = 0
    examples: list[str] = field(default_factory=list)
    unjudged: frozenset[str] = frozenset()
    torn: int = 0
    excused: int = 0

    @property
    def right(self) -> bool:
        """Whether nothing is wrong that Kafka has not said it did."""
        return not (self.lost or self.ghosts) and max(self.doubled, self.stale) <= self.excused

    def count(self, name: str) -> str:
        """A count for the table."""
        return "not judged" if name in self.unjudged else str(getattr(self, name))

    def find(self, name: str, what: str) -> None:
        """Count something that is wrong."""
        if name in self.unjudged:
            return
        setattr(self, name, getattr(self, name) + 1)
        if len(self.examples) < MOST:
            self.examples.append(f"{name}: {what}")


class Entry(NamedTuple):
    """What an entry says: `version` of the entity, None for a tombstone."""

    type: str
    key: str
    version: int | None


@dataclass
class Truth:
    """What the service wrote, as its own tables and ledger have it.

    `entries` by the id under which they are, or were, to be published: that of the ledger, and after an adoption the
    new id for what it retained. Ids up to `base` were the lost timeline's as well: records of those may be of entries
    that nobody remembers. `excused` went with a topic that was deleted. `table` has version, whether it is alive, and
    the writers' timeline of each entity.
    """

    entries: dict[int, Entry]
    table: dict[tuple[str, str], tuple[int, bool, int]]
    base: int = 0
    excused: frozenset[int] = frozenset()


def judge(
    url: str,
    bootstrap: str,
    topics: dict[str, str],
    *,
    timeline: int = 1,
    adopted: bool = False,
    republished: bool = False,
    gone: Mapping[str, Position] = {},
) -> Judgement:
    """Judge all topics (by entity type). Nothing may write meanwhile, and everything must be published.

    What was written is what the service's ledger says: the log itself is pruned, and renumbered. `timeline` is the
    writers' present one. After a fail-over (`adopted`) the retained log is published again under new ids: once, between
    the ids of the lost timeline and those above the adoption's base, an entity's version may go back. Entities that
    were not changed since and of which nothing is retained may have a last record that the database lost. After the
    positions were lost (`republished`) the order is not judged, nor what comes twice. What a topic held that was
    deleted is not looked for (`gone`: by entity type, the position that was committed when it was).
    """
    found = Judgement(unjudged=frozenset({"doubled", "stale"} if republished else ()))
    truth = _truth(found, url, adopted=adopted, gone=gone)
    for type_name, topic in topics.items():
        ids = {n: e.key for n, e in truth.entries.items() if e.type == type_name and n not in truth.excused}
        last = _read(found, list(read_topic(bootstrap, {}, topic)), topic, truth, type_name)
        _cover(found, type_name, ids, last, each=type_name == "every")
        wanted = {key for number, key in ids.items() if number > truth.base}
        for (of, key), (version, alive, changed_on) in truth.table.items():
            if of != type_name or (of in gone and key not in wanted):
                continue
            record = last[key][-1] if last.get(key) else None
            value = _version(record) if record is not None else None
            if record is not None and value == (version if alive else None):
                continue
            if (
                adopted and changed_on < timeline and key not in wanted
                and record is not None and (value is None or value >= version)
            ):  # fmt: skip
                continue
            found.find("lost", f"{topic} {key}: the table has version {version if alive else 'deleted'}, not {value}")
    return found


def _truth(found: Judgement, url: str, *, adopted: bool, gone: Mapping[str, Position]) -> Truth:
    with psycopg.connect(url) as connection:
        table = {
            (row[0], row[1]): row[2:]
            for row in connection.execute("SELECT type, key, version, alive, changed_on FROM thing WHERE version > 0")
        }
        removed, base = connection.execute("SELECT removed_id, base_id FROM outbox.settings").fetchone() or (0, 0)
        ledger = {
            row[0]: (Entry(*row[1:4]), row[4])
            for row in connection.execute("SELECT id, type, key, version, xid::text::bigint FROM ledger")
        }
        retained = {
            row[0]: Entry(*row[1:])
            for row in connection.execute(
                "SELECT id, type, key, (convert_from(state, 'UTF8')::jsonb->>'version')::bigint FROM outbox.entries"
            )
        }
    found.entries = len(ledger)
    if not adopted:
        # Without an adoption there is no base, and an adoption that nobody expected is seen: its ids are no entry's.
        excused = (n for n, (e, xid) in ledger.items() if e.type in gone and gone[e.type].published(n, xid))
        return Truth({n: entry for n, (entry, _) in ledger.items()}, table, excused=frozenset(excused))
    # What pruning went past keeps its id, and was published before; all else has to be there under a new one.
    left_out = {number: entry for number, (entry, _) in ledger.items() if number <= removed}
    anew = {number: entry for number, entry in retained.items() if number > base and number not in ledger}
    before = Counter(entry for number, (entry, _) in ledger.items() if removed < number <= base)
    for entry in before - Counter(anew.values()):
        found.find("lost", f"{entry}: the adoption lost it")
    for entry in Counter(anew.values()) - before:
        found.find("ghosts", f"{entry}: the adoption made it up")
    since = {number: entry for number, (entry, _) in ledger.items() if number > base}
    return Truth({**left_out, **anew, **since}, table, base)


def _entry_id(record: Record) -> int:
    return int(dict(record.headers)["outbox-id"])


def _version(record: Record) -> int | None:
    return None if record.value is None else int(orjson.loads(record.value)["version"])


def _read(found: Judgement, records: list[Record], topic: str, truth: Truth, type_name: str) -> dict[str, list[Record]]:
    by_key: dict[str, list[Record]] = defaultdict(list)
    # By key, the greatest version so far, and whether it is of the lost timeline.
    reached: dict[str, tuple[bool, int]] = {}
    # By entry, where it is: the broker's own log tells more of it.
    seen: dict[int, tuple[int, int]] = {}
    for record in records:
        found.records += 1
        key = (record.key or b"").decode()
        number, version = _entry_id(record), _version(record)
        if number in seen:
            places = f"partition {record.partition}, offsets {seen[number][1]} and {record.offset}"
            found.find("doubled", f"{topic} {key}: entry {number} is published twice, in {places}")
        elif by_key[key] and number < _entry_id(by_key[key][-1]):
            found.find("stale", f"{topic} {key}: entry {number} follows {_entry_id(by_key[key][-1])}")
        if by_key[key] and record.partition != by_key[key][-1].partition:
            found.find("stale", f"{topic} {key}: entry {number} is in another partition than the one before")
        seen[number] = record.partition, record.offset
        by_key[key].append(record)
        if number > truth.base:
            _compare(found, topic, Entry(type_name, key, version), number, truth)
        if version is not None:
            lost_timeline = number <= truth.base
            if key in reached and reached[key][0] == lost_timeline and version < reached[key][1]:
                found.find("stale", f"{topic} {key}: version {version} follows {reached[key][1]}")
            reached[key] = lost_timeline, version
    return by_key


def _compare(found: Judgement, topic: str, said: Entry, number: int, truth: Truth) -> None:
    entry = truth.entries.get(number)
    if entry is None:
        found.find("ghosts", f"{topic} {said.key}: entry {number} is published, the service did not commit it")
    elif entry != said:
        found.find("ghosts", f"{topic}: entry {number} is published as {said}, and is {entry}")


def _cover(
    found: Judgement, type_name: str, ids: Mapping[int, str], last: dict[str, list[Record]], *, each: bool
) -> None:
    """An entry is covered by its own record or, where the type collapses, by a later one of its key."""
    greatest = {key: _entry_id(records[-1]) for key, records in last.items() if records}
    published = {_entry_id(record) for records in last.values() for record in records} if each else set()
    for entry_id, key in ids.items():
        if entry_id > greatest.get(key, 0) or (each and entry_id not in published):
            found.find("lost", f"{type_name} {key}: entry {entry_id} was not published")

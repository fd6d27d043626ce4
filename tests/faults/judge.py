"""The checker: reads the topics and the tables, and says what is lost, doubled or stale."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import orjson
import psycopg

from outbox.kafka.reader import Record, read_topic
from outbox.position import Position

MOST = 10


@dataclass
class Judgement:
    """What a `read_committed` reader of the topics finds wrong, compared with the tables.

    `entries` are in the log, `records` in the topics. `lost`: entries that no record covers, and entities whose last
    record is not what the table holds. `doubled`: records whose entry was published before. `stale`: records that are
    older than the one before them. `ghosts`: records of entries that the database does not hold (after a fail-over that
    is so, and right). `examples` are the first of them, in words.
    """

    entries: int = 0
    records: int = 0
    lost: int = 0
    doubled: int = 0
    stale: int = 0
    ghosts: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def right(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.lost or self.doubled or self.stale or self.ghosts)

    def _say(self, what: str) -> None:
        if len(self.examples) < MOST:
            self.examples.append(what)


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

    `timeline` is the writers' present one. After a fail-over (`adopted`) the retained log is published again under new
    ids: for each entity the versions may go back once, and ids still grow. Entities that were not changed since and of
    which nothing is retained may have a last record that the database lost. After the positions were lost
    (`republished`) only the ends must be right. What pruning has removed is not looked for, nor what a topic held that
    was deleted (`gone`: by entity type, the position that was committed when it was).
    """
    found = Judgement()
    removed = 0
    with psycopg.connect(url) as connection:
        table = {
            (row[0], row[1]): row[2:]
            for row in connection.execute("SELECT type, key, version, alive, changed_on FROM thing WHERE version > 0")
        }
        ids: dict[str, list[tuple[int, str]]] = defaultdict(list)
        (removed,) = connection.execute("SELECT removed_id FROM outbox.settings").fetchone() or (0,)
        unpublished: dict[str, set[str]] = defaultdict(set)
        for entry_id, xid, type_name, key in connection.execute(
            "SELECT id, xid::text::bigint, type, key FROM outbox.entries ORDER BY id"
        ):
            found.entries += 1
            if type_name not in gone or not gone[type_name].published(entry_id, xid):
                ids[type_name].append((entry_id, key))
                unpublished[type_name].add(key)
    for type_name, topic in topics.items():
        last = _read(found, list(read_topic(bootstrap, {}, topic)), topic, adoptions=1 if adopted else 0)
        if not adopted:
            there = {number for number, _ in ids[type_name]}
            for ghost in (
                r for records in last.values() for r in records if _entry_id(r) not in there and _entry_id(r) > removed
            ):
                found.ghosts += 1
                found._say(f"{topic}: entry {_entry_id(ghost)} is published, the database does not hold it")
        _cover(found, type_name, ids[type_name], last, each=type_name == "every")
        for (of, key), (version, alive, changed_on) in table.items():
            again = key in unpublished[type_name]
            if of != type_name or (adopted and changed_on < timeline and not again) or (of in gone and not again):
                continue
            record = last[key][-1] if last.get(key) else None
            value = orjson.loads(record.value)["version"] if record is not None and record.value is not None else None
            if record is None or value != (version if alive else None):
                found.lost += 1
                found._say(f"{topic} {key}: the table has version {version if alive else 'deleted'}, the topic {value}")
    if republished:
        found.doubled = found.stale = 0
        if found.right:
            found.examples.clear()
    return found


def _entry_id(record: Record) -> int:
    return int(dict(record.headers)["outbox-id"])


def _read(found: Judgement, records: list[Record], topic: str, *, adoptions: int) -> dict[str, list[Record]]:
    by_key: dict[str, list[Record]] = defaultdict(list)
    again: dict[str, int] = defaultdict(lambda: adoptions)
    seen: set[int] = set()
    for record in records:
        found.records += 1
        key = (record.key or b"").decode()
        number = _entry_id(record)
        if number in seen:
            found.doubled += 1
            found._say(f"{topic} {key}: entry {number} is published twice")
        elif by_key[key] and number < _entry_id(by_key[key][-1]):
            found.stale += 1
            found._say(f"{topic} {key}: entry {number} follows {_entry_id(by_key[key][-1])}")
        elif (before := _last_state(by_key[key])) is not None and record.value is not None:
            now = orjson.loads(record.value)
            if now["version"] >= before["version"] or now["on"] > before["on"]:
                pass
            elif again[key]:
                again[key] -= 1
            else:
                found.stale += 1
                found._say(f"{topic} {key}: version {now['version']} follows {before['version']}")
        seen.add(number)
        by_key[key].append(record)
    return by_key


def _last_state(records: list[Record]) -> dict[str, int] | None:
    for record in reversed(records):
        if record.value is not None:
            state: dict[str, int] = orjson.loads(record.value)
            return state
    return None


def _cover(
    found: Judgement, type_name: str, ids: list[tuple[int, str]], last: dict[str, list[Record]], *, each: bool
) -> None:
    """An entry is covered by its own record or, where the type collapses, by a later one of its key."""
    greatest = {key: _entry_id(records[-1]) for key, records in last.items() if records}
    published = {_entry_id(record) for records in last.values() for record in records} if each else set()
    for entry_id, key in ids:
        if entry_id > greatest.get(key, 0) or (each and entry_id not in published):
            found.lost += 1
            found._say(f"{type_name} {key}: entry {entry_id} was not published")

"""Whether a read model says what its topic says, key by key, while both change.

As `outbox.reconcile` compares a topic with its source: the topic is read to its end as it is now; the model is waited
for, and read; what the topic got meanwhile is read as well, and the keys that it names are looked at again. What is
compared are the rows that the mapping makes of the messages.
"""

from __future__ import annotations

import datetime as dt
import sqlite3
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from decimal import Context, Decimal
from itertools import islice
from typing import Any

import orjson
from sqlalchemy import Column, types

from outbox.comparison import Comparison, Report
from outbox.errors import ConfigError, NotCaughtUpError
from outbox.kafka import reader
from outbox.kafka.reader import Record
from outbox.kafka.subscription import Place
from outbox.read_model.change import NONE, Bad, Change, Raw, read
from outbox.read_model.consumer import Settings
from outbox.read_model.declared import ENTRY_ID, UPDATED_AT, Declared, Follow, Function
from outbox.read_model.rows import maker
from outbox.read_model.store import Store

_LOOKS = 6
_PAUSE = 0.05
_AT_ONCE = 2_000
# A decimal of no scale comes back with so many places from SQLite, which has none.
_PLACES = 10
_EXACT = Context(prec=100_000)
# What a record of id 0 does not say.
_NOT_COMPARED = {ENTRY_ID, UPDATED_AT}

Progress = Callable[[str, int, int | None], None]


class Comparer:
    """Compares one topic of a read model."""

    def __init__(
        self,
        declared: Declared,
        store: Store,
        settings: Settings,
        follow: Follow,
        *,
        seconds: float = 60.0,
        told: Progress = lambda _what, _done, _of: None,
    ) -> None:
        """`seconds`: how long the model may take to apply what the topic has."""
        into = follow.into
        if isinstance(into, Function):
            raise ConfigError(
                f"What a function makes of {follow.topic} cannot be compared with the topic.",
                cure="Compare a copy, or columns; or rebuild: outbox read-model rebuild --app MODULE:ATTRIBUTE.",
            )
        self._declared = declared
        self._store = store
        self._settings = settings
        self._follow = follow
        self._names = into.columns
        self._make = maker(into)
        self._rounds = {name: rounded for name in into.columns if (rounded := _rounded(into.table.c[name]))}
        self._seconds = seconds
        self._told = told
        self._ends: dict[int, int] = {}

    def run(self, comparison: Comparison) -> Report:
        """Compare, from the start. Raises `NotCaughtUpError` when nobody applies what the topic has."""
        with closing(_Newest()) as newest:
            return self._run(comparison, newest)

    def _run(self, comparison: Comparison, newest: _Newest) -> Report:
        comparison.empty()
        self._ends = {}
        comparison.take_records(self._records(newest), 0)
        for look in range(1, _LOOKS + 1):
            first = look == 1
            self._wait_applied()
            if first:
                comparison.take_rows(self._rows())
            else:
                for keys in comparison.again():
                    comparison.take_rows(self._rows(set(keys)), of=keys)
            comparison.take_records(self._records(newest), look)
            comparison.compare(look, everything=first)
            if next(comparison.again(), None) is None:
                break
        return _turned(comparison.report())

    def _records(self, newest: _Newest) -> Iterator[Record]:
        """What the topic got since it was read last, each as the row that the mapping makes of it."""
        servers = (self._settings.bootstrap, self._settings.kafka)
        starts, ends = reader.bounds(*servers, self._follow.topic)
        starts = {partition: self._ends.get(partition, start) for partition, start in starts.items()}
        self._ends = dict(ends)
        total = sum(ends[partition] - start for partition, start in starts.items())
        found = self._read(reader.read_between(*servers, self._follow.topic, starts, ends), total)
        # Where partitions were added a key may lie in two, and which of them is read last says nothing.
        for record, one in newest.of(found) if len(ends) > 1 else found:
            yield record._replace(value=self._made(one), headers=())

    def _read(self, records: Iterable[Record], total: int) -> Iterator[tuple[Record, Change | Bad]]:
        for number, record in enumerate(records):
            if number % _AT_ONCE == 0:
                self._told("topic", number, total)
            yield record, read(Raw(*record), self._follow.decode)

    def _made(self, one: Change | Bad) -> bytes | None:
        if isinstance(one, Bad):
            return b"\xff"
        if one.deleted:
            return None
        try:
            return self._canonical(dict(zip(self._names, self._make(one, one.entry_id), strict=True)))
        except Exception:  # noqa: BLE001  the mapping is the service's: what it raises is of this record, and parks it
            return b"\xff"

    def _rows(self, keys: set[str] | None = None) -> Iterator[tuple[str, bytes | None]]:
        for number, (key, row) in enumerate(self._store.rows(self._follow)):
            if number % _AT_ONCE == 0:
                self._told("model", number, None)
            if keys is None or key in keys:
                yield key, self._canonical(row)

    def _canonical(self, row: Mapping[str, Any]) -> bytes:
        told = {name: value for name, value in row.items() if name not in _NOT_COMPARED}
        for name, rounded in self._rounds.items():
            if told[name] is not None:
                told[name] = rounded(told[name])
        return orjson.dumps(told, default=_plain, option=orjson.OPT_PASSTHROUGH_DATETIME)

    def _wait_applied(self) -> None:
        """Wait until the model is as far as the topic was read."""
        deadline = time.monotonic() + self._seconds
        while True:
            with self._store.transaction(reads=True) as transaction:
                offsets = transaction.offsets()
            behind = [p for p, end in self._ends.items() if offsets.get(Place(self._follow.topic, p), 0) < end]
            if not [p for p in behind if self._ends[p]]:
                return
            if time.monotonic() > deadline:
                raise NotCaughtUpError(
                    f"The read model {self._declared.name} has not applied in {self._seconds:g} s what "
                    f"{self._follow.topic} has.",
                    cure="Does it run? See: outbox read-model status --app MODULE:ATTRIBUTE.",
                )
            time.sleep(_PAUSE)


class _Newest:
    """Which records count where a key lies in several partitions, as the model has it: those of greater entry ids.

    The ids lie in a file of its own, which goes with it: there are as many as keys.
    """

    def __init__(self) -> None:
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.executescript(
            """
            PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;
            CREATE TABLE ids (key BLOB PRIMARY KEY, id INTEGER NOT NULL) WITHOUT ROWID;
            """
        )

    def close(self) -> None:
        """Give the file back."""
        self._database.close()

    def of(self, records: Iterable[tuple[Record, Change | Bad]]) -> Iterator[tuple[Record, Change | Bad]]:
        """Those that count; what comes from no entry does, as it comes."""
        taken = iter(records)
        while some := list(islice(taken, _AT_ONCE)):
            keys = list({record.key or b"" for record, _ in some})
            asked = f"SELECT key, id FROM ids WHERE key IN ({', '.join('?' * len(keys))})"
            ids: dict[bytes, int] = dict(self._database.execute(asked, keys))
            for record, one in some:
                key = record.key or b""
                if not one.entry_id or one.entry_id > ids.get(key, NONE):
                    ids[key] = max(one.entry_id, ids.get(key, NONE))
                    yield record, one
            self._database.execute("BEGIN")
            self._database.executemany("INSERT OR REPLACE INTO ids VALUES (?, ?)", ids.items())
            self._database.execute("COMMIT")


def _rounded(column: Column[Any]) -> Callable[[Any], Any] | None:
    """What makes of a value what a column of this type keeps of it, where that may be less."""
    kind = column.type
    if isinstance(kind, types.Float):
        single = isinstance(kind, types.REAL) or (kind.precision or 53) <= 24
        return (lambda value: struct.unpack("f", struct.pack("f", value))[0]) if single else None
    if isinstance(kind, types.Numeric):
        least = Decimal(1).scaleb(-(_PLACES if kind.scale is None else kind.scale))
        return lambda value: value.quantize(least, context=_EXACT) if isinstance(value, Decimal) else value
    return None


def _turned(report: Report) -> Report:
    """Of a read model the topic is the source: what it has and the model has not is missing."""
    report.missing, report.orphaned = report.orphaned, report.missing
    names = {"missing": "orphaned", "orphaned": "missing"}
    report.examples = {names.get(kind, kind): keys for kind, keys in report.examples.items()}
    return report


def _plain(value: Any) -> Any:
    if isinstance(value, Decimal):
        return {"number": str(value.normalize())}
    if isinstance(value, dt.datetime):
        # What SQLite gives back without saying so is UTC.
        return (value if value.tzinfo else value.replace(tzinfo=dt.UTC)).astimezone(dt.UTC).isoformat()
    return str(value)

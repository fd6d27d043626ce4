"""Part 5, growth: does the drain stay as fast when the table has grown, and does publishing leave dead rows?

Each round drains the same number of new entries, by the relay as a user runs it, from a fresh outbox and from ones
that have a past: ten times as many entries retained and published; 100 entity types; a transaction open meanwhile; a
ring that has gone round a hundred times. The rates are ratios to the fresh one's of the same round. Beside them: rows
that the server looked at for each entry published, by its own count (it tells whether every query uses its index),
dead rows, and how long `outbox status` takes.
"""

from __future__ import annotations

import datetime as dt
import json
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg import sql

from bench.measure import wait_for
from bench.options import Options
from bench.relay import Relay
from bench.report import Report, Series
from bench.servers import Servers, servers
from bench.topics import PARTITIONS
from devstack.processes import ServerError

NAME = "growth"
FRESH, RETAINED, TYPES, OPEN, RING = "fresh", "retained", "types", "open", "ring"
PEERS = (FRESH, RETAINED, TYPES, OPEN, RING)
RATE = "entries/s"
AIM = 0.9
MANY_TYPES = 100
LAPS = 100
SLOTS = 12
STATE = "x" * 220
"""With key, type and the rest an entry of about 280 bytes."""


@dataclass(frozen=True, slots=True)
class Drain:
    """One drain: entries a second, what the server counted meanwhile, and the relay's own times.

    `looked_at` are rows of the log that were fetched by an index for each entry published, `walked` rows that were
    read without one, in all. `reading` and `committing`: seconds of reading, and of producing and committing; they
    overlap, since the next batch is read while one is committed.
    """

    rate: float
    looked_at: float
    walked: int
    reading: float
    committing: float


class Past:
    """An outbox with a past, and its topics. Drained by `drain`, which first writes what there is to drain."""

    def __init__(self, servers: Servers, name: str, *, types: int = 1) -> None:
        self.types = types
        self.relay = Relay(servers, name=name)
        self._database = self.relay.url.rpartition("/")[2]
        self.relay.prepare(
            slots=SLOTS,
            types={f"type{n}": f"{self.relay.topic}.type{n}" for n in range(types)},
            partitions=PARTITIONS if types == 1 else 1,
        )

    def begin(self) -> None:
        """Publish a little, so that there is a position: the start of a log is read by a simpler query."""
        self.write(10)
        self.relay.command("relay", "--until-caught-up")

    # -- what happened before ------------------------------------------------------------------------------------

    def retain(self, count: int) -> None:
        """Published entries, in all slots but the one that is being filled."""
        step = 500_000
        with psycopg.connect(self.relay.url, autocommit=True) as connection:
            for first in range(0, count, step):
                connection.execute(
                    "INSERT INTO outbox.entries (slot, type, key, state, created_at)"
                    " SELECT (outbox.slot_of(clock_timestamp()) + 1 + n * %(others)s / %(count)s) %% %(slots)s,"
                    "        'type0', 'old' || n, convert_to(%(state)s, 'UTF8'),"
                    "        now() - make_interval(secs => 500000 * (1 - n / %(count)s::float8))"
                    " FROM generate_series(%(first)s::bigint, %(last)s::bigint) n",
                    {
                        "others": SLOTS - 1,
                        "count": count,
                        "slots": SLOTS,
                        "state": STATE,
                        "first": first,
                        "last": min(first + step, count) - 1,
                    },
                )
            # A start without a position leaves out what pruning went past: a shorter way than to publish it.
            connection.execute("UPDATE outbox.settings SET removed_id = (SELECT max(id) FROM outbox.entries)")
            connection.execute("VACUUM ANALYZE")

    def go_round(self, laps: int) -> None:
        """Fill and prune each slot of the ring so many times, by the function that the relay calls."""
        # What is beyond everything: all is published, and no entry of the ring is anybody's anchor.
        most = str(2**62)
        position = json.dumps([{"shard": 0, "epoch": 1, "anchor": most, "xmax": most, "xip": [], "cut": None}])
        with psycopg.connect(self.relay.url, autocommit=True) as connection:
            for _ in range(laps):
                for slot in range(SLOTS):
                    connection.execute(
                        "INSERT INTO outbox.entries (slot, type, key, state, created_at)"
                        " SELECT %s, 'type0', 'old' || n, %s, now() - interval '30 days'"
                        " FROM generate_series(1, 100) n",
                        [slot, STATE.encode()],
                    )
                    pruned = connection.execute(
                        "SELECT outbox.prune_slot(%s::smallint, %s::jsonb)", [slot, position]
                    ).fetchone()
                    if not pruned or not pruned[0]["pruned"]:
                        raise ServerError(f"Slot {slot} was not pruned: {pruned}")

    # -- a drain -------------------------------------------------------------------------------------------------

    def write(self, count: int) -> None:
        """So many new entries of distinct keys, over all types."""
        with psycopg.connect(self.relay.url, autocommit=True) as connection:
            connection.execute(
                "INSERT INTO outbox.entries (type, key, state)"
                " SELECT 'type' || n %% %s, 'key' || n, convert_to(%s, 'UTF8') FROM generate_series(1, %s) n",
                [self.types, STATE, count],
            )
            # What writing left to be written must not be written while somebody is measured.
            connection.execute("CHECKPOINT")

    def drain(self, count: int, seconds: float) -> Drain:
        """Write, then publish; the rate from the moment that the relay holds the shard."""
        self.write(count)
        before = self._counted()
        self.relay.begin()
        wait_for(
            lambda: sum(event["entries"] for event in self.relay.events("relay.published")) >= count,
            seconds=seconds,
            what=f"that all entries of {self.relay.name} are published",
            pause=0.2,
        )
        self.relay.end()
        published = list(self.relay.events("relay.published"))
        (held,) = self.relay.events("relay.holds")
        entries = sum(event["entries"] for event in published)
        if entries != count:
            raise ServerError(f"{entries} entries of {self.relay.name} were published, {count} were written.")
        after = self._counted()
        took = (_at(published[-1]) - _at(held)).total_seconds()
        return Drain(
            entries / took,
            (after[0] - before[0]) / count,
            after[1] - before[1],
            sum(event["read_seconds"] for event in published),
            sum(event["produce_seconds"] + event["commit_seconds"] for event in published),
        )

    def _counted(self) -> tuple[int, int]:
        """Rows of the log that indexes led to, and rows that were read without one."""
        indexed, walked = self._sum("idx_tup_fetch", "seq_tup_read")
        return indexed, walked

    def dead(self) -> int:
        """Rows of the log that publishing changed or removed, and dead rows, by the server's own count."""
        return sum(self._sum("n_dead_tup", "n_tup_upd", "n_tup_del"))

    def size(self) -> tuple[int, int]:
        """How many rows the log has, by statistics, and its bytes."""
        rows, size = self._sum("n_live_tup", "pg_total_relation_size(relid)")
        return rows, size

    def _sum(self, *columns: str) -> tuple[int, ...]:
        """Of columns of `pg_stat_user_tables`, over the log's tables."""
        chosen = ", ".join(f"coalesce(sum({column}), 0)::bigint" for column in columns)
        with psycopg.connect(self.relay.url) as connection:
            row = connection.execute(
                f"SELECT {chosen} FROM pg_stat_user_tables"
                " WHERE schemaname = 'outbox' AND relname LIKE 'entries%'".encode()
            ).fetchone()
        return tuple(map(int, row or ()))

    def status_seconds(self) -> float:
        """How long the command takes, with its start."""
        began = time.monotonic()
        self.relay.command("status", "--json")
        return time.monotonic() - began

    def drop(self) -> None:
        """Give the disk back."""
        with psycopg.connect(self.relay.postgres.url(), autocommit=True) as admin:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(self._database)))


def _at(event: Mapping[str, Any]) -> dt.datetime:
    """When an event was logged."""
    return dt.datetime.fromisoformat(event["at"])


def run(options: Options) -> Report:
    """The part."""
    view = options.view
    retained = options.entries * 10
    report = Report(
        NAME,
        f"Growth: {options.entries:,} entries drained from an outbox with a past",
        options.command,
        {"entries": options.entries, "rounds": options.rounds, "warm-up rounds": options.warm_up},
    )
    with ExitStack() as stack:
        view.step("starting the servers")
        those = stack.enter_context(servers(stack.enter_context(options.work())))
        pasts = _pasts(options, those, retained)
        if OPEN in pasts:
            # It has an entry, and a snapshot that keeps every row that dies from being cleaned up.
            connection = stack.enter_context(psycopg.connect(pasts[OPEN].relay.url))
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            connection.execute("INSERT INTO outbox.entries (type, key, state) VALUES ('type0', 'open', '{}')")
        before = {name: past.dead() for name, past in pasts.items()}
        drains: dict[str, list[Drain]] = {}
        fresh: Past | None = None
        for number in range(-options.warm_up, options.rounds):
            view.step(f"round {number + 1} of {options.rounds}" if number >= 0 else "warming up")
            if fresh is not None:
                fresh.drop()
            fresh = Past(those, f"fresh{number + options.warm_up}")
            fresh.begin()
            # In turn another order: who comes after whom must not tell.
            turn = {FRESH: fresh, **pasts}
            for name in turn if number % 2 == 0 else reversed(turn):
                one = turn[name].drain(options.entries, options.seconds)
                view.step(f"{name}: {one.rate:,.0f} entries/s, {one.looked_at:.2f} rows looked at for each")
                if number >= 0:
                    drains.setdefault(name, []).append(one)
        last = {**({FRESH: fresh} if fresh is not None else {}), **pasts}
        for name, of_name in drains.items():
            _tell(report, name, of_name, last[name])
        dead = sum(past.dead() - before.get(name, 0) for name, past in last.items())
        report.notes.append(
            "Rows of the log that publishing changed, removed or left dead, by pg_stat_user_tables, in all of them: "
            f"{dead}."
        )
        report.versions = those.versions()
    for name in PEERS[1:]:
        if name in drains:
            mine, theirs = report.of(f"relay, {name}", RATE), report.of(f"relay, {FRESH}", RATE)
            report.ratio(f"rate: {name} / {FRESH}", mine, theirs, aim=AIM)
    report.chart = RATE
    report.notes += [
        f"{RETAINED}: {retained:,} published entries are in the table.",
        f"{TYPES}: {MANY_TYPES} entity types with a topic each.",
        f"{OPEN}: a transaction with an entry is open from before the first round to after the last one.",
        f"{RING}: each of its {SLOTS} slots was filled and truncated {LAPS} times before.",
        "Reading goes on beside the commit of the batch before it.",
    ]
    return report


def _pasts(options: Options, those: Servers, retained: int) -> dict[str, Past]:
    """Those with a past, with it, each with a position."""
    pasts: dict[str, Past] = {}
    for name in options.peers:
        if name != FRESH:
            options.view.step(f"making the past: {name}")
            pasts[name] = Past(those, name, types=MANY_TYPES if name == TYPES else 1)
    if RETAINED in pasts:
        pasts[RETAINED].retain(retained)
    if RING in pasts:
        pasts[RING].go_round(LAPS)
    for past in pasts.values():
        past.begin()
    return pasts


def _tell(report: Report, name: str, drains: list[Drain], past: Past) -> None:
    def add(figure: str, unit: str, of: Callable[[Drain], float], digits: int) -> None:
        report.series.append(Series(f"relay, {name}", figure, unit, [of(one) for one in drains], digits))

    add(RATE, "", lambda one: one.rate, 0)
    add("reading", "s", lambda one: one.reading, 2)
    add("producing and committing", "s", lambda one: one.committing, 2)
    add("rows looked at for an entry", "", lambda one: one.looked_at, 2)
    add("rows read without an index", "", lambda one: float(one.walked), 0)
    rows, size = past.size()
    report.series += [
        Series(f"relay, {name}", "rows at the end", "", [float(rows)]),
        Series(f"relay, {name}", "size", "GB", [size / 1e9], 2),
        Series(f"relay, {name}", "outbox status", "s", [past.status_seconds()], 2),
    ]

"""Part 5, growth: does the drain stay as fast when the table has grown, and does publishing leave dead rows?

Each round drains the same number of new entries, by the relay as a user runs it, from a fresh outbox and from ones
that have a past: ten times as many entries retained and published; 100 entity types; a transaction open meanwhile; a
ring that has gone round a hundred times; all new entries late, of one transaction that others have overtaken. The rates
are ratios to the fresh one's of the same round. Beside them: rows that the server looked at for each entry published,
by its own count, what it counts of rows that died, and how long `outbox status` takes. The topics are read back.
"""

from __future__ import annotations

import datetime as dt
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import psycopg
from psycopg import sql

from bench import plans
from bench.measure import turned, wait_for
from bench.options import Options
from bench.part import Part
from bench.relay import Relay
from bench.report import Report, Series
from bench.servers import Servers, servers
from bench.topics import PARTITIONS
from bench.workload import Load
from devstack.processes import ServerError

NAME = "growth"
FRESH, AGAIN = "fresh", "fresh again"
RETAINED, TYPES, WIDE, OPEN, RING, LATE = "retained", "types", "wide", "open", "ring", "late"
PEERS = (FRESH, AGAIN, RETAINED, TYPES, WIDE, OPEN, RING, LATE)
"""`fresh` is always measured: the others are compared with it. `fresh again` is another such outbox: how far its ratio
is from one is what the machine does, and no past."""
RATE = "entries/s"
AIM = 0.9
MANY_TYPES = 100
LAPS = 100
SLOTS = 12
OTHERS = 1000
"""Entries that overtake a late transaction."""
STATE = "x" * 280
"""The state of what was published long ago, as large as those that are drained."""
DEAD = ("n_dead_tup", "n_tup_upd", "n_tup_del")
_COLUMNS = ("type", "key", "state")
# An entry is fetched once; what goes beyond that are the batches' own looks. More, and an index is the wrong one.
_LOOKED_AT, _BESIDE = 1.5, 2_000


@dataclass(frozen=True, slots=True)
class Drain:
    """One drain: entries a second, what the server counted meanwhile, and the relay's own times.

    `looked_at` are rows of the log that were fetched by an index for each entry published. `reading` and `committing`:
    seconds of reading, and of producing and committing; they overlap, since the next batch is read while one is
    committed.
    """

    rate: float
    looked_at: float
    reading: float
    committing: float


class Past:
    """An outbox with a past, and its topics. Drained by `drain`, which first writes what there is to drain.

    `late`: what is drained is of one transaction, which others have overtaken.
    """

    def __init__(
        self, servers: Servers, name: str, *, types: int = 1, partitions: int = PARTITIONS, late: bool = False
    ) -> None:
        self.late = late
        self.relay = Relay(servers, name=name)
        servers.stack.callback(self.relay.close)
        self._topics = servers.topics
        self._base = 0
        self._database = self.relay.url.rpartition("/")[2]
        self._types = {f"type{n}": f"{self.relay.topic}.type{n}" for n in range(types)}
        self.relay.prepare(slots=SLOTS, types=self._types, partitions=partitions)

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

    def write(self, count: int) -> Load:
        """So many new entries of distinct keys, over all types."""
        load = self._load(count)
        load.fill(self.relay.url, "outbox.entries", _COLUMNS, self._values(load))
        return load

    def write_late(self, count: int) -> Load:
        """The same in one transaction, during which others are written and published."""
        load = self._load(count)
        with psycopg.connect(self.relay.url, autocommit=True) as connection:
            with connection.transaction():
                statement = (
                    f"INSERT INTO outbox.entries ({', '.join(_COLUMNS)}) SELECT {', '.join(self._values(load))}"
                    f" FROM generate_series(1, {count}) n"
                )
                connection.execute(statement.encode())
                self.write(OTHERS)
                self.relay.command("relay", "--until-caught-up")
            # What writing left to be written must not be written while somebody is measured.
            connection.execute("CHECKPOINT")
        return load

    def _load(self, count: int) -> Load:
        base, self._base = self._base, self._base + count
        return Load(count, count, base=base)

    def _values(self, load: Load) -> Sequence[str]:
        return f"'type' || n % {len(self._types)}", load.key_sql, f"convert_to({load.state_sql}, 'UTF8')"

    def drain(self, count: int, seconds: float) -> Drain:
        """Write, then publish, and judge the topics; the rate from the moment that the relay holds the shard."""
        load = self.write_late(count) if self.late else self.write(count)
        starts = {topic: self._topics.ends(topic) for topic in self._types.values()}
        before = self._counted()
        self.relay.begin()

        def published() -> bool:
            self.relay.check_alive()
            return bool(sum(event["entries"] for event in self.relay.events("relay.published")) >= count)

        wait_for(published, seconds=seconds, what=f"that {self.relay.name} has published all", pause=0.2)
        self.relay.end()
        events = list(self.relay.events("relay.published"))
        held = list(self.relay.events("relay.holds"))
        if len(held) != 1:
            raise ServerError(f"The relay of {self.relay.name} took its shard {len(held)} times in one drain.")
        load.check(self._topics.judge(starts), exactly_once=True, collapsed=False, who=self.relay.name)
        after = self._counted()
        walked = after[1] - before[1]
        if walked:
            raise ServerError(f"{self.relay.name}: {walked} rows of the log were read without an index.")
        if after[0] - before[0] > _LOOKED_AT * count + _BESIDE:
            raise ServerError(f"{self.relay.name}: {after[0] - before[0]} rows were looked at for {count} entries.")
        return Drain(
            count / (_at(events[-1]) - _at(held[0])).total_seconds(),
            (after[0] - before[0]) / count,
            sum(event["read_seconds"] for event in events),
            sum(event["produce_seconds"] + event["commit_seconds"] for event in events),
        )

    def _counted(self) -> tuple[int, int]:
        """Rows of the log that indexes led to, and rows that were read without one; of sessions that have ended."""

        def ended() -> bool:
            with psycopg.connect(self.relay.url) as connection:
                row = connection.execute(
                    "SELECT count(*) FROM pg_stat_activity"
                    " WHERE datname = current_database() AND application_name LIKE 'outbox-%'"
                ).fetchone()
            return row == (0,)

        # A session says what it did when it ends, a moment after its client has gone.
        wait_for(ended, seconds=30, what=f"the end of the relay's session in {self._database}")
        counted = self.counts("idx_tup_fetch", "seq_tup_read")
        return counted["idx_tup_fetch"], counted["seq_tup_read"]

    def counts(self, *columns: str) -> dict[str, int]:
        """Of columns of `pg_stat_user_tables`, the sums over the log's tables."""
        chosen = ", ".join(f"coalesce(sum({column}), 0)::bigint" for column in columns)
        with psycopg.connect(self.relay.url) as connection:
            row = connection.execute(
                f"SELECT {chosen} FROM pg_stat_user_tables"
                " WHERE schemaname = 'outbox' AND relname LIKE 'entries%'".encode()
            ).fetchone()
        return dict(zip(columns, map(int, row or ()), strict=True))

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
    drains: dict[str, list[Drain]] = {}
    with ExitStack() as stack:
        view.step("starting the servers")
        those = stack.enter_context(servers(stack.enter_context(options.work())))
        pasts = _pasts(options, those, retained)
        if OPEN in pasts:
            # It has an entry, and a snapshot that keeps every row that dies from being cleaned up.
            connection = stack.enter_context(psycopg.connect(pasts[OPEN].relay.url))
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            connection.execute("INSERT INTO outbox.entries (type, key, state) VALUES ('type0', 'open', '{}')")
        opened = time.monotonic()
        judged = 0
        if RETAINED in pasts:
            view.step("explaining what the relay asks of what is retained")
            past = pasts[RETAINED]
            judged = plans.judge_relay(past.relay.url, f"bench-{past.relay.name}", partial(past.write, 100))
            past.begin()
        for number in options.numbers():
            pasts = {**_fresh(options, those, number, pasts), **pasts}
            for name in turned(list(pasts), number):
                one = pasts[name].drain(options.entries, options.seconds)
                view.step(f"{name}: {one.rate:,.0f} entries/s, {one.looked_at:.2f} rows looked at for each")
                if number >= 0:
                    drains.setdefault(name, []).append(one)
        minutes = (time.monotonic() - opened) / 60
        for name, of_name in drains.items():
            _tell(report, name, of_name, pasts[name])
        report.versions = those.versions([past.relay for past in pasts.values()])
    for name in PEERS[1:]:
        if name in drains:
            mine, theirs = report.of(f"relay, {name}", RATE), report.of(f"relay, {FRESH}", RATE)
            report.ratio(f"rate: {name} / {FRESH}", mine, theirs, aim=None if name in {AGAIN, WIDE} else AIM)
    if TYPES in drains and WIDE in drains:
        mine, theirs = report.of(f"relay, {TYPES}", RATE), report.of(f"relay, {WIDE}", RATE)
        report.ratio(f"rate: {TYPES} / {WIDE}", mine, theirs, aim=AIM)
    report.panel(RATE)
    dead = sum(sum(report.of(f"relay, {name}", column)[0] for column in DEAD) for name in drains)
    if dead:
        raise ServerError(f"Publishing changed, removed or left dead {dead:.0f} rows of the log.")
    report.notes += [
        "Publishing changed, removed or left dead no row of the log, by pg_stat_user_tables; otherwise the run fails.",
        "Rows of the log were found by an index, hardly any but those published, by the server's count; or it fails.",
        "The next batch is read, and made ready, beside the producing and the commit of the one before it.",
    ]
    if judged:
        report.notes.append(
            f"Among {retained:,} entries the plans of {judged} of the relay's statements - in vain, of a few new "
            "entries, at a backlog's start and within it - use the intended index, or the run fails. "
            "tests/test_plans.py holds the same among 10 and 100,000."
        )
    told = {
        AGAIN: "a second outbox without a past: what its ratio is away from one is the machine's.",
        RETAINED: f"{retained:,} published entries are in the table.",
        TYPES: f"{MANY_TYPES} entity types with a topic of one partition each.",
        WIDE: f"one type, whose topic has {MANY_TYPES} partitions: the client sends a request for each, and the broker "
        "marks each transaction in each of them. What is left between the two is the types' own.",
        OPEN: f"a transaction with an entry is open from before the first round to after the last, {minutes:.0f} "
        "minutes; what counts is what is written meanwhile, not the time.",
        RING: f"each of its {SLOTS} slots was filled and truncated {LAPS} times before.",
        LATE: f"a round's entries are of one transaction, open while {OTHERS:,} others were written and published.",
    }
    report.notes += [f"{name}: {text}" for name, text in told.items() if name in drains]
    return report


def _fresh(options: Options, those: Servers, number: int, pasts: dict[str, Past]) -> dict[str, Past]:
    """Those without a past, which are new in each round; the ones of the round before go away."""
    made: dict[str, Past] = {}
    for name in (FRESH, AGAIN):
        if name == AGAIN and AGAIN not in options.peers:
            continue
        if name in pasts:
            pasts.pop(name).drop()
        made[name] = Past(those, f"{'fresh' if name == FRESH else 'again'}{number + options.warm_up}")
        made[name].begin()
    return made


def _pasts(options: Options, those: Servers, retained: int) -> dict[str, Past]:
    """Those with a past, with it, each with a position."""
    pasts: dict[str, Past] = {}
    for name in options.peers:
        if name not in {FRESH, AGAIN}:
            options.view.step(f"making the past: {name}")
            many = {"types": MANY_TYPES, "partitions": 1} if name == TYPES else {}
            wide = {"partitions": MANY_TYPES} if name == WIDE else {}
            pasts[name] = Past(those, name, late=name == LATE, **many, **wide)
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
    counts = past.counts("n_live_tup", *DEAD, "pg_total_relation_size(relid)")
    size = counts.pop("pg_total_relation_size(relid)")
    for column, count in counts.items():
        report.series.append(Series(f"relay, {name}", column, "", [float(count)]))
    report.series += [
        Series(f"relay, {name}", "size", "GB", [size / 1e9], 2),
        Series(f"relay, {name}", "outbox status", "s", [past.status_seconds()], 2),
    ]


PART = Part(NAME, run, PEERS, by_entries=True)

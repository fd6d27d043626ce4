"""Part 7, backfill: a table that was there before into a topic, beside what else copies a table.

The relay runs already, nothing has changed for a while, and it is asked for a backfill: its pages are large then. Its
own drain of entries with the same states, `COPY` of the source's query, and Debezium's two snapshots of the same table
stand beside it. Then live changes come while backfills go on, of two types by turns, so that one is under way all the
time: what a change waits for, compared with one that comes alone, and how fast the backfills are meanwhile.
"""

from __future__ import annotations

import datetime as dt
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import psycopg

from bench import limits, table
from bench.contender import Contender, prepared, wait_alive
from bench.debezium import Connect
from bench.drain import CPU, MEMORY, RATE, Run, drain_once, tell_runs
from bench.latency import IDLE, STAGE_SECONDS, STAGES, Latencies, Traffic
from bench.measure import Spread, percentile, turned, usage, wait_for
from bench.options import Options
from bench.part import Part
from bench.relay import Relay
from bench.report import Panel, Report, Series
from bench.servers import Servers, servers
from bench.snapshots import Snapshot
from bench.workload import Load
from devstack.processes import ServerError
from outbox import backfill as service
from outbox import requests
from outbox.entity_types import read_types
from outbox.pace import QUIET_AFTER

NAME = "backfill"
BACKFILL, DRAIN, COPY, LIVE = "backfill", "drain", "COPY", "live"
INITIAL, INCREMENTAL = "debezium-initial", "debezium-incremental"
PEERS = (BACKFILL, DRAIN, INITIAL, INCREMENTAL, COPY, LIVE)
ALONE, BESIDE = "a live change, alone", "a live change, beside backfills"
MEANWHILE = "rows/s of the backfills"
_ROW, _AGAIN = "row", "row-again"
"""The entity types of the table's rows; a third one, `thing`, has the live changes. The second one is for the stage
with live changes: of one type, one backfill can go on at a time."""
_SCHEMA = "outbox"
_ASK_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class Live:
    """Live changes alone, and beside backfills. `rate`: the backfills' rows a second while changes came.

    `share`: of that time, how much one was asked for and not yet done.
    """

    alone: Latencies
    beside: Latencies
    rate: float
    share: float


class Backfill(Relay):
    """`outbox backfill start`, of a relay that runs already and to which no live change has come lately.

    `start_cpu`: the CPU seconds of each start, until then; they are in no figure of a backfill.
    """

    def __init__(self, servers: Servers) -> None:
        super().__init__(servers, name="relay-backfill")
        self.live_topic = f"{self.topic}.live"
        self.start_cpu: list[float] = []
        self._topics = servers.topics
        self._filled = False

    def prepare(self, **_: object) -> None:
        """Nothing yet: `fill` makes the outbox, whose types need the table."""

    def fill(self, load: Load) -> None:
        """Make the table and the outbox, once; start the relay, and wait until it takes it to be quiet."""
        if not self._filled:
            table.make(self.url, load)
            super().prepare(
                types={"thing": self.live_topic, _ROW: self.topic, _AGAIN: f"{self.topic}.again"},
                sources=dict.fromkeys((_ROW, _AGAIN), table.SOURCE),
            )
            self._filled = True
        super().begin()
        wait_alive(self._topics, self, 60, topic=self.live_topic)
        # That it lives was asked by a change, beside which pages are small: what that costs is measured by itself.
        time.sleep(QUIET_AFTER)
        self.start_cpu += [usage(pid).cpu_seconds for pid in self.pids.values()]

    def begin(self) -> None:
        """Ask for it."""
        self.mark()
        self.command("backfill", "start", _ROW)

    def backfill(self) -> None:
        """Ask for one and wait until it is over."""
        self.command("backfill", "start", _ROW, "--watch")

    def done(self, load: Load, added: int) -> bool:
        """A record for each row."""
        return added >= load.entries


class Drain(Relay):
    """The drain of entries that say what the table's rows say."""

    def __init__(self, servers: Servers) -> None:
        super().__init__(servers, name="relay-drain")

    def fill(self, load: Load) -> None:
        """Write the entries."""
        state = f"convert_to({table.state_sql(load)}, 'UTF8')"
        load.fill(self.url, "outbox.entries", ("type", "key", "state"), ("'thing'", load.key_sql, state))


def run(options: Options) -> Report:
    """The part."""
    view = options.view
    report = Report(
        NAME,
        f"Backfill: a table of {options.entries:,} rows",
        options.command,
        {
            "rows": options.entries,
            "seconds of a stage": options.stage_seconds,
            "rounds": options.rounds,
            "warm-up rounds": options.warm_up,
        },
    )
    load = table.rows(options.entries)
    runs: dict[str, list[Run]] = {}
    copied: list[limits.Limit] = []
    live: list[Live] = []
    with ExitStack() as stack:
        view.step("starting the servers")
        those = stack.enter_context(servers(stack.enter_context(options.work())))
        traffic = Traffic(those, options.stage_seconds)
        compared = contenders(those, options.peers)

        def publish(contender: Contender, number: int) -> None:
            one = drain_once(contender, load, those, seconds=options.seconds, told=view.step)
            if number >= 0:
                runs.setdefault(contender.name, []).append(one)
            if isinstance(contender, Backfill) and COPY in options.peers:
                limit = limits.copy_query(contender.url, table.SOURCE, load.entries, those.directory)
                view.step(f"{COPY}: {limit.rate:,.0f} rows/s, CPU {limit.usage.cpu_seconds:.2f} s")
                if number >= 0:
                    copied.append(limit)
            if isinstance(contender, Backfill) and LIVE in options.peers:
                both = watch_live(traffic, contender, load, options.seconds)
                view.step(f"{ALONE}: {_shown(both.alone)}")
                view.step(f"{BESIDE}: {_shown(both.beside)}; {both.rate:,.0f} rows/s meanwhile")
                if number >= 0:
                    live.append(both)

        takes: list[Callable[[int], None]] = [partial(publish, one) for one in compared]
        for number in options.numbers():
            for take in turned(takes, number):
                take(number)
        report.versions = those.versions(compared)
    _tell(report, options, runs, copied)
    _tell_live(report, live)
    if BACKFILL in options.peers and DRAIN in options.peers:
        started = Spread.of([cpu for one in compared if isinstance(one, Backfill) for cpu in one.start_cpu]).median
        report.notes.append(
            "relay-drain's CPU has the start of its process in it. relay-backfill's is counted from the request on: "
            f"its start, with one change to see that it runs, took {started:.2f} s of CPU before. The command that "
            "asks is counted for nobody."
        )
    return report


def contenders(servers: Servers, chosen: Sequence[str]) -> list[Contender]:
    """Those that were chosen, prepared."""
    connect = Connect(servers)
    servers.stack.callback(connect.close)
    makers: dict[str, Callable[[], Contender]] = {
        BACKFILL: lambda: Backfill(servers),
        DRAIN: lambda: Drain(servers),
        INITIAL: lambda: Snapshot(servers, connect, incremental=False),
        INCREMENTAL: lambda: Snapshot(servers, connect, incremental=True),
    }
    return prepared(makers, chosen, servers.stack)


def watch_live(traffic: Traffic, contender: Backfill, load: Load, seconds: float) -> Live:
    """Live changes alone, and while backfills go on; `seconds` is how long those may take to their end."""
    contender.fill(load)
    alone = traffic.changes(contender, STAGES[0], topic=contender.live_topic)
    contender.mark()
    over, failed = threading.Event(), list[Exception]()

    def ask() -> None:
        try:
            _keep_asking(contender, load, over, seconds)
        except Exception as error:  # noqa: BLE001  raised where it is waited for
            failed.append(error)

    def goes_on() -> bool:
        contender.check_alive()
        return bool(failed) or any(True for _ in contender.events("relay.published"))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        wait_for(goes_on, seconds=seconds, what="the first page of a backfill")
        beside = traffic.changes(contender, STAGES[0], topic=contender.live_topic)
    finally:
        over.set()
        asking.join()
    if failed:
        raise ServerError(f"A backfill beside the live changes failed: {failed[0]}") from failed[0]
    contender.end()
    return Live(alone, beside, *_meanwhile(contender))


def _keep_asking(contender: Backfill, load: Load, over: threading.Event, seconds: float) -> None:
    """Ask for backfills of both types until it is over, each as soon as the one before it is done; wait for the last.

    Past the command line, which counts the rows first: that would be a burden of its own.
    """
    with psycopg.connect(contender.url, autocommit=True) as connection:
        types = {one.name: one for one in read_types(connection, _SCHEMA) if one.name in {_ROW, _AGAIN}}

        def going() -> set[str]:
            found = requests.backfills(connection, _SCHEMA)
            if wrong := [said["error"] for one in found for said in one.outcomes.values() if said.get("error")]:
                raise ServerError(f"it ended early: {wrong[0]}")
            return {one.arguments["type"] for one in found if one.state(1) == "running"}

        def done() -> bool:
            contender.check_alive()
            return not going()

        # Half a table at first: two that were as long would end at the same time.
        service.start(connection, _SCHEMA, types[_AGAIN], shards=1, where=f"id < {load.entries // 2}")
        while not over.is_set():
            for name in types.keys() - going():
                service.start(connection, _SCHEMA, types[name], shards=1)
            over.wait(_ASK_SECONDS)
        wait_for(done, seconds=seconds, what="the end of the last backfills")


def _meanwhile(contender: Backfill) -> tuple[float, float]:
    """From the first live change to the last: rows of backfills a second, and the share of time with one under way."""
    events = list(contender.events("relay.published"))
    live = [place for place, event in enumerate(events) if event["entries"]]
    begin, end = _at(events[live[0]]), _at(events[live[-1]])
    # Each change has a key of its own, so none is collapsed, and what is no change's record is a row's.
    rows = sum(event["records"] - event["entries"] for event in events[live[0] + 1 : live[-1] + 1])
    with psycopg.connect(contender.url) as connection:
        row = connection.execute(
            "SELECT coalesce(sum(date_part('epoch', upper(part) - lower(part))), 0)"
            " FROM (SELECT unnest(range_agg(tstzrange(requested_at, finished_at)) * tstzmultirange(tstzrange(%s, %s)))"
            f"       FROM {_SCHEMA}.requests WHERE kind = 'backfill') AS parts (part)",
            [begin, end],
        ).fetchone()
    seconds = (end - begin).total_seconds()
    return rows / seconds, float(row[0]) / seconds if row else 0.0


def _at(event: Mapping[str, Any]) -> dt.datetime:
    """When an event was logged."""
    return dt.datetime.fromisoformat(event["at"])


def _shown(one: Latencies) -> str:
    middle, late = (percentile(one.after_commit, share) * 1000 for share in (0.5, 0.99))
    return f"p50 {middle:.1f} ms, p99 {late:.1f}"


def _tell(
    report: Report,
    options: Options,
    runs: Mapping[str, list[Run]],
    copied: Sequence[limits.Limit],
) -> None:
    """The series and ratios."""
    tell_runs(report, options.entries, runs)
    if copied:
        report.series.append(Series(COPY, RATE, "", [one.rate for one in copied]))
        per_million = 1_000_000 / options.entries
        report.series.append(Series(COPY, CPU, "s", [one.usage.cpu_seconds * per_million for one in copied], 2))
    report.panel(RATE)
    mine = next((who for who in runs if who == "relay-backfill"), None)
    if mine is not None:
        rate = report.of(mine, RATE)
        for who in runs:
            if who != mine:
                aim = {"relay-drain": 1.0, "Debezium, incremental snapshot": 4.0}.get(who)
                report.ratio(f"rate: {mine} / {who}", rate, report.of(who, RATE), aim=aim)
                report.ratio(f"memory: {mine} / {who}", report.of(mine, MEMORY), report.of(who, MEMORY), at_least=False)
        if copied:
            report.ratio(f"rate: {mine} / {COPY}", rate, report.of(COPY, RATE))


def _tell_live(report: Report, live: Sequence[Live]) -> None:
    """The series and ratios of the live changes."""
    if not live:
        return
    for who, rounds in ((ALONE, [one.alone for one in live]), (BESIDE, [one.beside for one in live])):
        for figure, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
            values = [percentile(one.after_commit, share) * 1000 for one in rounds]
            report.series.append(Series(who, figure, "ms", values, 1))
    report.series.append(Series(BESIDE, MEANWHILE, "", [one.rate for one in live]))
    report.panels.append(Panel("live changes", ["p50", "p99"], {who: who for who in (ALONE, BESIDE)}, [ALONE, BESIDE]))
    p50, p99 = ([report.of(who, figure) for who in (BESIDE, ALONE)] for figure in ("p50", "p99"))
    report.ratio(f"{IDLE} p50: beside backfills / alone", *p50, at_least=False)
    report.ratio(f"{IDLE} p99: beside backfills / alone", *p99, aim=3, at_least=False)
    share = min(one.share for one in live)
    report.notes.append(
        f"Beside backfills, one of them was under way for {share:.0%} of the time in which changes came, in the round "
        f"in which that was least: of two types with the same source they take turns. {MEANWHILE.capitalize()}: of "
        "both together, from the first change to the last."
    )


PART = Part(NAME, run, PEERS, by_entries=True, stage_seconds=STAGE_SECONDS)

"""Part 7, backfill: a table that was there before into a topic, beside what else copies a table.

The relay runs, and is asked for a backfill, as in a service that goes on; its own drain of entries with the same
states, `COPY` of the source's query, and Debezium's two snapshots of the same table stand beside it. Then what a live
change waits for while backfills go on one after the other, compared with one that comes alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

from bench import limits, table
from bench.contender import Contender, prepared, wait_alive
from bench.debezium import Connect
from bench.drain import CPU, MEMORY, RATE, Run, drain_once, tell_runs
from bench.latency import IDLE, STAGE_SECONDS, STAGES, Latencies, Traffic
from bench.measure import percentile, turned
from bench.options import Options
from bench.part import Part
from bench.relay import Relay
from bench.report import Panel, Report, Series
from bench.servers import Servers, servers
from bench.snapshots import Snapshot
from bench.workload import Load
from devstack.processes import ServerError
from outbox.pace import QUIET_AFTER

NAME = "backfill"
BACKFILL, DRAIN, COPY, LIVE = "backfill", "drain", "COPY", "live"
INITIAL, INCREMENTAL = "debezium-initial", "debezium-incremental"
PEERS = (BACKFILL, DRAIN, INITIAL, INCREMENTAL, COPY, LIVE)
ALONE, BESIDE = "a live change, alone", "a live change, beside backfills"
_ROW = "row"
"""The entity type of the table's rows; the other, `thing`, has the live changes."""


class Backfill(Relay):
    """`outbox backfill start`, of a relay that runs already, as it does when a service has live changes."""

    def __init__(self, servers: Servers) -> None:
        super().__init__(servers, name="relay-backfill")
        self.live_topic = f"{self.topic}.live"
        self._topics = servers.topics
        self._filled = False

    def prepare(self, **_: object) -> None:
        """Make the outbox with two types; `fill` makes the table, which the source of one needs."""

    def fill(self, load: Load) -> None:
        """Make the table, once, and start the relay."""
        if not self._filled:
            table.make(self.url, load)
            super().prepare(types={"thing": self.live_topic, _ROW: self.topic}, sources={_ROW: table.SOURCE})
            self._filled = True
        super().begin()
        wait_alive(self._topics, self, 60, topic=self.live_topic)
        # That it lives was asked by a change, beside which pages are small: what that costs is measured by itself.
        time.sleep(QUIET_AFTER)

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
    live: dict[str, list[Latencies]] = {}
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
                for who, one_stage in watch_live(traffic, contender, load).items():
                    view.step(f"{who}: {_shown(one_stage)}")
                    if number >= 0:
                        live.setdefault(who, []).append(one_stage)

        takes: list[Callable[[int], None]] = [partial(publish, one) for one in compared]
        for number in options.numbers():
            for take in turned(takes, number):
                take(number)
        report.versions = those.versions(compared)
    _tell(report, options, runs, copied, live)
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


def watch_live(traffic: Traffic, contender: Backfill, load: Load) -> Mapping[str, Latencies]:
    """Live changes alone, and while one backfill after the other goes on."""
    contender.fill(load)
    found = {ALONE: traffic.changes(contender, STAGES[0], topic=contender.live_topic)}
    over, failed = threading.Event(), list[Exception]()

    def backfills() -> None:
        try:
            while not over.is_set():
                contender.backfill()
        except Exception as error:  # noqa: BLE001  raised where it is waited for
            failed.append(error)

    beside = threading.Thread(target=backfills)
    beside.start()
    try:
        found[BESIDE] = traffic.changes(contender, STAGES[0], topic=contender.live_topic)
    finally:
        over.set()
        beside.join()
    if failed:
        raise ServerError(f"A backfill beside the live changes failed: {failed[0]}") from failed[0]
    contender.end()
    return found


def _shown(one: Latencies) -> str:
    middle, late = (percentile(one.after_commit, share) * 1000 for share in (0.5, 0.99))
    return f"p50 {middle:.1f} ms, p99 {late:.1f}"


def _tell(
    report: Report,
    options: Options,
    runs: Mapping[str, list[Run]],
    copied: Sequence[limits.Limit],
    live: Mapping[str, Sequence[Latencies]],
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
    for who, rounds in live.items():
        for figure, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
            values = [percentile(one.after_commit, share) * 1000 for one in rounds]
            report.series.append(Series(who, figure, "ms", values, 1))
    if live:
        report.panels.append(Panel("live changes", ["p50", "p99"], {who: who for who in live}, list(live)))
        p50, p99 = ([report.of(who, figure) for who in (BESIDE, ALONE)] for figure in ("p50", "p99"))
        report.ratio(f"{IDLE} p50: beside backfills / alone", *p50, at_least=False)
        report.ratio(f"{IDLE} p99: beside backfills / alone", *p99, aim=3, at_least=False)


PART = Part(NAME, run, PEERS, by_entries=True, stage_seconds=STAGE_SECONDS)

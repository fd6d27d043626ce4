"""Part 6, idle cost: CPU of a contender and of its servers, and what it asks the database, when nothing happens."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass

import psycopg

from bench import install
from bench.latency import DEBEZIUM, RELAY, TXOUTBOX, contenders, wait_alive
from bench.measure import Meter
from bench.options import Options
from bench.report import Report, Series
from bench.servers import Servers, servers
from devstack.postgres import Postgres

NAME = "idle"
PEERS = (RELAY, DEBEZIUM, TXOUTBOX)
STAGE_SECONDS = 60.0
NOBODY = "the servers alone"
# Until what the start has set in motion (plans, caches, a group that settles) has come to rest.
_SETTLE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Idle:
    """Per cent of a core; transactions a second in the contender's database."""

    own: float
    postgres: float
    kafka: float
    transactions: float


def _transactions(server: Postgres, database: str) -> int:
    """How many transactions a database has seen; asked from another one, and only after they have been reported."""
    with psycopg.connect(server.url(), autocommit=True) as connection:
        row = connection.execute(
            "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = %s", [database]
        ).fetchone()
    return int(row[0]) if row else 0


def _watch(seconds: float, servers: Servers, server: Postgres, database: str, pids: Meter) -> Idle:
    trees = Meter({}, {"PostgreSQL": server.pid, "Kafka": servers.kafka.pid})
    before, began = _transactions(server, database), time.monotonic()
    time.sleep(seconds)
    passed = time.monotonic() - began
    own, of_servers = sum(pids.cpu_seconds().values()), trees.cpu_seconds()
    asked = _transactions(server, database) - before
    share = 100 / passed
    return Idle(own * share, of_servers["PostgreSQL"] * share, of_servers["Kafka"] * share, asked / passed)


def run(options: Options) -> Report:
    """The part."""
    view = options.view
    report = Report(
        NAME,
        f"Idle cost: {options.stage_seconds:g} seconds in which nothing happens",
        options.command,
        {"seconds": options.stage_seconds, "rounds": options.rounds},
    )
    found: dict[str, list[Idle]] = {}
    with ExitStack() as stack:
        view.step("starting the servers")
        those = stack.enter_context(servers(stack.enter_context(options.work())))
        peers = contenders(those, options.peers)
        for number in range(options.rounds):
            view.step(f"round {number + 1} of {options.rounds}")
            for peer in peers:
                peer.begin()
                wait_alive(those, peer, options.seconds)
                time.sleep(_SETTLE_SECONDS)
                database = peer.url.rpartition("/")[2]
                one = _watch(options.stage_seconds, those, peer.postgres, database, Meter(peer.pids))
                peer.end()
                found.setdefault(peer.name, []).append(one)
                view.step(_shown(peer.name, one))
            # Kafka Connect keeps running: its worker talks to the broker without a connector, too.
            alone = _watch(options.stage_seconds, those, those.postgres("postgres"), "postgres", Meter({}))
            found.setdefault(NOBODY, []).append(alone)
            view.step(_shown(NOBODY, alone))
        report.versions = those.versions() | install.versions()
    for who, rounds in found.items():
        columns = {
            "CPU": [one.own for one in rounds],
            "PostgreSQL's CPU": [one.postgres for one in rounds],
            "Kafka's CPU": [one.kafka for one in rounds],
        }
        for name, values in columns.items():
            report.series.append(Series(who, name, "%", values, 2))
        if who != NOBODY:
            asked = [one.transactions for one in rounds]
            report.series.append(Series(who, "transactions/s in the database", "", asked, 2))
    if RELAY in found:
        mine = report.of(RELAY, "CPU")
        report.ratio("CPU: relay / 0.5% of a core", mine, [0.5] * len(mine), aim=1, at_least=False)
        for who in found:
            if who.startswith("Debezium"):
                report.ratio(f"CPU: relay / {who}", mine, report.of(who, "CPU"), at_least=False)
    return report


def _shown(who: str, one: Idle) -> str:
    return (
        f"{who}: {one.own:.2f}% of a core, PostgreSQL {one.postgres:.2f}%, Kafka {one.kafka:.2f}%, "
        f"{one.transactions:.2f} transactions/s"
    )

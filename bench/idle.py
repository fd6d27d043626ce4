"""Part 6, idle cost: CPU of a contender and of its servers, and what it asks the database, when nothing happens.

Statements are counted in the server's log, which the contender's database writes for each one: a line more in a second
or so. What comes over a replication connection is no statement. Kafka Connect's worker talks to the broker whether it
has a connector or not: everybody else is measured before it starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import psycopg
from psycopg import sql

from bench.contender import Contender, wait_alive
from bench.latency import DEBEZIUM, RELAY, TXOUTBOX, contenders
from bench.measure import Meter, turned
from bench.options import Options
from bench.part import Part
from bench.report import Report, Series
from bench.servers import Servers, servers
from devstack.postgres import Postgres

NAME = "idle"
PEERS = (RELAY, DEBEZIUM, TXOUTBOX)
STAGE_SECONDS = 60.0
NOBODY, NO_CONNECTOR = "the servers alone", "the servers and Kafka Connect's worker"
# Until what the start has set in motion (plans, caches, a group that settles) has come to rest.
_SETTLE_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Idle:
    """Per cent of a core; statements a second in the contender's database."""

    own: float
    postgres: float
    kafka: float
    statements: float


def _database(contender: Contender) -> str:
    return contender.url.rpartition("/")[2]


def _log_statements(contender: Contender) -> None:
    """Have every statement in its database logged, from the next connection on."""
    with psycopg.connect(contender.postgres.url(), autocommit=True) as connection:
        connection.execute(
            sql.SQL("ALTER DATABASE {} SET log_statement = 'all'").format(sql.Identifier(_database(contender)))
        )


def _statements(log: bytes, database: str) -> int:
    """How many statements a server's log has of a database."""
    # A prepared one is executed; the lines of a longer one that follow have no such beginning.
    return sum(log.count(f"@{database} LOG:  {word}".encode()) for word in ("statement: ", "execute "))


def _watch(seconds: float, servers: Servers, server: Postgres, database: str, own: Meter) -> Idle:
    trees = Meter({}, {"PostgreSQL": server.pid, "Kafka": servers.kafka.pid})
    told, began = server.log.stat().st_size, time.monotonic()
    time.sleep(seconds)
    passed = time.monotonic() - began
    mine, of_servers = sum(own.cpu_seconds().values()), trees.cpu_seconds()
    asked = _statements(server.log.read_bytes()[told:], database)
    share = 100 / passed
    return Idle(mine * share, of_servers["PostgreSQL"] * share, of_servers["Kafka"] * share, asked / passed)


def run(options: Options) -> Report:
    """The part."""
    view = options.view
    report = Report(
        NAME,
        f"Idle cost: {options.stage_seconds:g} seconds in which nothing happens",
        options.command,
        {"seconds": options.stage_seconds, "rounds": options.rounds, "warm-up rounds": options.warm_up},
    )
    found: dict[str, list[Idle]] = {}
    with ExitStack() as stack:
        view.step("starting the servers")
        those = stack.enter_context(servers(stack.enter_context(options.work())))

        def took(who: str, number: int, one: Idle) -> None:
            view.step(_shown(who, one))
            if number >= 0:
                found.setdefault(who, []).append(one)

        def watch(contender: Contender, number: int) -> None:
            contender.begin()
            wait_alive(those.topics, contender, options.seconds)
            time.sleep(_SETTLE_SECONDS)
            one = _watch(options.stage_seconds, those, contender.postgres, _database(contender), Meter(contender.pids))
            contender.check_alive()
            contender.end()
            took(contender.name, number, one)

        def watch_nobody(who: str, number: int) -> None:
            one = _watch(options.stage_seconds, those, those.postgres("postgres"), "postgres", Meter({}))
            took(who, number, one)

        compared: list[Contender] = []
        # One after the other: making Debezium starts the worker.
        for nobody, names in ((NOBODY, (RELAY, TXOUTBOX)), (NO_CONNECTOR, (DEBEZIUM,))):
            chosen = contenders(those, [name for name in names if name in options.peers])
            if not chosen:
                continue
            for contender in chosen:
                _log_statements(contender)
            takes: list[Callable[[int], None]] = [partial(watch, one) for one in chosen]
            takes.append(partial(watch_nobody, nobody))
            for number in options.numbers():
                for take in turned(takes, number):
                    take(number)
            compared += chosen
        report.versions = those.versions(compared)
    _tell(report, found)
    return report


def _tell(report: Report, found: Mapping[str, Sequence[Idle]]) -> None:
    """The series and ratios."""
    for who, rounds in found.items():
        if who not in {NOBODY, NO_CONNECTOR}:
            report.series.append(Series(who, "CPU", "%", [one.own for one in rounds], 2))
            asked = [one.statements for one in rounds]
            report.series.append(Series(who, "statements/s in the database", "", asked, 2))
        report.series.append(Series(who, "PostgreSQL's CPU", "%", [one.postgres for one in rounds], 2))
        report.series.append(Series(who, "Kafka's CPU", "%", [one.kafka for one in rounds], 2))
    report.panel("CPU")
    if RELAY in found:
        mine = report.of(RELAY, "CPU")
        report.ratio("CPU: relay / 0.5% of a core", mine, [0.5] * len(mine), aim=1, at_least=False)
        for who in found:
            if who.startswith("Debezium"):
                report.ratio(f"CPU: relay / {who}", mine, report.of(who, "CPU"), at_least=False)


def _shown(who: str, one: Idle) -> str:
    return (
        f"{who}: {one.own:.2f}% of a core, PostgreSQL {one.postgres:.2f}%, Kafka {one.kafka:.2f}%, "
        f"{one.statements:.2f} statements/s"
    )


PART = Part(NAME, run, PEERS, stage_seconds=STAGE_SECONDS)

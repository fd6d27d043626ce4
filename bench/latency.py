"""Part 3, latency: from the commit in the service to the receipt by a `read_committed` consumer.

The time of sending is taken when the commit has returned in the service: from then on the service may tell others of
its change, and nobody waits for what came before. (What was taken just before the insert is shown too; it adds
the time of the owner's transaction.) A bare Kafka transaction is timed from its beginning.
"""

from __future__ import annotations

import json
import sys
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psycopg

from bench.contender import Contender, prepared, wait_alive
from bench.debezium import LATENCY, Connect, Debezium
from bench.measure import Meter, Spread, percentile, turned, wait_for
from bench.options import Options
from bench.part import Part
from bench.relay import Relay
from bench.report import Panel, Report, Series
from bench.servers import Servers, servers
from bench.txoutbox import Txoutbox
from devstack.install import ROOT
from devstack.processes import Child, ServerError, tail

NAME = "latency"
RELAY, DEBEZIUM, TXOUTBOX, BARE = "relay", "debezium", "txoutbox", "bare"
PEERS = (RELAY, DEBEZIUM, TXOUTBOX, BARE)
BARE_NAME = "bare Kafka transaction"
IDLE = "idle"
STAGE_SECONDS = 20.0
_WARM_SECONDS = 2.0
# How long the receiver waits for the next record before it gives up.
_PATIENCE_SECONDS = 30
# Writers that kept less than this share of a rate did not show what the rate does.
_KEPT = 0.95
_STEPS = ("read", "prepare", "produce", "flush", "commit")


@dataclass(frozen=True, slots=True)
class Stage:
    """A rate of changes a second, and over how many connections, by how many processes, they are written."""

    name: str
    rate: float
    connections: int = 1
    writers: int = 1


STAGES: Sequence[Stage] = (Stage(IDLE, 20), Stage("1,000/s", 1000, 4, 2), Stage("5,000/s", 5000, 16, 4))


@dataclass(frozen=True, slots=True)
class Latencies:
    """One stage of one contender: seconds, in order. `sent` is the rate that the writers kept; `cpu` of a core."""

    after_commit: Sequence[float]
    before_insert: Sequence[float]
    sent: float
    cpu: float
    steps: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class _Process:
    """One of the traffic's, and the files that it writes."""

    child: Child
    out: Path
    log: Path


class Traffic:
    """Starts the writers and the receiver of `bench.traffic`, and puts together what they saw."""

    def __init__(self, servers: Servers, seconds: float) -> None:
        self._servers = servers
        self._seconds = seconds
        self._base = 0
        self._runs = 0

    def changes(self, contender: Contender, stage: Stage, *, topic: str | None = None) -> Latencies:
        """Write changes for a contender that runs; `topic`: where they go, if that is not what it is measured by."""
        given = {"url": contender.url, "insert": contender.insert, "connections": stage.connections}
        writers = [
            ("writer", {**given, "places": list(range(place, stage.connections, stage.writers))})
            for place in range(stage.writers)
        ]
        return self._measure(topic or contender.topic, stage, writers, contender.check_alive, contender.pids)

    def transactions(self, stage: Stage) -> Latencies:
        """Bare Kafka transactions."""
        topic, positions = "bench.bare", "bench.bare-positions"
        self._servers.topics.make(topic)
        self._servers.topics.make(positions, partitions=1)
        return self._measure(topic, stage, [("transactions", {"positions": positions})], lambda: None, {})

    def _measure(
        self,
        topic: str,
        stage: Stage,
        senders: Sequence[tuple[str, Mapping[str, Any]]],
        check: Callable[[], None],
        pids: Mapping[str, int],
    ) -> Latencies:
        """One stage: wait for what is sent, send, and compare the times. The processes' CPU is measured meanwhile."""
        count = round(stage.rate * (self._seconds + _WARM_SECONDS))
        shared = {"bootstrap": self._servers.kafka.bootstrap, "topic": topic, "count": count}
        starts = self._servers.topics.ends(topic)
        receiver = self._start("receiver", **shared, starts=starts, patience=_PATIENCE_SECONDS)
        wait_for(
            lambda: "ready" in receiver.log.read_text(errors="replace"),
            seconds=60,
            what=f"the receiver's start (see {receiver.log})",
            pause=0.02,
        )
        meter, began = Meter(pids), time.monotonic()
        base, self._base = self._base, self._base + count
        started = [self._start(role, **shared, **given, rate=stage.rate, base=base) for role, given in senders]
        sent = [one for sender in started for one in self._finish(sender, 3, check)]
        received = {number: at for number, at in self._finish(receiver, 2, check)}  # noqa: C416 - mypy sees no pairs
        cpu = sum(meter.cpu_seconds().values()) / (time.monotonic() - began)
        if len(received) != count:
            raise ServerError(f"{len(received)} of {count} changes were received from {topic}.")
        warm = base + round(stage.rate * _WARM_SECONDS)
        counted = [(number, before, after) for number, before, after in sent if number >= warm]
        spent = (max(after for *_, after in counted) - min(before for _, before, _ in counted)) / 1e9
        return Latencies(
            sorted((received[number] - after) / 1e9 for number, _, after in counted),
            sorted((received[number] - before) / 1e9 for number, before, _ in counted),
            len(counted) / spent,
            cpu,
            {},
        )

    def _start(self, role: str, **given: Any) -> _Process:
        self._runs += 1
        out = self._servers.directory / f"traffic-{role}-{self._runs}.bin"
        log = out.with_suffix(".log")
        command = [sys.executable, "-m", "bench.traffic", role, json.dumps({**given, "out": str(out)})]
        child = Child(command, log=log, cwd=ROOT)
        self._servers.stack.callback(child.stop, seconds=0)
        return _Process(child, out, log)

    def _finish(self, process: _Process, width: int, check: Callable[[], None]) -> list[tuple[int, ...]]:
        """Wait for its end; what it saw, in groups of `width`."""
        deadline = time.monotonic() + self._seconds * 4 + 120
        while not process.child.wait(0.2):
            check()
            if time.monotonic() > deadline:
                raise ServerError(f"The traffic does not end:\n{tail(process.log)}")
        if process.child.exit_code() != 0:
            check()
            raise ServerError(f"The traffic failed (exit code {process.child.exit_code()}):\n{tail(process.log)}")
        values = array("q")
        values.frombytes(process.out.read_bytes())
        process.out.unlink()
        return list(zip(*(values[place::width] for place in range(width)), strict=True))


def run(options: Options) -> Report:
    """The part."""
    view = options.view
    report = Report(
        NAME,
        "Latency: commit in the service to receipt",
        options.command,
        {"seconds of a stage": options.stage_seconds, "rounds": options.rounds, "warm-up rounds": options.warm_up},
    )
    found: dict[tuple[str, str], list[Latencies]] = {}
    failed: dict[tuple[str, str], str] = {}
    with ExitStack() as stack:
        view.step("starting the servers")
        those = stack.enter_context(servers(stack.enter_context(options.work())))
        traffic = Traffic(those, options.stage_seconds)
        compared = contenders(those, options.peers)

        def took(who: str, stage: Stage, number: int, one: Latencies) -> None:
            view.step(_shown(who, stage, one))
            if number >= 0:
                found.setdefault((who, stage.name), []).append(one)

        def watch(contender: Contender, number: int) -> None:
            contender.begin()
            wait_alive(those.topics, contender, options.seconds)
            for stage in STAGES:
                if (contender.name, stage.name) in failed:
                    continue
                try:
                    one = _stage(traffic, contender, stage)
                except ServerError as error:
                    if contender.name == RELAY:
                        raise
                    # It is the others that are shown by what they do not do; it must not cost the figures of all.
                    failed[contender.name, stage.name] = str(error).partition("\n")[0]
                    view.step(f"{contender.name}, {stage.name}: {error}")
                else:
                    took(contender.name, stage, number, one)
            contender.end()
            _clear(contender)

        def watch_bare(number: int) -> None:
            took(BARE_NAME, STAGES[0], number, traffic.transactions(STAGES[0]))

        takes: list[Callable[[int], None]] = [partial(watch, one) for one in compared]
        if BARE in options.peers:
            takes.append(watch_bare)
        for number in options.numbers():
            for take in turned(takes, number):
                take(number)
        report.versions = those.versions(compared)
    for who, stage in failed:
        found.pop((who, stage), None)
    _tell(report, found)
    report.notes += [f"{who}, {stage}: no figures; in one round {why}" for (who, stage), why in failed.items()]
    return report


def contenders(servers: Servers, chosen: Sequence[str]) -> list[Contender]:
    """Those that were chosen, prepared, tuned for latency."""
    connect = Connect(servers)
    servers.stack.callback(connect.close)
    makers: dict[str, Callable[[], Contender]] = {
        RELAY: lambda: Relay(servers),
        DEBEZIUM: lambda: Debezium(servers, connect, tuning=LATENCY),
        TXOUTBOX: lambda: Txoutbox(servers, notify=True),
    }
    return prepared(makers, chosen, servers.stack)


def _stage(traffic: Traffic, contender: Contender, stage: Stage) -> Latencies:
    if not isinstance(contender, Relay):
        return traffic.changes(contender, stage)
    contender.mark()
    one = traffic.changes(contender, stage)
    batches = list(contender.events("relay.published"))
    if not batches:
        raise ServerError("The relay has logged no transaction of what was received.")
    steps = {step: sum(batch[f"{step}_seconds"] for batch in batches) / len(batches) for step in _STEPS}
    age = sum(batch["age_seconds"] for batch in batches) / len(batches)
    # What is left of the oldest entry's age: its own transaction's end, the ring, being woken.
    return replace(one, steps={"transaction's end and wake-up": age - sum(steps.values()), **steps})


def _clear(contender: Contender) -> None:
    """Take Debezium's rows away, as its users do; the relay keeps its log, txoutbox deletes by itself."""
    if isinstance(contender, Debezium):
        with psycopg.connect(contender.url) as connection:
            connection.execute("TRUNCATE outbox")


def _shown(who: str, stage: Stage, one: Latencies) -> str:
    times = one.before_insert if who == BARE_NAME else one.after_commit
    middle, late, most = (percentile(times, share) * 1000 for share in (0.5, 0.99, 1.0))
    return f"{who}, {stage.name}: p50 {middle:.1f} ms, p99 {late:.1f}, max {most:.1f}; {one.sent:,.0f} changes/s sent"


def _tell(report: Report, found: Mapping[tuple[str, str], list[Latencies]]) -> None:
    """The series and ratios."""
    for (who, of_stage), rounds in found.items():
        name = f"{who}, {of_stage}"
        # The bare transaction is received before its commit returns: from its beginning.
        times = [one.before_insert if who == BARE_NAME else one.after_commit for one in rounds]
        _add(report, name, times, "")
        if who != BARE_NAME:
            _add(report, name, [one.before_insert for one in rounds], " from before the insert")
        report.series.append(Series(name, "changes/s sent", "", [one.sent for one in rounds]))
        if who != BARE_NAME:
            report.series.append(Series(name, "CPU", "% of a core", [one.cpu * 100 for one in rounds], 1))
    whos = list(dict.fromkeys(who for who, _ in found))
    for stage in STAGES:
        bars = {f"{who}, {stage.name}": who for who in whos if (who, stage.name) in found}
        report.panels.append(Panel(stage.name, ["p50", "p99"], bars, [f"{RELAY}, {stage.name}"]))
    unkept = _unkept(report, found)
    if RELAY in whos:
        _judge(report, found, unkept, next((who for who in whos if who.startswith("Debezium")), None))
        for stage in STAGES:
            report.notes.append(_steps(stage, found[RELAY, stage.name]))


def _add(report: Report, name: str, times: Sequence[Sequence[float]], since: str) -> None:
    for figure, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
        values = [percentile(one, share) * 1000 for one in times]
        report.series.append(Series(name, f"{figure}{since}", "ms", values, 1))


def _unkept(report: Report, found: Mapping[tuple[str, str], list[Latencies]]) -> set[tuple[str, str]]:
    """Whose stages, by contender and name, were not written at their rate in every round; noted in the report."""
    unkept: set[tuple[str, str]] = set()
    rates = {stage.name: stage.rate for stage in STAGES}
    for (who, name), rounds in found.items():
        least = min(one.sent for one in rounds)
        if least < _KEPT * rates[name]:
            unkept.add((who, name))
            report.notes.append(
                f"{who}, {name}: the machine did not keep the rate ({least:,.0f} changes/s in the worst round): what "
                "was measured is not this rate, and there is no verdict."
            )
    return unkept


def _judge(
    report: Report,
    found: Mapping[tuple[str, str], list[Latencies]],
    unkept: set[tuple[str, str]],
    debezium: str | None,
) -> None:
    """The aims; none for a stage whose rate was not kept."""

    def judge(stage: Stage, figure: str, than: str, theirs: Sequence[float], aim: float) -> None:
        kept = not any((who, stage.name) in unkept for who in (RELAY, than))
        mine = report.of(f"{RELAY}, {stage.name}", figure)
        name = f"{stage.name} {figure}: relay / {'Debezium' if than == debezium else than}"
        report.ratio(name, mine, theirs, aim=aim if kept else None, at_least=False)

    idle, busy = STAGES[0], STAGES[1:]
    for figure in ("p50", "p99"):
        if debezium is not None:
            judge(idle, figure, debezium, report.of(f"{debezium}, {idle.name}", figure), 0.45)
        if (BARE_NAME, idle.name) in found:
            judge(idle, figure, BARE_NAME, report.of(f"{BARE_NAME}, {idle.name}", figure), 2)
    for stage in busy:
        if debezium is not None:
            judge(stage, "p99", debezium, report.of(f"{debezium}, {stage.name}", "p99"), 1)
    judge(busy[0], "p99", "40 ms", [40.0] * len(found[RELAY, busy[0].name]), 1)


def _steps(stage: Stage, rounds: Sequence[Latencies]) -> str:
    names = rounds[0].steps
    middle = {name: Spread.of([one.steps[name] for one in rounds]).median for name in names}
    whole = sum(middle.values())
    shown = ", ".join(f"{name} {value * 1000:.2f} ({value / whole:.0%})" for name, value in middle.items())
    return f"The relay's own time at {stage.name}, mean of its transactions, ms and share: {shown}."


PART = Part(NAME, run, PEERS, stage_seconds=STAGE_SECONDS)

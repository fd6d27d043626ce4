"""Part 3, latency: from the commit in the service to the receipt by a `read_committed` consumer.

The time of sending is taken when the commit has returned in the service: from then on the service may tell others of
its change, and nobody waits for what came before. (What was taken just before the insert is kept too; it adds the
time of the owner's transaction, the same for all.) A bare Kafka transaction is timed from its beginning.
"""

from __future__ import annotations

import json
import sys
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

from bench import install
from bench.contender import Contender, prepared
from bench.debezium import LATENCY, Connect, Debezium
from bench.measure import Meter, percentile, wait_for
from bench.options import Options
from bench.relay import Relay
from bench.report import Report, Series
from bench.servers import Servers, servers
from bench.txoutbox import Txoutbox
from bench.workload import run as execute
from devstack.install import ROOT
from devstack.processes import Child, ServerError, tail

NAME = "latency"
RELAY, DEBEZIUM, TXOUTBOX, BARE = "relay", "debezium", "txoutbox", "bare"
PEERS = (RELAY, DEBEZIUM, TXOUTBOX, BARE)
BARE_NAME = "bare Kafka transaction"
IDLE = "idle"
_WARM_SECONDS = 2.0
_STEPS = ("read", "prepare", "produce", "flush", "commit")


@dataclass(frozen=True, slots=True)
class Stage:
    """A rate of changes a second, and over how many connections they are written."""

    name: str
    rate: float
    connections: int


STAGES: Sequence[Stage] = (Stage(IDLE, 20, 1), Stage("1,000/s", 1000, 4), Stage("5,000/s", 5000, 16))


@dataclass(frozen=True, slots=True)
class Latencies:
    """One stage of one contender: seconds, in order. `sent` is the rate that the writer kept; `cpu` of a core."""

    after_commit: Sequence[float]
    before_insert: Sequence[float]
    sent: float
    cpu: float
    steps: Mapping[str, float]


class Traffic:
    """Starts the writer and the receiver of `bench.traffic`, and puts together what they saw."""

    def __init__(self, servers: Servers, seconds: float) -> None:
        self._servers = servers
        self._seconds = seconds
        self._base = 0
        self._runs = 0

    def _start(self, role: str, **given: Any) -> tuple[Child, Path, Path]:
        self._runs += 1
        out = self._servers.directory / f"traffic-{role}-{self._runs}.bin"
        log = out.with_suffix(".log")
        command = [sys.executable, "-m", "bench.traffic", role, json.dumps({**given, "out": str(out)})]
        child = Child(command, log=log, cwd=ROOT)
        self._servers.stack.callback(child.stop, seconds=0)
        return child, out, log

    def _finish(self, child: Child, out: Path, log: Path, width: int) -> list[tuple[int, ...]]:
        if not child.wait(self._seconds * 4 + 120) or child.exit_code() != 0:
            raise ServerError(f"The traffic failed (exit code {child.exit_code()}):\n{tail(log)}")
        values = array("q")
        values.frombytes(out.read_bytes())
        out.unlink()
        return list(zip(*(values[place::width] for place in range(width)), strict=True))

    def measure(self, topic: str, stage: Stage, role: str, meter: Callable[[], Meter], **given: Any) -> Latencies:
        """One stage: wait for what is sent, send, and compare the times."""
        topics = self._servers.topics
        count = round(stage.rate * (self._seconds + _WARM_SECONDS))
        shared = {"bootstrap": self._servers.kafka.bootstrap, "topic": topic, "count": count}
        waiting, received_out, received_log = self._start("receiver", **shared, starts=topics.ends(topic), patience=30)
        wait_for(lambda: "ready" in received_log.read_text(), seconds=60, what="the receiver's start", pause=0.02)
        measured, began = meter(), time.monotonic()
        sending, sent_out, sent_log = self._start(
            role, **shared, **given, rate=stage.rate, connections=stage.connections, base=self._base
        )
        base, self._base = self._base, self._base + count
        sent = self._finish(sending, sent_out, sent_log, 3)
        received = {number: at for number, at in self._finish(waiting, received_out, received_log, 2)}  # noqa: C416  of two
        cpu = sum(measured.cpu_seconds().values()) / (time.monotonic() - began)
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


def wait_alive(servers: Servers, contender: Contender, seconds: float) -> None:
    """Wait until a change goes through: then it is started, and its servers know of it."""
    before = sum(servers.topics.ends(contender.topic).values())
    with psycopg.connect(contender.url) as connection:
        connection.execute(contender.insert.encode(), ("k0", '{"version":0,"note":""}'))
    wait_for(
        lambda: sum(servers.topics.ends(contender.topic).values()) > before,
        seconds=seconds,
        what=f"the first record of {contender.name}",
    )


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
    with ExitStack() as stack:
        view.step("starting the servers")
        those = stack.enter_context(servers(stack.enter_context(options.work())))
        traffic = Traffic(those, options.stage_seconds)
        peers = contenders(those, options.peers)
        topics = ("bench.bare", "bench.bare-positions")
        if BARE in options.peers:
            those.topics.make(topics[0])
            those.topics.make(topics[1], partitions=1)
        for number in range(-options.warm_up, options.rounds):
            view.step(f"round {number + 1} of {options.rounds}" if number >= 0 else "warming up")
            place = number % len(peers) if peers else 0
            for peer in peers[place:] + peers[:place]:
                peer.begin()
                wait_alive(those, peer, options.seconds)
                for stage in STAGES:
                    one = _stage(traffic, peer, stage)
                    view.step(_shown(peer.name, stage, one))
                    if number >= 0:
                        found.setdefault((peer.name, stage.name), []).append(one)
                peer.end()
                _clear(peer)
            if BARE in options.peers:
                one = traffic.measure(topics[0], STAGES[0], "transactions", lambda: Meter({}), positions=topics[1])
                view.step(_shown(BARE_NAME, STAGES[0], one))
                if number >= 0:
                    found.setdefault((BARE_NAME, IDLE), []).append(one)
        report.versions = those.versions() | install.versions()
    _tell(report, found)
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


def _stage(traffic: Traffic, peer: Contender, stage: Stage) -> Latencies:
    if isinstance(peer, Relay):
        peer.mark()
    one = traffic.measure(peer.topic, stage, "writer", lambda: Meter(peer.pids), url=peer.url, insert=peer.insert)
    if not isinstance(peer, Relay):
        return one
    batches = list(peer.events("relay.published"))
    steps = {step: sum(batch[f"{step}_seconds"] for batch in batches) / len(batches) for step in _STEPS}
    age = sum(batch["age_seconds"] for batch in batches) / len(batches)
    # What is left of the oldest entry's age: its own transaction's end, the ring, being woken.
    steps = {"transaction's end and wake-up": age - sum(steps.values()), **steps}
    return Latencies(one.after_commit, one.before_insert, one.sent, one.cpu, steps)


def _clear(peer: Contender) -> None:
    """Take Debezium's rows away, as its users do; the relay keeps its log, txoutbox deletes by itself."""
    if isinstance(peer, Debezium):
        with psycopg.connect(peer.url) as connection:
            execute(connection, "TRUNCATE outbox")


def _shown(who: str, stage: Stage, one: Latencies) -> str:
    middle, late, most = (percentile(one.after_commit, share) * 1000 for share in (0.5, 0.99, 1.0))
    return f"{who}, {stage.name}: p50 {middle:.1f} ms, p99 {late:.1f}, max {most:.1f}; {one.sent:,.0f} changes/s sent"


def _tell(report: Report, found: Mapping[tuple[str, str], list[Latencies]]) -> None:
    """The series and ratios."""
    for (who, stage), rounds in found.items():
        # The bare transaction is received before its commit returns: from its beginning.
        times = [one.before_insert if who == BARE_NAME else one.after_commit for one in rounds]
        for name, share in (("p50", 0.5), ("p99", 0.99), ("max", 1.0)):
            values = [percentile(one, share) * 1000 for one in times]
            report.series.append(Series(f"{who}, {stage}", name, "ms", values, 1))
        late = [percentile(one.before_insert, 0.5) * 1000 for one in rounds]
        report.series.append(Series(f"{who}, {stage}", "p50 from before the insert", "ms", late, 1))
        report.series.append(Series(f"{who}, {stage}", "changes/s sent", "", [one.sent for one in rounds]))
        if who != BARE_NAME:
            report.series.append(Series(f"{who}, {stage}", "CPU", "% of a core", [one.cpu * 100 for one in rounds], 1))
    report.chart = "p50"
    whos = {who for who, _ in found}
    debezium = next((who for who in whos if who.startswith("Debezium")), None)
    if (RELAY, IDLE) not in found:
        return
    for figure in ("p50", "p99"):
        mine = report.of(f"{RELAY}, {IDLE}", figure)
        if debezium is not None:
            report.ratio(
                f"idle {figure}: relay / Debezium",
                mine,
                report.of(f"{debezium}, {IDLE}", figure),
                aim=0.45,
                at_least=False,
            )
        if BARE_NAME in whos:
            report.ratio(
                f"idle {figure}: relay / bare transaction",
                mine,
                report.of(f"{BARE_NAME}, {IDLE}", figure),
                aim=2,
                at_least=False,
            )
    for one_stage in STAGES[1:]:
        busy = report.of(f"{RELAY}, {one_stage.name}", "p99")
        if debezium is not None:
            theirs = report.of(f"{debezium}, {one_stage.name}", "p99")
            report.ratio(f"{one_stage.name} p99: relay / Debezium", busy, theirs, aim=1, at_least=False)
    busy = report.of(f"{RELAY}, {STAGES[1].name}", "p99")
    report.ratio("1,000/s p99: relay / 40 ms", busy, [40.0] * len(busy), aim=1, at_least=False)
    for one_stage in STAGES:
        rounds = found[RELAY, one_stage.name]
        names = rounds[0].steps
        middle = {name: sorted(one.steps[name] for one in rounds)[len(rounds) // 2] * 1000 for name in names}
        report.notes.append(
            f"The relay's own time at {one_stage.name}, mean of its transactions, ms: "
            + ", ".join(f"{name} {value:.2f}" for name, value in middle.items())
            + "."
        )

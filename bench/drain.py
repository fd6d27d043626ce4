"""Part 1, drain: how fast a backlog of distinct keys is published, beside Debezium, txoutbox and the limits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

from bench import limits
from bench.contender import Contender, prepared
from bench.debezium import WORKER, Connect, Debezium
from bench.measure import Meter, turned, usage
from bench.options import Options
from bench.part import Part
from bench.relay import Relay
from bench.report import Report, Series
from bench.servers import Servers, servers
from bench.topics import Delivered, Timeline
from bench.txoutbox import Txoutbox
from bench.workload import Load

NAME = "drain"
RATE, CPU, MEMORY = "entries/s", "CPU for a million", "peak memory"
RELAY, COPY, PRODUCER = "relay", "COPY", "ProducerPerformance"
DEBEZIUM_POLL, DEBEZIUM_INTERVAL = "debezium-poll", "debezium-interval"
TXOUTBOX, TXOUTBOX_2 = "txoutbox", "txoutbox-2"
PEERS = (RELAY, DEBEZIUM_POLL, DEBEZIUM_INTERVAL, TXOUTBOX, TXOUTBOX_2, COPY, PRODUCER)


@dataclass(frozen=True, slots=True)
class Run:
    """One contender in one round. `cpu` by process and server, seconds."""

    timeline: Timeline
    delivered: Delivered
    cpu: Mapping[str, float]
    own_cpu: float
    peak_bytes: int
    details: Mapping[str, float]


def drain_once(
    contender: Contender, load: Load, servers: Servers, *, seconds: float, told: Callable[[str], None]
) -> Run:
    """Fill while it is stopped, let it publish until all can be read, and judge what was delivered."""
    contender.fill(load)
    starts = servers.topics.ends(contender.topic)
    server_meter = Meter({}, contender.trees)
    warm = contender.pids
    meter = Meter(warm)
    began = time.monotonic()
    contender.begin()
    started = {name: pid for name, pid in contender.pids.items() if name not in warm}
    timeline = servers.topics.watch(
        contender.topic,
        starts,
        began=began,
        done=lambda added: contender.done(load, added),
        check=contender.check_alive,
        seconds=seconds,
    )
    # A process of this round alone is counted from its start, one that was warm from the start signal.
    own = meter.cpu_seconds() | {name: usage(pid).cpu_seconds for name, pid in started.items()}
    peak = meter.peak_bytes() + sum(usage(pid).peak_bytes for pid in started.values())
    cpu = own | server_meter.cpu_seconds()
    contender.end()
    delivered = servers.topics.judge({contender.topic: starts})
    load.check(
        delivered,
        exactly_once=contender.exactly_once,
        collapsed=contender.collapses and load.keys < load.entries,
        who=contender.name,
    )
    run = Run(timeline, delivered, cpu, sum(own.values()), peak, contender.details())
    told(
        f"{contender.name}: {timeline.steady_rate(load.entries):,.0f} entries/s, {timeline.seconds:.2f} s in all, "
        f"{delivered.records:,} records, CPU {run.own_cpu:.2f} s, {run.peak_bytes / 1e6:,.0f} MB"
    )
    return run


def contenders(servers: Servers, chosen: Sequence[str]) -> list[Contender]:
    """Those that were chosen, prepared."""
    connect = Connect(servers)
    servers.stack.callback(connect.close)
    makers: dict[str, Callable[[], Contender]] = {
        RELAY: lambda: Relay(servers),
        DEBEZIUM_POLL: lambda: Debezium(servers, connect, boundary="poll"),
        DEBEZIUM_INTERVAL: lambda: Debezium(servers, connect, boundary="interval"),
        TXOUTBOX: lambda: Txoutbox(servers),
        TXOUTBOX_2: lambda: Txoutbox(servers, processes=2),
    }
    return prepared(makers, chosen, servers.stack)


def run(options: Options) -> Report:
    """The part."""
    view = options.view
    report = Report(
        NAME,
        f"Drain: {options.entries:,} entries, distinct keys",
        options.command,
        {"entries": options.entries, "rounds": options.rounds, "warm-up rounds": options.warm_up},
    )
    runs: dict[str, list[Run]] = {}
    reached: dict[str, list[limits.Limit]] = {}
    with ExitStack() as stack:
        view.step("starting the servers")
        those = stack.enter_context(servers(stack.enter_context(options.work())))
        compared = contenders(those, options.peers)

        def drain(contender: Contender, number: int, load: Load) -> None:
            one = drain_once(contender, load, those, seconds=options.seconds, told=view.step)
            if number >= 0:
                runs.setdefault(contender.name, []).append(one)
            if contender.name == RELAY and COPY in options.peers:
                _keep(reached, number, COPY, limits.copy_out(contender.url, load, those.directory), view.step)

        def produce(number: int, load: Load) -> None:
            sample = limits.write_sample(load, those.postgres("postgres").url(), those.directory)
            limit = limits.producer_performance(those.kafka, those.topics, load, sample)
            _keep(reached, number, PRODUCER, limit, view.step)

        takes: list[Callable[[int, Load], None]] = [partial(drain, one) for one in compared]
        if PRODUCER in options.peers:
            takes.append(produce)
        for number in options.numbers():
            load = Load(options.entries, options.entries, base=(number + options.warm_up) * options.entries)
            for take in turned(takes, number):
                take(number, load)
        report.versions = those.versions(compared)
    _tell(report, options, runs, reached)
    return report


def _keep(
    reached: dict[str, list[limits.Limit]], number: int, name: str, limit: limits.Limit, told: Callable[[str], None]
) -> None:
    told(f"{name}: {limit.rate:,.0f} rows/s, CPU {limit.usage.cpu_seconds:.2f} s")
    if number >= 0:
        reached.setdefault(name, []).append(limit)


def tell_runs(report: Report, entries: int, runs: Mapping[str, list[Run]]) -> None:
    """The series of each contender, and what is to be known of Kafka Connect's when it is among them."""

    def add(who: str, what: str, unit: str, values: Sequence[float], digits: int = 0) -> None:
        report.series.append(Series(who, what, unit, values, digits))

    per_million = 1_000_000 / entries
    for who, rounds in runs.items():
        add(who, RATE, "", [one.timeline.steady_rate(entries) for one in rounds])
        add(who, "until all can be read", "s", [one.timeline.seconds for one in rounds], 2)
        add(who, CPU, "s", [one.own_cpu * per_million for one in rounds], 2)
        add(who, MEMORY, "MB", [one.peak_bytes / 1e6 for one in rounds])
        for server in ("PostgreSQL", "Kafka"):
            add(who, f"{server}'s CPU", "s", [one.cpu[server] * per_million for one in rounds], 2)
        add(who, "records", "", [float(one.delivered.records) for one in rounds])
    if any(who.startswith("Debezium") for who in runs):
        report.notes.append(WORKER)


def _tell(
    report: Report, options: Options, runs: Mapping[str, list[Run]], reached: Mapping[str, list[limits.Limit]]
) -> None:
    """The series and ratios."""
    per_million = 1_000_000 / options.entries
    tell_runs(report, options.entries, runs)
    for who, of_limit in reached.items():
        report.series.append(Series(who, RATE, "", [one.rate for one in of_limit]))
        cpu = [one.usage.cpu_seconds * per_million for one in of_limit]
        report.series.append(Series(who, CPU, "s", cpu, 2))
    report.panel(RATE)
    if RELAY not in runs:
        return
    rate = report.of(RELAY, RATE)
    if COPY in reached and PRODUCER in reached:
        both = zip(report.of(COPY, RATE), report.of(PRODUCER, RATE), strict=True)
        report.ratio("rate: relay / lower limit", rate, [min(pair) for pair in both], aim=0.6)
    for who in runs:
        if who == RELAY:
            continue
        debezium = who.startswith("Debezium")
        report.ratio(f"rate: relay / {who}", rate, report.of(who, RATE), aim=4 if debezium else None)
        for figure, aim in ((CPU, 0.2), (MEMORY, 0.1)):
            mine, theirs = report.of(RELAY, figure), report.of(who, figure)
            report.ratio(f"{figure}: relay / {who}", mine, theirs, aim=aim if debezium else None, at_least=False)
    peak = report.of(RELAY, MEMORY)
    report.ratio("peak memory: relay / 120 MB", peak, [120.0] * len(peak), aim=1, at_least=False)
    steps = [_steps(one.details) for one in runs[RELAY]]
    middle = {name: sorted(step[name] for step in steps)[len(steps) // 2] * per_million for name in steps[0]}
    report.notes.append(
        "The relay's own steps, seconds for a million entries (reading goes on beside the commit of the batch before "
        "it): " + ", ".join(f"{name} {value:.2f}" for name, value in middle.items()) + "."
    )
    report.notes.append("The relay's CPU time has its start in it.")
    batches = runs[RELAY][-1].details["transactions"]
    plural = "" if batches == 1 else "s"
    report.notes.append(f"The relay wrote {options.entries:,} entries in {batches:,.0f} transaction{plural}.")


def _steps(details: Mapping[str, float]) -> dict[str, float]:
    names = ("read", "prepare", "produce", "flush", "commit")
    return {name: details.get(f"{name}_seconds", 0.0) for name in names}


PART = Part(NAME, run, PEERS, by_entries=True)

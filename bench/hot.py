"""Part 2, hot keys: a backlog in which the same few keys change again and again, beside one of distinct keys."""

from __future__ import annotations

from contextlib import ExitStack

from bench.contender import Contender
from bench.drain import DEBEZIUM_INTERVAL, DEBEZIUM_POLL, RATE, RELAY, Run, contenders, drain_once, tell_runs
from bench.measure import turned
from bench.options import Options
from bench.part import Part
from bench.relay import Relay
from bench.report import Report
from bench.servers import servers
from bench.workload import Load

NAME = "hot"
PEERS = (RELAY, DEBEZIUM_POLL, DEBEZIUM_INTERVAL)
KEYS = 1000
DISTINCT = "relay, distinct keys"


def run(options: Options) -> Report:
    """The part."""
    view = options.view
    report = Report(
        NAME,
        f"Hot keys: {options.entries:,} entries over {KEYS:,} keys",
        options.command,
        {"entries": options.entries, "keys": KEYS, "rounds": options.rounds, "warm-up rounds": options.warm_up},
    )
    runs: dict[str, list[Run]] = {}
    with ExitStack() as stack:
        view.step("starting the servers")
        those = stack.enter_context(servers(stack.enter_context(options.work())))
        compared = contenders(those, options.peers)
        takes: list[tuple[str, Contender]] = [(one.name, one) for one in compared]
        takes += [(DISTINCT, one) for one in compared if isinstance(one, Relay)]
        base = 0
        for number in options.numbers():
            for name, contender in turned(takes, number):
                load = Load(options.entries, options.entries if name == DISTINCT else KEYS, base=base)
                base += options.entries
                one = drain_once(contender, load, those, seconds=options.seconds, told=view.step)
                if number >= 0:
                    runs.setdefault(name, []).append(one)
        report.versions = those.versions(compared)
    tell_runs(report, options.entries, runs)
    report.panel(RATE)
    if RELAY in runs:
        rate = report.of(RELAY, RATE)
        report.ratio("rate: hot keys / distinct keys", rate, report.of(DISTINCT, RATE), aim=1.5)
        for who in runs:
            if who not in {RELAY, DISTINCT}:
                report.ratio(f"rate: relay / {who}", rate, report.of(who, RATE))
                written, theirs = report.of(RELAY, "records"), report.of(who, "records")
                report.ratio(f"records written: relay / {who}", written, theirs, at_least=False)
    return report


PART = Part(NAME, run, PEERS, by_entries=True)

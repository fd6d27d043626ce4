"""Part 2, hot keys: a backlog in which the same few keys change again and again, beside one of distinct keys."""

from __future__ import annotations

from contextlib import ExitStack

from bench import install
from bench.debezium import Debezium
from bench.drain import DEBEZIUM_INTERVAL, DEBEZIUM_POLL, RATE, RELAY, Run, contenders, drain_once, tell_runs
from bench.options import Options
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
        peers = contenders(those, options.peers)
        base = 0
        for number in range(-options.warm_up, options.rounds):
            view.step(f"round {number + 1} of {options.rounds}" if number >= 0 else "warming up")
            for peer in peers if number % 2 else reversed(peers):
                loads = {peer.name: Load(options.entries, KEYS, base=base)}
                if isinstance(peer, Relay):
                    loads[DISTINCT] = Load(options.entries, options.entries, base=base + options.entries)
                for name, load in loads.items():
                    one = drain_once(peer, load, those, seconds=options.seconds, told=view.step)
                    if number >= 0:
                        runs.setdefault(name, []).append(one)
            base += 2 * options.entries
        report.versions = those.versions() | install.versions()
        tell_runs(report, options.entries, runs)
        if RELAY in runs:
            rate = report.of(RELAY, RATE)
            report.ratio("rate: hot keys / distinct keys", rate, report.of(DISTINCT, RATE), aim=1.5)
            for peer in peers:
                if isinstance(peer, Debezium):
                    report.ratio(f"rate: relay / {peer.name}", rate, report.of(peer.name, RATE))
                    written, theirs = report.of(RELAY, "records"), report.of(peer.name, "records")
                    report.ratio(f"records written: relay / {peer.name}", written, theirs, at_least=False)
    return report

"""Part 8, reconcile: a topic of a million keys compared with its table, beside a bare consumer that reads the topic.

Both are processes, timed from their start to their end. The consumer does nothing with what it reads; `outbox
reconcile` reads the table, too, makes digests of both, and joins them. Of a long topic it has a second process, which
reads it: CPU and memory are those of both. A sample, for a monitor, is timed as well.
"""

from __future__ import annotations

import json
import sys
from array import array
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from bench import table
from bench.backfill import Backfill
from bench.measure import Usage, run_measured, turned
from bench.options import Options
from bench.part import Part
from bench.relay import PROGRAM
from bench.report import Report, Series
from bench.servers import Servers, servers
from devstack.install import ROOT
from devstack.processes import Child, ServerError, tail

NAME = "reconcile"
RECONCILE, SAMPLE, CONSUMER = "reconcile", "sample", "consumer"
PEERS = (RECONCILE, SAMPLE, CONSUMER)
NAMES = {RECONCILE: "outbox reconcile", SAMPLE: "outbox reconcile --sample 10000", CONSUMER: "a bare consumer"}
_SAMPLED = 10_000


def run(options: Options) -> Report:
    """The part."""
    view = options.view
    report = Report(
        NAME,
        f"Reconcile: {options.entries:,} keys",
        options.command,
        {"keys": options.entries, "rounds": options.rounds, "warm-up rounds": options.warm_up},
    )
    found: dict[str, list[tuple[float, Usage]]] = {}
    with ExitStack() as stack:
        view.step("starting the servers")
        those = stack.enter_context(servers(stack.enter_context(options.work())))
        owner = Backfill(those)
        stack.callback(owner.close)
        view.step(f"publishing a table of {options.entries:,} rows")
        owner.fill(table.rows(options.entries))
        owner.backfill()

        takes: dict[str, Callable[[], tuple[float, Usage]]] = {
            RECONCILE: lambda: _reconcile(owner, those, options, options.entries),
            SAMPLE: lambda: _reconcile(owner, those, options, None),
            CONSUMER: lambda: _consume(owner, those, options),
        }
        for number in options.numbers():
            for who in turned([who for who in takes if who in options.peers], number):
                took, used = takes[who]()
                view.step(f"{NAMES[who]}: {took:.2f} s, CPU {used.cpu_seconds:.2f} s, {used.peak_bytes / 1e6:,.0f} MB")
                if number >= 0:
                    found.setdefault(who, []).append((took, used))
        owner.check_alive()
        owner.end()
        report.versions = those.versions([owner])
    for who, rounds in found.items():
        _add(report, NAMES[who], rounds)
    report.panel("seconds")
    if RECONCILE in found or SAMPLE in found:
        report.notes.append(
            "`outbox reconcile` reads a long topic in a second process: CPU is that of both, and peak memory the "
            "greatest sum of what was resident of both, looked at again and again; pages that they share count twice."
        )
    if RECONCILE in found and CONSUMER in found:
        mine, bare = (report.of(NAMES[who], "seconds") for who in (RECONCILE, CONSUMER))
        report.ratio("time: reconcile / a bare consumer", mine, bare, aim=2.5, at_least=False)
    return report


def _add(report: Report, who: str, rounds: Sequence[tuple[float, Usage]]) -> None:
    report.series.append(Series(who, "seconds", "", [took for took, _ in rounds], 2))
    report.series.append(Series(who, "CPU", "s", [used.cpu_seconds for _, used in rounds], 2))
    report.series.append(Series(who, "peak memory", "MB", [used.peak_bytes / 1e6 for _, used in rounds]))


def _reconcile(owner: Backfill, servers: Servers, options: Options, keys: int | None) -> tuple[float, Usage]:
    """The command, of all keys (so many), or of a sample (None); refused when it does not find them equal."""
    log = servers.directory / "reconcile.json"
    log.unlink(missing_ok=True)
    sampled = [] if keys is not None else ["--sample", str(_SAMPLED)]
    command = [str(PROGRAM), "reconcile", "row", "--json", *sampled]
    child = Child(command, log=log, cwd=servers.directory, env=owner.environment)
    took, used = run_measured(child, seconds=options.seconds, what=f"outbox reconcile (see {log})")
    said = json.loads(log.read_text().splitlines()[-1])
    if said["equal"] != (keys if keys is not None else said["sample"]["keys"]) or not said["equal"]:
        raise ServerError(f"outbox reconcile was to find everything equal, and said:\n{tail(log)}")
    return took, used


def _consume(owner: Backfill, servers: Servers, options: Options) -> tuple[float, Usage]:
    """A consumer of the whole topic."""
    out, log = servers.directory / "reader.bin", servers.directory / "reader.log"
    given = {
        "bootstrap": servers.kafka.bootstrap,
        "topic": owner.topic,
        "ends": servers.topics.ends(owner.topic),
        "out": str(out),
    }
    child = Child([sys.executable, "-m", "bench.traffic", "reader", json.dumps(given)], log=log, cwd=ROOT)
    took, used = run_measured(child, seconds=options.seconds, what=f"a bare consumer (see {log})")
    read = array("q")
    read.frombytes(out.read_bytes())
    if read[0] != options.entries:
        raise ServerError(f"The consumer read {read[0]} records of {options.entries}.")
    return took, used


PART = Part(NAME, run, PEERS, by_entries=True)

"""`python -m bench [PART] [options]`: run one part or all, show and keep the figures."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

import psycopg
from confluent_kafka import KafkaException

from bench import backfill, document, drain, growth, hot, idle, latency, owner, read_model, reconcile
from bench.options import Options
from bench.part import ENTRIES, Part
from bench.view import View
from devstack.processes import ServerError
from outbox.errors import OutboxError

PARTS: Mapping[str, Part] = {
    one.name: one
    for one in (
        *(drain.PART, hot.PART, latency.PART, owner.PART, growth.PART, idle.PART),
        *(backfill.PART, reconcile.PART, read_model.PART),
    )
}
REPORT = "report"
_FAILURES = (ServerError, OutboxError, KafkaException, psycopg.Error, OSError, subprocess.TimeoutExpired)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, show; the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure one part or all; show what was found, and keep it.",
        epilog='From a checkout: make bench ARGS="drain --rounds 3". A run of fewer than 3 rounds, without a warm-up, '
        "smaller than the defaults, or without some peers is a trial: shown and kept, but not on the page.",
    )
    parser.add_argument(
        "part",
        nargs="?",
        choices=[*PARTS, REPORT],
        help=f"what to measure (default: every part, then the report); {REPORT}: write docs/performance.md from what "
        "was measured last",
    )
    parser.add_argument(
        "--entries",
        type=_positive,
        default=ENTRIES,
        help=f"how many entries, rows, keys or records a round is of (default {ENTRIES:,})",
    )
    parser.add_argument("--rounds", type=_positive, default=5, help="rounds whose figures count (default 5)")
    parser.add_argument("--warm-up", type=_whole, default=1, help="rounds before them (default 1)")
    parser.add_argument(
        "--seconds", type=_seconds, default=600, help="the most that one contender may take in one round (default 600)"
    )
    parser.add_argument(
        "--stage-seconds",
        type=_seconds,
        help="how long a steady load, or idleness, is watched (default: the part's own; latency, for instance, "
        f"{latency.STAGE_SECONDS:g})",
    )
    parser.add_argument(
        "--peers",
        metavar="NAME,NAME",
        help="whom to measure, of the part that is named (default: all; a name that is none is answered with those "
        "that there are)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--keep", action="store_true", help="keep the servers' directories and logs")
    chosen = parser.parse_args(given)
    parts = [one for one in PARTS.values() if chosen.part in {None, one.name}]
    if chosen.peers is not None:
        if len(parts) != 1:
            parser.error("--peers belongs to one part: name it")
        if unknown := [name for name in chosen.peers.split(",") if name not in parts[0].peers]:
            names = ", ".join(parts[0].peers)
            parser.error(f"{parts[0].name} does not measure {', '.join(unknown)}; it measures {names}")
    signal.signal(signal.SIGTERM, _stop)
    view = View()
    try:
        failed = [part.name for part in parts if not _measured(part, chosen, given, view)]
        if chosen.part in {None, REPORT} and not _reported():
            failed.append(REPORT)
    except KeyboardInterrupt:
        print("Stopped; nothing is left behind.", file=sys.stderr)
        return 130
    if failed and chosen.part is None:
        print(f"Failed: {', '.join(failed)}.", file=sys.stderr)
    return 1 if failed else 0


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError("it must be a whole number from 0")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError("it must be a whole number from 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError("it must be a number of seconds, more than 0")
    return number


def _measured(part: Part, chosen: argparse.Namespace, given: Sequence[str], view: View) -> bool:
    """Run a part, show and keep what it found; whether it did not fail."""
    options = Options(
        command=f'make bench ARGS="{shlex.join(given)}"' if given else "make bench",
        entries=chosen.entries,
        rounds=chosen.rounds,
        warm_up=chosen.warm_up,
        seconds=chosen.seconds,
        stage_seconds=chosen.stage_seconds or part.stage_seconds or 0,
        peers=chosen.peers.split(",") if chosen.peers else part.peers,
        keep=chosen.keep,
        view=view,
    )
    view.step(f"part: {part.name}")
    try:
        report = part.run(options)
        report.lacks = part.lacks(options)
        file = report.save()
    except _FAILURES as error:
        print(f"{part.name} failed: {error}", file=sys.stderr)
        return False
    if not chosen.json:
        view.result(report.markdown())
    if report.lacks:
        view.step(f"a trial, which does not come into the page: {'; '.join(report.lacks)}")
    view.step(f"kept in {file}")
    if chosen.json:
        print(json.dumps(report.as_json(), indent=1))
    return True


def _reported() -> bool:
    """Write the page from what is kept; whether that did not fail."""
    try:
        written, left_out = document.write(list(PARTS))
    except _FAILURES as error:
        print(f"The report failed: {error}", file=sys.stderr)
        return False
    print(f"{document.PAGE}: {', '.join(written) or 'no part has been measured in full'}", file=sys.stderr)
    for trial in left_out:
        print(f"Left out: {trial}", file=sys.stderr)
    return True


def _stop(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

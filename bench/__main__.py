"""`python -m bench PART [options]`: run one part, show and keep its figures."""

from __future__ import annotations

import argparse
import importlib
import json
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

import psycopg
from confluent_kafka import KafkaException

from bench import document
from bench.options import Options
from bench.report import Report
from bench.view import View
from devstack.processes import ServerError

PARTS: Mapping[str, str] = {
    "drain": "bench.drain",
    "hot": "bench.hot",
    "latency": "bench.latency",
    "owner": "bench.owner",
    "growth": "bench.growth",
    "idle": "bench.idle",
}
"""Each part's module: `run(options) -> Report`, `PEERS` (whom it can measure) and, if it has one, `STAGE_SECONDS`."""
REPORT = "report"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, run, show; the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "part",
        choices=[*PARTS, REPORT],
        help=f"what to measure; {REPORT}: write docs/performance.md from what was measured last",
    )
    parser.add_argument("--entries", type=_positive, default=1_000_000, help="rows in one round (default 1,000,000)")
    parser.add_argument("--rounds", type=_positive, default=5, help="rounds whose figures count (default 5)")
    parser.add_argument("--warm-up", type=_whole, default=1, help="rounds before them (default 1)")
    parser.add_argument(
        "--seconds", type=_seconds, default=600, help="the most that one contender may take in one round"
    )
    parser.add_argument("--stage-seconds", type=_seconds, help="how long a steady load, or idleness, is watched")
    parser.add_argument(
        "--peers", help="whom to measure, with commas; default: all; a wrong one is answered with those"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--keep", action="store_true", help="keep the servers' directories and logs")
    chosen = parser.parse_args(given)
    if chosen.peers is not None and chosen.part in PARTS:
        known = importlib.import_module(PARTS[chosen.part]).PEERS
        if unknown := [name for name in chosen.peers.split(",") if name not in known]:
            parser.error(f"{chosen.part} does not measure {', '.join(unknown)}; it measures {', '.join(known)}")
    signal.signal(signal.SIGTERM, _stop)
    try:
        return _report() if chosen.part == REPORT else _measure(chosen, given)
    except (ServerError, KafkaException, psycopg.Error) as error:
        print(f"The benchmark failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped; nothing is left behind.", file=sys.stderr)
        return 130


def _whole(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("at least 0")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError("more than 0")
    return number


def _report() -> int:
    written = document.write(list(PARTS))
    print(f"{document.PAGE}: {', '.join(written) or 'no part has been measured'}", file=sys.stderr)
    return 0


def _measure(chosen: argparse.Namespace, given: Sequence[str]) -> int:
    module = importlib.import_module(PARTS[chosen.part])
    if chosen.stage_seconds is None:
        chosen.stage_seconds = getattr(module, "STAGE_SECONDS", 20.0)
    options = Options(
        command=shlex.join(["python", "-m", "bench", *given]),
        entries=chosen.entries,
        rounds=chosen.rounds,
        warm_up=chosen.warm_up,
        seconds=chosen.seconds,
        stage_seconds=chosen.stage_seconds,
        peers=chosen.peers.split(",") if chosen.peers else module.PEERS,
        keep=chosen.keep,
        view=View(),
    )
    report: Report = module.run(options)
    file = report.save()
    options.view.result(report.markdown())
    options.view.step(f"kept in {file}")
    if chosen.json:
        print(json.dumps(report.as_json(), indent=1))
    return 0


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError("it must be a whole number from 1")
    return int(text)


def _stop(_number: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())

"""`python -m faults`: run the cases, with progress; print the table, and write it with `--write FILE`.

Exit 0 when nothing was lost, doubled, stale or a ghost; 1 when something was, or a case failed; 130 after Ctrl-C.
Records that are doubled because a broker, by its own log, broke a transaction are counted and said, and no failure.
A case that this machine cannot do is left out and said. One that stops at an assertion of its own is run again, once,
and that is said, too; what was judged wrong counts all the same. The table is written by a whole run only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from faults.cases import CASES
from faults.scene import Outcome
from faults.volume import LeftOutError

COLUMNS = (
    *("fault", "times", "entries", "records", "lost", "doubled", "out of order", "ghosts"),
    "seconds until on (median / most)",
)


BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1")
    return number


def main() -> int:
    """Run; the exit code."""
    # As Ctrl-C: servers are stopped and their directories removed.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        return _run()
    except KeyboardInterrupt:
        sys.stderr.write("Stopped; nothing is left behind.\n")
        return 130


def _run() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"which of: {', '.join(CASES)} (all)")
    parser.add_argument("--times", type=_positive, help="how often each, instead of its own number")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table into FILE, between its marks")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    chosen = parser.parse_args()
    if chosen.write and chosen.cases:
        parser.error("the table is that of a whole run: --write takes no cases")
    if chosen.write and BEGIN not in (chosen.write.read_text() if chosen.write.is_file() else ""):
        parser.error(f"{chosen.write} has no line {BEGIN}, after which the table is to be written")
    unknown = set(chosen.cases) - set(CASES)
    if unknown:
        parser.error(f"there is no case {', '.join(sorted(unknown))}; there are: {', '.join(CASES)}")
    console = Console(stderr=True, highlight=False)
    began = time.monotonic()
    outcomes: list[Outcome] = []
    # Cases that stopped at an assertion of their own, with the assertion; and those that did so twice.
    failed: dict[str, str] = {}
    given_up: list[str] = []
    left_out: list[str] = []
    names = chosen.cases or list(CASES)
    with (
        tempfile.TemporaryDirectory(prefix="outbox-faults-") as made,
        Progress(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        ) as progress,
    ):
        directory = Path(made)
        directory.chmod(0o711)
        all_of_it = progress.add_task("cases", total=len(names))
        queue = list(names)
        for name in queue:
            progress.update(all_of_it, description=name)
            place = directory / f"{name}-{queue.count(name)}"
            place.mkdir(mode=0o711)
            try:
                found, stopped = _run_case(name, place, chosen.times, progress)
            except LeftOutError as reason:
                left_out.append(name)
                progress.console.print(f"left out: {name}: {reason}")
            else:
                # Of a case that stopped only what was judged wrong counts; it is run once more, at the end.
                outcomes += [outcome for outcome in found if not (stopped and outcome.judgement.right)]
                if stopped and name in failed:
                    given_up.append(name)
                elif stopped:
                    failed[name] = stopped
                    queue.append(name)
                    progress.update(all_of_it, total=len(queue))
            progress.advance(all_of_it)
    together = in_one_scene(outcomes)
    outcomes = merged(outcomes)
    _print(outcomes, as_json=chosen.json)
    for faults in together:
        console.print(f"In one scene, judged as a whole: {'; '.join(faults)}.")
    total = sum(outcome.times for outcome in outcomes if not outcome.unit)
    console.print(f"{total} fault{'s' * (total != 1)} in {time.monotonic() - began:.0f} s")
    again = [f"{name} stopped the first time ({why}), and was run again" for name, why in failed.items()]
    for what in again:
        console.print(what)
    if chosen.write and not given_up and not left_out:
        _write(chosen.write, outcomes, together, again, total, time.monotonic() - began)
    return 1 if failed or any(not outcome.judgement.right for outcome in outcomes) else 0


def _run_case(name: str, place: Path, times: int | None, progress: Progress) -> tuple[list[Outcome], str]:
    """Run one case: what it found, and why it stopped before its end (empty: it did not)."""
    run, usual = CASES[name]
    found: list[Outcome] = []
    try:
        for outcome in run(place, times or usual, partial(_say, progress, name)):
            found.append(outcome)
            verdict = "right" if outcome.judgement.right else "WRONG"
            often = f"{outcome.times} time{'s' * (outcome.times != 1)}"
            notes = f" ({outcome.remarks})" if outcome.remarks else ""
            progress.console.print(f"{verdict}: {outcome.fault}, {often}{notes}")
            for example in outcome.judgement.examples:
                progress.console.print(f"    {example}")
    except LeftOutError:
        raise
    except Exception as error:
        progress.console.print(f"[red]FAILED: {name}[/red]")
        progress.console.print(traceback.format_exc(), markup=False)
        _show_logs(progress.console, place)
        return found, str(error).strip().partition("\n")[0] or type(error).__name__
    return found, ""


def merged(outcomes: list[Outcome]) -> list[Outcome]:
    """One row a fault: a case may yield several, each of a scene of its own."""
    rows: dict[str, Outcome] = {}
    for one in outcomes:
        row = rows.get(one.fault)
        if row is None:
            rows[one.fault] = replace(one, judgement=replace(one.judgement), seconds=list(one.seconds))
            continue
        row.times += one.times
        row.seconds += one.seconds
        for count in ("entries", "records", "lost", "doubled", "stale", "ghosts", "torn", "excused"):
            setattr(row.judgement, count, getattr(row.judgement, count) + getattr(one.judgement, count))
    return list(rows.values())


def in_one_scene(outcomes: list[Outcome]) -> list[list[str]]:
    """The faults that were injected in one scene: their entries and records are the same, and count once."""
    scenes: dict[int, list[str]] = {}
    for outcome in outcomes:
        scenes.setdefault(id(outcome.judgement), []).append(outcome.fault)
    return [faults for faults in scenes.values() if len(faults) > 1]


def _show_logs(console: Console, directory: Path) -> None:
    """The ends of the logs that were written last: the directory is removed at the end."""
    logs = sorted(directory.rglob("relay-*.log"), key=lambda log: log.stat().st_mtime)
    for log in logs[-2:]:
        console.print(f"the end of {log.relative_to(directory)}:")
        for line in log.read_text(errors="replace").splitlines()[-20:]:
            console.print(f"    {line}", markup=False, soft_wrap=True)


def _say(progress: Progress, name: str, text: str) -> None:
    if progress.console.is_terminal:
        progress.update(progress.task_ids[0], description=text)
    else:
        progress.console.print(text)


def _print(outcomes: list[Outcome], *, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps([dict(zip(COLUMNS, o.row, strict=True)) for o in outcomes]) + "\n")
        return
    table = Table(*COLUMNS)
    for outcome in outcomes:
        table.add_row(*outcome.row)
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _write(
    file: Path, outcomes: list[Outcome], together: list[list[str]], again: list[str], total: int, seconds: float
) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{os.cpu_count()} cores ({platform.machine()}), {memory:.0f} GiB, {platform.system()}"
    command = f'make faults ARGS="{shlex.join(sys.argv[1:])}"'
    about = (
        f"{total} faults in one run of `{command}`, {seconds / 60:.0f} minutes, on {machine}, "
        f"Python {platform.python_version()}. Seconds: from the fault's end to the publication of what was committed "
        "by then, the median and the greatest."
    )
    lines = [
        about,
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|---" + "|--:" * (len(COLUMNS) - 1) + "|",
        *("| " + " | ".join(outcome.row) + " |" for outcome in outcomes),
        "",
        *(f"- {outcome.fault}: {outcome.remarks}" for outcome in outcomes if outcome.remarks),
        *(f"- In one scene, judged as a whole: {'; '.join(faults)}" for faults in together),
        *(f"- {what}" for what in again),
    ]
    before, _, rest = file.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    file.write_text(before + BEGIN + "\n" + "\n".join(lines).rstrip() + "\n" + END + after)


if __name__ == "__main__":
    sys.exit(main())

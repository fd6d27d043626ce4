"""docs/performance.md: what the parts have found is written between marks; the text around them is people's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from bench import install
from bench.report import DIRECTORY, TRIALS, Report
from devstack.install import ROOT, InstallError, run
from devstack.processes import ServerError

PAGE = ROOT / "docs" / "performance.md"

_HEAD = """# Performance

What `make bench` measured: the relay beside what one would take instead, and beside the limits. Each part is one run
on one machine, in interleaved rounds; each section says the commit that was measured, and the machine. The figures of
another machine differ; the ratios, taken round by round, are what counts. A cell shows the median of the rounds, and
the least and the most of them.

`make bench` runs every part and writes this page, `make bench ARGS="drain"` runs one part (`ARGS=--help` lists them),
`make bench ARGS=report` writes this page from the full runs that were measured last. Everything runs on one machine
over its loopback interface: load, PostgreSQL, Kafka and the contender share its cores, so the limits, which leave one
of the servers idle, are out of reach by as much as that server takes.
"""


# What is to be known of a part's figures, whatever they are.
_SAID: Mapping[str, Sequence[str]] = {
    "drain": (
        "COPY reads pages that the relay has read just before: hint bits are set, and all is in memory.",
        "txoutbox delivers at least once, without transactions.",
        "Connect's peak is that of a worker with the heap that Kafka's script gives it, up to 2 GB.",
    ),
    "latency": (
        "Timed from the return of the service's commit; the bare Kafka transaction from its beginning.",
        "txoutbox, rung by NOTIFY, delivers at least once, without transactions.",
        "The relay's own times are of its transactions' oldest entries: at a rate those wait for the one before.",
    ),
    "idle": ("Debezium is measured in rounds of its own, after the others: its worker talks to Kafka all the time.",),
}


def write(parts: Sequence[str], page: Path = PAGE, kept: Path = DIRECTORY) -> tuple[list[str], list[str]]:
    """Write the sections of those parts that have figures of a full run, and their pictures.

    The names of those parts, and what was left out: trials that are newer, and figures of another version. A section
    that is not there yet comes to the end. Raises `ServerError` when nothing can be drawn.
    """
    text = page.read_text("utf-8") if page.exists() else _HEAD
    written: list[str] = []
    left_out: list[str] = []
    for part in parts:
        try:
            report = _kept(kept / f"{part}.json")
            trial = _kept(kept / TRIALS / f"{part}.json")
        except ServerError as error:
            left_out.append(str(error))
            continue
        if trial is not None and (report is None or report.at < trial.at):
            left_out.append(f"{part} of {trial.at}, a trial: {'; '.join(trial.lacks)}")
        if report is None:
            continue
        picture = page.with_name(f"performance-{part}.svg")
        if report.panels:
            _draw(kept / f"{part}.json", picture)
        text = _put(text, part, _section(report, picture.name))
        written.append(part)
    if written:
        page.write_text(text, "utf-8")
    return written, left_out


def _kept(file: Path) -> Report | None:
    try:
        return Report.load(file) if file.exists() else None
    except (KeyError, TypeError, ValueError) as error:
        raise ServerError(f"{file} is not what this version keeps: measure the part again.") from error


def _section(report: Report, picture: str) -> str:
    lines = [f"## {report.title}", ""]
    if report.panels:
        figures = ", ".join(dict.fromkeys(figure for panel in report.panels for figure in panel.figures))
        lines += [f"![{report.title}: {figures}]({picture})", ""]
    origin = f"`{report.command}` at {report.commit}, {report.at}: {_listed(report.options)}"
    noted = replace(report, notes=[*report.notes, *_SAID.get(report.part, ())])
    lines += [noted.markdown(), "", f"{origin}. {_listed(report.machine)}. {_listed(report.versions)}."]
    return "\n".join(lines)


def _listed(of: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in of.items())


def _put(text: str, part: str, section: str) -> str:
    begin, end = f"<!-- bench:{part} -->", f"<!-- /bench:{part} -->"
    block = f"{begin}\n{section}\n{end}"
    found = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if found.search(text):
        return found.sub(lambda _: block, text)
    return f"{text.rstrip()}\n\n{block}\n"


def _draw(report: Path, picture: Path) -> None:
    install.python_packages()
    script = install.HERE / "plot.py"
    try:
        run(f"Drawing {picture.name}", [str(install.PYTHON), "-P", str(script), str(report), str(picture)], seconds=120)
    except InstallError as error:
        raise ServerError(str(error)) from error

"""docs/performance.md: what the parts have found is written between marks; the text around them is people's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench import install
from bench.report import DIRECTORY, Report
from devstack.install import ROOT, InstallError, run
from devstack.processes import ServerError

PAGE = ROOT / "docs" / "performance.md"

_HEAD = """# Performance

What `make bench` measured: the relay beside what one would take instead, and beside the limits, in one run on one
machine. The figures of another machine differ; the ratios, taken round by round, are what counts. A cell shows the
median of the rounds, and the least and the most of them.

`make bench ARGS="drain"` runs one part (`ARGS=--help` lists them), `make bench ARGS=report` writes this page from what
was measured last. Everything runs on one machine over its loopback interface: load, PostgreSQL, Kafka and the contender
share its cores, so the limits, which leave one of the servers idle, are out of reach by as much as that server takes.
"""


def write(parts: Sequence[str], page: Path = PAGE, kept: Path = DIRECTORY) -> list[str]:
    """Write the sections of those parts that have figures, and their pictures; the names of those parts.

    A section that is not there yet comes to the end. Raises `ServerError` when nothing can be drawn.
    """
    text = page.read_text("utf-8") if page.exists() else _HEAD
    written: list[str] = []
    for part in parts:
        file = kept / f"{part}.json"
        if not file.exists():
            continue
        report = Report.load(file)
        if not (report.series or report.ratios):
            raise ServerError(f"{file} has no figures: measure the part again.")
        picture = page.with_name(f"performance-{part}.svg")
        if report.chart is not None:
            _draw(file, picture)
        text = _put(text, part, _section(report, picture.name if report.chart else None))
        written.append(part)
    page.write_text(text, "utf-8")
    return written


def _section(report: Report, picture: str | None) -> str:
    lines = [f"## {report.title}", ""]
    if picture is not None:
        lines += [f"![{report.chart} of each contender]({picture})", ""]
    origin = f"`{report.command}` at {report.commit}, {report.at}: {_listed(report.options)}"
    lines += [report.markdown(), "", f"{origin}. {_listed(report.machine)}. {_listed(report.versions)}."]
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

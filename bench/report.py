"""What a part found: kept as JSON under `.bench/`, and written into docs/performance.md."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.measure import Spread
from devstack.install import ROOT
from devstack.processes import ServerError

DIRECTORY = ROOT / ".bench"
TRIALS = "trial"
"""Below it: what is no full run, and does not come into the page."""


def _machine() -> dict[str, str]:
    """The hardware and the system."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 1024**2
    return {
        "processor": f"{os.cpu_count()} x {model}",
        "memory": f"{memory:.0f} GiB",
        "system": f"Linux {platform.release()}",
        "Python": platform.python_version(),
    }


def _commit() -> str:
    """The commit that was measured; with a plus when the work tree differs from it."""
    git = ("git", "-C", str(ROOT))
    shown = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False)
    return shown.stdout.strip() + ("+" if changed.stdout.strip() else "")


@dataclass(frozen=True, slots=True)
class Series:
    """One figure of one contender, a value a round. `unit` is written behind it; `digits` after the point."""

    contender: str
    figure: str
    unit: str
    values: Sequence[float]
    digits: int = 0

    @property
    def spread(self) -> Spread:
        """Least, median, most."""
        return Spread.of(self.values)


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio taken round by round, and what was aimed at. `at_least`: more is better; else less is."""

    name: str
    values: Sequence[float]
    aim: float | None = None
    at_least: bool = True

    @property
    def spread(self) -> Spread:
        """Least, median, most."""
        return Spread.of(self.values)

    @property
    def met(self) -> bool | None:
        """Whether the median meets the aim; None without one."""
        if self.aim is None:
            return None
        return self.spread.median >= self.aim if self.at_least else self.spread.median <= self.aim

    @property
    def missed_by(self) -> float:
        """By what share of the aim the median misses it; 0 when it does not."""
        if self.met is not False or not self.aim:
            return 0
        return abs(self.spread.median / self.aim - 1)


@dataclass(frozen=True, slots=True)
class Panel:
    """A panel of the part's picture: some figures of some contenders, as bars.

    `bars`: the contenders, and what is written at their bars; `ours`: those of them that stand for this project. The
    bars begin at `base`: 1 for ratios.
    """

    title: str
    figures: Sequence[str]
    bars: Mapping[str, str]
    ours: Sequence[str]
    base: float = 0


@dataclass
class Report:
    """One part's figures. `panels` are drawn; `notes` are sentences for the reader; `lacks`: see `bench.part`."""

    part: str
    title: str
    command: str
    options: Mapping[str, Any]
    versions: Mapping[str, str] = field(default_factory=dict)
    series: list[Series] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)
    lacks: list[str] = field(default_factory=list)
    machine: Mapping[str, str] = field(default_factory=_machine)
    at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    commit: str = field(default_factory=_commit)

    def of(self, contender: str, figure: str) -> Sequence[float]:
        """The values of one series; `KeyError` when there is none."""
        for one in self.series:
            if (one.contender, one.figure) == (contender, figure):
                return one.values
        raise KeyError(f"{contender}: {figure}")

    def ratio(
        self,
        name: str,
        above: Sequence[float],
        below: Sequence[float],
        *,
        aim: float | None = None,
        at_least: bool = True,
    ) -> None:
        """Add a ratio, taken round by round."""
        self.ratios.append(Ratio(name, [a / b for a, b in zip(above, below, strict=True)], aim, at_least))

    def panel(self, figure: str) -> None:
        """Draw a figure of all contenders that have it."""
        bars = {one.contender: one.contender for one in self.series if one.figure == figure}
        self.panels.append(Panel("", [figure], bars, [who for who in bars if who.startswith("relay")]))

    # -- kept ----------------------------------------------------------------------------------------------------

    def save(self, directory: Path = DIRECTORY) -> Path:
        """Keep it, a trial apart; the file. `ServerError` when it has no figures."""
        if not self.series:
            raise ServerError(f"The part {self.part} found no figures: nothing is kept.")
        directory = directory / TRIALS if self.lacks else directory
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / f"{self.part}.json"
        file.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")
        return file

    @classmethod
    def load(cls, file: Path) -> Report:
        """What `save` kept; `KeyError`, `TypeError` or `ValueError` when it is of another version."""
        kept = json.loads(file.read_text("utf-8"))
        kept["series"] = [Series(**one) for one in kept["series"]]
        kept["ratios"] = [Ratio(**one) for one in kept["ratios"]]
        kept["panels"] = [Panel(**one) for one in kept["panels"]]
        return cls(**kept)

    # -- shown ---------------------------------------------------------------------------------------------------

    def as_json(self) -> dict[str, Any]:
        """All of it, with the spreads and whether each aim was met."""
        whole = asdict(self)
        whole["series"] = [asdict(one) | {"spread": asdict(one.spread)} for one in self.series]
        whole["ratios"] = [asdict(one) | {"spread": asdict(one.spread), "met": one.met} for one in self.ratios]
        return whole

    def markdown(self) -> str:
        """Tables: contenders by figures, then the ratios."""
        figures = list(dict.fromkeys(one.figure for one in self.series))
        contenders = list(dict.fromkeys(one.contender for one in self.series))
        cells = {(one.contender, one.figure): _cell(one) for one in self.series}
        lines = [
            "| | " + " | ".join(figures) + " |",
            "|---" * (len(figures) + 1) + "|",
            *(f"| {who} | " + " | ".join(cells.get((who, what), "") for what in figures) + " |" for who in contenders),
        ]
        if self.ratios:
            lines += ["", "| ratio | median (least to most) | aim | |", "|---|---|---|---|"]
            lines += [_ratio_row(one) for one in self.ratios]
        if self.notes:
            lines += ["", *(f"- {note}" for note in self.notes)]
        return "\n".join(lines)


def _number(value: float, digits: int) -> str:
    return f"{value:,.{digits}f}"


def _cell(one: Series) -> str:
    spread = one.spread
    unit = f" {one.unit}" if one.unit else ""
    middle = _number(spread.median, one.digits)
    if len(one.values) == 1:
        return middle + unit
    return f"{middle}{unit} ({_number(spread.least, one.digits)} to {_number(spread.most, one.digits)})"


def _share(part: float) -> str:
    if part < 0.001:
        return "less than 0.1%"
    return f"{part:.0%}" if part >= 0.095 else f"{part:.1%}"


def _ratio_row(one: Ratio) -> str:
    spread = one.spread
    aim = "" if one.aim is None else f"at {'least' if one.at_least else 'most'} {one.aim:g}"
    met = {None: "", True: "met", False: f"**missed by {_share(one.missed_by)}**"}[one.met]
    # A digit more than the aim has, so that nothing seems to be met that is not.
    digits = 2 if one.aim is None else max(2, len(f"{one.aim:g}".partition(".")[2]) + 1)
    middle, least, most = (f"{value:.{digits}f}" for value in (spread.median, spread.least, spread.most))
    return f"| {one.name} | {middle} ({least} to {most}) | {aim} | {met} |"

"""What a person sees: a live table on a terminal, plain lines elsewhere; the same numbers in both."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pgbench_demo.compare import Comparison
from pgbench_demo.service import TABLES
from pgbench_demo.watch import Latency, Look

PLAIN_SECONDS = 3.0
"""How often a line is printed where there is no terminal."""
LIVE_SECONDS = 0.5


@dataclass(frozen=True)
class Run:
    """What pgbench did: its committed transactions, and how many a second."""

    transactions: int
    rate: float
    seconds: float
    latency: Latency | None


class View:
    """Prints to standard output; on a terminal in colours and in place."""

    def __init__(self) -> None:
        self._console = Console(highlight=False, soft_wrap=True)
        self._began = time.monotonic()
        self._live: Live | None = None
        self._printed = 0.0

    @property
    def interval(self) -> float:
        """Seconds between two looks."""
        return LIVE_SECONDS if self._console.is_terminal else 1.0

    def step(self, text: str) -> None:
        """Say what happens now."""
        self._console.print(f"[dim]{time.monotonic() - self._began:6.1f} s[/dim]  {text}")

    @contextmanager
    def live(self) -> Iterator[None]:
        """While it lasts, `show` draws in place (on a terminal)."""
        if not self._console.is_terminal:
            yield
            return
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def show(self, what: str, look: Look, *, last: bool = False) -> None:
        """Show a look: the table in place, or, now and then (and at the `last`), a line."""
        if self._live is not None:
            self._live.update(_table(what, look), refresh=True)
            return
        now = time.monotonic()
        if not last and now - self._printed < PLAIN_SECONDS:
            return
        self._printed = now
        self.step(
            f"{what}: entries {look.entries:,}, records {look.records:,}, "
            f"collapse {_collapse(look.entries, look.records)}, unpublished {look.unpublished:,}, "
            f"commit to visible {_latency(look.latency)}"
        )

    def result(self, run: Run, comparisons: Sequence[Comparison]) -> None:
        """Say whether the topics equal the tables, with the numbers."""
        if self._console.is_terminal:
            self._console.print()
            self._console.print(_summary(comparisons))
        else:
            for one in comparisons:
                self._console.print(
                    f"{one.topic}: {one.rows:,} rows in {one.table}, {one.live_keys:,} live keys, "
                    f"{one.entries:,} entries, {one.records:,} records, "
                    f"collapse {_collapse(one.entries, one.records)}: " + ("equal" if one.equal else "DIFFERENT")
                )
        for one in comparisons:
            for text in one.listed:
                self._console.print(f"  {text}", style="red", markup=False)
            if one.differences > len(one.listed):
                self._console.print(f"  ... and {one.differences - len(one.listed):,} more", style="red")
        self._console.print(
            f"pgbench: {run.transactions:,} transactions, {run.rate:,.0f} a second, each changing three entities"
        )
        measured = f", {run.latency.samples:,} records measured" if run.latency is not None else ""
        self._console.print(f"commit to visible: {_latency(run.latency)}{measured}")
        if all(one.equal for one in comparisons):
            self._console.print(
                f"equal: {sum(one.live_keys for one in comparisons):,} keys, read from the start of the topics, "
                "are what the tables hold",
                style="bold green",
            )
        else:
            self._console.print(
                f"NOT EQUAL: {sum(one.differences for one in comparisons):,} differences", style="bold red"
            )


def _table(what: str, look: Look) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, title=what, title_justify="left", title_style="bold", pad_edge=False)
    table.add_column("entity type", min_width=12)
    for name in ("entries", "records", "collapse", "entries/s"):
        table.add_column(name, justify="right", min_width=10)
    for published in TABLES:
        total = look.totals.get(published.type)
        entries, records = (total.entries, total.records) if total is not None else (0, 0)
        table.add_row(
            published.type,
            f"{entries:,}",
            f"{records:,}",
            _collapse(entries, records),
            f"{look.rates.get(published.type, 0):,.0f}",
        )
    table.add_section()
    table.add_row(
        "all",
        f"{look.entries:,}",
        f"{look.records:,}",
        _collapse(look.entries, look.records),
        f"{sum(look.rates.values()):,.0f}",
        style="bold",
    )
    below = Text.assemble(
        ("commit to visible  ", "dim"), _latency(look.latency), ("    unpublished  ", "dim"), f"{look.unpublished:,}"
    )
    return Group(table, below)


def _summary(comparisons: Sequence[Comparison]) -> RenderableType:
    table = Table(box=box.ROUNDED, title="Topics, read from the start, against the tables", title_style="bold")
    table.add_column("topic")
    table.add_column("table")
    for name in ("rows", "live keys", "entries", "records", "collapse"):
        table.add_column(name, justify="right")
    table.add_column("")
    for one in comparisons:
        table.add_row(
            one.topic,
            one.table,
            f"{one.rows:,}",
            f"{one.live_keys:,}",
            f"{one.entries:,}",
            f"{one.records:,}",
            _collapse(one.entries, one.records),
            Text("equal", style="green") if one.equal else Text(f"{one.differences:,} differ", style="red"),
        )
    return table


def _collapse(entries: int, records: int) -> str:
    return f"{entries / records:.1f}x" if records else "-"


def _latency(latency: Latency | None) -> str:
    return "-" if latency is None else f"p50 {latency.p50:.0f} ms, p99 {latency.p99:.0f} ms"

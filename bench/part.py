"""What a part of the benchmarks is, and when a run of it is a full one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.options import Options
from bench.report import Report

ENTRIES = 1_000_000
"""Entries of a round of a full run."""
ROUNDS = 3
"""The fewest rounds of a full run: of two there is no median."""


@dataclass(frozen=True, slots=True)
class Part:
    """One part.

    `peers`: whom and what it can be asked to measure: contenders, limits, circumstances. `by_entries`: a round is as
    large as its number of entries; `stage_seconds`: how long a steady load, or idleness, is watched (None: there is
    none).
    """

    name: str
    run: Callable[[Options], Report]
    peers: Sequence[str]
    by_entries: bool = False
    stage_seconds: float | None = None

    def lacks(self, options: Options) -> list[str]:
        """What a run lacks of a full one, in words; only a full one, which lacks nothing, comes into the page."""
        lacking: list[str] = []
        if self.by_entries and options.entries < ENTRIES:
            lacking.append(f"{options.entries:,} entries instead of {ENTRIES:,}")
        if self.stage_seconds is not None and options.stage_seconds < self.stage_seconds:
            lacking.append(f"stages of {options.stage_seconds:g} s instead of {self.stage_seconds:g}")
        if options.rounds < ROUNDS:
            lacking.append(f"rounds: {options.rounds} instead of {ROUNDS} at least")
        if options.warm_up < 1:
            lacking.append("no warm-up")
        if left_out := [name for name in self.peers if name not in options.peers]:
            lacking.append(f"without {', '.join(left_out)}")
        return lacking

"""The pace of a backfill: how many rows a batch takes, and when it takes any. Pure."""

from __future__ import annotations

LEAST_ROWS = 100
_FIRST_ROWS = 500
# A page is at most so many times the one before: of a small page the batch's own cost is the greater part.
_GROWTH = 4
QUIET_AFTER = 2.0
"""Seconds without a live change, after which nobody is likely to wait for a page."""


class Pace:
    """Keeps what a batch spends on rows of a source near a budget, and the rows under `rate` a second.

    Live changes wait behind the rows that are published with them, so the budget bounds what a backfill adds to their
    latency: it is `busy` seconds while changes come, and `quiet` while none have come for `QUIET_AFTER` seconds. `most`
    is the greatest page, `now` seconds of a clock that never goes back.
    """

    def __init__(self, *, busy: float, quiet: float, most: int) -> None:
        self._busy = busy
        self._quiet = quiet
        self._most = most
        self._rows = min(_FIRST_ROWS, most)
        # Seconds of a row, as it was lately; None: not known yet.
        self._cost: float | None = None
        self._changed: float | None = None
        # By request: when its next rows are due.
        self._due: dict[int, float] = {}

    def changed(self, now: float) -> None:
        """Tell that a batch had live changes."""
        self._changed = now

    def quiet(self, now: float) -> bool:
        """Whether no live changes have come lately."""
        return self._changed is None or now - self._changed >= QUIET_AFTER

    def rows(self, request: int, rate: float | None, now: float) -> int:
        """How many rows of a request the next batch may take; 0: not yet."""
        fit = self._fitting(now)
        if rate is None:
            return fit
        if now < self._due.get(request, 0.0):
            return 0
        # A tenth of a second's worth at a time, so that a small rate is no burst a second.
        return max(1, min(fit, round(rate / 10)))

    def _fitting(self, now: float) -> int:
        if self._cost is None:
            return self._rows
        budget = self._quiet if self.quiet(now) else self._busy
        return min(self._most, self._rows * _GROWTH, max(LEAST_ROWS, round(budget / self._cost)))

    def took(self, request: int, rows: int, seconds: float, rate: float | None, now: float, *, asked: int) -> None:
        """Tell what a page cost: how many rows it brought of how many, and the seconds of what grows with them."""
        if rate is not None:
            self._due[request] = max(self._due.get(request, 0.0), now - seconds) + rows / rate
            return  # its pages are small for another reason
        if rows < asked:
            return  # a page that is not full tells little
        # Half way towards it: one slow page is no trend.
        cost = max(seconds, 1e-6) / rows
        self._cost = cost if self._cost is None else (self._cost + cost) / 2
        self._rows = rows

    def due(self, now: float) -> float | None:
        """In how many seconds rows are due that a rate holds back; None when none are."""
        waiting = [due - now for due in self._due.values() if due > now]
        return min(waiting) if waiting else None

    def keep(self, requests: frozenset[int]) -> None:
        """Forget all other requests."""
        for request in self._due.keys() - requests:
            del self._due[request]

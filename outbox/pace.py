"""The pace of a backfill: how many rows a batch takes, and when it takes any. Pure."""

from __future__ import annotations

LEAST_ROWS = 200


class Pace:
    """Keeps what a batch spends on rows of a source near `budget` seconds, and the rows under `rate` a second.

    Live changes wait behind the rows that are published with them, so the budget bounds what a backfill adds to their
    latency. `most` is the greatest page, `now` seconds of a clock that never goes back.
    """

    def __init__(self, *, budget: float, most: int) -> None:
        self._budget = budget
        self._most = most
        self._rows = min(500, most)
        # By request: when its next rows are due.
        self._due: dict[int, float] = {}

    def rows(self, request: int, rate: float | None, now: float) -> int:
        """How many rows of a request the next batch may take; 0: not yet."""
        if rate is None:
            return self._rows
        if now < self._due.get(request, 0.0):
            return 0
        # A tenth of a second's worth at a time, so that a small rate is no burst a second.
        return max(1, min(self._rows, round(rate / 10)))

    def took(self, request: int, rows: int, seconds: float, rate: float | None, now: float) -> None:
        """Tell what a page cost: how many rows it brought, and the seconds of what grows with them."""
        if rate is not None:
            self._due[request] = max(self._due.get(request, 0.0), now - seconds) + rows / rate
        if rows < self._rows:
            return  # a page that is not full tells little
        # Half way towards what would have met the budget: one slow page is no trend.
        wanted = self._rows * self._budget / max(seconds, 1e-6)
        self._rows = round(min(self._most, max(LEAST_ROWS, (self._rows + min(wanted, 4 * self._rows)) / 2)))

    def due(self, now: float) -> float | None:
        """In how many seconds rows are due that a rate holds back; None when none are."""
        waiting = [due - now for due in self._due.values() if due > now]
        return min(waiting) if waiting else None

    def keep(self, requests: frozenset[int]) -> None:
        """Forget all other requests."""
        for request in self._due.keys() - requests:
            del self._due[request]

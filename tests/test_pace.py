"""The pace of a backfill: its pages fit into a budget, its rate is kept, its turns are fair."""

from __future__ import annotations

import pytest

from outbox.pace import LEAST_ROWS, Pace

BUDGET = 0.025


def settled(cost: float, *, most: int = 20_000) -> int:
    """How many rows a page has after a while, when a row costs so many seconds."""
    pace = Pace(budget=BUDGET, most=most)
    for _ in range(50):
        rows = pace.rows(1, None, 0.0)
        pace.took(1, rows, rows * cost, None, 0.0)
    return pace.rows(1, None, 0.0)


@pytest.mark.parametrize("cost", [1e-6, 1e-5, 5e-5, 1e-4])
def test_a_page_grows_or_shrinks_until_it_meets_the_budget(cost: float) -> None:
    """Within the greatest page, and the least that is worth a transaction."""
    wanted = min(20_000, max(LEAST_ROWS, BUDGET / cost))
    assert settled(cost) == pytest.approx(wanted, rel=0.05)


def test_a_row_that_is_very_dear_leaves_the_least_page() -> None:
    """Smaller ones would cost a transaction each for hardly anything."""
    assert settled(0.01) == LEAST_ROWS


def test_a_page_that_is_not_full_says_nothing() -> None:
    """The last one, or one that was cut at a row that fails."""
    pace = Pace(budget=BUDGET, most=20_000)
    before = pace.rows(1, None, 0.0)
    pace.took(1, 3, 10.0, None, 0.0)
    assert pace.rows(1, None, 0.0) == before


def test_a_rate_is_kept_over_any_second() -> None:
    """Rows are due when those before them are paid for, and nothing is saved up while it was paused."""
    pace = Pace(budget=BUDGET, most=20_000)
    now, taken = 0.0, 0
    while now < 10.0:
        rows = pace.rows(1, 100.0, now)
        if rows:
            pace.took(1, rows, 0.001, 100.0, now)
            taken += rows
        else:
            now += pace.due(now) or 0.0
    assert taken == pytest.approx(1_000, rel=0.05)
    assert pace.rows(1, 100.0, now + 3600) <= 10


def test_a_rate_of_one_request_holds_no_other_back_and_is_forgotten_with_it() -> None:
    """What is due is known by request."""
    pace = Pace(budget=BUDGET, most=20_000)
    pace.took(1, 10, 0.001, 1.0, 0.0)
    assert pace.rows(1, 1.0, 0.0) == 0
    assert pace.rows(2, None, 0.0) > 0
    assert pace.due(0.0) == pytest.approx(10.0, abs=0.1)
    pace.keep(frozenset({2}))
    assert pace.due(0.0) is None

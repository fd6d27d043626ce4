"""The pace of a backfill: its pages fit into a budget, its rate is kept, its turns are fair."""

from __future__ import annotations

import pytest

from outbox.pace import LEAST_ROWS, QUIET_AFTER, Pace

BUSY, QUIET = 0.01, 0.15


def a_pace(*, most: int = 20_000) -> Pace:
    """One with changes, at time 0."""
    pace = Pace(busy=BUSY, quiet=QUIET, most=most)
    pace.changed(0.0)
    return pace


def settled(cost: float, *, now: float = 0.0) -> int:
    """How many rows a page has after a while, when a row costs so many seconds."""
    pace = a_pace()
    for _ in range(50):
        rows = pace.rows(1, None, now)
        pace.took(1, rows, rows * cost, None, now, asked=rows)
    return pace.rows(1, None, now)


@pytest.mark.parametrize("cost", [1e-6, 1e-5, 5e-5, 1e-4])
def test_a_page_grows_or_shrinks_until_it_meets_the_budget(cost: float) -> None:
    """Within the greatest page, and the least that is worth a transaction."""
    for now, budget in ((0.0, BUSY), (QUIET_AFTER, QUIET)):
        wanted = min(20_000, max(LEAST_ROWS, budget / cost))
        assert settled(cost, now=now) == pytest.approx(wanted, rel=0.05)


def test_the_first_change_after_a_silence_makes_pages_small_again() -> None:
    """Whoever waits for it waits for one large page at the most."""
    pace = a_pace()
    for _ in range(20):
        rows = pace.rows(1, None, QUIET_AFTER)
        pace.took(1, rows, rows * 1e-5, None, QUIET_AFTER, asked=rows)
    assert pace.rows(1, None, QUIET_AFTER) == pytest.approx(QUIET / 1e-5, rel=0.01)
    pace.changed(QUIET_AFTER)
    assert pace.rows(1, None, QUIET_AFTER) == pytest.approx(BUSY / 1e-5, rel=0.01)


def test_a_page_grows_by_steps() -> None:
    """Of a small page what a batch costs in any case is the greater part: it says little of a large one."""
    pace = a_pace()
    first = pace.rows(1, None, 0.0)
    pace.took(1, first, 1e-6, None, 0.0, asked=first)
    assert pace.rows(1, None, 0.0) == 4 * first


def test_a_row_that_is_very_dear_leaves_the_least_page() -> None:
    """Smaller ones would cost a transaction each for hardly anything."""
    assert settled(0.01) == LEAST_ROWS


def test_a_page_that_is_not_full_says_nothing() -> None:
    """The last one, or one that was cut at a row that fails."""
    pace = a_pace()
    before = pace.rows(1, None, 0.0)
    pace.took(1, 3, 10.0, None, 0.0, asked=before)
    assert pace.rows(1, None, 0.0) == before


def test_a_rate_is_kept_over_any_second() -> None:
    """Rows are due when those before them are paid for, and nothing is saved up while it was paused."""
    pace = a_pace()
    now, taken = 0.0, 0
    while now < 10.0:
        rows = pace.rows(1, 100.0, now)
        if rows:
            pace.took(1, rows, 0.001, 100.0, now, asked=rows)
            taken += rows
        else:
            now += pace.due(now) or 0.0
    assert taken == pytest.approx(1_000, rel=0.05)
    assert pace.rows(1, 100.0, now + 3600) <= 10


def test_a_rate_of_one_request_holds_no_other_back_and_is_forgotten_with_it() -> None:
    """What is due is known by request."""
    pace = a_pace()
    pace.took(1, 10, 0.001, 1.0, 0.0, asked=10)
    assert pace.rows(1, 1.0, 0.0) == 0
    assert pace.rows(2, None, 0.0) > 0
    assert pace.due(0.0) == pytest.approx(10.0, abs=0.1)
    pace.keep(frozenset({2}))
    assert pace.due(0.0) is None

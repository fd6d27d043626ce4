"""A sample of keys: both sides take the same, and what it says of all is not said too surely."""

from __future__ import annotations

import random

import psycopg
import pytest

from outbox.sample import Sample, at_most


@pytest.mark.postgres
def test_the_server_takes_the_same_keys_as_we_do(database_url: str) -> None:
    """By the same hash of the same bytes, at any share."""
    keys = [f"k{n}" for n in range(2000)] + ["Zoë", "a:b", "日本", "\\", "x" * 1024]
    with psycopg.connect(database_url) as connection:
        for share in (0.0005, 0.1, 0.5, 0.9999, 1.0):
            sample = Sample(share)
            found = connection.execute(
                f"SELECT key FROM unnest(%s::text[]) AS s (key) WHERE {sample.sql}".encode(), [keys]
            ).fetchall()
            assert {row[0] for row in found} == {key for key in keys if sample.takes(key.encode())}


def test_a_sample_has_about_as_many_as_were_asked_for() -> None:
    """And everything when more are asked for than there are."""
    sample = Sample.of(1_000, total=100_000)
    assert sum(sample.takes(b"key %d" % n) for n in range(100_000)) == pytest.approx(1_000, rel=0.15)
    assert all(Sample.of(10, total=5).takes(b"key %d" % n) for n in range(1000))
    assert Sample.of(10, total=0).share == 1.0


@pytest.mark.parametrize(
    ("different", "keys", "share"),
    # Of none: 1 - 0.05 ** (1 / keys), which the rule of three approximates. Of others: where so few have one chance in
    # twenty, by sums of binomial terms.
    [(0, 1000, 0.002991), (0, 10, 0.258866), (1, 100, 0.046560), (5, 50, 0.198833), (0, 1, 0.95)],
)
def test_the_bound_is_that_of_clopper_and_pearson(different: int, keys: int, share: float) -> None:
    """One-sided, 95%."""
    assert at_most(different, keys) == pytest.approx(share, rel=1e-3)


def test_of_nothing_or_of_all_that_differs_nothing_is_promised() -> None:
    """All may differ."""
    assert at_most(0, 0) == at_most(7, 7) == 1.0


def test_the_bound_holds_as_often_as_it_says() -> None:
    """Of samples of a population with a known share, hardly more than one in twenty has a bound below it."""
    draw = random.Random(7)
    share, keys, tries = 0.02, 200, 2_000
    wrong = sum(at_most(sum(draw.random() < share for _ in range(keys)), keys) < share for _ in range(tries))
    assert wrong / tries <= 0.06

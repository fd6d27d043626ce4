"""The arithmetic of positions, and what a database says about them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.errors import RelayError
from outbox.lineage import Head, Verdict, judge
from outbox.position import Anchor, Cut, Point, Position, Snapshot, Totals, floor_of, start

POINT = Point(Snapshot(100, 110, (103, 107)), Anchor(50, 109, 1_700_000_000_000_001, 0))
POSITION = Position("shop", 0, "me", 3, "7000", 1, POINT)


def head(**changes: object) -> Head:
    """A head that continues POSITION, but for what a test changes."""
    usual = Head(
        Snapshot(120, 120), "0/1", "7000", 1, 3, 0, 1, anchor_found=True, top=Anchor(60, 119, 2, 0), base_id=1000
    )
    return replace(usual, **changes)  # type: ignore[arg-type]  # each test names fields of Head


def test_an_entry_of_a_transaction_that_the_snapshot_saw_is_published() -> None:
    """Visible in S1 and not above the anchor: it went out."""
    assert POSITION.published(40, 102)


@pytest.mark.parametrize("xid", [103, 107, 110, 111])
def test_an_entry_of_a_transaction_in_progress_or_later_is_new_whatever_its_id(xid: int) -> None:
    """A small id of a transaction that S1 did not see is new: ids are no order of commits."""
    assert not POSITION.published(1, xid)


def test_an_id_above_the_anchor_is_new_even_with_an_old_xid() -> None:
    """A crash hands transaction ids out again; ids of durable entries never come again."""
    assert not POSITION.published(51, 42)


def test_in_a_cut_only_what_lies_up_to_the_last_id_is_published() -> None:
    """The cut's end sees more than is done."""
    cut = replace(POSITION, cut=Cut(Point(Snapshot(130, 130), Anchor(90, 129, 3, 0)), 70))
    assert cut.published(65, 115)
    assert cut.published(40, 102)
    assert not cut.published(75, 115)
    assert not cut.published(69, 131)
    # A late entry below the last id that the cut's end saw was read before it: by id.
    assert cut.published(45, 103)


def test_the_start_of_a_log_leaves_out_what_pruning_went_past() -> None:
    """An old state of a key whose newer one was pruned must not come back."""
    begin = start("shop", 0, "me", 1, None, 1, 20)
    assert begin.published(20, 5)
    assert not begin.published(21, 5)


snapshots = st.builds(
    lambda xmin, gap, xip: Snapshot(xmin, xmin + gap, tuple(sorted(x for x in xip if xmin <= x < xmin + gap))),
    st.integers(3, 2**63 - 2000),
    st.integers(0, 1000),
    st.sets(st.integers(3, 2**62), max_size=5),
)
anchors = st.none() | st.builds(
    Anchor, st.integers(1, 2**63 - 1), st.integers(3, 2**63 - 1), st.integers(0, 2**60), st.integers(0, 1023)
)
points = st.builds(Point, st.none() | snapshots, anchors, st.integers(0, 2**63 - 1))
all_positions = st.builds(
    Position,
    outbox=st.text(min_size=1, max_size=5),
    shard=st.integers(0, 1023),
    token=st.text(max_size=5),
    epoch=st.integers(0, 2**40),
    system=st.none() | st.text(max_size=5),
    timeline=st.integers(1, 100),
    point=points,
    cut=st.none() | st.builds(Cut, points, st.integers(0, 2**63 - 1)),
    totals=st.dictionaries(st.text(max_size=3), st.builds(Totals, st.integers(0, 2**40)), max_size=2),
    at_ms=st.integers(0, 2**50),
    earlier=st.integers(0, 2**63 - 1),
)


@given(all_positions)
def test_a_position_comes_back_from_its_record_unchanged(position: Position) -> None:
    """Also ids beyond 53 bits, which JSON readers round."""
    assert Position.decode(position.encode()) == position


@pytest.mark.parametrize("value", [b"", b"null", b"{}", b'{"format": 1}', b"\xff", b'{"format": 99}'])
def test_a_record_that_is_no_position_is_refused_with_the_cure(value: bytes) -> None:
    """Nobody but the relay writes there."""
    with pytest.raises(RelayError) as caught:
        Position.decode(value)
    assert caught.value.cure


def test_the_floor_of_an_adoption_is_the_greatest_anchor_of_all_shards_and_cuts() -> None:
    """New ids must lie above everything that any shard has published."""
    other = replace(POSITION, shard=1, cut=Cut(Point(Snapshot(1, 1), Anchor(99, 1, 1, 1)), 60))
    assert floor_of([POSITION, other]) == 99
    assert floor_of([]) == 0


def test_a_database_that_continues_the_log_is_said_to() -> None:
    """The anchor's row is there, nothing else has changed."""
    assert judge(POSITION, head()) is Verdict.CONTINUES


def test_a_missing_anchor_is_a_lost_tail() -> None:
    """What was published is not there."""
    assert judge(POSITION, head(anchor_found=False)) is Verdict.LOST_TAIL


def test_an_older_epoch_in_the_database_is_a_lost_tail() -> None:
    """A restore from before an adoption."""
    assert judge(POSITION, head(epoch=2)) is Verdict.LOST_TAIL


def test_a_newer_epoch_starts_anew() -> None:
    """Somebody adopted: another shard, or a person."""
    assert judge(POSITION, head(epoch=4, anchor_found=False)) is Verdict.ADOPTED


def test_an_adoption_that_did_not_know_of_what_this_shard_published_is_not_enough() -> None:
    """Its new ids must lie above: else they would be given a second time."""
    floor = floor_of([POSITION])
    assert judge(POSITION, head(epoch=4, base_id=floor)) is Verdict.ADOPTED
    assert judge(POSITION, head(epoch=4, base_id=floor - 1)) is Verdict.LOST_TAIL


def test_another_cluster_is_refused_until_a_person_gave_this_one_up() -> None:
    """Also with a newer epoch: an unrelated database may have been adopted for reasons of its own."""
    assert judge(POSITION, head(system="8000")) is Verdict.OTHER_CLUSTER
    assert judge(POSITION, head(system="8000", epoch=9)) is Verdict.OTHER_CLUSTER
    assert judge(POSITION, head(system="8000", epoch=9, adopted_from=["6000"])) is Verdict.OTHER_CLUSTER
    assert judge(POSITION, head(system="8000", epoch=4, adopted_from=["6000", "7000"])) is Verdict.ADOPTED


def test_where_the_identifier_is_hidden_an_xid_still_to_come_tells_a_copy() -> None:
    """The anchor's row is there, but its transaction cannot have happened here."""
    hidden = replace(POSITION, system=None)
    assert judge(hidden, head(system=None, snapshot=Snapshot(50, 60))) is Verdict.OTHER_CLUSTER
    # Handed out again after a crash, but still above the anchor's: the same cluster.
    assert judge(hidden, head(system=None, snapshot=Snapshot(110, 110))) is Verdict.CONTINUES

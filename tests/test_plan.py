"""The plan of a batch: parts, dead letters, requests, and the position after each."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.batch import Batch
from outbox.entity_type import EntityType
from outbox.entry import Entry
from outbox.lineage import Head
from outbox.plan import Part, Plan
from outbox.position import Anchor, Cut, Point, Position, Snapshot, Totals, start
from outbox.request import Entity, Found, Page, Request, Row

TYPES = {
    "user": EntityType("user", "users"),
    "event": EntityType("event", "events", collapse=False),
}
LIMITS = {"users": 10_000, "events": 10_000}
BIG = b"x" * 20_000


def entry(number: int, key: str = "a", state: bytes | None = b"{}", *, of: str = "user") -> Entry:
    return Entry(number, of, key, state, 1_000)


def batch_of(
    entries: Sequence[Entry],
    *,
    requests: Sequence[Request] = (),
    retained: Sequence[Entry] = (),
    found: Found | None = None,
    last_id: int | None = None,
    position: Position | None = None,
) -> Batch:
    top = max((e.id for e in entries), default=100)
    head = Head(Snapshot(50, 50), "0/0", "1", 1, 1, 0, 1, anchor_found=True, top=Anchor(max(top, 100), 49, 0, 0))
    before = position or start("shop", 0, "t", 1, "1", 1, 0)
    return Batch(before, head, TYPES, entries, last_id, requests, found or Found(retained))


def plan_of(batch: Batch, dead: Mapping[Entity, int] | None = None, *, later: Collection[Entity] = ()) -> Plan:
    """The plan of a batch for which all dead letters were looked up, but for some that came `later`."""
    found = replace(batch.found, looked_for=frozenset(dead or ()) - set(later))
    return Plan(replace(batch, found=found), LIMITS, dead or {}, now_ms=5_000)


def parts(plan: Plan, size: int) -> Iterator[Part]:
    """Every part, committed one after the other."""
    while not plan.finished:
        part = plan.part(size)
        yield part
        plan.done(part)


def test_one_part_takes_a_whole_batch_and_leads_to_the_point_that_the_snapshot_sees() -> None:
    """The normal case: one Kafka transaction."""
    plan = plan_of(batch_of([entry(1), entry(2, "b"), entry(3)]))
    part = plan.part()
    assert [m.entry.id for m in part.messages] == [2, 3]
    assert (part.position.cut, part.position.point.floor) == (None, 100)
    assert part.position.totals == {"user": Totals(entries=3, records=2)}
    assert plan.done(part) == {}
    assert plan.finished


def test_parts_are_cut_by_id_towards_the_same_point_and_count_each_entry_once() -> None:
    """A relay that is killed between two parts goes on from the first one's position."""
    plan = plan_of(batch_of([entry(n, f"k{n}") for n in range(1, 8)]))
    seen = list(parts(plan, 3))
    assert [[m.entry.id for m in part.messages] for part in seen] == [[1, 2, 3], [4, 5, 6], [7]]
    cuts = [part.position.cut for part in seen]
    assert [cut and cut.last_id for cut in cuts] == [3, 6, None]
    assert all(cut is None or cut.to.floor == 100 for cut in cuts)
    assert [part.position.totals["user"].entries for part in seen] == [3, 6, 7]
    assert seen[0].position.published(3, 10)
    assert not seen[0].position.published(4, 10)


def test_a_batch_that_is_cut_stays_cut_after_its_last_part() -> None:
    """The rest of the difference is read next."""
    plan = plan_of(batch_of([entry(1), entry(2, "b")], last_id=2))
    part = plan.part()
    assert part.position.cut is not None
    assert part.position.cut.last_id == 2


def test_what_cannot_be_published_goes_with_the_part_that_its_id_lies_in() -> None:
    """No letter before its turn, none forgotten, also when it is the last."""
    plan = plan_of(batch_of([entry(1, "a"), entry(2, "b", BIG), entry(3, "c"), entry(4, "d", BIG)]))
    seen = list(parts(plan, 1))
    assert [[m.entry.id for m in part.messages] for part in seen] == [[1], [3]]
    assert [[letter.id for letter in part.letters] for part in seen] == [[], [2, 4]]
    assert seen[-1].position.totals["user"] == Totals(entries=4, records=2, dead=2)


def test_a_refused_message_is_left_out_and_becomes_a_letter() -> None:
    """The others of the batch are published."""
    plan = plan_of(batch_of([entry(1, "a"), entry(2, "b"), entry(3, "c")]))
    first = plan.part(1)
    plan.done(first)
    plan.refuse({0: "no"})
    part = plan.part(1)
    assert [m.entry.id for m in part.messages] == [3]
    assert [(letter.id, letter.reason) for letter in part.letters] == [(2, "refused")]
    assert plan.done(part) == {("user", "b"): 2}
    assert plan.finished


def test_a_batch_of_nothing_but_refused_messages_still_advances() -> None:
    """Else it would be read for ever."""
    plan = plan_of(batch_of([entry(1)]))
    plan.refuse({0: "no"})
    part = plan.part(1)
    assert (part.messages, [letter.id for letter in part.letters]) == ([], [1])
    assert part.position.cut is None


def test_a_later_state_clears_a_dead_letter_and_an_earlier_one_does_not() -> None:
    """Of one key in one batch, with collapse off: what counts is which id is greater."""
    good_last = plan_of(batch_of([entry(1, "a", BIG, of="event"), entry(2, "a", of="event")]))
    part = good_last.part()
    assert [letter.id for letter in part.letters] == [1]
    assert part.cleared == [("event", "a")]
    assert good_last.done(part) == {}
    bad_last = plan_of(batch_of([entry(1, "a", of="event"), entry(2, "a", BIG, of="event")]))
    part = bad_last.part()
    assert part.cleared == []
    assert bad_last.done(part) == {("event", "a"): 2}


def test_a_letter_of_before_is_cleared_by_a_newer_state() -> None:
    """It has nothing to say any more."""
    plan = plan_of(batch_of([entry(7, "a")]), {("user", "a"): 3, ("user", "b"): 4})
    part = plan.part()
    assert part.cleared == [("user", "a")]
    assert plan.done(part) == {("user", "b"): 4}


RETRY = Request(9, "retry", {"type": None, "keys": None})
DROP = Request(8, "drop", {"type": "user", "keys": ["a"]})


def test_a_retry_publishes_the_last_retained_entry_after_the_batch_and_says_what_became_of_each() -> None:
    """In the batch: published anyway. Gone: said. Still too large: stays a dead letter."""
    dead = {("user", "kept"): 1, ("user", "gone"): 2, ("user", "big"): 3, ("user", "again"): 4}
    batch = batch_of(
        [entry(50, "again"), entry(51, "other")], requests=[RETRY], retained=[entry(1, "kept"), entry(3, "big", BIG)]
    )
    plan = plan_of(batch, dead)
    part = plan.part()
    assert [m.entry.id for m in part.messages] == [50, 51, 1]
    assert part.position.requests["9"] == {
        "done": {"retried": 2, "refused": 1, "not_retained": 1, "examples": [["user", "gone"]]}
    }
    assert plan.done(part) == {("user", "gone"): 2, ("user", "big"): 3}


def test_a_retried_record_that_is_refused_again_is_said_to_be_refused() -> None:
    """Halved like any other: the innocent are published."""
    dead = {("user", "guilty"): 1, ("user", "innocent"): 2}
    plan = plan_of(
        batch_of([entry(50, "new")], requests=[RETRY], retained=[entry(1, "guilty"), entry(2, "innocent")]), dead
    )
    plan.done(plan.part(1))
    plan.refuse({0: "no"})
    part = plan.part(1)
    assert [m.entry.id for m in part.messages] == [2]
    assert part.position.requests["9"] == {"done": {"retried": 1, "refused": 1, "not_retained": 0, "examples": []}}
    assert plan.done(part) == {("user", "guilty"): 1}


def test_a_part_between_the_batch_and_what_is_retried_has_the_batch_done_and_the_request_open() -> None:
    """A relay that is killed there does the request anew, in a snapshot of its own."""
    plan = plan_of(batch_of([entry(50, "new")], requests=[RETRY], retained=[entry(1)]), {("user", "a"): 1})
    part = plan.part(1)
    assert (part.position.cut, dict(part.position.requests)) == (None, {})
    plan.done(part)
    assert plan.part(1).position.requests["9"]["done"]["retried"] == 1


def test_dropped_letters_are_cleared_and_no_later_request_retries_them() -> None:
    """Requests are done in the order of their ids."""
    dead = {("user", "a"): 1, ("user", "b"): 2}
    plan = plan_of(batch_of([], requests=[DROP, RETRY], retained=[entry(1), entry(2, "b")]), dead)
    part = plan.part()
    assert [m.entry.key for m in part.messages] == ["b"]
    assert set(part.cleared) == {("user", "a"), ("user", "b")}
    assert part.position.requests["8"] == {"done": {"dropped": 1}}
    assert plan.done(part) == {}


def test_a_request_that_the_position_knows_to_be_done_is_not_done_again_and_is_forgotten_when_it_is_closed() -> None:
    """It was committed; only the control table had not been told."""
    done = {"9": {"done": {"retried": 1}}, "7": {"done": {}}}
    position = start("shop", 0, "t", 1, "1", 1, 0)
    position = Position(**{name: getattr(position, name) for name in Position.__slots__} | {"requests": done})
    plan = plan_of(batch_of([], requests=[RETRY], retained=[entry(1)], position=position), {("user", "a"): 1})
    assert plan.empty
    plan = plan_of(batch_of([entry(5)], requests=[RETRY], position=position))
    assert plan.part().position.requests == {"9": done["9"]}


def test_a_dead_letter_that_came_after_the_look_up_is_retried_with_the_next_batch() -> None:
    """A batch is read ahead of the commit that may leave one: it is not said to be retained no more."""
    dead = {("user", "a"): 1, ("user", "b"): 2}
    assert plan_of(batch_of([], requests=[RETRY], retained=[entry(1)]), dead, later=[("user", "b")]).empty
    assert not plan_of(batch_of([], requests=[RETRY], retained=[entry(1)]), dead).empty


BACKFILL = Request(5, "backfill", {"type": "user"})
PUBLISH = Request(6, "publish", {"type": "user", "keys": ["a", "b", "c"]})


def row(key: str, state: bytes | None = b"{}", *, failure: str | None = None) -> Row:
    return Row(entry(0, key, state), (key,), failure)


def page_of(*rows: Row, more: bool = True) -> Found:
    return Found(page=rows, source="s", paged=Page(5, "user", None, None, len(rows)), more=more)


def with_requests(requests: Mapping[str, Mapping[str, Any]]) -> Position:
    return replace(start("shop", 0, "t", 1, "1", 1, 0), requests=requests)


def test_a_page_follows_the_batch_without_the_keys_that_the_batch_has() -> None:
    """Each key once; the page ends where it was read to, whatever is left out of it."""
    plan = plan_of(batch_of([entry(50, "b")], requests=[BACKFILL], found=page_of(row("a"), row("b"))))
    part = plan.part()
    assert [(m.entry.id, m.entry.key) for m in part.messages] == [(50, "b"), (0, "a")]
    assert dict(part.messages[1].headers) == {"outbox-id": b"0"}
    assert part.position.requests["5"] == {"rows": 2, "refused": 0, "after": ["b"], "source": "s"}


def test_every_part_of_a_page_says_where_the_next_begins_and_takes_the_letters_before_it() -> None:
    """A relay that is killed between two parts goes on behind the first, and no row is without record or letter."""
    found = page_of(row("a"), row("b", None, failure="division by zero"), row("c"), row("d", BIG), more=False)
    plan = plan_of(batch_of([entry(50, "x")], requests=[BACKFILL], found=found))
    seen = list(parts(plan, 1))
    assert [[m.entry.key for m in part.messages] for part in seen] == [["x"], ["a"], ["c"]]
    assert [[letter.key for letter in part.letters] for part in seen] == [[], [], ["b", "d"]]
    assert [dict(part.position.requests) for part in seen] == [
        {},
        {"5": {"rows": 1, "refused": 0, "after": ["a"], "source": "s"}},
        {"5": {"done": {"rows": 4, "refused": 2}}},
    ]
    assert seen[-1].letters[0].reason == "source"


def test_a_backfill_counts_on_from_what_the_position_says() -> None:
    """Also when it is over with a page that is empty."""
    position = with_requests({"5": {"rows": 7, "refused": 1, "after": ["q"]}})
    plan = plan_of(batch_of([], requests=[BACKFILL], found=page_of(row("r")), position=position))
    assert plan.part().position.requests["5"] == {"rows": 8, "refused": 1, "after": ["r"], "source": "s"}
    plan = plan_of(batch_of([], requests=[BACKFILL], found=page_of(more=False), position=position))
    assert not plan.empty
    assert plan.part().position.requests["5"] == {"done": {"rows": 7, "refused": 1}}


def test_a_backfill_without_a_page_waits() -> None:
    """Paused, held back by its rate, or another one's turn."""
    assert plan_of(batch_of([], requests=[BACKFILL])).empty
    paused = replace(BACKFILL, paused=True)
    assert plan_of(batch_of([], requests=[paused], found=page_of(row("a")))).empty


def test_a_source_that_cannot_be_read_ends_the_request_and_nothing_else() -> None:
    """What it had done is said, and why it ended."""
    found = Found(errors={"user": "no such column"})
    position = with_requests({"5": {"rows": 7, "refused": 0, "after": ["q"]}})
    part = plan_of(batch_of([entry(50)], requests=[BACKFILL], found=found, position=position)).part()
    assert [m.entry.id for m in part.messages] == [50]
    assert part.position.requests["5"] == {"done": {"rows": 7, "refused": 0, "error": "no such column"}}


def test_named_keys_are_published_as_they_are_and_what_is_gone_gets_a_tombstone() -> None:
    """From the source; a key of the batch is published by its entry."""
    found = Found(current=[row("a"), row("c", None)])
    part = plan_of(batch_of([entry(50, "b")], requests=[PUBLISH], found=found)).part()
    assert [(m.entry.key, m.value) for m in part.messages] == [("b", b"{}"), ("a", b"{}"), ("c", None)]
    assert part.position.requests["6"] == {"done": {"rows": 3, "refused": 0, "tombstones": 1, "gone": []}}


def test_named_keys_of_a_type_without_a_source_are_published_as_far_as_they_are_retained() -> None:
    """What is not retained is said, with its name."""
    found = Found(retained=[entry(3, "a"), entry(4, "b")])
    part = plan_of(batch_of([], requests=[PUBLISH], found=found)).part()
    assert [m.entry.id for m in part.messages] == [3, 4]
    done = {"rows": 3, "refused": 0, "tombstones": 0, "gone": [["user", "c"]]}
    assert part.position.requests["6"] == {"done": done}


def test_what_comes_from_a_source_clears_the_dead_letter_of_its_key() -> None:
    """It is what the key is as of the batch: no entry that failed is newer."""
    plan = plan_of(batch_of([], requests=[BACKFILL], found=page_of(row("a"))), {("user", "a"): 41, ("user", "b"): 42})
    assert plan.done(plan.part()) == {("user", "b"): 42}


@pytest.mark.parametrize("cut", [None, 40])
def test_only_a_batch_that_ends_at_its_own_snapshot_takes_requests(cut: int | None) -> None:
    """The rest of a cut backlog is older than what a request would publish."""
    position = start("shop", 0, "t", 1, "1", 1, 0)
    if cut is not None:
        position = position.advanced(Point(Snapshot(50, 50), Anchor(60, 49, 0, 0)), cut)
    assert isinstance(position.cut, Cut) == (cut is not None)
    assert batch_of([entry(41)], position=position).takes_requests == (cut is None)
    assert not batch_of([entry(41)], position=position, last_id=41).takes_requests


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["user", "event"]), st.booleans()), max_size=12),
    st.lists(st.integers(1, 4), min_size=1, max_size=30),
    st.sets(st.integers(1, 12)),
)
def test_however_it_is_cut_and_refused_the_end_is_the_same(
    made: list[tuple[str, str, bool]], sizes: list[int], guilty: set[int]
) -> None:
    """Each entry is published, superseded or a letter, once, in order, and the totals tell it."""
    entries = [entry(number, key, BIG if big else b"{}", of=of) for number, (key, of, big) in enumerate(made, start=1)]
    plan = plan_of(batch_of(entries))
    published: list[int] = []
    letters: list[int] = []
    turn = 0
    part = None
    while not plan.finished:
        part = plan.part(sizes[turn % len(sizes)])
        turn += 1
        bad = [m for m in part.messages if m.entry.id in guilty]
        if bad and len(part.messages) > 1:
            part = plan.part(1)
            bad = [m for m in part.messages if m.entry.id in guilty]
        if bad:
            plan.refuse({0: "no"})
            continue
        published += [m.entry.id for m in part.messages]
        letters += [letter.id for letter in part.letters]
        plan.done(part)
    assert part is not None
    wanted = {
        e.id
        for e in entries
        if e.type == "event" or not any(f.id > e.id and (f.type, f.key) == (e.type, e.key) for f in entries)
    }
    assert published == sorted(published)
    assert sorted(published + letters) == sorted(wanted)
    assert set(letters) == {n for n in wanted if n in guilty or entries[n - 1].state == BIG}
    totals = part.position.totals.values()
    assert sum(t.entries for t in totals) == len(entries)
    assert sum(t.records for t in totals) == len(published)
    assert sum(t.dead for t in totals) == len(letters)


FOLLOWED = {
    **TYPES,
    "user.v2": EntityType("user.v2", "users.v2", source="q", follows="user"),
    "user.v3": EntityType("user.v3", "users.v3", source="q", follows="user", reads_source=True),
}


def followed(
    entries: Sequence[Entry], *live: Row, requests: Sequence[Request] = (), found: Found | None = None
) -> Plan:
    """A plan of a batch of types that are followed."""
    batch = replace(batch_of(entries, requests=requests, found=found), types=FOLLOWED, live=live)
    return Plan(batch, {**LIMITS, "users.v2": 10_000, "users.v3": 10_000}, {}, now_ms=5_000)


def of_source(number: int, key: str, state: bytes | None, failure: str | None = None) -> Row:
    return Row(entry(number, key, state, of="user.v3"), (key,), failure)


def test_what_follows_a_type_gets_its_entries_or_what_its_source_says_of_them() -> None:
    """In id order, each under the type's own name and the entry's id."""
    plan = followed([entry(50, "a"), entry(51, "b", None)], of_source(50, "a", b"new"), of_source(51, "b", None))
    part = plan.part()
    assert [(m.topic, m.entry.id, m.entry.type, m.value) for m in part.messages] == [
        ("users", 50, "user", b"{}"),
        ("users.v2", 50, "user.v2", b"{}"),
        ("users.v3", 50, "user.v3", b"new"),
        ("users", 51, "user", None),
        ("users.v2", 51, "user.v2", None),
        ("users.v3", 51, "user.v3", None),
    ]
    assert part.position.totals == {
        "user": Totals(2, 2, 0),
        "user.v2": Totals(2, 2, 0),
        "user.v3": Totals(2, 2, 0),
    }


def test_what_was_made_of_one_entry_is_not_parted() -> None:
    """A position between them would take what is not sent for published."""
    plan = followed([entry(50, "a"), entry(51, "b")], of_source(50, "a", b"x"), of_source(51, "b", b"y"))
    seen = list(parts(plan, 1))
    assert [[m.topic for m in part.messages] for part in seen] == [["users", "users.v2", "users.v3"]] * 2
    assert plan.smallest(seen[0])
    assert not plan.smallest(followed([entry(50, "a"), entry(51, "b")]).part())


def test_a_window_of_a_history_is_not_taken_for_what_was_made_of_one_entry() -> None:
    """It may begin and end with the same id: the batch's own entry, and that again."""
    rows = [Row(entry(number, "a", of="event"), (str(number),)) for number in (48, 49, 50)]
    request = Request(7, "history", {"type": "event", "of": "event"})
    found = Found(page=rows, paged=Page(7, "event", None, None, 3, history={}), more=True, end=("50",))
    plan = plan_of(batch_of([entry(50, "a", of="event")], requests=[request], found=found))
    part = plan.part()
    assert [m.entry.id for m in part.messages] == [50, 48, 49, 50]
    assert not plan.smallest(part)
    assert part.position.requests["7"]["after"] == ["50"]


def test_a_window_of_a_history_without_a_chosen_entry_is_gone_past() -> None:
    """Else it would be looked at for ever."""
    request = Request(7, "history", {"type": "event", "of": "event"})
    found = Found(paged=Page(7, "event", None, None, 3, history={}), more=True, end=("50",), scanned=3)
    plan = plan_of(batch_of([], requests=[request], found=found))
    assert not plan.empty
    assert plan.part().position.requests["7"] == {"rows": 0, "refused": 0, "after": ["50"], "source": None}


def test_a_type_that_reads_its_source_publishes_nothing_of_what_was_written() -> None:
    """Whoever writes may be older than the shape of its topic."""
    types = {"user": EntityType("user", "users", source="q", reads_source=True)}
    live = [Row(entry(51, "a", b"new"), ("a",))]
    batch = replace(batch_of([entry(50, "a"), entry(51, "a")]), types=types, live=live)
    part = Plan(batch, LIMITS, {}, now_ms=5_000).part()
    assert [(m.entry.id, m.value) for m in part.messages] == [(51, b"new")]
    assert part.position.totals == {"user": Totals(2, 1, 0)}


def test_a_source_that_fails_for_an_entry_leaves_a_letter_of_the_follower() -> None:
    """What others publish of the entry goes on."""
    plan = followed([entry(50, "a")], of_source(50, "a", None, "division by zero"))
    part = plan.part()
    assert [m.topic for m in part.messages] == ["users", "users.v2"]
    assert [(x.id, x.type, x.key, x.topic, x.reason) for x in part.letters] == [
        (50, "user.v3", "a", "users.v3", "source")
    ]
    assert part.cleared == []


def test_a_page_of_a_follower_leaves_out_the_keys_that_the_batch_names() -> None:
    """They are published as of the same snapshot."""
    page = Found(page=[of_source(0, "a", b"x"), of_source(0, "b", b"y")], paged=Page(5, "user.v3", None, None, 2))
    request = Request(5, "backfill", {"type": "user.v3"})
    part = followed([entry(50, "a")], of_source(50, "a", b"x"), requests=[request], found=page).part()
    assert [(m.topic, m.entry.id, m.entry.key) for m in part.messages if m.topic == "users.v3"] == [
        ("users.v3", 50, "a"),
        ("users.v3", 0, "b"),
    ]

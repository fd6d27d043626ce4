"""The conformance suite of a store: what every store has to do, as tests for pytest.

    from outbox.read_model.conformance import StoreConformance

    class TestMyStore(StoreConformance):
        @pytest.fixture
        def make_store(self, tmp_path):
            return lambda: MyStore(...)       # each call: the same, empty at the start of a test, another connection

Needs pytest; nothing else of this library does. The store must be able to make its own tables: `create(declared)`.
"""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import orjson
import pytest
from sqlalchemy import BigInteger, CheckConstraint, Column, Float, Index, MetaData, Table, Text, insert, select

from outbox.kafka.subscription import Place
from outbox.read_model.change import Bad, Change, Raw, read
from outbox.read_model.declared import Columns, Copy, Declared, Follow, Function, Tables
from outbox.read_model.store import BadBuildError, Claim, LostBuildError, RefusedError, Store
from outbox.read_model.tables import copy_table


class CreatingStore(Store, Protocol):
    """A store that makes its own tables."""

    def create(self, declared: Declared) -> None:
        """Make what is missing."""


MakeStore = Callable[[], CreatingStore]

METADATA = MetaData()
COPY = copy_table(METADATA, "conform_copy")
OWN = Table(
    "conform_own",
    METADATA,
    Column("key", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("price", Float),
    Column("entry_id", BigInteger, nullable=False),
)
APART = Table(
    "conform_apart", METADATA, Column("id", BigInteger, primary_key=True), Column("name", Text, nullable=False)
)
STRICT = Table(
    "conform_strict",
    METADATA,
    Column("key", Text, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("price", Float),
    Column("entry_id", BigInteger, nullable=False),
    CheckConstraint("price >= 0", name="conform_strict_price"),
    Index("conform_strict_by_price", "price"),
)
TOLD = Table(
    "conform_told", METADATA, Column("key", Text, primary_key=True), Column("times", BigInteger, nullable=False)
)


def count(tables: Tables, changes: Sequence[Change]) -> None:
    """A function of a service's: how often it was told of each key."""
    told = tables[TOLD]
    for change in changes:
        before = tables.connection.execute(select(told.c.times).where(told.c.key == change.key)).scalar()
        if before is None:
            tables.connection.execute(insert(told).values(key=change.key, times=1))
        else:
            tables.connection.execute(told.update().where(told.c.key == change.key).values(times=before + 1))


FOLLOWS = {
    "copy": Follow("conform.copy", Copy(COPY)),
    "own": Follow("conform.own", Columns(OWN, {"name": "name", "price": "price"})),
    "apart": Follow("conform.apart", Columns(APART, {"name": "name"}, key="id")),
    "told": Follow("conform.told", Function(count, writes=[TOLD])),
}
PLAIN = ("copy", "own", "apart")
WITH_STRICT = Declared(
    "conformance-strict", [Follow("conform.strict", Columns(STRICT, {"name": "name", "price": "price"}))]
)
DECLARED = Declared("conformance", [FOLLOWS[name] for name in PLAIN])
WITH_FUNCTION = Declared("conformance-function", list(FOLLOWS.values()))


def change(key: str, state: Mapping[str, Any] | None, entry_id: int = 1, *, offset: int = 0) -> Change:
    """A change as it comes from a topic."""
    value = None if state is None else orjson.dumps(state)
    raw = Raw(0, offset, 1_700_000_000_000, key.encode(), value, [("outbox-id", b"%d" % entry_id)])
    made = read(raw, lambda text, _headers: orjson.loads(text))
    assert isinstance(made, Change)
    return made


def bad(key: str, entry_id: int, *, offset: int = 0) -> Bad:
    """A message that cannot be applied."""
    raw = Raw(2, offset, 5, key.encode(), b"\xff\x00", [("outbox-id", b"%d" % entry_id), ("x", b"\xfe")])
    made = read(raw, _fail)
    assert isinstance(made, Bad)
    return made


def advanced(store: Store, place: Place, offset: int, *, build: Any = "live") -> Claim:
    """Claim a partition and go on to an offset."""
    with store.transaction(build) as transaction:
        claim = transaction.claim(place)
        assert transaction.advance(place, claim, offset)
    return claim._replace(offset=offset)


def put(store: Store, follow: Follow, changes: Sequence[Change], *, build: Any = "live") -> None:
    """Write changes as the consumer does."""
    with store.transaction(build) as transaction:
        known = transaction.held(follow, [one.key for one in changes])
        transaction.put(follow, changes, {one.key: one.entry_id for one in changes}, known)


class StoreConformance:
    """What every store has to do."""

    @pytest.fixture
    def make_store(self) -> MakeStore:
        """To be overridden: makes a store, each time the same one over another connection."""
        raise NotImplementedError

    @pytest.fixture
    def refuse_deletions(self) -> Callable[[Store], None]:
        """To be overridden: makes a store refuse that a row of `conform_own` is deleted, as a reference would."""
        pytest.skip("this store is not said to refuse deletions")

    @pytest.fixture
    def store(self, make_store: MakeStore) -> Any:
        """One that is open, with its tables."""
        store = make_store()
        store.create(WITH_FUNCTION)
        store.open(WITH_FUNCTION)
        yield store
        store.close()

    def test_a_partition_is_claimed_and_advanced_by_the_last_who_claimed_it(self, store: Store) -> None:
        """Who claimed before moves nothing, and neither does who is elsewhere than he believes."""
        place = Place("conform.copy", 3)
        with store.transaction() as transaction:
            first = transaction.claim(place)
        assert first.offset == 0
        with store.transaction() as transaction:
            assert transaction.advance(place, first, 10)
        with store.transaction() as transaction:
            second = transaction.claim(place)
        assert (second.offset, second.epoch > first.epoch) == (10, True)
        with store.transaction() as transaction:
            assert not transaction.advance(place, first._replace(offset=10), 20)
            assert not transaction.advance(place, second._replace(offset=9), 20)
            assert transaction.advance(place, second, 20)
            assert transaction.offsets() == {place: 20}

    def test_what_fails_leaves_nothing(self, store: Store) -> None:
        """Rows, ids, parked messages, offsets: all of it or none."""
        place, follow = Place("conform.copy", 0), FOLLOWS["copy"]
        with store.transaction() as transaction:
            claim = transaction.claim(place)
        with pytest.raises(ZeroDivisionError), store.transaction() as transaction:
            assert transaction.advance(place, claim, 5)
            transaction.put(follow, [change("a", {})], {"a": 1}, {})
            raise ZeroDivisionError
        with store.transaction(reads=True) as transaction:
            assert transaction.offsets() == {place: 0}
            assert transaction.held(follow, ["a"]) == {}

    @pytest.mark.parametrize("name", PLAIN)
    def test_rows_are_written_replaced_and_taken_away_and_their_ids_stay_known(self, store: Store, name: str) -> None:
        """One, and so many that a store has a faster way; of what is deleted the id is known, until it is forgotten."""
        follow = FOLLOWS[name]
        state = {"name": "first", "price": 1.5}
        some = [change(str(n), state, n + 1) for n in range(200)]
        put(store, follow, some[:1])
        put(store, follow, some)
        put(store, follow, [change("7", {"name": "second", "price": 2}, 900)])
        with store.transaction() as transaction:
            transaction.delete(follow, [change("8", None, 901)], {"8": 901})
        with store.transaction(reads=True) as transaction:
            held = transaction.held(follow, [*(one.key for one in some), "nowhere", "no number"])
        assert held == {**{one.key: one.entry_id for one in some}, "7": 900, "8": 901}
        rows = dict(store.rows(follow))
        assert len(rows) == 199
        assert "8" not in rows
        if name == "copy":
            assert rows["7"]["state"] == {"name": "second", "price": 2}
        else:
            assert rows["7"]["name"] == "second"
        with store.transaction() as transaction:
            assert transaction.forget(dt.datetime.now(dt.UTC) + dt.timedelta(seconds=60)) == 1
            assert transaction.held(follow, ["8"]) == {}

    def test_what_was_deleted_and_comes_again_is_a_row_again(self, store: Store) -> None:
        """And is known by its new id alone."""
        follow = FOLLOWS["own"]
        put(store, follow, [change("a", {"name": "x"}, 1)])
        with store.transaction() as transaction:
            transaction.delete(follow, [change("a", None, 2)], {"a": 2})
        put(store, follow, [change("a", {"name": "y"}, 3)])
        with store.transaction() as transaction:
            assert transaction.held(follow, ["a"]) == {"a": 3}
            assert transaction.forget(dt.datetime.now(dt.UTC) + dt.timedelta(seconds=60)) == 0
        assert [row["name"] for _, row in store.rows(follow)] == ["y"]

    @pytest.mark.parametrize("many", [1, 100])
    def test_what_is_refused_writes_nothing_and_the_transaction_goes_on(self, store: Store, many: int) -> None:
        """A null where none may be; a value that is none of the column's type."""
        follow = FOLLOWS["own"]
        good = [change(f"k{n}", {"name": "x"}, 1) for n in range(many)]
        for wrong in ({"price": 1}, {"name": 5}, {"name": "x", "price": "dear"}):
            with store.transaction() as transaction:
                with pytest.raises(RefusedError):
                    held = {one.key: 1 for one in good} | {"bad": 1}
                    transaction.put(follow, [*good, change("bad", wrong)], held, {})
                transaction.put(
                    follow, [change("after", {"name": "y"})], {"after": 1}, transaction.held(follow, ["after"])
                )
            assert [key for key, _ in store.rows(follow)] == ["after"]

    def test_a_function_is_told_each_change_and_what_it_wrote_goes_with_its_failure(self, store: Store) -> None:
        """Its ids are kept apart, those of what is deleted as well."""
        follow = FOLLOWS["told"]
        put(store, follow, [change("a", {}, 1), change("b", {}, 2)])
        put(store, follow, [change("a", None, 3)])
        with store.transaction(reads=True) as transaction:
            assert transaction.held(follow, ["a", "b", "c"]) == {"a": 3, "b": 2}

        def failing(tables: Tables, changes: Sequence[Change]) -> None:
            count(tables, changes)
            raise KeyError("nothing")

        broken = Follow(follow.topic, Function(failing, writes=[TOLD]))
        with store.transaction() as transaction, pytest.raises(RefusedError, match="KeyError"):
            transaction.put(broken, [change("b", {}, 9)], {"b": 9}, {"b": 2})
        with store.transaction(reads=True) as transaction:
            assert transaction.held(follow, ["b"]) == {"b": 2}

    def test_a_deletion_that_is_refused_writes_nothing_and_the_transaction_goes_on(
        self, store: Store, refuse_deletions: Callable[[Store], None]
    ) -> None:
        """Neither that of the others beside it, nor an id."""
        follow = FOLLOWS["own"]
        put(store, follow, [change("a", {"name": "x"}, 1), change("b", {"name": "x"}, 1)])
        refuse_deletions(store)
        with store.transaction() as transaction:
            with pytest.raises(RefusedError):
                transaction.delete(follow, [change("a", None, 2), change("b", None, 2)], {"a": 2, "b": 2})
            transaction.put(follow, [change("c", {"name": "y"})], {"c": 1}, transaction.held(follow, ["c"]))
        with store.transaction(reads=True) as transaction:
            assert transaction.held(follow, ["a", "b", "c"]) == {"a": 1, "b": 1, "c": 1}
        assert sorted(key for key, _ in store.rows(follow)) == ["a", "b", "c"]

    def test_of_a_topic_one_transaction_goes_on_at_a_time(self, store: Store, make_store: MakeStore) -> None:
        """A key may lie in two partitions: who has the older state finds what the other wrote meanwhile."""
        follow = FOLLOWS["own"]
        found: list[Mapping[str, int]] = []
        over = threading.Event()

        def other() -> None:
            mine = make_store()
            mine.open(WITH_FUNCTION)
            try:
                with mine.transaction() as transaction:
                    found.append(transaction.held(follow, ["a"]))
                over.set()
            finally:
                mine.close()

        waiting = threading.Thread(target=other)
        with store.transaction() as transaction:
            assert transaction.held(follow, ["a"]) == {}
            waiting.start()
            assert not over.wait(0.3)
            transaction.put(follow, [change("a", {"name": "newer"}, 9)], {"a": 9}, {})
        waiting.join()
        assert found == [{"a": 9}]

    def test_parked_messages_are_kept_one_a_key_as_they_came(self, store: Store) -> None:
        """With bytes that no text can be made of, and since the first of them."""
        follow = FOLLOWS["copy"]
        with store.transaction() as transaction:
            transaction.park(follow, [bad("a", 4, offset=7), bad("b", 4, offset=7)])
        with store.transaction() as transaction:
            (since,) = (one.parked_at for one in transaction.parked(follow.topic, ["a"]))
            transaction.park(follow, [bad("a", 5, offset=8)])
        with store.transaction(reads=True) as transaction:
            assert [(one.key, one.raw.offset) for one in transaction.parked()] == [("a", 8), ("b", 7)]
            (found,) = transaction.parked(follow.topic, ["a"])
            assert found.raw == bad("a", 5, offset=8).raw
            assert (found.entry_id, "no state" in found.reason, found.parked_at) == (5, True, since)

    def test_parked_messages_are_forgotten_when_what_is_as_new_was_applied(self, store: Store) -> None:
        """Or what comes from no entry; an older state leaves them."""
        follow = FOLLOWS["copy"]
        with store.transaction() as transaction:
            transaction.park(follow, [bad(key, 5) for key in ("older", "same", "newer", "none", "other")])
            transaction.unpark(follow, {"older": 4, "same": 5, "newer": 6, "none": 0})
            assert [one.key for one in transaction.parked()] == ["older", "other"]

    def test_parked_messages_are_counted_and_paged(self, store: Store) -> None:
        """By topic and key; of one topic, or of all."""
        with store.transaction() as transaction:
            for name in ("own", "copy"):
                transaction.park(FOLLOWS[name], [bad(f"k{n}", 1) for n in range(5)])
        with store.transaction(reads=True) as transaction:
            assert (transaction.parked_count(), transaction.parked_count("conform.own")) == (10, 5)
            pages, after = [], None
            while page := transaction.parked(after=after, limit=3):
                after = page[-1].topic, page[-1].key
                pages.append([f"{one.topic[8:]} {one.key}" for one in page])
            own = transaction.parked("conform.own", after=("conform.own", "k3"))
        assert [len(page) for page in pages] == [3, 3, 3, 1]
        every = [one for page in pages for one in page]
        assert every == [f"{topic} k{n}" for topic in ("copy", "own") for n in range(5)]
        assert [one.key for one in own] == ["k4"]
        assert store.facts().parked == 10

    def test_what_is_known_of_the_model_is_remembered(self, store: Store, make_store: MakeStore) -> None:
        """Piece by piece, and by another connection."""
        assert store.facts().fingerprint is None
        at = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
        store.know(fingerprint="abc")
        store.know(loaded_at=at, topic_ids={"t": "id"}, began_at={"t": at}, current_at={"t": at, "u": at})
        store.ask_rebuild("why not")
        other = make_store()
        other.open(WITH_FUNCTION)
        try:
            facts = other.facts()
        finally:
            other.close()
        assert facts.fingerprint == "abc"
        assert (facts.loaded_at, facts.rebuild, facts.rebuild_for) == (at, "why not", WITH_FUNCTION.fingerprint)
        assert (facts.topic_ids, facts.current_at) == ({"t": "id"}, {"t": at, "u": at})
        assert (facts.began_at, facts.parked) == ({"t": at}, 0)
        store.ask_rebuild(None)
        assert (store.facts().rebuild, store.facts().rebuild_for) == (None, None)

    def test_of_a_topic_the_first_beginning_and_the_last_end_are_remembered(self, store: Store) -> None:
        """Whoever says so, in whatever order."""
        first = dt.datetime(2026, 1, 2, 3, 4, 5, tzinfo=dt.UTC)
        later = first + dt.timedelta(seconds=1)
        for at in (first, later, first):
            store.know(began_at={"t": at}, current_at={"t": at})
        facts = store.facts()
        assert (facts.began_at, facts.current_at) == ({"t": first}, {"t": later})

    def test_a_new_build_takes_the_place_of_the_live_one_once_it_is_as_far(self, store: Store) -> None:
        """Rows that are gone, new, other, the same; ids, parked messages; and old claims are void."""
        follow, place = FOLLOWS["own"], Place("conform.own", 0)
        put(store, follow, [change(key, {"name": "old"}, 1) for key in ("gone", "other")])
        with store.transaction() as transaction:
            claim = transaction.claim(place)
            assert transaction.advance(place, claim, 7)
            claim = claim._replace(offset=7)
            transaction.park(follow, [bad("p", 1)])
        store.begin_build()
        put(store, follow, [change(key, {"name": "new"}, 2) for key in ("other", "new")], build="new")
        assert sorted(key for key, _ in store.rows(follow)) == ["gone", "other"]
        with store.transaction("new") as transaction:
            mine = transaction.claim(place)
            assert mine.offset == 0
            assert transaction.advance(place, mine, 6)
            transaction.delete(follow, [change("dead", None, 5)], {"dead": 5})
        assert store.swap("print") == [place]
        assert sorted(key for key, _ in store.rows(follow)) == ["gone", "other"]
        with store.transaction("new") as transaction:
            assert transaction.advance(place, mine._replace(offset=6), 8)
        assert store.swap("print") == []
        assert {key: row["name"] for key, row in store.rows(follow)} == {"other": "new", "new": "new"}
        with store.transaction() as transaction:
            assert transaction.offsets() == {place: 8}
            assert not transaction.advance(place, claim, 9)
            assert not transaction.advance(place, claim._replace(offset=8), 9)
            assert transaction.held(follow, ["other", "new", "gone", "dead"]) == {"other": 2, "new": 2, "dead": 5}
            assert transaction.parked() == []
        assert (store.facts().fingerprint, store.facts().loaded_at is not None) == ("print", True)
        store.end_build()

    def test_of_a_topic_that_was_made_anew_the_old_offsets_say_nothing(self, store: Store) -> None:
        """They may be greater than the new topic is long."""
        place = Place("conform.copy", 0)
        with store.transaction() as transaction:
            assert transaction.advance(place, transaction.claim(place), 1000)
        store.begin_build()
        with store.transaction("new") as transaction:
            assert transaction.advance(place, transaction.claim(place), 3)
        assert store.swap("print") == [place]
        assert store.swap("print", anew=["conform.copy"]) == []
        with store.transaction(reads=True) as transaction:
            assert transaction.offsets() == {place: 3}

    def test_what_is_followed_no_more_holds_no_new_build_up_and_is_forgotten(self, store: Store) -> None:
        """Its offsets, and what was known of the topic."""
        gone, place, at = Place("conform.gone", 0), Place("conform.copy", 0), dt.datetime(2026, 1, 2, tzinfo=dt.UTC)
        advanced(store, gone, 7)
        advanced(store, place, 5)
        store.know(topic_ids={"conform.gone": "id", "conform.copy": "id"}, current_at={"conform.gone": at})
        store.begin_build()
        advanced(store, place, 5, build="new")
        assert store.swap("print", topic_ids={"conform.copy": "other"}, current_at={"conform.copy": at}) == []
        with store.transaction(reads=True) as transaction:
            assert transaction.offsets() == {place: 5}
        facts = store.facts()
        assert (facts.topic_ids, facts.current_at) == ({"conform.copy": "other"}, {"conform.copy": at})

    def test_a_swap_is_seen_by_whoever_claims_and_who_claimed_before_goes_on_with_nothing(
        self, store: Store, make_store: MakeStore
    ) -> None:
        """Where the new build has read nothing as well; and it waits for who has looked which mapping made it."""
        unread = Place("conform.copy", 1)
        store.know(fingerprint="old")
        with store.transaction() as transaction:
            claim = transaction.claim(unread)
        over = threading.Event()

        def swap() -> None:
            store.begin_build()
            assert store.swap("new") == []
            over.set()

        other = make_store()
        other.open(WITH_FUNCTION)
        swapping = threading.Thread(target=swap)
        try:
            with other.transaction() as transaction:
                assert transaction.fingerprint() == "old"
                swapping.start()
                assert not over.wait(0.3)
                assert transaction.fingerprint() == "old"
            swapping.join()
            assert over.is_set()
            with other.transaction() as transaction:
                assert transaction.fingerprint() == "new"
                assert not transaction.advance(unread, claim, 5)
        finally:
            other.close()

    def test_a_build_that_another_process_has_begun_anew_is_lost(self, store: Store, make_store: MakeStore) -> None:
        """Who had it before writes nothing, swaps nothing, and removes nothing."""
        follow = FOLLOWS["own"]
        other = make_store()
        other.open(WITH_FUNCTION)
        try:
            assert store.begin_build() != other.begin_build()
            with pytest.raises(LostBuildError), store.transaction("new"):
                pass
            with pytest.raises(LostBuildError):
                store.swap("mine")
            store.end_build()
            put(other, follow, [change("a", {"name": "x"})], build="new")
            assert other.swap("theirs") == []
        finally:
            other.close()
        assert store.facts().fingerprint == "theirs"
        assert [key for key, _ in store.rows(follow)] == ["a"]

    def test_a_new_build_that_would_empty_a_table_is_refused(self, store: Store) -> None:
        """A mapping that fits no message, a topic that is not filled yet: what is served stays, unless it is wanted."""
        follow = FOLLOWS["own"]
        put(store, follow, [change("a", {"name": "x"})])
        store.begin_build()
        with store.transaction("new") as transaction:
            transaction.park(follow, [bad("a", 1)])
        with pytest.raises(BadBuildError, match=r"conform_own empty: of conform\.own 1 messages are parked.*no state"):
            store.swap("print", may_empty=True)
        assert [key for key, _ in store.rows(follow)] == ["a"]
        store.begin_build()
        with pytest.raises(BadBuildError, match=r"conform_own empty: conform\.own has nothing for it"):
            store.swap("print")
        assert [key for key, _ in store.rows(follow)] == ["a"]
        assert store.swap("print", may_empty=True) == []
        assert list(store.rows(follow)) == []

    def test_a_new_build_refuses_what_the_table_refuses(self, make_store: MakeStore) -> None:
        """Or it would be put into its place with what is parked live; and values that must be unique change hands."""
        (follow,) = WITH_STRICT.follows
        store = make_store()
        store.create(WITH_STRICT)
        store.open(WITH_STRICT)
        try:
            put(store, follow, [change(key, {"name": name}, 1) for key, name in ("ax", "by", "cz")])
            store.begin_build()
            put(store, follow, [change(key, {"name": name}, 2) for key, name in ("ay", "bx", "dz")], build="new")
            with store.transaction("new") as transaction:
                for wrong in ({"name": "x"}, {"name": "n", "price": -1}):
                    with pytest.raises(RefusedError):
                        transaction.put(follow, [change("e", wrong)], {"e": 1}, {})
            assert store.swap("print") == []
            assert {key: row["name"] for key, row in store.rows(follow)} == {"a": "y", "b": "x", "d": "z"}
            store.begin_build()
            store.end_build()
        finally:
            store.close()

    def test_one_process_rebuilds_at_a_time(self, store: Store, make_store: MakeStore) -> None:
        """The right goes with the block."""
        other = make_store()
        other.open(WITH_FUNCTION)
        try:
            with store.builder() as mine:
                assert mine
                with other.builder() as theirs:
                    assert not theirs
            with other.builder() as theirs:
                assert theirs
        finally:
            other.close()

    def test_two_that_claim_and_advance_at_once_never_both_go_on(self, store: Store, make_store: MakeStore) -> None:
        """A partition is written by one at a time: as many offsets as there were advances that said so."""
        place = Place("conform.copy", 0)
        went_on: list[int] = []

        def work() -> None:
            mine = make_store()
            mine.open(WITH_FUNCTION)
            try:
                for _ in range(20):
                    with mine.transaction() as transaction:
                        claim = transaction.claim(place)
                    with mine.transaction() as transaction:
                        if transaction.advance(place, claim, claim.offset + 1):
                            went_on.append(1)
            finally:
                mine.close()

        threads = [threading.Thread(target=work) for _ in range(3)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        with store.transaction(reads=True) as transaction:
            assert transaction.offsets() == {place: len(went_on)}
        assert went_on


def _fail(_value: bytes, _headers: Mapping[str, bytes]) -> Any:
    raise ValueError("no state")

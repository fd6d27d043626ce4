"""From entries to messages: collapse, headers, sizes, times."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from outbox.collapse import collapse
from outbox.entity_type import EntityType
from outbox.entry import Entry
from outbox.message import messages

TYPES = {
    "user": EntityType("user", "users"),
    "order": EntityType("order", "orders", collapse=False),
}
LIMITS = {"users": 10_000, "orders": 10_000}
NOW = 1_800_000_000_000


def entry(number: int, type_name: str = "user", key: str = "1", **more: object) -> Entry:
    """An entry with a small state."""
    return Entry(**{"id": number, "type": type_name, "key": key, "state": b"{}", "created_ms": NOW, **more})  # type: ignore[arg-type]  # each test names fields of Entry


entry_lists = st.lists(st.tuples(st.sampled_from(["user", "order", "unknown"]), st.sampled_from("abc"))).map(
    lambda pairs: [entry(n, t, k) for n, (t, k) in enumerate(pairs)]
)


@given(entry_lists)
def test_collapse_keeps_the_last_of_each_key_in_id_order(entries: list[Entry]) -> None:
    """And everything of a type that does not collapse."""
    kept = list(collapse(entries, TYPES))
    assert kept == sorted(kept)
    last = {(e.type, e.key): e for e in entries}
    assert {(e.type, e.key): e for e in kept} == last
    assert [e for e in kept if e.type == "order"] == [e for e in entries if e.type == "order"]
    collapsing = [(e.type, e.key) for e in kept if e.type != "order"]
    assert len(collapsing) == len(set(collapsing))


def test_a_record_has_one_header_unless_the_entry_says_more() -> None:
    """Each header costs; JSON is the rule and goes without saying."""
    made, _ = messages([entry(7, content_type="application/json")], TYPES, LIMITS, now_ms=NOW)
    assert made[0].headers == {"outbox-id": b"7"}
    made, _ = messages(
        [entry(7, content_type="application/avro", cause="moved", headers='{"tenant": "a"}')],
        TYPES,
        LIMITS,
        now_ms=NOW,
    )
    assert list(made[0].headers.items()) == [
        ("outbox-id", b"7"),
        ("content-type", b"application/avro"),
        ("cause", b"moved"),
        ("tenant", b"a"),
    ]


def test_a_tombstone_is_a_true_null() -> None:
    """Empty bytes would stay in a compacted topic as a live record."""
    made, _ = messages([entry(1, state=None), entry(2, key="2", state=b"")], TYPES, LIMITS, now_ms=NOW)
    assert made[0].value is None
    assert made[1].value == b""


def test_a_created_at_in_the_future_is_written_as_now() -> None:
    """Kafka refuses times that are too far ahead."""
    made, _ = messages([entry(1, created_ms=NOW + 7_200_000), entry(2, created_ms=5)], TYPES, LIMITS, now_ms=NOW)
    assert [m.created_ms for m in made] == [NOW, 5]


def test_what_cannot_be_published_is_named_and_the_others_go_on() -> None:
    """Too large for its topic, headers included; or of a type that nobody registered."""
    made, refused = messages(
        [
            entry(1),
            entry(2, state=b"x" * 9_990),
            entry(3, state=b"x" * 9_000, headers='{"h": "' + "y" * 1_000 + '"}'),
            entry(4, "unknown"),
            entry(5),
        ],
        TYPES,
        LIMITS,
        now_ms=NOW,
    )
    assert [m.entry.id for m in made] == [1, 5]
    assert [(u.entry.id, u.reason) for u in refused] == [(2, "too-large"), (3, "too-large"), (4, "unknown-type")]


def test_the_size_rule_keeps_the_reserve_that_was_measured() -> None:
    """Key, value and headers, 128 bytes, and 8 a header."""
    header_bytes = len("outbox-id") + 1 + 8
    fits = 10_000 - 128 - header_bytes - 1
    made, refused = messages([entry(1, state=b"x" * fits)], TYPES, LIMITS, now_ms=NOW)
    assert (len(made), len(refused)) == (1, 0)
    made, refused = messages([entry(1, state=b"x" * (fits + 1))], TYPES, LIMITS, now_ms=NOW)
    assert (len(made), len(refused)) == (0, 1)

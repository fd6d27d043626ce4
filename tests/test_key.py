"""The key's text: one text for one key, and no text that Kafka or PostgreSQL cannot hold."""

from __future__ import annotations

from datetime import UTC, date, datetime
from decimal import Decimal
from enum import Enum, IntEnum
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.errors import EntryKeyError
from outbox.key import key_text


class Country(Enum):
    FRANCE = "fr"


class Number(IntEnum):
    SEVEN = 7


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("a:b", "a:b"),
        (42, "42"),
        (-(10**30), "-1000000000000000000000000000000"),
        (True, "true"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (date(2026, 1, 2), "2026-01-02"),
        (Country.FRANCE, "fr"),
        (Number.SEVEN, "7"),
        (("a:b\\",), "a:b\\"),
        (("acme", 7), "acme:7"),
        (("a:b", "c\\"), "a\\:b:c\\\\"),
        (("", "a"), ":a"),
        ("é" * 512, "é" * 512),
    ],
)
def test_a_key_has_one_text(key: object, text: str) -> None:
    """One part is written as it is; parts of a composite key are escaped and joined with a colon."""
    assert key_text("customer", key) == text


@pytest.mark.parametrize(
    ("key", "word"),
    [
        ("", "empty"),
        ((), "empty"),
        (None, "None"),
        ((1, None), "None"),
        ("a" * 1025, "1025 bytes"),
        ("é" * 513, "1026 bytes"),
        ("a\x00b", "NUL"),
        ("a\ud800", "surrogate"),
        (1.5, "float"),
        (Decimal("1.0"), "Decimal"),
        (b"a", "bytes"),
        (datetime(2026, 1, 2, tzinfo=UTC), "datetime"),
        ([1], "list"),
    ],
)
def test_what_is_no_key_is_refused_with_the_entity_and_the_cure(key: object, word: str) -> None:
    """Empty, over 1024 bytes, not text in UTF-8, or a type that has more than one text."""
    with pytest.raises(EntryKeyError, match=word) as caught:
        key_text("customer", key)
    assert '"customer"' in caught.value.message
    assert caught.value.cure


_parts = st.tuples(*[st.text(alphabet=":\\ab", min_size=1, max_size=5)] * 2)


@given(_parts, _parts)
def test_two_composite_keys_never_share_a_text(one: tuple[str, str], other: tuple[str, str]) -> None:
    """Escaping keeps the parts apart whatever they hold."""
    assert (key_text("t", one) == key_text("t", other)) == (one == other)

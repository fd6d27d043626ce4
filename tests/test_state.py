"""The state's bytes: exact, or refused with the place of what is wrong."""

from __future__ import annotations

import json
import math
from collections import namedtuple
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from types import MappingProxyType
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict

from outbox.errors import StateError
from outbox.state import state_bytes

NAN, INFINITY = float("nan"), float("inf")


def written(state: object) -> str:
    return state_bytes("order", "7", state).decode()


def exactly(text: str) -> Any:
    """JSON with numbers as they are written."""
    return json.loads(text, parse_float=Decimal)


class Colour(Enum):
    RED = "red"
    NOTHING = NAN


@dataclass
class Line:
    sku: str
    price: Decimal | float | None
    note: str | None = None
    _private: int = field(default=1)


class Model(BaseModel):
    model_config = ConfigDict(extra="allow")
    id: UUID
    price: Decimal | float | None = None


Pair = namedtuple("Pair", ["left", "right"])  # noqa: PYI024 - the untyped form is a type of its own as well


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"a": 1, "b": [True, None, 1.5, "é"]}, '{"a":1,"b":[true,null,1.5,"é"]}'),
        ({"id": UUID(int=1)}, '{"id":"00000000-0000-0000-0000-000000000001"}'),
        ({"at": datetime(2026, 1, 2, 3, 4, 5, 6, UTC)}, '{"at":"2026-01-02T03:04:05.000006+00:00"}'),
        ({"on": date(2026, 1, 2), "at": time(3, 4)}, '{"on":"2026-01-02","at":"03:04:00"}'),
        ({"colour": Colour.RED}, '{"colour":"red"}'),
        (Line("x", Decimal("1.10")), '{"sku":"x","price":1.10,"note":null}'),
        ([Line("x", Decimal("1.10")), 2**64], '[{"sku":"x","price":1.10,"note":null},18446744073709551616]'),
        (Model(id=UUID(int=2), price=Decimal("0.10")), '{"id":"00000000-0000-0000-0000-000000000002","price":0.10}'),
        (MappingProxyType({"a": 1}), '{"a":1}'),
        (Pair(1, 2), '{"left":1,"right":2}'),
        ({"tags": {"b", "a"}, "pair": (1, 2)}, '{"tags":["a","b"],"pair":[1,2]}'),
        ({"mixed": frozenset({1, "a"})}, '{"mixed":[1,"a"]}'),
        ({1: "a", UUID(int=1): "b"}, '{"1":"a","00000000-0000-0000-0000-000000000001":"b"}'),
        ({date(2026, 1, 2): 1, Colour.RED: 2}, '{"2026-01-02":1,"red":2}'),
        ("text", '"text"'),
        (0, "0"),
    ],
)
def test_json_of_the_usual_types(state: object, text: str) -> None:
    """Each type has one form; a set is sorted, so that equal states have equal bytes."""
    assert written(state) == text


@pytest.mark.parametrize("number", ["1.10", "0.1000000000000000055511151231257827", "1E+40", "-0", "0E-9", "123"])
def test_a_decimal_is_an_exact_number(number: str) -> None:
    """Not text and not a float: every digit is there."""
    assert str(Decimal(written({"n": Decimal(number)})[5:-1])) == number


@pytest.mark.parametrize("number", [2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1, 10**100])
def test_a_whole_number_of_any_size_is_exact(number: int) -> None:
    """Beyond 64 bits, too, at any depth and beside everything else."""
    state = {"n": [number], "line": Line("x", Decimal("1.10")), "at": date(2026, 1, 2)}
    assert exactly(written(state))["n"] == [number]
    assert exactly(written(state))["line"]["price"] == Decimal("1.10")


@pytest.mark.parametrize(
    ("state", "place"),
    [
        ({"a": NAN}, r"\$\.a"),
        ({"a": -INFINITY}, r"\$\.a"),
        ({"lines": [{}, {"price": NAN}]}, r"\$\.lines\[1\]\.price"),
        ({"lines": ({"price": None}, {"price": INFINITY})}, r"\$\.lines\[1\]\.price"),
        ({"a": None, "line": Line("x", NAN)}, r"\$\.line\.price"),
        (Line("x", INFINITY), r"\$\.price"),
        (Model(id=UUID(int=1), price=NAN), r"\$\.price"),
        ({"a": {NAN}}, r"\$\.a\[0\]"),
        ({"a": Colour.NOTHING}, r"\$\.a"),
        ({"a": MappingProxyType({"b": NAN})}, r"\$\.a\.b"),
        ({"a": Decimal("NaN")}, r"\$\.a"),
        ({"a": Decimal("sNaN")}, r"\$\.a"),
        ([Decimal("-Infinity")], r"\$\[0\]"),
        (NAN, r"\$ is"),
        ({"a": {"b c": NAN}}, r'\$\.a\["b c"\]'),
    ],
)
def test_nan_and_infinity_are_refused_wherever_they_are(state: object, place: str) -> None:
    """orjson alone would write null, and a read model would take it for one."""
    with pytest.raises(StateError, match=place) as caught:
        state_bytes("order", "7", state)
    assert 'order "7"' in caught.value.message
    assert "no such number" in caught.value.message


def test_the_word_null_in_a_text_is_no_lost_number() -> None:
    """Only numbers are refused."""
    assert written({"a": "null", "b": None, "c": [1.0, Decimal(1)], "d": Line("x", None)})


circle: list[Any] = []
circle.append(circle)


@pytest.mark.parametrize(
    ("state", "what"),
    [
        ({"lines": [{"who": object()}]}, r"\$\.lines\[0\]\.who is a builtins.object"),
        ({"a": timedelta(1)}, r"\$\.a is a datetime.timedelta"),
        ({"a": time(1, tzinfo=UTC)}, r"\$\.a is a time with a time zone"),
        ({"a": b"x"}, r"\$\.a holds bytes"),
        ({"a": 1j}, r"\$\.a is a builtins.complex"),
        ({"a": "\ud800"}, r"\$\.a holds a lone surrogate"),
        ({"a": {"\ud800": 1}}, r"a key of \$\.a holds a lone surrogate"),
        ({"a": {1: 1, "1": 2}}, r"two keys of \$\.a have the same text '1'"),
        ({"a": {None: 1}}, r"None is a key of \$\.a"),
        ({"a": {(1, 2): 1}}, r"\(1, 2\) is a key of \$\.a"),
        ({"a": circle}, "circle"),
    ],
)
def test_what_json_cannot_hold_is_refused_with_its_place_and_type(state: object, what: str) -> None:
    """The error names the entity, the place inside the state, the type and the cure."""
    with pytest.raises(StateError, match=what) as caught:
        state_bytes("order", "7", state)
    assert 'order "7"' in caught.value.message
    assert caught.value.cure


def test_none_is_no_state() -> None:
    """A tombstone is asked for by its name."""
    with pytest.raises(StateError, match=r"outbox\.delete"):
        state_bytes("order", "7", None)


@pytest.mark.parametrize("state", [b"\x00\xff", bytearray(b"\x00\xff"), memoryview(b"\x00\xff")])
def test_bytes_pass_untouched(state: object) -> None:
    """The service has encoded them itself."""
    assert state_bytes("order", "7", state) == b"\x00\xff"


_json = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.decimals()
    | st.text(alphabet=st.characters(codec="utf-8")),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(alphabet=st.characters(codec="utf-8")), inner),
    max_leaves=20,
)


def _finite(value: object) -> bool:
    match value:
        case float():
            return math.isfinite(value)
        case Decimal():
            return value.is_finite()
        case list():
            return all(map(_finite, value))
        case dict():
            return all(map(_finite, value.values()))
        case _:
            return True


@given(_json)
def test_a_state_is_read_back_as_it_was_or_refused(state: object) -> None:
    """Whatever JSON can hold; nothing changes without a word."""
    if state is None:
        return
    if not _finite(state):
        with pytest.raises(StateError):
            written(state)
        return
    assert json.loads(written(state), parse_float=Decimal) == _with_decimals(state)


def _with_decimals(value: object) -> object:
    match value:
        case float():
            return Decimal(repr(value))
        case list():
            return [_with_decimals(item) for item in value]
        case dict():
            return {name: _with_decimals(item) for name, item in value.items()}
        case _:
            return value

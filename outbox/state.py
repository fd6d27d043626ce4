"""The serialiser: an entity's state as JSON, exact or refused.

orjson does the work. It is helped with what it does not know, and watched where it would change a value without a
word: it writes NaN and infinity as null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time
from decimal import Decimal
from enum import Enum
from types import NoneType
from typing import Any, NoReturn, cast
from uuid import UUID

import orjson

from outbox.errors import StateError

# orjson itself gives up at 254; a state that is nested deeper is a circle.
_MAX_DEPTH = 200

_MIN_INT, _MAX_INT = -(2**63), 2**64 - 1


def state_bytes(type: str, key: str, state: object) -> bytes:
    """A state's bytes: `bytes`, `bytearray` and `memoryview` as they are, anything else as JSON in UTF-8.

    JSON takes, nested at will: mappings, lists, tuples, sets (sorted), text, numbers, booleans, None, UUID,
    datetime, date, time, enums (their value), dataclasses, attrs classes, named tuples (an object of their fields)
    and pydantic models. A Decimal and a whole number of any size are written as exact JSON numbers. The keys of a
    mapping may be text, whole numbers, UUIDs, dates and enums, as long as no two of them share a text.

    Raises `StateError`, which names the place inside the state (`$.lines[3].price`), for NaN and infinity, text that
    is not valid Unicode, circles, and every other type; and for None, which is what `outbox.delete` is for.
    `type` and `key` name the entity.
    """
    if isinstance(state, bytes):
        return state
    if isinstance(state, (bytearray, memoryview)):
        return bytes(state)
    if state is None:
        raise StateError(
            f'The state of {type} "{key}" is None.', cure="To publish a tombstone call outbox.delete(where, type, key)."
        )
    try:
        try:
            written = orjson.dumps(state, _known)
        except orjson.JSONEncodeError:
            # What orjson cannot write, and where: the slow way finds out, or writes it exactly.
            return orjson.dumps(_plain(state, "$", 0))
        # A null is either a None or a number that got lost: only a state that has one is looked at.
        if b"null" in written and _lost_number(state):
            _plain(state, "$", 0)
    except (_Unwritable, RecursionError, orjson.JSONEncodeError) as problem:
        what, cure = problem.args if isinstance(problem, _Unwritable) else (f"{problem}", "")
        raise StateError(f'The state of {type} "{key}" cannot be written as JSON: {what}.', cure=cure) from problem
    return written


class _Unwritable(Exception):  # noqa: N818 - it never leaves this module
    """What is wrong, and the cure."""


def _known(value: object) -> object:
    """What orjson does not know, as something that it does. A TypeError says that there is no such thing."""
    if isinstance(value, Decimal):
        if value.is_finite():
            return orjson.Fragment(str(value))
    else:
        known = _simpler(value)
        if known is not value:
            return known
    raise TypeError


def _simpler(value: object) -> object:
    """A value of a type of its own as a dict, list, text or number; the value itself when there is no such form."""
    dump = getattr(value, "model_dump", None)
    if callable(dump):
        # A pydantic model (version 2). Not its own JSON: that writes a Decimal as text.
        return dump(mode="python")
    if isinstance(value, Mapping):
        return dict(value)
    named = getattr(value, "_asdict", None)
    if callable(named):
        return named()
    if isinstance(value, AbstractSet):
        return _sorted(value)
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, float):
        return float(value)
    attributes = getattr(value.__class__, "__attrs_attrs__", None)
    if attributes is not None:
        return {attribute.name: getattr(value, attribute.name) for attribute in attributes}
    return value


def _sorted(values: AbstractSet[Any]) -> list[Any]:
    # The order of a set differs from process to process; the state must not.
    try:
        return sorted(values)
    except TypeError:
        return sorted(values, key=lambda value: (value.__class__.__name__, repr(value)))


# -- NaN ---------------------------------------------------------------------------------------------------------


# What is no number that could get lost: a Decimal was looked at when it was written.
_SAFE = frozenset({str, int, bool, NoneType, UUID, datetime, date, time, Decimal, bytes})


def _lost_number(value: object) -> bool:
    """Whether a float that is no number is inside; `value` is what orjson has written, so it has an end."""
    kind = value.__class__
    if kind is dict:
        items: Iterable[object] = cast("dict[str, object]", value).values()
    elif kind is list or kind is tuple:
        items = cast("list[object]", value)
    elif isinstance(value, float):
        return value - value != 0.0
    elif isinstance(value, Enum):
        return _lost_number(value.value)
    elif is_dataclass(value):
        items = [getattr(value, field.name) for field in fields(value)]
    else:
        known = _simpler(value)
        return known is not value and _lost_number(known)
    for item in items:
        # Written for speed: this is what a state with a None pays.
        kind = item.__class__
        if kind in _SAFE:
            continue
        if kind is float:
            if item - item != 0.0:  # type: ignore[operator]  # a float: NaN and the infinities have no difference
                return True
        elif _lost_number(item):
            return True
    return False


# -- the slow way: with the place of each value ---------------------------------------------------------------------


def _plain(value: object, place: str, depth: int) -> object:  # noqa: PLR0912 - one branch a type
    """The value with everything that orjson refuses written out as a `Fragment`. Raises `_Unwritable`."""
    if value is None or isinstance(value, (bool, UUID, datetime, date)):
        return value
    if isinstance(value, Enum):
        return _plain(value.value, place, depth + 1)
    if isinstance(value, str):
        return _text(str(value), place)
    if isinstance(value, int):
        return int(value) if _MIN_INT <= value <= _MAX_INT else orjson.Fragment(_digits(value))
    if isinstance(value, float):
        if not math.isfinite(value):
            _not_finite(value, place)
        return float(value)
    if isinstance(value, Decimal):
        if not value.is_finite():
            _not_finite(value, place)
        return orjson.Fragment(str(value))
    if isinstance(value, time):
        if value.tzinfo is not None:
            raise _Unwritable(f"{place} is a time with a time zone", "Use a datetime, or write it as text yourself.")
        return value
    if depth > _MAX_DEPTH:
        raise _Unwritable(
            f"{place[:200]} is nested more than {_MAX_DEPTH} levels deep, perhaps in a circle",
            "Leave the way back (a child's reference to its parent) out of the state.",
        )
    if isinstance(value, orjson.Fragment):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        # As orjson does it: fields with a leading underscore are private.
        return {
            field.name: _plain(getattr(value, field.name), f"{place}.{field.name}", depth + 1)
            for field in fields(value)
            if not field.name.startswith("_")
        }
    simple = value if isinstance(value, (dict, list)) else _simpler(value)
    if isinstance(simple, dict):
        return _object(simple, place, depth)
    if isinstance(simple, list):
        return [_plain(item, f"{place}[{index}]", depth + 1) for index, item in enumerate(simple)]
    if isinstance(value, (bytes, bytearray, memoryview)):
        raise _Unwritable(
            f"{place} holds bytes", "Write them as text (base64), or pass the whole state as bytes with a content_type."
        )
    raise _Unwritable(
        f"{place} is a {value.__class__.__module__}.{value.__class__.__qualname__}",
        "Build the state of plain values: dict, list, text, number, UUID, datetime, dataclass, pydantic model.",
    )


def _object(value: Mapping[Any, object], place: str, depth: int) -> dict[str, object]:
    made: dict[str, object] = {}
    for key, item in value.items():
        name = _name(key, place)
        inside = f"{place}.{name}" if name.isidentifier() else f"{place}[{json.dumps(name)}]"
        if name in made:
            raise _Unwritable(f"two keys of {place} have the same text {name!r}", "Make the keys text of their own.")
        made[name] = _plain(item, inside, depth + 1)
    return made


def _name(key: object, place: str) -> str:
    if isinstance(key, Enum):
        return _name(key.value, place)
    if isinstance(key, str):
        return _text(str(key), f"a key of {place}")
    if isinstance(key, int) and not isinstance(key, bool):
        return _digits(key)
    if isinstance(key, UUID):
        return str(key)
    if isinstance(key, date):
        return key.isoformat()
    raise _Unwritable(
        f"{key!r:.100} is a key of {place} and a {key.__class__.__qualname__}",
        "The keys of a JSON object are text: convert it.",
    )


def _text(text: str, place: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _Unwritable(
            f"{place} holds a lone surrogate and is no valid text",
            "Look where it was decoded from bytes: with errors='surrogateescape' it stays invalid.",
        ) from error
    return text


def _digits(value: int) -> str:
    # str() refuses more than 4,300 digits (sys.set_int_max_str_digits), which no JSON reader would take either.
    try:
        return int.__repr__(value)
    except ValueError as error:
        raise _Unwritable("it holds a whole number of thousands of digits", "Write it as text.") from error


def _not_finite(value: object, place: str) -> NoReturn:
    raise _Unwritable(f"{place} is {value!r}, and JSON has no such number", "Use None, or leave the field out.")

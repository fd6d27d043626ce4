"""Rows: what a change becomes in a table. Pure."""

from __future__ import annotations

import datetime as dt
import re
import uuid
from collections.abc import Callable, Sequence
from decimal import Context, Decimal
from functools import partial
from typing import Any

from sqlalchemy import Column, types

from outbox.read_model.change import Change
from outbox.read_model.declared import ENTRY_ID, KEY, UPDATED_AT, Columns, Convert, Copy

Row = tuple[Any, ...]
"""The values of the columns that `into.columns` names."""
# The usual context rounds to 28 digits.
_EXACT = Context(prec=100_000)
_NANOSECONDS = re.compile(r"\.\d{6}\d*[1-9]")


def maker(into: Copy | Columns) -> Callable[[Change, int], Row]:
    """How rows are made of changes and the entry ids that are held; what it raises is of the change."""
    if isinstance(into, Copy):
        return _copied
    values = [_value(into.table.c[name], how) for name, how in into.values.items()]
    key = key_of(into)
    own = [name for name in (ENTRY_ID, UPDATED_AT) if name in into.table.c]
    time = _fit(into.table.c[UPDATED_AT]) if UPDATED_AT in own else _same

    def make(change: Change, held: int) -> Row:
        kept = {ENTRY_ID: max(held, 0), UPDATED_AT: time(_time(change.updated_ms))}
        try:
            return key(change.key), *(value(change) for value in values), *(kept[name] for name in own)
        except Exception as error:
            raise ValueError(_blamed(into, change, key, values) or f"{error.__class__.__name__}: {error}") from error

    return make


def _blamed(
    into: Columns, change: Change, key: Callable[[str], Any], values: Sequence[Callable[[Change], Any]]
) -> str | None:
    """Which column cannot be filled, and why."""
    tried: list[tuple[str, Callable[[], Any]]] = [(into.key, lambda: key(change.key))]
    tried += [(name, partial(value, change)) for name, value in zip(into.values, values, strict=True)]
    for name, make in tried:
        try:
            make()
        except Exception as error:  # noqa: BLE001  the service's own function may raise anything
            of = f" (of {into.values[name]!r})" if isinstance(into.values.get(name), str) else ""
            return f"column {name}{of}: {error.__class__.__name__}: {error}"
    return None


def key_of(into: Copy | Columns) -> Callable[[str], Any]:
    """What makes of an entity's key what the table's column has; it raises `ValueError` for one that cannot be held."""
    column = into.table.c[KEY if isinstance(into, Copy) else into.key]
    made, fit = converter(column), _fit(column)
    return made if fit is _same else lambda key: fit(made(key))


def _copied(change: Change, held: int) -> Row:
    return change.key, change.state, max(held, 0), _time(change.updated_ms)


def _time(milliseconds: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(milliseconds / 1000, dt.UTC)


def _value(column: Column[Any], how: str | tuple[str, Convert] | Callable[[Change], Any]) -> Callable[[Change], Any]:
    made, fit = _told(column, how), _fit(column)
    return made if fit is _same else lambda change: fit(made(change))


def _told(column: Column[Any], how: str | tuple[str, Convert] | Callable[[Change], Any]) -> Callable[[Change], Any]:
    if callable(how):
        return how
    member, convert = how if isinstance(how, tuple) else (how, converter(column))
    path = member.split(".")

    def value(change: Change) -> Any:
        found = change.state
        if not isinstance(found, dict):
            raise TypeError("the state is no object, which has members")
        for name in path:
            found = found.get(name) if isinstance(found, dict) else None
        return None if found is None else convert(found)

    return value


def _same(value: Any) -> Any:
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


def _whole(value: Any) -> int:
    number = int(value)
    if isinstance(value, float) and number != value:
        raise ValueError(f"{value!r} is no whole number")
    return number


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{value!r} is neither true nor false")
    return value


def _decimal(value: Any) -> Decimal:
    # A float's text is the number that JSON had, its binary value is not.
    return Decimal(str(value))


def _moment(value: Any) -> dt.datetime:
    if isinstance(value, dt.datetime):
        return value
    if _NANOSECONDS.search(value):
        raise ValueError(f"{value} has more than microseconds, which are all that is kept")
    return dt.datetime.fromisoformat(value)


def _fit(column: Column[Any]) -> Convert:
    """What makes of a value one that every store keeps as it is; raises `ValueError` for one that would be cut."""
    kind = column.type
    if isinstance(kind, types.DateTime):
        return _in_utc if kind.timezone else _without_zone
    if isinstance(kind, types.Integer):
        bits = 16 if isinstance(kind, types.SmallInteger) else 64 if isinstance(kind, types.BigInteger) else 32
        return lambda value: _within_bits(value, bits)
    if isinstance(kind, types.Numeric) and not isinstance(kind, types.Float):
        # NUMERIC(10) has no fraction; NUMERIC has any.
        places = kind.scale if kind.scale is not None or kind.precision is None else 0
        return _same if places is None else lambda value: _within(value, places, kind.precision)
    if isinstance(kind, types.String) and not isinstance(kind, types.Enum) and kind.length is not None:
        longest = kind.length
        return lambda value: _no_longer(value, longest)
    return _same


def _within_bits(value: Any, bits: int) -> Any:
    if isinstance(value, int) and not -(1 << bits - 1) <= value < 1 << bits - 1:
        raise ValueError(f"{value} is no integer of {bits} bits")
    return value


def _no_longer(value: Any, longest: int) -> Any:
    if isinstance(value, str) and len(value) > longest:
        raise ValueError(f"it has {len(value)} characters, and {longest} at the most are kept")
    return value


def _in_utc(value: Any) -> Any:
    """A time with its zone, UTC: some stores forget the zone. One without is UTC."""
    if not isinstance(value, dt.datetime):
        return value
    return value.astimezone(dt.UTC) if value.tzinfo else value.replace(tzinfo=dt.UTC)


def _without_zone(value: Any) -> Any:
    return _in_utc(value).replace(tzinfo=None) if isinstance(value, dt.datetime) else value


def _within(value: Any, places: int, precision: int | None) -> Any:
    if isinstance(value, Decimal) and value.is_finite():
        exponent = value.normalize(_EXACT).as_tuple().exponent
        if isinstance(exponent, int) and -exponent > places:
            raise ValueError(f"{value} has more than {places} decimal places")
        if precision is not None and value and value.adjusted() >= precision - places:
            raise ValueError(f"{value} has more than {precision - places} digits before the point")
    return value


_CONVERTERS: Sequence[tuple[type[types.TypeEngine[Any]], Convert]] = (
    (types.JSON, _same),
    (types.Uuid, lambda value: value if isinstance(value, uuid.UUID) else uuid.UUID(value)),
    (types.Boolean, _truth),
    (types.Integer, _whole),
    (types.Float, float),
    (types.Numeric, _decimal),
    (types.DateTime, _moment),
    (types.Date, dt.date.fromisoformat),
    (types.Time, dt.time.fromisoformat),
    (types.Enum, _same),
    (types.String, _text),
)


def converter(column: Column[Any]) -> Convert:
    """What makes of a JSON value one of the column's type; a type that is not known takes it as it is."""
    for kind, convert in _CONVERTERS:
        if isinstance(column.type, kind):
            return convert
    return _same

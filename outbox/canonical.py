"""Canonical JSON: two texts of the same value have the same digest. Pure."""

from __future__ import annotations

import json
from decimal import Context, Decimal
from hashlib import blake2b
from typing import Any

import orjson

_DIGEST_BYTES = 16
_WHOLE_DIGITS = 18
# The usual context rounds to 28 digits.
_EXACT = Context(prec=100_000)
# All digits alike, and all that may follow one in a number: searched as a text, which is ten times as quick as by a
# pattern.
_FORM = bytes.maketrans(b"0123456789.eE", b"0000000000...")


def digest(value: bytes) -> bytes:
    """Of bytes as they are: 16 bytes."""
    return blake2b(value, digest_size=_DIGEST_BYTES).digest()


def json_digest(text: bytes) -> bytes | None:
    """Of a JSON text's value, whatever the order of its keys and the form of its numbers; None when it is none.

    Numbers are compared as decimals, exactly: `1`, `1.0` and `1e0` are one value, `0.1` and `0.10000000000000001` two.
    """
    try:
        quick = orjson.loads(text)
        # Most texts that look like it have such a number within a string alone, a price or a telephone number say.
        if not (_may_have_odd_number(text) and _has_float(quick)):
            return digest(orjson.dumps(quick, option=orjson.OPT_SORT_KEYS))
    except (orjson.JSONDecodeError, orjson.JSONEncodeError):
        pass  # it may be more than orjson takes: nested deeply, a lone surrogate
    try:
        value = _plain(json.loads(text, parse_float=Decimal, parse_int=Decimal, parse_constant=_refuse))
    except (ValueError, ArithmeticError, RecursionError):
        return None
    try:
        return digest(orjson.dumps(value, option=orjson.OPT_SORT_KEYS))
    except orjson.JSONEncodeError:
        return digest(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def _may_have_odd_number(text: bytes) -> bool:
    """Whether a number may be in it whose text is not the only one of its value.

    Those have a point or an exponent, or are beyond 64 bits; orjson takes each of them for a float.
    """
    form = text.translate(_FORM)
    return b"0." in form or b"0" * 19 in form


def _has_float(value: Any) -> bool:
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, float):
            return True
        if isinstance(one, dict):
            left += one.values()
        elif isinstance(one, list):
            left += one
    return False


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return _number(value) if isinstance(value, Decimal) else value


def _number(number: Decimal) -> Any:
    """A whole number as itself, as the short way has it; any other as an object that no JSON text is likely to hold."""
    if not number:
        return 0
    if number.adjusted() < _WHOLE_DIGITS and number == number.to_integral_value():
        return int(number)
    return {"\0number": str(number.normalize(_EXACT))}

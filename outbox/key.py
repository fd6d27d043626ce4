"""The key of an entity as text: the Kafka message key is this, in UTF-8."""

from __future__ import annotations

from datetime import date, datetime
from enum import Enum
from uuid import UUID

from outbox.errors import EntryKeyError

KeyPart = str | int | UUID | date | Enum
"""What a key, or a part of one, is made of; `bool` is an `int` and is written `true` or `false`."""

Key = KeyPart | tuple[KeyPart, ...]
"""A key: one part, or a tuple of parts for a composite key."""

MAX_KEY_BYTES = 1024

_CURE = "Use the entity's primary key: text, a whole number, a UUID, a date, an enum, or a tuple of these."


def key_text(type: str, key: object) -> str:
    r"""The text of a key, 1 to 1024 bytes in UTF-8.

    One part is written as it is. The parts of a composite key are joined with `:`; inside a part `\` is written
    `\\` and `:` is written `\:`, so that two keys never share a text: `("a:b", 7)` is `a\:b:7`. The same is done in
    SQL by the capture trigger.

    `type` is the entity type's name; errors name it. Raises `EntryKeyError`.
    """
    if isinstance(key, tuple):
        if len(key) == 1:
            text = _part(type, key[0])
        else:
            text = ":".join(_part(type, part).replace("\\", "\\\\").replace(":", "\\:") for part in key)
    else:
        text = _part(type, key)
    if not text:
        raise EntryKeyError(f'The key of an entity of type "{type}" is empty.', cure=_CURE)
    # One character takes four bytes at most: short keys need no look at their bytes, unless they are odd.
    if "\x00" in text:
        raise EntryKeyError(
            f'The key {text[:100]!r} of an entity of type "{type}" holds a NUL character.',
            cure="PostgreSQL stores none in text: write the key otherwise.",
        )
    if not text.isascii() or len(text) > MAX_KEY_BYTES:
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            raise EntryKeyError(
                f'The key {text[:100]!r} of an entity of type "{type}" holds a lone surrogate and is no valid text.',
                cure="Look where it was decoded from bytes: with errors='surrogateescape' it stays invalid.",
            ) from error
        if size > MAX_KEY_BYTES:
            raise EntryKeyError(
                f'The key {text[:100]!r}... of an entity of type "{type}" has {size} bytes; '
                f"the most is {MAX_KEY_BYTES}.",
                cure=_CURE,
            )
    return text


def _part(type: str, part: object) -> str:
    if isinstance(part, Enum):
        # Before str and int: an enum may be one of them as well, and its value is what a column holds.
        return _part(type, part.value)
    if isinstance(part, str):
        return str(part)
    if isinstance(part, bool):
        return "true" if part else "false"
    if isinstance(part, int):
        return int.__repr__(part)
    if isinstance(part, UUID):
        return str(part)
    if isinstance(part, date) and not isinstance(part, datetime):
        return part.isoformat()
    if part is None:
        raise EntryKeyError(
            f'The key of an entity of type "{type}" is None, or a part of it is.',
            cure="A key that the database makes is known after the flush or from RETURNING: write the entry then.",
        )
    raise EntryKeyError(
        f'The key of an entity of type "{type}" cannot be written as text: {part!r:.100} is a '
        f"{part.__class__.__qualname__}, which has more than one text.",
        cure=_CURE,
    )

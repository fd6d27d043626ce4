"""A message: what one entry becomes in Kafka."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import orjson

from outbox.entity_type import EntityType
from outbox.entry import Entry

ID_HEADER = "outbox-id"
CONTENT_TYPE_HEADER = "content-type"
CAUSE_HEADER = "cause"
JSON_CONTENT_TYPE = "application/json"
_OWN_NAMES = frozenset({ID_HEADER, CONTENT_TYPE_HEADER, CAUSE_HEADER})

# A record alone takes key + value + headers + 72 bytes and about 2 a header; the reserve is for what else a broker
# of another version may add.
_RESERVE = 128
_RESERVE_PER_HEADER = 8


Headers = dict[str, str | bytes | None]
"""By name, in order. A dictionary: the client takes one in half the time of a list of pairs."""


class Message(NamedTuple):
    """One record to be: the topic, the key in UTF-8, the state's bytes or None, the headers, the time.

    `created_ms`: milliseconds since 1970. `entry` is what it was made of.
    """

    topic: str
    key: bytes
    value: bytes | None
    headers: Headers
    created_ms: int
    entry: Entry


class Unpublishable(NamedTuple):
    """An entry that cannot become a record: `reason` is a word for scripts, `explanation` a sentence."""

    entry: Entry
    topic: str | None
    reason: str
    explanation: str


class Made(NamedTuple):
    """What the entries of a batch became, given these `limits`. `seconds`: how long it took."""

    messages: Sequence[Message]
    unpublishable: Sequence[Unpublishable]
    limits: Mapping[str, int]
    seconds: float


def messages(
    entries: Iterable[Entry],
    types: Mapping[str, EntityType],
    limits: Mapping[str, int],
    *,
    now_ms: int,
) -> tuple[list[Message], list[Unpublishable]]:
    """Make the messages of a batch, in order, and name the entries that cannot be published.

    `limits` holds each topic's `max.message.bytes`. A created-at in the future is written as `now_ms`: Kafka refuses
    times that are too far ahead.
    """
    made: list[Message] = []
    refused: list[Unpublishable] = []
    append, new = made.append, tuple.__new__
    # What an entry without a header of its own, and far from its topic's limit, goes to: nearly every one.
    plain = {
        name: (entity_type.topic, limits[entity_type.topic] - 4096)
        for name, entity_type in types.items()
        if entity_type.topic in limits
    }
    for entry in entries:
        entry_id, type_name, key_text, state, created_ms, content_type, cause, own_headers = entry
        if cause is None and own_headers is None and content_type is None and type_name in plain:
            topic, most = plain[type_name]
            key = key_text.encode()
            if len(key) + (0 if state is None else len(state)) <= most:
                when = min(now_ms, created_ms)
                # As Message(...) does, without its own call: this runs once an entry.
                append(new(Message, (topic, key, state, {ID_HEADER: b"%d" % entry_id}, when, entry)))
                continue
        entity_type = types.get(type_name)
        if entity_type is None:
            refused.append(
                Unpublishable(entry, None, "unknown-type", f'the entity type "{type_name}" is not registered')
            )
            continue
        headers: dict[str, str | bytes | None] = {ID_HEADER: b"%d" % entry_id}
        if content_type is not None and content_type != JSON_CONTENT_TYPE:
            headers[CONTENT_TYPE_HEADER] = content_type.encode()
        if cause is not None:
            headers[CAUSE_HEADER] = cause.encode()
        if own_headers is not None:
            try:
                headers |= _own(own_headers)
            except ValueError as error:
                refused.append(
                    Unpublishable(entry, entity_type.topic, "headers", f"its headers cannot be read: {error}")
                )
                continue
        key = key_text.encode()
        topic = entity_type.topic
        limit = limits.get(topic)
        if limit is None:
            refused.append(Unpublishable(entry, topic, "no-topic", f"the topic {topic} is missing"))
            continue
        # Judged cheaply first: hardly any state comes near the limit.
        size = len(key) + (0 if state is None else len(state))
        if size + 4096 > limit or own_headers is not None:
            size += _RESERVE + sum(
                len(name) + len(value or b"") + _RESERVE_PER_HEADER for name, value in headers.items()
            )
            if size > limit:
                refused.append(
                    Unpublishable(
                        entry,
                        topic,
                        "too-large",
                        f"the record needs up to {size} bytes, the topic {topic} takes {limit}",
                    )
                )
                continue
        made.append(Message(topic, key, state, headers, min(created_ms, now_ms), entry))
    return made, refused


def _own(text: str) -> dict[str, str | bytes | None]:
    # The table allows any JSON object; writers refuse what is no string and the relay's own names, a hand-written
    # INSERT may not. A number that no double holds, or a thousand levels, cannot be read at all: a ValueError.
    found = orjson.loads(text)
    if not isinstance(found, dict):
        raise ValueError("they are no JSON object")  # noqa: TRY004  as for all that cannot be read
    return {
        name: value.encode() if isinstance(value, str) else orjson.dumps(value)
        for name, value in found.items()
        if name not in _OWN_NAMES
    }

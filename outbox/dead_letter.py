"""A dead letter: an entry that could not be published, with the reason."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import orjson

from outbox.errors import RelayError

FORMAT = 1


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One record of the dead-letter topic; its key is the entity, so a later one of the same entity replaces it.

    `id` and `created_ms` are the entry's; `topic` is None when the entity type is not registered; `reason` is a word
    (`too-large`, `refused`, `unknown-type`, ...), `message` a sentence; `at_ms` is when it was given up. Times are
    milliseconds since 1970. The state is not in it: it stays in the outbox until retention.
    """

    id: int
    type: str
    key: str
    topic: str | None
    reason: str
    message: str
    created_ms: int
    epoch: int
    at_ms: int

    def encode(self) -> bytes:
        """The record's value: JSON."""
        return orjson.dumps(
            {
                "format": FORMAT,
                "id": str(self.id),
                "type": self.type,
                "key": self.key,
                "topic": self.topic,
                "reason": self.reason,
                "message": self.message,
                "created_ms": self.created_ms,
                "epoch": self.epoch,
                "at_ms": self.at_ms,
            }
        )

    @classmethod
    def decode(cls, value: bytes) -> Self:
        """Read a record's value; `RelayError` when it is none."""
        try:
            raw = orjson.loads(value)
            if raw.pop("format") != FORMAT:
                raise RelayError("A dead letter has a format that this version does not read.")
            return cls(**{**raw, "id": int(raw["id"])})
        except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise RelayError(f"A record of the dead-letter topic is none: {value[:80]!r}.") from error


def entity_key(type_name: str, key: str) -> bytes:
    """The record's key: the entity as a JSON array of type and key."""
    return orjson.dumps([type_name, key])

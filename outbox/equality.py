"""Equality: when reconcile takes two states for the same. Pure.

An entity type may say it, as its `comparison`: `json`, `bytes`, or `MODULE:ATTRIBUTE`, a function of the service's that
is given a state's bytes and returns what two states that say the same have in common. Without one the content type of
each record says it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from outbox.canonical import digest, json_digest
from outbox.errors import ConfigError
from outbox.message import JSON_CONTENT_TYPE

JSON, BYTES = "json", "bytes"
_NAMED = re.compile(r"[^:]+:[^:]+")

Normal = Callable[[bytes], bytes]
"""Of a state what those that say the same have in common. Raises `ValueError` for what cannot be read."""


def check_comparison(comparison: str | None) -> None:
    """Refuse what names no comparison."""
    if comparison not in {None, JSON, BYTES} and not _NAMED.fullmatch(comparison or ""):
        raise ConfigError(
            f'"{(comparison or "")[:100]}" is no comparison.',
            cure=f"Name {JSON}, {BYTES}, or a function of yours as MODULE:ATTRIBUTE.",
        )


@dataclass(frozen=True, slots=True)
class Equality:
    """`comparison`: what the entity type names, or None; `normal`: the function where that is one."""

    comparison: str | None = None
    normal: Normal | None = None

    def by_value(self, content_type: str | None) -> bool:
        """Whether a record of this content type (None: JSON) is compared by its value; otherwise by its bytes."""
        if self.comparison is not None:
            return self.comparison != BYTES
        return (content_type or JSON_CONTENT_TYPE).partition(";")[0].strip().lower().endswith(("/json", "+json"))

    def value(self, state: bytes) -> bytes | None:
        """A digest of a state's value; None when it has none: it is undecodable, or only bytes are compared.

        Raises `ConfigError` when the type's function fails with anything but a `ValueError`, or returns no bytes.
        """
        if self.normal is None:
            return None if self.comparison == BYTES else json_digest(state)
        try:
            found = self.normal(state)
        except ValueError:
            return None
        except Exception as error:
            raise ConfigError(
                f"The comparison {self.comparison} failed: {error.__class__.__name__}: {error}.",
                cure="Let it raise ValueError for a state that cannot be read.",
            ) from error
        if not isinstance(found, bytes):
            raise ConfigError(
                f"The comparison {self.comparison} returned a {found.__class__.__name__}, no bytes.",
                cure="Let it return what two states that say the same have in common.",
            )
        return digest(found)

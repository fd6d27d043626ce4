"""A sample of keys: the same ones in the topic and in the source, and what it says of all. Pure."""

from __future__ import annotations

import hashlib
import math

CONFIDENCE = 0.95
_ALL = 1 << 32


class Sample:
    """A share of all keys, by a hash of their text: whoever has a key knows whether it is meant. `share`: 0 to 1."""

    def __init__(self, share: float) -> None:
        self.share = min(1.0, share)
        self._below = math.ceil(self.share * _ALL)

    @classmethod
    def of(cls, keys: int, *, total: int) -> Sample:
        """So many of a total, about."""
        return cls(keys / total if total else 1.0)

    def takes(self, key: bytes) -> bool:
        """Whether a key is in it."""
        return int.from_bytes(hashlib.md5(key, usedforsecurity=False).digest()[:4]) < self._below

    @property
    def sql(self) -> str:
        """The same as a condition over `s.key`."""
        hashed = "('x' || left(md5(convert_to(s.key::text, 'UTF8')), 8))::bit(32)::bigint"
        # As bits the number is unsigned, in PostgreSQL from bit(32) to bigint too.
        return f"({hashed}) < {self._below}"


def at_most(different: int, keys: int, *, confidence: float = CONFIDENCE) -> float:
    """The share of all keys that differs at the most, when so many of a sample do (Clopper and Pearson, 1934).

    One-sided: of a hundred samples five may have fewer differences than that share would make likely. 1 without keys.
    """
    if not keys or different >= keys:
        return 1.0
    low, high = different / keys, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if _at_most_so_many(different, keys, middle) > 1 - confidence:
            low = middle
        else:
            high = middle
    return high


def _at_most_so_many(different: int, keys: int, share: float) -> float:
    """The probability of at most so many differences among so many keys, each different with this probability."""
    if share >= 1.0:
        return 0.0
    total = math.lgamma(keys + 1)
    return sum(
        math.exp(
            total
            - math.lgamma(n + 1)
            - math.lgamma(keys - n + 1)
            + n * math.log(share)
            + (keys - n) * math.log1p(-share)
        )
        if share > 0
        else float(n == 0)
        for n in range(different + 1)
    )

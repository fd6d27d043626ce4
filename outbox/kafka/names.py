"""What an outbox's own things in Kafka are called; everything follows from its name."""

from __future__ import annotations


def positions_topic(name: str) -> str:
    """The topic of positions: one partition a shard."""
    return f"{name}.outbox.positions"


def dead_letters_topic(name: str) -> str:
    """The topic of dead letters: one partition a shard."""
    return f"{name}.outbox.dead-letters"


def transactional_id(name: str, shard: int) -> str:
    """The transactional id that fences all but one relay of a shard."""
    return f"{name}-{shard}"

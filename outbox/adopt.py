"""Adoption on a person's word: of a copy, a restored database, or one whose relay stopped at a lost tail."""

from __future__ import annotations

from dataclasses import dataclass

from outbox.adoption import adopt_log
from outbox.config import Config
from outbox.database import Connection, place, translated
from outbox.kafka.shard_log import read_positions
from outbox.position import Position, floor_of
from outbox.schema import quote


@dataclass(frozen=True, slots=True)
class Prospect:
    """What an adoption would do: entries that would be published again, those left out, the epochs, the clusters."""

    entries: int
    left_out: int
    epoch: int
    floor: int
    positions: tuple[Position, ...]

    @property
    def systems(self) -> list[str]:
        """The clusters that were published from."""
        return sorted({p.system for p in self.positions if p.system is not None})


def look(config: Config, connection: Connection, name: str) -> Prospect:
    """What there is to adopt."""
    found = tuple(Position.decode(value) for value in read_positions(config, name) if value is not None)
    s = quote(config.schema)
    with translated(place(config.database_url)):
        row = connection.execute(
            f"""SELECT count(*) FILTER (WHERE e.id > s.removed_id), count(*) FILTER (WHERE e.id <= s.removed_id),
                       s.epoch
                FROM {s}.settings s LEFT JOIN {s}.entries e ON true GROUP BY s.epoch""".encode()
        ).fetchone()
    new, left_out, epoch = row or (0, 0, 0)
    return Prospect(new, left_out, epoch, floor_of(found), found)


def adopt(config: Config, prospect: Prospect) -> int:
    """Adopt; the epoch in force afterwards."""
    # The relay accepts another cluster only where a person gave up the one that it knows.
    return adopt_log(config, expected_epoch=prospect.epoch, positions=prospect.positions, from_systems=prospect.systems)

"""What is published: the same rows for every contender, written in transactions of the same size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import psycopg

from bench.topics import Delivered
from devstack.processes import ServerError

TRANSACTION = 100
"""Rows in one of the owner's transactions. One transaction of a million rows would make logical decoding spill to
disk, which no service does to it; a million transactions would take the filling longer than everything else."""
_STATE_BYTES = 280


@dataclass(frozen=True, slots=True)
class Load:
    """Rows to be written: `entries` of them, over `keys` keys, with states of about 280 bytes.

    `base` numbers the rows on from an earlier load: row n has the version base + n. `prefix` begins the keys.
    """

    entries: int
    keys: int
    base: int = 0
    prefix: str = "c"

    @property
    def key_sql(self) -> str:
        """The key of row `n`."""
        return f"'{self.prefix}' || (n % {self.keys})"

    @property
    def state_sql(self) -> str:
        """The state of row `n`, a text: JSON with the row's version, filled up with hexadecimal digits.

        Those compress as real states do, by about half.
        """
        version = f"({self.base} + n)"
        return (
            f'\'{{"version":\' || {version} || \',"note":"\' || '
            f"left({digits_sql(_STATE_BYTES)}, {_STATE_BYTES - 23} - length({version}::text)) || '\"}}'"
        )

    def fill(self, url: str, table: str, columns: Sequence[str], values: Sequence[str]) -> None:
        """Insert the rows, `TRANSACTION` in each transaction; `values` are expressions of `n`."""
        block = f"""
            DO $body$
            BEGIN
                FOR head IN 1 .. {self.entries} BY {TRANSACTION} LOOP
                    INSERT INTO {table} ({", ".join(columns)})
                    SELECT {", ".join(values)}
                    FROM generate_series(head, least(head + {TRANSACTION} - 1, {self.entries})) n;
                    COMMIT;
                END LOOP;
            END
            $body$"""
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("SET synchronous_commit = off")
            run(connection, block)
            # What filling left to be written must not be written while somebody is measured.
            connection.execute("CHECKPOINT")

    def newest(self) -> dict[bytes, int]:
        """Each key's last version."""
        return {
            b"%s%d" % (self.prefix.encode(), n % self.keys): self.base + n
            for n in range(max(1, self.entries - self.keys + 1), self.entries + 1)
        }

    def check(self, delivered: Delivered, *, exactly_once: bool, collapsed: bool, who: str) -> None:
        """Refuse a contender that did not deliver what it should; `ServerError` says what was wrong."""
        wrong: list[str] = []
        if not collapsed and delivered.records - delivered.doubled != self.entries:
            wrong.append(f"{delivered.records - delivered.doubled} different records of {self.entries} entries")
        if exactly_once and (delivered.doubled or delivered.backwards):
            wrong.append(f"{delivered.doubled} twice, {delivered.backwards} out of order")
        if delivered.last != self.newest():
            wrong.append("the last state of some keys is not the last one written")
        if wrong:
            raise ServerError(f"{who} delivered wrongly: {'; '.join(wrong)}.")


def digits_sql(least: int) -> str:
    """An expression of `n`: at least so many hexadecimal digits."""
    return " || ".join(f"md5(n || '{letter}')" for letter in "abcdefghijklmnop"[: least // 32 + 1])


def run(connection: psycopg.Connection[Any], statement: str) -> None:
    """Execute a statement that was put together here; psycopg takes literals only."""
    connection.execute(statement.encode())

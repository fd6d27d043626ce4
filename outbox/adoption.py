"""Adoption: make every retained entry new, after the database lost its tail or became another cluster."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing

import psycopg
from psycopg import errors as pg
from psycopg import sql as psycopg_sql

from outbox import sql
from outbox.config import Config
from outbox.database import connect_as, place, translated
from outbox.errors import DatabaseUnavailableError
from outbox.patience import Patience
from outbox.position import Position, floor_of
from outbox.schema import quote
from outbox.telemetry import emit

log = logging.getLogger("outbox.adoption")


def adopt_log(
    config: Config,
    *,
    expected_epoch: int,
    positions: Sequence[Position],
    from_systems: Sequence[str] = (),
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Adopt the log, unless somebody did already; the epoch in force afterwards.

    `positions` are those of all shards: new ids lie above the greatest of their anchors, the new epoch above theirs.
    `from_systems` are the clusters whose positions are given up, when a person decided that (none: the same cluster).

    Waits for writers no longer than `lock_timeout`, a number of times (or until `stop()` is true), and lets them write
    for as long between; then raises `DatabaseUnavailableError`, and the caller tries again.
    """
    where = place(config.database_url)
    floor = floor_of(positions)
    least_epoch = max((p.epoch for p in positions), default=0) + 1
    query = sql.load("relay")["adopt"].replace("{schema}", psycopg_sql.Identifier(config.schema).as_string(None))
    # As long as it takes: the log may be large. A stop ends it, also where the server does not answer.
    patience = Patience(math.inf, stop=stop)
    with closing(patience), connect_as(config, "outbox-adopt", statement_timeout=0, patience=patience) as connection:
        for attempt in range(1, config.lock_tries + 1):
            if stop():
                break
            try:
                with translated(where), patience.call(connection), connection.transaction():
                    connection.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
                    connection.execute(
                        psycopg_sql.SQL("SET LOCAL lock_timeout = {}").format(
                            psycopg_sql.Literal(round(config.lock_timeout * 1000))
                        )
                    )
                    row = connection.execute(
                        query.encode(),
                        {
                            "epoch": expected_epoch,
                            "floor": floor,
                            "least_epoch": least_epoch,
                            "from_systems": list(from_systems),
                        },
                    ).fetchone()
                epoch, entries = row or (expected_epoch, None)
                if entries is not None:
                    emit(log, "relay.adopted", epoch=epoch, entries=entries)
                return int(epoch)
            except DatabaseUnavailableError as error:
                if not isinstance(error.__cause__, (pg.LockNotAvailable, pg.DeadlockDetected)):
                    raise
                emit(
                    log,
                    "adoption.locked_out",
                    attempt=attempt,
                    tries=config.lock_tries,
                    blockers=_blockers(connection, config.schema),
                )
                _pause(config.lock_timeout, stop)
    raise DatabaseUnavailableError(
        f"The outbox in {where} could not be adopted: a transaction that wrote entries stayed open.",
        cure="Find it in pg_stat_activity or pg_prepared_xacts, and end it.",
    )


def _pause(seconds: float, stop: Callable[[], bool]) -> None:
    deadline = time.monotonic() + seconds
    while not stop() and (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, 0.1))


def _blockers(connection: psycopg.Connection[tuple[object, ...]], schema: str) -> int:
    row = connection.execute(
        "SELECT count(DISTINCT l.virtualtransaction) FROM pg_locks l WHERE l.relation = to_regclass(%s)"
        " AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        " AND l.mode = 'RowExclusiveLock' AND l.granted",
        [f"{quote(schema)}.entries"],
    ).fetchone()
    return int(str(row[0])) if row else 0

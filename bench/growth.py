"""Part 5, growth: does the drain stay as fast when the table has grown, and does publishing leave dead rows?

Each round drains the same number of new entries, by the relay as a user runs it, from a fresh outbox and from ones
that have a past: 10,000,000 entries retained and published; 100 entity types; a transaction open meanwhile; a ring
that has gone round a hundred times. The rates are ratios to the fresh one's of the same round. Beside them: rows that
the server looked at for each entry published, by its own count (it tells whether every query uses its index), dead
rows, and how long `outbox status` takes.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psycopg

from bench.owner import OUTBOX, RESULTS, SERVER, Spread, command, relay_environment
from devstack.kafka import Kafka
from devstack.postgres import Postgres
from outbox import schema

SLOTS = 12
AIM = 0.9
STATE = "x" * 220
"""With key, type and the rest an entry of about 280 bytes."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is run. `entries` are drained in each round; `retained`, `types`, `laps`: how large the past is."""

    rounds: int = 5
    entries: int = 500_000
    retained: int = 10_000_000
    types: int = 100
    laps: int = 100
    scenes: Sequence[str] = ("fresh", "retained", "types", "open", "ring")


@dataclass(frozen=True, slots=True)
class Drain:
    """One drain: entries a second, what the server counted meanwhile, and the relay's own times.

    `reading` and `committing`: seconds of reading, and of producing and committing; they overlap, since the next batch
    is read while one is committed.

    `looked_at` are rows of the log that were fetched by an index for each entry published, `walked` rows that were
    read without one, in all.
    """

    rate: float
    looked_at: float
    walked: int
    reading: float
    committing: float


@dataclass(frozen=True, slots=True)
class Scene:
    """One past over all rounds. `dead`: rows that publishing changed or removed, and dead rows in the log's tables."""

    name: str
    drains: Sequence[Drain]
    ratio: Spread
    rows: int
    size: int
    dead: Mapping[str, int]
    status_seconds: float


@dataclass(frozen=True, slots=True)
class Result:
    """All of the part."""

    scenes: Sequence[Scene]
    tables: Sequence[Mapping[str, Any]]
    met: Mapping[str, bool]
    about: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For the document and the plots."""
        return {"part": "growth", **asdict(self)}

    def lines(self) -> Iterator[str]:
        """For people."""
        yield (
            f"{'':9} {'rate over fresh':>24} {'entries/s':>10} {'rows/entry':>10} {'walked':>7} {'read s':>7} "
            f"{'commit s':>8}"
        )
        for scene in self.scenes:
            rate, reading, committing = (
                statistics.median(getattr(drain, name) for drain in scene.drains)
                for name in ("rate", "reading", "committing")
            )
            looked_at = max(drain.looked_at for drain in scene.drains)
            walked = max(drain.walked for drain in scene.drains)
            yield (
                f"{scene.name:9} {scene.ratio!s:>24} {rate:10.0f} {looked_at:10.2f} {walked:7} {reading:7.2f} "
                f"{committing:8.2f}  {scene.rows:,} rows, {scene.size / 1e9:.2f} GB, {sum(scene.dead.values())} dead; "
                f"outbox status {scene.status_seconds:.2f} s"
            )
        yield ""
        for what, met in self.met.items():
            yield f"{what}: {'met' if met else 'NOT met'}"


class Past:
    """An outbox with a past, and its topics. Drained by `drain`, which first writes what there is to drain."""

    def __init__(self, server: Postgres, kafka: Kafka, name: str, *, types: int = 1) -> None:
        self.server = server
        self.name = f"{name}{random.randrange(10**6)}"
        self.types = types
        with psycopg.connect(server.url(), autocommit=True) as admin:
            admin.execute(f"CREATE DATABASE {self.name}".encode())
        self.url = server.url(self.name)
        self.environment = relay_environment(self.url, kafka.bootstrap, log_level="debug")
        with psycopg.connect(self.url) as connection:
            schema.install(connection, schema.Settings(name=self.name, slots=SLOTS))
            connection.execute(
                "INSERT INTO outbox.entity_types (name, topic, topic_settings)"
                " SELECT 'type' || n, %s || n, jsonb_build_object('partitions', %s::int)"
                " FROM generate_series(0, %s - 1) n",
                [f"{self.name}.type", 8 if types == 1 else 1, types],
            )
        command(self.environment, "topics", "apply", "--yes")

    def begin(self) -> None:
        """Publish a little, so that there is a position: the start of a log is read by a simpler query."""
        self.write(10)
        command(self.environment, "relay", "--until-caught-up")

    # -- what happened before ------------------------------------------------------------------------------------

    def retain(self, count: int) -> None:
        """Published entries, in all slots but the one that is being filled."""
        step = 500_000
        with psycopg.connect(self.url, autocommit=True) as connection:
            for first in range(0, count, step):
                connection.execute(
                    "INSERT INTO outbox.entries (slot, type, key, state, created_at)"
                    " SELECT (outbox.slot_of(clock_timestamp()) + 1 + n * %(others)s / %(count)s) %% %(slots)s,"
                    "        'type0', 'old' || n, convert_to(%(state)s, 'UTF8'),"
                    "        now() - make_interval(secs => 500000 * (1 - n / %(count)s::float8))"
                    " FROM generate_series(%(first)s::bigint, %(last)s::bigint) n",
                    {
                        "others": SLOTS - 1,
                        "count": count,
                        "slots": SLOTS,
                        "state": STATE,
                        "first": first,
                        "last": min(first + step, count) - 1,
                    },
                )
            # A start without a position leaves out what pruning went past: a shorter way than to publish it.
            connection.execute("UPDATE outbox.settings SET removed_id = (SELECT max(id) FROM outbox.entries)")
            connection.execute("VACUUM ANALYZE")

    def go_round(self, laps: int) -> None:
        """Fill and prune each slot of the ring so many times, by the function that the relay calls."""
        # What is beyond everything: all is published, and no entry of the ring is anybody's anchor.
        most = str(2**62)
        position = json.dumps([{"shard": 0, "epoch": 1, "anchor": most, "xmax": most, "xip": [], "cut": None}])
        with psycopg.connect(self.url, autocommit=True) as connection:
            for _ in range(laps):
                for slot in range(SLOTS):
                    connection.execute(
                        "INSERT INTO outbox.entries (slot, type, key, state, created_at)"
                        " SELECT %s, 'type0', 'old' || n, %s, now() - interval '30 days'"
                        " FROM generate_series(1, 100) n",
                        [slot, STATE.encode()],
                    )
                    pruned = connection.execute(
                        "SELECT outbox.prune_slot(%s::smallint, %s::jsonb)", [slot, position]
                    ).fetchone()
                    if not pruned or not pruned[0]["pruned"]:
                        raise RuntimeError(f"slot {slot} was not pruned: {pruned}")

    # -- a drain -------------------------------------------------------------------------------------------------

    def write(self, count: int) -> None:
        """So many new entries of distinct keys, over all types."""
        with psycopg.connect(self.url) as connection:
            connection.execute(
                "INSERT INTO outbox.entries (type, key, state)"
                " SELECT 'type' || n %% %s, 'key' || n, convert_to(%s, 'UTF8') FROM generate_series(1, %s) n",
                [self.types, STATE, count],
            )

    def drain(self, count: int) -> Drain:
        """Write, then publish; the rate from the moment that the relay holds the shard."""
        self.write(count)
        before = self.counted()
        done = subprocess.run(
            [str(OUTBOX), "relay", "--until-caught-up"],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=1800,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"outbox relay failed ({done.returncode}):\n{done.stdout}{done.stderr}")
        events = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
        held = [at(event) for event in events if event.get("event") == "relay.holds"]
        published = [event for event in events if event.get("event") == "relay.published"]
        entries = sum(event["entries"] for event in published)
        if entries != count:
            raise RuntimeError(f"{entries} entries were published, {count} were written")
        after = self.counted()
        seconds = (at(published[-1]) - held[-1]).total_seconds()
        return Drain(
            entries / seconds,
            (after[0] - before[0]) / count,
            after[1] - before[1],
            sum(event["read_seconds"] for event in published),
            sum(event["commit_seconds"] for event in published),
        )

    def counted(self) -> tuple[int, int]:
        """Rows of the log that indexes led to, and rows that were read without one."""
        return self.two(
            "SELECT sum(idx_tup_fetch)::bigint, sum(seq_tup_read)::bigint FROM pg_stat_user_tables"
            " WHERE schemaname = 'outbox' AND relname LIKE 'entries%'"
        )

    def status_seconds(self) -> float:
        """How long the command takes, with its start."""
        began = time.monotonic()
        command(self.environment, "status", "--json")
        return time.monotonic() - began

    def tables(self) -> list[dict[str, Any]]:
        """What the server counts of the log's tables."""
        with psycopg.connect(self.url) as connection:
            rows = connection.execute(
                "SELECT relname, n_live_tup, n_dead_tup, n_tup_upd, n_tup_del FROM pg_stat_user_tables"
                " WHERE schemaname = 'outbox' AND relname LIKE 'entries%' ORDER BY relname"
            ).fetchall()
        return [
            {"past": self.name, "table": name, "live": live, "dead": dead, "updated": updated, "deleted": deleted}
            for name, live, dead, updated, deleted in rows
        ]

    def rows(self) -> tuple[int, int]:
        """How many rows the log has, by statistics, and its size in bytes."""
        return self.two(
            "SELECT sum(n_live_tup)::bigint, sum(pg_total_relation_size(relid))::bigint FROM pg_stat_user_tables"
            " WHERE schemaname = 'outbox' AND relname LIKE 'entries%'"
        )

    def one(self, query: str) -> Any:
        """The row of a query."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            return connection.execute(query.encode()).fetchone()

    def two(self, query: str) -> tuple[int, int]:
        """Two numbers of a row."""
        first, second = self.one(query)
        return int(first or 0), int(second or 0)

    def drop(self) -> None:
        """Give the disk back."""
        with psycopg.connect(self.server.url(), autocommit=True) as admin:
            admin.execute(f"DROP DATABASE {self.name} WITH (FORCE)".encode())


def at(event: Mapping[str, Any]) -> dt.datetime:
    """When an event was logged."""
    return dt.datetime.fromisoformat(event["at"])


def run(options: Options) -> Result:
    """Measure."""
    with ExitStack() as cleanup:
        place = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="outbox-bench-")))
        # PostgreSQL may run as another user, who must be able to enter.
        place.chmod(0o711)
        server = cleanup.enter_context(Postgres(place / "postgres", options=SERVER))
        kafka = cleanup.enter_context(Kafka(place / "kafka"))
        pasts: dict[str, Past] = {}
        makers: dict[str, Callable[[], Past]] = {
            "retained": lambda: Past(server, kafka, "retained"),
            "types": lambda: Past(server, kafka, "types", types=options.types),
            "open": lambda: Past(server, kafka, "open"),
            "ring": lambda: Past(server, kafka, "ring"),
        }
        for name in options.scenes:
            if name in makers:
                print(f"making: {name}", file=sys.stderr)
                pasts[name] = makers[name]()
        if "retained" in pasts:
            pasts["retained"].retain(options.retained)
        if "ring" in pasts:
            pasts["ring"].go_round(options.laps)
        for past in pasts.values():
            past.begin()
        if "open" in pasts:
            # It has an entry, and a snapshot that keeps every row that dies from being cleaned up.
            connection = cleanup.enter_context(psycopg.connect(pasts["open"].url))
            connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            connection.execute("INSERT INTO outbox.entries (type, key, state) VALUES ('type0', 'open', '{}')")
        drains: dict[str, list[Drain]] = {}
        fresh: Past | None = None
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            if fresh is not None:
                fresh.drop()
            fresh = Past(server, kafka, "fresh")
            fresh.begin()
            # In turn another order: who comes after whom must not tell.
            turn = ["fresh", *pasts]
            for name in turn if number % 2 == 0 else reversed(turn):
                past = fresh if name == "fresh" else pasts[name]
                drains.setdefault(name, []).append(past.drain(options.entries))
        scenes = list(summed_up({**({"fresh": fresh} if fresh else {}), **pasts}, drains))
        tables = [table for past in pasts.values() for table in past.tables()]
        about = {
            "postgresql": pasts[next(iter(pasts))].one("SELECT current_setting('server_version')")[0] if pasts else "?",
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "options": asdict(options),
            "server": SERVER,
        }
    met = {
        f"{scene.name}: at least {AIM} of the fresh table's rate": scene.ratio.median >= AIM
        for scene in scenes
        if scene.name != "fresh"
    }
    met["publishing changes, removes and leaves dead no row"] = not any(sum(scene.dead.values()) for scene in scenes)
    met["no row of the log is read without an index"] = not any(d.walked for scene in scenes for d in scene.drains)
    return Result(scenes, tables, met, about)


def summed_up(pasts: Mapping[str, Past], drains: Mapping[str, Sequence[Drain]]) -> Iterator[Scene]:
    """Each past over the rounds."""
    for name, past in pasts.items():
        own = drains[name]
        tables = past.tables()
        rows, size = past.rows()
        yield Scene(
            name,
            own,
            Spread.of([drain.rate / beside.rate for drain, beside in zip(own, drains["fresh"], strict=True)]),
            rows,
            size,
            {what: sum(table[what] for table in tables) for what in ("dead", "updated", "deleted")},
            past.status_seconds(),
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this part alone."""
    default = Options()
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description=(__doc__ or "").split("\n", 1)[0])
    for name in ("rounds", "entries", "retained", "types", "laps"):
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name), help="default %(default)s")
    parser.add_argument("--scenes", nargs="+", choices=default.scenes, default=list(default.scenes))
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    chosen = vars(parser.parse_args(arguments))
    as_json = chosen.pop("json")
    result = run(Options(**chosen))
    text = json.dumps(result.as_json(), indent=1)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "growth.json").write_text(text + "\n")
    print(text if as_json else "\n".join(result.lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

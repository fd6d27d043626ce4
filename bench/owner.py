"""Part 4, the owner's cost: what an entry adds to the service's own transaction.

Stock pgbench runs all variants in one run, drawn anew for each transaction, so that whatever disturbs the machine
disturbs all of them alike; each transaction's time is taken from pgbench's log. What is compared is the whole
transaction, BEGIN to COMMIT: an UPDATE of a customer, and what publishes it. `plain` is the yardstick: the same
INSERT into a table that has nothing but a primary key.

Rounds go through every setting (durable commits or not; one client or 16; relay off, busy, asleep), so that a slow
minute spoils one round of each and not all rounds of one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import psycopg

from devstack.kafka import Kafka
from devstack.postgres import Postgres
from outbox import capture, schema, sql

OUTBOX = Path(sys.executable).with_name("outbox")
RESULTS = Path(".bench")

Group = Literal["outbox", "logical", "bulk", "alone"]
Relay = Literal["off", "busy", "asleep"]

Connector = Callable[[Postgres, str], AbstractContextManager[None]]
"""Starts what reads Debezium's outbox table: called with the server (wal_level=logical) and the database's name, it
returns a context manager that has the connector running inside. The table is `public.debezium_outbox`, with the
columns of Debezium's outbox event router; publication `debezium` has it, and is the connector's to use or not."""

STATE = {
    "name": "Ada Lovelace",
    "email": "ada.lovelace@example.com",
    "balance": 1_234_567,
    "note": "prefers the telephone; " * 6,
}
"""The state that the variants write: with key, type and the rest an entry of about 280 bytes."""

DOMAIN = """
CREATE TABLE {table} (
    id bigint PRIMARY KEY, name text NOT NULL, email text NOT NULL, balance bigint NOT NULL, note text NOT NULL
) WITH (fillfactor = 80);
INSERT INTO {table} SELECT n, 'Ada Lovelace', 'ada.lovelace@example.com', n, repeat('prefers the telephone; ', 6)
FROM generate_series(1, {rows}) n;
"""

# What a service would make for itself without help: no checks, no ring, one index.
BARE = """
CREATE TABLE {table} (
    id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY, type text NOT NULL, key text NOT NULL, state bytea,
    content_type text, cause text, headers jsonb, created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
"""

NAIVE = """
CREATE FUNCTION naive() RETURNS trigger LANGUAGE plpgsql AS
    $$ BEGIN PERFORM pg_notify('naive', NEW.id::text); RETURN NULL; END $$;
CREATE TRIGGER naive AFTER INSERT ON bare_notify FOR EACH ROW EXECUTE FUNCTION naive();
"""

# The table of Debezium's documentation of the outbox event router.
DEBEZIUM = """
CREATE TABLE debezium_outbox (
    id uuid PRIMARY KEY, aggregatetype varchar(255) NOT NULL, aggregateid varchar(255) NOT NULL,
    type varchar(255) NOT NULL, payload jsonb
);
CREATE PUBLICATION debezium FOR TABLE debezium_outbox WITH (publish = 'insert');
"""

UPDATE = "UPDATE {table} SET balance = balance + 1 WHERE id = :id;"
BULK = 1_000


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to publish: pgbench's script, and how much longer than `plain` it may take (None: no aim)."""

    name: str
    title: str
    script: str
    aim: float | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """What is run. `seconds` for each pgbench; `rate`: transactions a second while the relay is to sleep."""

    rounds: int = 5
    seconds: float = 10.0
    clients: Sequence[int] = (1, 16)
    durable: Sequence[bool] = (True, False)
    relays: Sequence[Relay] = ("off", "busy", "asleep")
    groups: Sequence[Group] = ("outbox", "logical", "bulk", "alone")
    rows: int = 100_000
    rate: float = 40.0
    connector: Connector | None = None
    directory: Path | None = None


@dataclass(frozen=True, slots=True)
class Setting:
    """Under which circumstances a run was taken."""

    group: Group
    clients: int
    durable: bool
    relay: Relay

    def __str__(self) -> str:
        commits = "durable" if self.durable else "not durable"
        return f"{self.group}, {self.clients} client{'s' * (self.clients > 1)}, {commits}, relay {self.relay}"


@dataclass(frozen=True, slots=True)
class Times:
    """One variant in one run: microseconds of whole transactions."""

    count: int
    mean: float
    p50: float
    p99: float

    @classmethod
    def of(cls, micros: Sequence[float]) -> Times:
        """Sum a run up."""
        ordered = sorted(micros)
        return cls(
            len(ordered),
            statistics.fmean(ordered),
            ordered[len(ordered) // 2],
            ordered[min(len(ordered) - 1, math.floor(len(ordered) * 0.99))],
        )


@dataclass(frozen=True, slots=True)
class Spread:
    """A ratio over the rounds."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Spread:
        """Sum the rounds up."""
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.least:.3f} to {self.most:.3f})"


@dataclass(frozen=True, slots=True)
class Cell:
    """One variant in one setting over all rounds; ratios to `plain` of the same run."""

    setting: Setting
    variant: str
    rounds: Sequence[Times]
    mean: Spread
    p50: Spread
    p99: Spread


@dataclass(frozen=True, slots=True)
class Aim:
    """What was aimed at, and what was measured: the median over the rounds of the ratio of the means."""

    what: str
    most: float
    measured: float
    met: bool


@dataclass(frozen=True, slots=True)
class Result:
    """All of the part."""

    cells: Sequence[Cell]
    aims: Sequence[Aim]
    about: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For the document and the plots."""
        return {"part": "owner", **asdict(self)}

    def lines(self) -> Iterator[str]:
        """For people."""
        last: Setting | None = None
        for cell in self.cells:
            if cell.setting != last:
                last = cell.setting
                yield ""
                yield f"{last}  (times over plain: median of the rounds, least to most)"
                yield f"  {'':10} {'mean':>24} {'p50':>24} {'p99':>24} {'mean us':>9} {'count':>8}"
            micros = statistics.median(t.mean for t in cell.rounds)
            count = sum(t.count for t in cell.rounds)
            yield f"  {cell.variant:10} {cell.mean!s:>24} {cell.p50!s:>24} {cell.p99!s:>24} {micros:9.0f} {count:8}"
        yield ""
        for aim in self.aims:
            verdict = "met" if aim.met else "NOT met"
            yield f"{aim.what}: aim {aim.most:.3f}, measured {aim.measured:.3f}: {verdict}"


# -- the variants ----------------------------------------------------------------------------------------------------


def transaction(*statements: str, domain: str = "customer") -> str:
    """A script: the domain change, then what publishes it (what is published last was written last)."""
    return "\n".join(
        [r"\set id random(1, :rows)", "BEGIN;", UPDATE.format(table=domain), *statements, "COMMIT;", ""],
    )


def put(table: str) -> str:
    """The Python writer's own statement, for this table: `plain` differs from `writer` by nothing but the table."""
    statement = sql.load("writer")["put"].replace("{schema}.entries", table)
    given = {"type": "'customer'", "key": ":id", "state": ":state"}
    for name in ("type", "key", "state", "content_type", "cause", "headers"):
        statement = statement.replace(f"%({name})s", given.get(name, "NULL"))
    return f"{statement};"


def outbox_variants() -> list[Variant]:
    """What is compared in every setting."""
    return [
        Variant("domain", "the domain change alone", transaction()),
        Variant("plain", "plain insert into a bare table", transaction(put("bare"))),
        Variant("writer", "the Python writer's statement", transaction(put("outbox.entries")), 1.03),
        Variant(
            "put",
            "outbox.put",
            transaction("SELECT outbox.put('customer', CAST(:id AS text), CAST(:json AS jsonb));"),
            1.07,
        ),
        Variant("capture", "the capture trigger", transaction(domain="customer_captured"), 1.15),
        Variant("notify", "a trigger that notifies on each insert", transaction(put("bare_notify"))),
    ]


def logical_variants() -> list[Variant]:
    """Debezium's outbox, beside the yardstick and the writer on the same server."""
    debezium = transaction(
        "INSERT INTO debezium_outbox (id, aggregatetype, aggregateid, type, payload)"
        " VALUES (gen_random_uuid(), 'customer', :id, 'changed', CAST(:json AS jsonb)) RETURNING id AS entry \\gset",
        "DELETE FROM debezium_outbox WHERE id = CAST(:entry AS uuid);",
    )
    kept = ("domain", "plain", "writer", "put", "capture")
    return [
        *(Variant(v.name, v.title, v.script) for v in outbox_variants() if v.name in kept),
        Variant("debezium", "Debezium's outbox: insert and delete", debezium),
    ]


def bulk_variants() -> list[Variant]:
    """1,000 entries in one statement, in a transaction that changes as many rows."""

    def bulk(table: str) -> str:
        # The arrays are constants of the prepared statement: what they cost to send and to read is left out, which
        # makes the share of the insert itself greater.
        statement = sql.load("writer")["put_many"].replace("{schema}.entries", table)
        keys = ",".join(str(number) for number in range(1, BULK + 1))
        states = ",".join(r'"\\x' + state().hex() + '"' for _ in range(BULK))
        nulls = ",".join(["NULL"] * BULK)
        given = {"type": "'customer'", "keys": f"'{{{keys}}}'", "states": f"'{{{states}}}'"}
        for name in ("type", "keys", "states", "content_types", "causes", "headers"):
            statement = statement.replace(f"%({name})s", given.get(name, f"'{{{nulls}}}'"))
        change = f"UPDATE customer SET balance = balance + 1 WHERE id BETWEEN :id AND :id + {BULK - 1};"
        # Blocks of rows that do not overlap: two transactions that met would wait for each other.
        return "\n".join([rf"\set id {BULK} * :client_id + 1", "BEGIN;", change, f"{statement};", "COMMIT;", ""])

    return [
        Variant("plain", "1,000 by plain insert into a bare table", bulk("bare")),
        Variant("writer", "1,000 by put_many's statement", bulk("outbox.entries"), 1.03),
    ]


def state() -> bytes:
    """The state's bytes."""
    return json.dumps(STATE).encode()


# -- servers ---------------------------------------------------------------------------------------------------------

SERVER = {
    # A checkpoint in the middle of a run would hit the variants unevenly.
    "max_wal_size": "16GB",
    "checkpoint_timeout": "1h",
    "shared_buffers": "512MB",
}
DATABASE = "bench"


def make_database(server: Postgres, *, rows: int) -> str:
    """The tables of all variants and an outbox, in a database of their own; its URL."""
    with psycopg.connect(server.url(), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {DATABASE}".encode())
    url = server.url(DATABASE)
    with psycopg.connect(url) as connection:
        schema.install(connection, schema.Settings(name=f"bench{random.randrange(10**6)}"))
        for name in ("customer", "captured"):
            connection.execute(
                "INSERT INTO outbox.entity_types (name, topic) VALUES (%s, %s)", [name, f"bench.{name}.{server.port}"]
            )
        for table in ("customer", "customer_captured"):
            connection.execute(DOMAIN.format(table=table, rows=rows).encode())
        for table in ("bare", "bare_notify"):
            connection.execute(BARE.format(table=table).encode())
        connection.execute(NAIVE)
        captured = capture.Capture("customer_captured", "captured")
        for statement in capture.statements(captured, existing_rows=False):
            connection.execute(statement.encode())
        connection.execute(DEBEZIUM)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE")
    return url


@contextmanager
def drained_slot(server: Postgres, database: str) -> Iterator[None]:
    """What stands for Debezium until its connector is there: a slot that pgoutput feeds and pg_recvlogical drains.

    Cheaper than the connector, which also has to read, convert and send what comes: it flatters Debezium.
    """
    common = ("-d", server.url(database), "--slot", "debezium")
    subprocess.run(
        [Postgres.bin("pg_recvlogical"), *common, "--create-slot", "-P", "pgoutput"], check=True, capture_output=True
    )
    options = ("-o", "proto_version=1", "-o", "publication_names=debezium")
    process = subprocess.Popen(
        [Postgres.bin("pg_recvlogical"), *common, "--start", *options, "-f", os.devnull], stderr=subprocess.DEVNULL
    )
    try:
        yield
    finally:
        process.kill()
        process.wait()
        # The server notices a moment later that nobody reads any more.
        for _ in range(100):
            dropped = subprocess.run(
                [Postgres.bin("pg_recvlogical"), *common, "--drop-slot"], check=False, capture_output=True
            )
            if dropped.returncode == 0:
                break
            time.sleep(0.1)


def relay_environment(url: str, bootstrap: str, **settings: object) -> dict[str, str]:
    """The environment of a relay or command; settings by their names, in lower case."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")}
    given = {f"OUTBOX_{name.upper()}": str(value) for name, value in settings.items()}
    return {
        **own,
        "OUTBOX_DATABASE_URL": url,
        "OUTBOX_KAFKA_BOOTSTRAP_SERVERS": bootstrap,
        "OUTBOX_REPLICATION_FACTOR": "1",
        "OUTBOX_LOG_FORMAT": "json",
        **given,
    }


def command(environment: Mapping[str, str], *arguments: str, seconds: float = 600) -> str:
    """Run a command of the command line that must succeed; what it prints."""
    done = subprocess.run(
        [str(OUTBOX), *arguments],
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"outbox {' '.join(arguments)} failed ({done.returncode}):\n{done.stdout}{done.stderr}")
    return done.stdout


@contextmanager
def running_relay(environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A relay, as a user runs it, until the block ends."""
    with log.open("ab") as out:
        process = subprocess.Popen([str(OUTBOX), "relay"], env=dict(environment), stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def wait_idle(url: str, *, seconds: float = 300) -> None:
    """Wait until the relay has published everything and sleeps: it shows so in pg_stat_activity."""
    deadline = time.monotonic() + seconds
    with psycopg.connect(url, autocommit=True) as connection:
        while time.monotonic() < deadline:
            row = connection.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'outbox-relay % idle'"
            ).fetchone()
            if row and row[0]:
                return
            time.sleep(0.1)
    raise RuntimeError(f"the relay did not fall asleep in {seconds:g} s")


# -- pgbench ---------------------------------------------------------------------------------------------------------


def pgbench(
    url: str,
    variants: Sequence[Variant],
    *,
    clients: int,
    seconds: float,
    durable: bool,
    rows: int,
    rate: float | None = None,
) -> dict[str, Times]:
    """Run the variants, drawn anew for each transaction; the times of each.

    With a `rate` (transactions a second) the time that a transaction waited for its turn is not counted.
    """
    with tempfile.TemporaryDirectory(prefix="outbox-bench-") as place:
        directory = Path(place)
        files: list[str] = []
        for variant in variants:
            path = directory / f"{variant.name}.sql"
            path.write_text(variant.script)
            files += ["-f", str(path)]
        done = subprocess.run(
            [
                Postgres.bin("pgbench"),
                *("-n", "-M", "prepared", "-c", str(clients), "-j", str(min(clients, 2)), "-T", f"{seconds:.0f}"),
                *("-D", f"rows={rows}", "-D", rf"state=\x{state().hex()}", "-D", f"json={state().decode()}"),
                *("-l", "--log-prefix", str(directory / "log")),
                *(() if rate is None else ("-R", f"{rate:g}")),
                *files,
                url,
            ],
            env={**os.environ, "PGOPTIONS": f"-c synchronous_commit={'on' if durable else 'off'}"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0 or "aborted" in done.stderr:
            raise RuntimeError(f"pgbench failed ({done.returncode}):\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        micros: dict[int, list[float]] = {}
        for path in directory.glob("log.*"):
            for line in path.read_text().splitlines():
                # client, number, time, script, epoch, microseconds of it, and with a rate: how late it began
                parts = line.split()
                late = float(parts[6]) if rate is not None else 0.0
                micros.setdefault(int(parts[3]), []).append(float(parts[2]) - late)
    return {variant.name: Times.of(micros[number]) for number, variant in enumerate(variants) if number in micros}


# -- the part --------------------------------------------------------------------------------------------------------


def run(options: Options) -> Result:
    """Measure."""
    runs: dict[Setting, list[dict[str, Times]]] = {}
    with ExitStack() as cleanup:
        place = options.directory or Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="outbox-bench-")))
        # PostgreSQL may run as another user, who must be able to enter.
        place.chmod(0o711)
        replica = cleanup.enter_context(Postgres(place / "replica", options=SERVER))
        url = make_database(replica, rows=options.rows)
        logical_url = ""
        if "logical" in options.groups:
            logical = cleanup.enter_context(Postgres(place / "logical", options={**SERVER, "wal_level": "logical"}))
            logical_url = make_database(logical, rows=options.rows)
            cleanup.enter_context((options.connector or drained_slot)(logical, DATABASE))
        environment: dict[str, str] = {}
        if set(options.relays) - {"off"}:
            kafka = cleanup.enter_context(Kafka(place / "kafka"))
            environment = relay_environment(url, kafka.bootstrap)
            command(environment, "topics", "apply", "--yes")

        def take(setting: Setting, at: str, variants: Sequence[Variant], *, rate: float | None = None) -> None:
            found = pgbench(
                at,
                variants,
                clients=setting.clients,
                # At a rate there are few transactions: more time for them.
                seconds=options.seconds * (1 if rate is None else 3),
                durable=setting.durable,
                rows=options.rows,
                rate=rate,
            )
            runs.setdefault(setting, []).append(found)

        settings = [(durable, clients) for durable in options.durable for clients in options.clients]
        for number in range(options.rounds):
            print(f"round {number + 1} of {options.rounds}", file=sys.stderr)
            for durable, clients in settings:
                if "outbox" in options.groups and "off" in options.relays:
                    take(Setting("outbox", clients, durable, "off"), url, outbox_variants())
                if "logical" in options.groups:
                    take(Setting("logical", clients, durable, "off"), logical_url, logical_variants())
                if "bulk" in options.groups:
                    take(Setting("bulk", clients, durable, "off"), url, bulk_variants())
                if "alone" in options.groups and clients > 1:
                    runs.setdefault(Setting("alone", clients, durable, "off"), []).append(
                        alone(url, options, clients=clients, durable=durable)
                    )
            if environment and "outbox" in options.groups:
                with running_relay(environment, place / "relay.log"):
                    for durable, clients in settings:
                        wait_idle(url)
                        if "busy" in options.relays:
                            take(Setting("outbox", clients, durable, "busy"), url, outbox_variants())
                        if "asleep" in options.relays:
                            wait_idle(url)
                            # Seldom enough that most transactions find it asleep.
                            setting = Setting("outbox", clients, durable, "asleep")
                            take(setting, url, outbox_variants(), rate=options.rate)
        about = {
            "postgresql": _version(url),
            "platform": platform.platform(),
            "cores": os.cpu_count(),
            "debezium": "its connector" if options.connector else "pgoutput drained by pg_recvlogical",
            "options": {k: v for k, v in asdict(options).items() if k not in {"connector", "directory"}},
            "server": SERVER,
        }
    cells = list(summed_up(runs))
    return Result(cells, list(judged(cells)), about)


def alone(url: str, options: Options, *, clients: int, durable: bool) -> dict[str, Times]:
    """Variants one after the other: who notifies waits for others who notify, and shuffled it meets few of them."""
    found: dict[str, Times] = {}
    for variant in outbox_variants():
        if variant.name in {"plain", "writer", "put", "capture", "notify"}:
            seconds = max(1.0, options.seconds / 4)
            found |= pgbench(url, [variant], clients=clients, seconds=seconds, durable=durable, rows=options.rows)
    return found


def summed_up(runs: Mapping[Setting, Sequence[Mapping[str, Times]]]) -> Iterator[Cell]:
    """Each variant of each setting over the rounds."""
    for setting, rounds in sorted(runs.items(), key=lambda item: str(item[0])):
        for name in rounds[0]:
            own = [r for r in rounds if name in r and "plain" in r]
            if own:
                yield Cell(
                    setting,
                    name,
                    [r[name] for r in own],
                    *(
                        Spread.of([getattr(r[name], what) / getattr(r["plain"], what) for r in own])
                        for what in ("mean", "p50", "p99")
                    ),
                )


def judged(cells: Sequence[Cell]) -> Iterator[Aim]:
    """The aims, at the greatest number of clients."""
    most = max((cell.setting.clients for cell in cells), default=0)
    at = {(cell.setting, cell.variant): cell.mean.median for cell in cells if cell.setting.clients == most}
    aims = {("outbox", variant.name): (variant.title, variant.aim) for variant in outbox_variants() if variant.aim} | {
        ("bulk", variant.name): (variant.title, variant.aim) for variant in bulk_variants() if variant.aim
    }
    for (setting, name), ratio in at.items():
        title, aim = aims.get((setting.group, name), ("", None))
        if aim is not None:
            yield Aim(f"{title} ({setting})", aim, ratio, ratio <= aim)
    for (setting, name), ratio in at.items():
        if setting.group == "logical" and name in {"writer", "put", "capture"}:
            debezium = at[setting, "debezium"]
            yield Aim(f"{name} below Debezium's outbox ({setting})", debezium, ratio, ratio < debezium)


def _version(url: str) -> str:
    with psycopg.connect(url) as connection:
        row = connection.execute("SELECT current_setting('server_version')").fetchone()
    return str(row[0]) if row else "?"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run this part alone."""
    parser = argparse.ArgumentParser(prog="python -m bench.owner", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each pgbench run (default 10)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--durable", choices=["on", "off"], nargs="+", default=["on", "off"])
    parser.add_argument("--relay", choices=["off", "busy", "asleep"], nargs="+", default=["off", "busy", "asleep"])
    parser.add_argument(
        "--group",
        choices=["outbox", "logical", "bulk", "alone"],
        nargs="+",
        default=["outbox", "logical", "bulk", "alone"],
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    chosen = parser.parse_args(arguments)
    result = run(
        Options(
            rounds=chosen.rounds,
            seconds=chosen.seconds,
            clients=chosen.clients,
            durable=[word == "on" for word in chosen.durable],
            relays=chosen.relay,
            groups=chosen.group,
        )
    )
    text = json.dumps(result.as_json(), indent=1)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "owner.json").write_text(text + "\n")
    if chosen.json:
        print(text)
    else:
        print("\n".join(result.lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

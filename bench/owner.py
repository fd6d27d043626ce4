"""Part 4, the owner's cost: what an entry adds to the service's own transaction.

Stock pgbench runs all variants in one run, drawn anew for each transaction, so that whatever disturbs the machine
disturbs all of them alike; each transaction's time is taken from pgbench's log. What is compared is the whole
transaction, BEGIN to COMMIT: an UPDATE of a customer, and what publishes it. `plain` is the yardstick: the same
INSERT into a table that has nothing but a primary key.

Rounds go through every setting (durable commits or not; one client or 16; relay off, busy, asleep), so that a slow
minute spoils one round of each and not all rounds of one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import psycopg

from bench import install, pgbench
from bench.debezium import LATENCY, Connect, Debezium
from bench.measure import Spread, wait_for
from bench.options import Options
from bench.pgbench import Times
from bench.relay import Relay
from bench.report import Report, Series
from bench.servers import servers
from outbox import capture, sql

NAME = "owner"
OFF, BUSY, ASLEEP = "relay off", "relay busy", "relay asleep"
DEBEZIUM, ALONE, BULK = "beside Debezium", "alone", "1,000 at once"
PEERS = (OFF, BUSY, ASLEEP, DEBEZIUM, ALONE, BULK)
"""The circumstances; `alone`: one variant after the other instead of drawn, since who notifies waits for others who
do, and among others meets few of them."""
STAGE_SECONDS = 10.0
CLIENTS = (1, 16)
ROWS = 100_000
MANY = 1_000
# Transactions a second at which most find the relay asleep.
_SELDOM = 40.0

PLAIN = "plain insert"

STATE = {
    "name": "Ada Lovelace",
    "email": "ada.lovelace@example.com",
    "balance": 1_234_567,
    "note": "prefers the telephone; " * 6,
}
"""The state that the variants write: with key, type and the rest an entry of about 280 bytes."""
_BYTES = json.dumps(STATE).encode()

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


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to publish: pgbench's script, and how much longer than `plain` it may take (None: no aim)."""

    title: str
    script: str
    aim: float | None = None


@dataclass(frozen=True, slots=True)
class Setting:
    """How a run was taken."""

    circumstance: str
    clients: int
    durable: bool

    def __str__(self) -> str:
        return f"{self.clients} client{'s' * (self.clients > 1)}, {'durable' if self.durable else 'not durable'}"


Runs = Mapping[Setting, Sequence[Mapping[str, Times]]]
"""Of each setting, round by round: the times by the variants' titles."""

# -- the variants ----------------------------------------------------------------------------------------------------


def transaction(*statements: str, domain: str = "customer") -> str:
    """A script: the domain change, then what publishes it (what is published last was written last)."""
    update = f"UPDATE {domain} SET balance = balance + 1 WHERE id = :id;"
    return "\n".join([r"\set id random(1, :rows)", "BEGIN;", update, *statements, "COMMIT;", ""])


def put(table: str) -> str:
    """The Python writer's own statement, for this table: `plain` differs from the writer by nothing but the table."""
    statement = sql.load("writer")["put"].replace("{schema}.entries", table)
    given = {"type": "'customer'", "key": ":id", "state": ":state"}
    for name in ("type", "key", "state", "content_type", "cause", "headers"):
        statement = statement.replace(f"%({name})s", given.get(name, "NULL"))
    return f"{statement};"


def variants() -> list[Variant]:
    """What is compared in every setting but for the bulk."""
    return [
        Variant("domain change alone", transaction()),
        Variant(PLAIN, transaction(put("bare"))),
        Variant("writer's statement", transaction(put("outbox.entries")), 1.03),
        Variant(
            "outbox.put",
            transaction("SELECT outbox.put('customer', CAST(:id AS text), CAST(:json AS jsonb));"),
            1.07,
        ),
        Variant("capture trigger", transaction(domain="customer_captured"), 1.15),
        Variant("NOTIFY on each insert", transaction(put("bare_notify"))),
    ]


def beside_debezium() -> list[Variant]:
    """The same on a server with logical decoding, and Debezium's outbox: insert and delete."""
    theirs = transaction(
        "INSERT INTO public.outbox (id, aggregatetype, aggregateid, type, payload)"
        " VALUES (gen_random_uuid(), 'customer', :id, 'changed', :json) RETURNING id AS entry \\gset",
        "DELETE FROM public.outbox WHERE id = CAST(:entry AS uuid);",
    )
    return [*(Variant(one.title, one.script) for one in variants()), Variant(DEBEZIUM_OUTBOX, theirs)]


DEBEZIUM_OUTBOX = "Debezium's outbox"


def bulk() -> list[Variant]:
    """1,000 entries in one statement, in a transaction that changes as many rows."""

    def script(table: str) -> str:
        # The arrays are constants of the prepared statement: what they cost to send and to read is left out, which
        # makes the share of the insert itself greater.
        statement = sql.load("writer")["put_many"].replace("{schema}.entries", table)
        keys = ",".join(str(number) for number in range(1, MANY + 1))
        states = ",".join(r'"\\x' + _BYTES.hex() + '"' for _ in range(MANY))
        nulls = ",".join(["NULL"] * MANY)
        given = {"type": "'customer'", "keys": f"'{{{keys}}}'", "states": f"'{{{states}}}'"}
        for name in ("type", "keys", "states", "content_types", "causes", "headers"):
            statement = statement.replace(f"%({name})s", given.get(name, f"'{{{nulls}}}'"))
        change = f"UPDATE customer SET balance = balance + 1 WHERE id BETWEEN :id AND :id + {MANY - 1};"
        # Blocks of rows that do not overlap: two transactions that met would wait for each other.
        return "\n".join([rf"\set id {MANY} * :client_id + 1", "BEGIN;", change, f"{statement};", "COMMIT;", ""])

    return [Variant(PLAIN, script("bare")), Variant("writer's statement", script("outbox.entries"), 1.03)]


# -- where they run --------------------------------------------------------------------------------------------------


def make_tables(relay: Relay) -> None:
    """The tables of all variants beside an outbox, and its entity types."""
    with psycopg.connect(relay.url) as connection:
        for name in ("customer", "captured"):
            connection.execute(
                "INSERT INTO outbox.entity_types (name, topic) VALUES (%s, %s)", [name, f"{relay.topic}.{name}"]
            )
        for table in ("customer", "customer_captured"):
            connection.execute(DOMAIN.format(table=table, rows=ROWS).encode())
        for table in ("bare", "bare_notify"):
            connection.execute(BARE.format(table=table).encode())
        connection.execute(NAIVE)
        for statement in capture.statements(capture.Capture("customer_captured", "captured"), existing_rows=False):
            connection.execute(statement.encode())
    with psycopg.connect(relay.url, autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE")
    relay.command("topics", "apply", "--yes")


def wait_asleep(relay: Relay, seconds: float) -> None:
    """Wait until the relay has published everything and sleeps: it shows so in pg_stat_activity."""

    def asleep() -> bool:
        with psycopg.connect(relay.url) as connection:
            row = connection.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'outbox-relay % idle'"
            ).fetchone()
        return bool(row and row[0])

    wait_for(asleep, seconds=seconds, what="that the relay has published everything", pause=0.2)


class Rounds:
    """Goes through the settings of a round, and keeps what each run found."""

    def __init__(self, options: Options, relay: Relay, debezium: Debezium | None, beside: Relay | None) -> None:
        """`beside`: an outbox in Debezium's database."""
        self._options = options
        self._chosen = set(options.peers)
        self._relay, self._debezium, self._beside = relay, debezium, beside
        self.runs: dict[Setting, list[dict[str, Times]]] = {}

    def round(self) -> None:
        """One round."""
        for clients, durable in self._each():
            if OFF in self._chosen:
                self._take(self._relay.url, variants(), Setting(OFF, clients, durable))
            if BULK in self._chosen:
                self._take(self._relay.url, bulk(), Setting(BULK, clients, durable))
            if ALONE in self._chosen and clients > 1:
                setting, times = Setting(ALONE, clients, durable), dict[str, Times]()
                for variant in variants()[1:]:
                    times |= self._bench(self._relay.url, [variant], setting, share=0.25)
                self._took(setting, times)
        if self._debezium is not None and self._beside is not None:
            self._debezium.begin()
            for clients, durable in self._each():
                self._take(self._beside.url, beside_debezium(), Setting(DEBEZIUM, clients, durable))
            self._debezium.end()
        if self._chosen & {BUSY, ASLEEP}:
            self._relay.begin()
            for clients, durable in self._each():
                self._with_relay(clients, durable)
            self._relay.end()

    def _with_relay(self, clients: int, durable: bool) -> None:
        seconds = self._options.seconds
        wait_asleep(self._relay, seconds)
        if BUSY in self._chosen:
            self._take(self._relay.url, variants(), Setting(BUSY, clients, durable))
            wait_asleep(self._relay, seconds)
        if ASLEEP in self._chosen:
            # At this rate there are few transactions: more time for them.
            setting = Setting(ASLEEP, clients, durable)
            self._took(setting, self._bench(self._relay.url, variants(), setting, share=3, rate=_SELDOM))

    @staticmethod
    def _each() -> list[tuple[int, bool]]:
        return [(clients, durable) for durable in (True, False) for clients in CLIENTS]

    def _bench(
        self, url: str, chosen: Sequence[Variant], setting: Setting, *, share: float = 1, rate: float | None = None
    ) -> dict[str, Times]:
        return pgbench.run(
            url,
            {one.title: one.script for one in chosen},
            clients=setting.clients,
            seconds=max(self._options.stage_seconds * share, 1),
            durable=setting.durable,
            variables={"rows": ROWS, "state": rf"\x{_BYTES.hex()}", "json": _BYTES.decode()},
            rate=rate,
        )

    def _take(self, url: str, chosen: Sequence[Variant], setting: Setting) -> None:
        self._took(setting, self._bench(url, chosen, setting))

    def _took(self, setting: Setting, times: dict[str, Times]) -> None:
        self.runs.setdefault(setting, []).append(times)
        shown = ", ".join(f"{name} {one.mean / times[PLAIN].mean:.3f}" for name, one in times.items())
        self._options.view.step(f"{setting}, {setting.circumstance}: {shown}")


def run(options: Options) -> Report:
    """The part."""
    report = Report(
        NAME,
        "The owner's cost: times of whole transactions over those with a plain insert",
        options.command,
        {"seconds of a run": options.stage_seconds, "rounds": options.rounds},
    )
    with ExitStack() as stack:
        options.view.step("starting the servers")
        those = stack.enter_context(servers(stack.enter_context(options.work())))
        relay = Relay(those)
        stack.callback(relay.close)
        relay.prepare()
        make_tables(relay)
        debezium, beside = None, None
        if DEBEZIUM in options.peers:
            connect = Connect(those)
            stack.callback(connect.close)
            debezium = Debezium(those, connect, tuning=LATENCY)
            debezium.prepare()
            # The same outbox on its server, without a relay: everybody's WAL is the one that Debezium decodes.
            beside = Relay(those, name="beside", beside=debezium)
            beside.prepare()
            make_tables(beside)
        rounds = Rounds(options, relay, debezium, beside)
        for number in range(options.rounds):
            options.view.step(f"round {number + 1} of {options.rounds}")
            rounds.round()
        report.versions = those.versions() | (install.versions() if debezium is not None else {})
    tell(report, rounds.runs)
    return report


# -- what came of it -------------------------------------------------------------------------------------------------


def tell(report: Report, runs: Runs) -> None:
    """A row for each variant with a number of clients and a kind of commit, a column for each circumstance."""
    rows = [Setting("", clients, durable) for durable in (True, False) for clients in sorted(CLIENTS, reverse=True)]
    for row in rows:
        for variant in [*variants(), Variant(DEBEZIUM_OUTBOX, "")]:
            for circumstance in PEERS:
                rounds = runs.get(Setting(circumstance, row.clients, row.durable), [])
                ratios = _over_plain(rounds, variant.title)
                if ratios:
                    report.series.append(Series(f"{variant.title}, {row}", circumstance, "", ratios, 3))
    for row in rows:
        rounds = runs.get(Setting(OFF, row.clients, row.durable), [])
        if rounds:
            middle = Spread.of([one[PLAIN].mean for one in rounds]).median
            late = Spread.of([one[PLAIN].p99 for one in rounds]).median
            report.notes.append(
                f"The transaction with the plain insert, {row}, relay off: mean {middle / 1000:.2f} ms, "
                f"p99 {late / 1000:.2f} ms."
            )
    _judge(report, runs)


def _over_plain(rounds: Sequence[Mapping[str, Times]], title: str) -> list[float]:
    return [one[title].mean / one[PLAIN].mean for one in rounds if title in one and PLAIN in one]


def _judge(report: Report, runs: Runs) -> None:
    """The aims, at the greatest number of clients."""
    aims = {one.title: one.aim for one in variants() if one.aim is not None}
    for setting, rounds in runs.items():
        if setting.clients != max(CLIENTS):
            continue
        if setting.circumstance == DEBEZIUM:
            for title in aims:
                both = [(one[title].mean, one[DEBEZIUM_OUTBOX].mean) for one in rounds]
                mine, theirs = [a for a, _ in both], [b for _, b in both]
                name = f"{title} / {DEBEZIUM_OUTBOX} ({setting})"
                report.ratio(name, mine, theirs, aim=1, at_least=False)
            continue
        for title, aim in ({one.title: one.aim for one in bulk()} if setting.circumstance == BULK else aims).items():
            if aim is not None:
                mine, plain = [one[title].mean for one in rounds], [one[PLAIN].mean for one in rounds]
                name = f"{title} / {PLAIN} ({setting}, {setting.circumstance})"
                report.ratio(name, mine, plain, aim=aim, at_least=False)

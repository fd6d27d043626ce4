"""Part 4, the owner's cost: what an entry adds to the service's own transaction.

Stock pgbench runs all variants in one run, drawn anew for each transaction, so that whatever disturbs the machine
disturbs all of them alike; each transaction's time is taken from pgbench's log. What is compared is the whole
transaction, BEGIN to COMMIT: an UPDATE of a customer, and what publishes it. `plain` is the yardstick: the same
INSERT into a table that has nothing but a primary key. Each variant has customers of its own: a table that all but one
change would bloat more than that one's.

Rounds go through every setting (durable commits or not; one client or 16; relay off, busy, asleep), so that a slow
minute spoils one round of each and not all rounds of one. What a running relay costs everybody shows in the plain
insert itself: its time is shown, and compared between the circumstances.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import psycopg

from bench import pgbench
from bench.contender import wait_alive
from bench.debezium import LATENCY, Connect, Debezium
from bench.measure import Spread, turned, wait_for
from bench.options import Options
from bench.part import Part
from bench.pgbench import Times
from bench.relay import Relay
from bench.report import Panel, Report, Series
from bench.servers import Servers, servers
from outbox import capture, sql

NAME = "owner"
OFF, BUSY, SELDOM, ASLEEP = "off", "busy", "seldom", "asleep"
DEBEZIUM, STOPPED, ALONE, BULK = "debezium", "debezium-stopped", "alone", "bulk"
PEERS = (OFF, BUSY, SELDOM, ASLEEP, DEBEZIUM, STOPPED, ALONE, BULK)
RATE = 40.0
"""Transactions a second at which most find the relay asleep."""
TITLES: Mapping[str, str] = {
    OFF: "relay off",
    BUSY: "relay busy",
    SELDOM: f"relay off, {RATE:g} transactions/s",
    ASLEEP: f"relay asleep, {RATE:g} transactions/s",
    DEBEZIUM: "beside Debezium",
    STOPPED: "Debezium stopped",
    ALONE: "alone",
    BULK: "1,000 at once",
}
"""The circumstances. `alone`: one variant after the other instead of drawn, since who notifies waits for others who
do, and among others meets few of them. `seldom`: as `asleep`, without the relay. `debezium-stopped`: the same server
with logical decoding, while its connector reads nothing."""
JUDGED = (OFF, BUSY, BULK)
"""Those in which there is an aim. Alone, a slow minute would be one variant's; at a rate, most of the time is waiting
for the disk or the processor to wake up."""
STAGE_SECONDS = 10.0
# Of that time: one variant needs less, and at a rate there are few transactions.
_SHARES: Mapping[str, float] = {ALONE: 0.25, SELDOM: 2, ASLEEP: 2}
CLIENTS = (1, 16)
ROWS = 100_000
MANY = 1_000

PLAIN, WITH_INDEXES = "plain insert", "insert with the log's indexes"
WRITER, PUT, CAPTURE = "writer's statement", "outbox.put", "capture trigger"
DEBEZIUM_OUTBOX = "Debezium's outbox"

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

# The same with the log's two indexes: where most of what a bulk costs goes.
INDEXED = """
CREATE TABLE bare_indexed (
    xid xid8 NOT NULL DEFAULT pg_current_xact_id(), id bigint NOT NULL GENERATED ALWAYS AS IDENTITY,
    shard smallint NOT NULL DEFAULT 0, type text NOT NULL, key text NOT NULL, state bytea,
    content_type text, cause text, headers jsonb, created_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE INDEX ON bare_indexed (shard, id);
CREATE INDEX ON bare_indexed (shard, xid, id);
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

# Whose customers each variant changes.
DOMAINS: Mapping[str, str] = {
    "domain change alone": "customer_alone",
    PLAIN: "customer_plain",
    WITH_INDEXES: "customer_indexed",
    WRITER: "customer_writer",
    PUT: "customer_put",
    CAPTURE: "customer_captured",
    "NOTIFY on each insert": "customer_notify",
    DEBEZIUM_OUTBOX: "customer_debezium",
}


def variant(title: str, *statements: str, aim: float | None = None) -> Variant:
    """The domain change, then what publishes it (what is published last was written last)."""
    update = f"UPDATE {DOMAINS[title]} SET balance = balance + 1 WHERE id = :id;"
    script = "\n".join([r"\set id random(1, :rows)", "BEGIN;", update, *statements, "COMMIT;", ""])
    return Variant(title, script, aim)


def put(table: str) -> str:
    """The Python writer's own statement, for this table: `plain` differs from the writer by nothing but the table."""
    statement = sql.load("writer")["put"].replace("{schema}.entries", table)
    given = {"type": "'customer'", "key": ":id", "state": ":state"}
    for name in ("type", "key", "state", "content_type", "cause", "headers"):
        statement = statement.replace(f"%({name})s", given.get(name, "NULL"))
    return f"{statement};"


def variants() -> list[Variant]:
    """What is compared in every setting but for the bulk."""
    by_function = "SELECT outbox.put('customer', CAST(:id AS text), CAST(:json AS jsonb));"
    return [
        variant("domain change alone"),
        variant(PLAIN, put("bare")),
        variant(WRITER, put("outbox.entries"), aim=1.03),
        variant(PUT, by_function, aim=1.07),
        variant(CAPTURE, aim=1.15),
        variant("NOTIFY on each insert", put("bare_notify")),
    ]


def beside_debezium() -> list[Variant]:
    """The same on a server with logical decoding, and Debezium's outbox: insert and delete."""
    theirs = variant(
        DEBEZIUM_OUTBOX,
        "INSERT INTO public.outbox (id, aggregatetype, aggregateid, type, payload)"
        " VALUES (gen_random_uuid(), 'customer', :id, 'changed', :json) RETURNING id AS entry \\gset",
        "DELETE FROM public.outbox WHERE id = CAST(:entry AS uuid);",
    )
    return [*variants(), theirs]


def bulk() -> list[Variant]:
    """1,000 entries in one statement, in a transaction that changes as many rows."""

    def script(title: str, table: str) -> str:
        # The arrays are constants of the prepared statement: what they cost to send and to read is left out, which
        # makes the share of the insert itself greater.
        statement = sql.load("writer")["put_many"].replace("{schema}.entries", table)
        keys = ",".join(str(number) for number in range(1, MANY + 1))
        states = ",".join(r'"\\x' + _BYTES.hex() + '"' for _ in range(MANY))
        nulls = ",".join(["NULL"] * MANY)
        given = {"type": "'customer'", "keys": f"'{{{keys}}}'", "states": f"'{{{states}}}'"}
        for name in ("type", "keys", "states", "content_types", "causes", "headers"):
            statement = statement.replace(f"%({name})s", given.get(name, f"'{{{nulls}}}'"))
        change = f"UPDATE {DOMAINS[title]} SET balance = balance + 1 WHERE id BETWEEN :id AND :id + {MANY - 1};"
        # Blocks of rows that do not overlap: two transactions that met would wait for each other.
        return "\n".join([rf"\set id {MANY} * :client_id + 1", "BEGIN;", change, f"{statement};", "COMMIT;", ""])

    return [
        Variant(PLAIN, script(PLAIN, "bare")),
        Variant(WITH_INDEXES, script(WITH_INDEXES, "bare_indexed")),
        Variant(WRITER, script(WRITER, "outbox.entries"), 1.03),
    ]


def compared(circumstance: str) -> list[Variant]:
    """What is compared in a circumstance."""
    return {BULK: bulk, DEBEZIUM: beside_debezium}.get(circumstance, variants)()


# -- where they run --------------------------------------------------------------------------------------------------


def make_tables(relay: Relay) -> None:
    """The tables of all variants beside an outbox, and its entity types."""
    with psycopg.connect(relay.url) as connection:
        for name in ("customer", "captured"):
            connection.execute(
                "INSERT INTO outbox.entity_types (name, topic) VALUES (%s, %s)", [name, f"{relay.topic}.{name}"]
            )
        for table in DOMAINS.values():
            connection.execute(DOMAIN.format(table=table, rows=ROWS).encode())
        for table in ("bare", "bare_notify"):
            connection.execute(BARE.format(table=table).encode())
        connection.execute(INDEXED)
        connection.execute(NAIVE)
        for statement in capture.statements(capture.Capture(DOMAINS[CAPTURE], "captured"), existing_rows=False):
            connection.execute(statement.encode())
    with psycopg.connect(relay.url, autocommit=True) as connection:
        connection.execute("VACUUM ANALYZE")
    relay.command("topics", "apply", "--yes")


def wait_asleep(relay: Relay, seconds: float) -> None:
    """Wait until the relay has published everything and sleeps: it shows so in pg_stat_activity."""

    def asleep() -> bool:
        relay.check_alive()
        with psycopg.connect(relay.url) as connection:
            row = connection.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'outbox-relay % idle'"
            ).fetchone()
        return bool(row and row[0])

    wait_for(asleep, seconds=seconds, what="that the relay has published everything", pause=0.2)


@dataclass(frozen=True, slots=True)
class Beside:
    """Debezium, and an outbox without a relay in its database: everybody's log is the one that Debezium decodes."""

    debezium: Debezium
    outbox: Relay


class Rounds:
    """Goes through the settings of a round, and keeps what each run found."""

    def __init__(self, options: Options, servers: Servers, relay: Relay, beside: Beside | None) -> None:
        self._options = options
        self._topics = servers.topics
        self._relay, self._beside = relay, beside
        self.runs: dict[Setting, list[Mapping[str, Times]]] = {}
        # While it was to sleep: entries that the relay published, and in how many batches.
        self.slept: list[tuple[int, int]] = []

    def round(self, number: int) -> None:
        """One round; those of the warm-up, with negative numbers, are not kept."""
        for take in turned([self._without_relay, self._with_debezium, self._with_relay], number):
            take(number)

    def _settings(self, number: int, *circumstances: str) -> list[Setting]:
        """Those of the circumstances that were chosen, with each number of clients and kind of commit."""
        chosen = [one for one in circumstances if one in self._options.peers]
        each = [(clients, durable) for durable in (True, False) for clients in CLIENTS]
        found = [
            Setting(circumstance, clients, durable)
            for clients, durable in turned(each, number)
            for circumstance in turned(chosen, number)
        ]
        # One client meets nobody, alone or among others.
        return [one for one in found if one.circumstance != ALONE or one.clients > 1]

    def _without_relay(self, number: int) -> None:
        for setting in self._settings(number, OFF, SELDOM, BULK, ALONE):
            self._take(number, setting, self._relay.url)

    def _with_relay(self, number: int) -> None:
        if not (settings := self._settings(number, BUSY, ASLEEP)):
            return
        self._relay.begin()
        for setting in settings:
            wait_asleep(self._relay, self._options.seconds)
            self._relay.mark()
            self._take(number, setting, self._relay.url)
            if setting.circumstance == ASLEEP:
                wait_asleep(self._relay, self._options.seconds)
                batches = [event["entries"] for event in self._relay.events("relay.published")]
                self.slept.append((sum(batches), len(batches)))
        wait_asleep(self._relay, self._options.seconds)
        self._relay.end()

    def _with_debezium(self, number: int) -> None:
        if self._beside is None:
            return
        debezium, seconds = self._beside.debezium, self._options.seconds
        for setting in self._settings(number, STOPPED):
            self._take(number, setting, self._beside.outbox.url)
        if not self._settings(number, DEBEZIUM):
            return
        debezium.begin()
        debezium.wait_running()
        # It has to read past what was written while it was stopped.
        wait_alive(self._topics, debezium, seconds)
        for setting in self._settings(number, DEBEZIUM):
            starts, confirmed = self._topics.ends(debezium.topic), debezium.confirmed()
            self._take(number, setting, self._beside.outbox.url)
            # Until it has published everything, as the relay: whether it has published at all is shown thereby.
            self._topics.watch(
                debezium.topic,
                starts,
                began=time.monotonic(),
                done=lambda added: added > 0,
                check=debezium.check_alive,
                seconds=seconds,
            )
            _wait_confirmed(debezium, confirmed, seconds)
        debezium.end()

    def _take(self, number: int, setting: Setting, url: str) -> None:
        """One run."""
        if setting.circumstance == ALONE:
            times: dict[str, Times] = {}
            for one in turned(variants()[1:], number):
                times |= self._bench(url, [one], setting)
        else:
            times = self._bench(url, compared(setting.circumstance), setting)
        if number >= 0:
            self.runs.setdefault(setting, []).append(times)
        shown = ", ".join(f"{name} {one.mean / times[PLAIN].mean:.3f}" for name, one in times.items())
        plain = f"{times[PLAIN].mean / 1000:.2f} ms"
        self._options.view.step(f"{setting}, {TITLES[setting.circumstance]}: {shown}; {PLAIN} {plain}")

    def _bench(self, url: str, chosen: Sequence[Variant], setting: Setting) -> dict[str, Times]:
        return pgbench.run(
            url,
            {one.title: one.script for one in chosen},
            clients=setting.clients,
            seconds=max(self._options.stage_seconds * _SHARES.get(setting.circumstance, 1), 1),
            durable=setting.durable,
            variables={"rows": ROWS, "state": rf"\x{_BYTES.hex()}", "json": _BYTES.decode()},
            rate=RATE if setting.circumstance in {SELDOM, ASLEEP} else None,
        )


def _wait_confirmed(debezium: Debezium, before: int, seconds: float) -> None:
    """Wait until it has told its server that what was written since is published."""

    def moved() -> bool:
        debezium.check_alive()
        return debezium.confirmed() > before

    wait_for(moved, seconds=seconds, what="that Debezium confirms what it has read to its replication slot", pause=0.2)


def run(options: Options) -> Report:
    """The part."""
    report = Report(
        NAME,
        "The owner's cost: times of whole transactions over those with a plain insert",
        options.command,
        {"seconds of a run": options.stage_seconds, "rounds": options.rounds, "warm-up rounds": options.warm_up},
    )
    with ExitStack() as stack:
        options.view.step("starting the servers")
        those = stack.enter_context(servers(stack.enter_context(options.work())))
        relay = Relay(those)
        stack.callback(relay.close)
        relay.prepare()
        make_tables(relay)
        beside: Beside | None = None
        if DEBEZIUM in options.peers:
            connect = Connect(those)
            stack.callback(connect.close)
            debezium = Debezium(those, connect, tuning=LATENCY)
            debezium.prepare()
            beside = Beside(debezium, Relay(those, name="beside", beside=debezium))
            beside.outbox.prepare()
            make_tables(beside.outbox)
        rounds = Rounds(options, those, relay, beside)
        for number in options.numbers():
            rounds.round(number)
        report.versions = those.versions([relay, beside.debezium] if beside is not None else [relay])
    tell(report, rounds.runs)
    if rounds.slept:
        entries, batches = (sum(each) for each in zip(*rounds.slept, strict=True))
        report.notes.append(
            f"While it was to be asleep the relay published {entries:,} entries in {batches:,} batches: so many times "
            "a writer rang. What that costs has no aim: at this rate most of a transaction's time is waiting."
        )
    return report


# -- what came of it -------------------------------------------------------------------------------------------------


def tell(report: Report, runs: Runs) -> None:
    """A row for each variant with a number of clients and a kind of commit, a column for each circumstance."""
    rows = [Setting("", clients, durable) for durable in (True, False) for clients in sorted(CLIENTS, reverse=True)]
    for row in rows:
        for title in DOMAINS:
            for circumstance in PEERS:
                rounds = runs.get(Setting(circumstance, row.clients, row.durable), [])
                unit, values = "", _over_plain(rounds, title)
                if title == PLAIN:
                    unit, values = "ms", [one[PLAIN].mean / 1000 for one in rounds]
                if values:
                    report.series.append(Series(f"{title}, {row}", TITLES[circumstance], unit, values, 3))
    report.notes.append(f"Of the {PLAIN} the times are shown, of all else the ratio to it in the same run.")
    if any(CAPTURE in one for rounds in runs.values() for one in rounds):
        report.notes.append(f"The {CAPTURE} saves the client a statement, and its round trip, which the others have.")
    for row in rows:
        if rounds := runs.get(Setting(OFF, row.clients, row.durable), []):
            late = Spread.of([one[PLAIN].p99 / 1000 for one in rounds]).median
            report.notes.append(f"p99 of the transaction with the {PLAIN}, {row}, {TITLES[OFF]}: {late:.2f} ms.")
    for row in rows:
        _draw(report, row)
        for running, without in ((BUSY, OFF), (ASLEEP, SELDOM), (DEBEZIUM, STOPPED)):
            mine = runs.get(Setting(running, row.clients, row.durable), [])
            plain = runs.get(Setting(without, row.clients, row.durable), [])
            if mine and plain:
                name = f"{PLAIN}: {TITLES[running]} / {TITLES[without]} ({row})"
                report.ratio(name, [one[PLAIN].mean for one in mine], [one[PLAIN].mean for one in plain])
    _judge(report, runs)


def _draw(report: Report, row: Setting) -> None:
    """The ratios at the greatest number of clients."""
    if row.clients != max(CLIENTS):
        return
    shown = [TITLES[one] for one in (OFF, BUSY, DEBEZIUM)]
    there = {one.contender for one in report.series if one.figure in shown}
    bars = {name: title for title in DOMAINS if title != PLAIN and (name := f"{title}, {row}") in there}
    figures = [one for one in shown if any(series.figure == one for series in report.series)]
    if bars:
        ours = [f"{title}, {row}" for title in (WRITER, PUT, CAPTURE)]
        report.panels.append(Panel(f"over the {PLAIN}, {row}", figures, bars, ours, base=1))


def _over_plain(rounds: Sequence[Mapping[str, Times]], title: str) -> list[float]:
    return [one[title].mean / one[PLAIN].mean for one in rounds if title in one and PLAIN in one]


def _judge(report: Report, runs: Runs) -> None:
    """The aims, at the greatest number of clients."""
    for setting, rounds in runs.items():
        if setting.clients != max(CLIENTS) or setting.circumstance not in {*JUDGED, DEBEZIUM}:
            continue
        beside = setting.circumstance == DEBEZIUM
        for one in compared(setting.circumstance):
            if one.aim is not None:
                than = DEBEZIUM_OUTBOX if beside else PLAIN
                report.ratio(
                    f"{one.title} / {than} ({setting}, {TITLES[setting.circumstance]})",
                    [times[one.title].mean for times in rounds],
                    [times[than].mean for times in rounds],
                    aim=1 if beside else one.aim,
                    at_least=False,
                )


PART = Part(NAME, run, PEERS, stage_seconds=STAGE_SECONDS)

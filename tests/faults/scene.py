"""A scene: the servers, the outbox, the load, and relays as processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import psycopg
from confluent_kafka.admin import AdminClient

from devstack.kafka import Kafka
from devstack.postgres import Postgres
from faults.cluster import Cluster
from faults.judge import Judgement, judge
from faults.load import TYPES, Load, make_domain
from faults.proxy import Proxy
from faults.transactions import ends, has_open_transaction, offsets
from faults.victim import Lack
from faults.volume import Volume
from outbox import schema
from outbox.config import Config
from outbox.errors import BrokerUnavailableError
from outbox.kafka.shard_log import read_positions
from outbox.position import Position
from relays import OUTBOX, environment, eventually, must

PASSWORD = "of-the-relay"
# What a coordinator logs (TransactionMarkerChannelManager of Kafka 4.3.1), with the partitions.
TORN = "Couldn't find leader endpoint for partitions"
TESTS = Path(__file__).resolve().parent.parent


@dataclass
class Relay:
    """A relay's process; `log` is kept over its lives."""

    command: Sequence[str]
    env: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] = field(init=False)
    began: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.began = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, env=self.env, stdout=log, stderr=log, cwd=TESTS)

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    def events(self) -> list[dict[str, Any]]:
        """What this life of it has logged."""
        with self.log.open("rb") as log:
            log.seek(self.began)
            return [json.loads(line) for line in log.read().splitlines() if line.startswith(b"{")]

    def said(self, name: str) -> dict[str, Any] | None:
        """The last event of a name, if there is one."""
        return next((event for event in reversed(self.events()) if event.get("event") == name), None)

    def wait_said(self, name: str, *, seconds: float = 60) -> dict[str, Any]:
        """Wait until it has said it."""
        return eventually(lambda: self.said(name), seconds=seconds, what=f"event {name} in {self.log}")

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, by its id."""
        self.process.send_signal(number)

    def wait(self, *, seconds: float = 60) -> int:
        """Wait for its end; the exit code."""
        return self.process.wait(seconds)

    def wait_frozen(self, *, seconds: float = 60) -> None:
        """Wait until it is stopped by a signal (or has ended)."""

        def frozen() -> bool:
            try:
                state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                return True
            return state in "TZ"

        eventually(frozen, seconds=seconds, what="frozen")

    def kill(self) -> None:
        """End it at once."""
        if self.alive:
            self.process.kill()
        self.process.wait()


class Scene:
    """PostgreSQL and Kafka of its own, both behind proxies as far as the relay is concerned; an outbox; its types.

    Writers reach PostgreSQL directly: what is cut is the relay's line. `relay()` and `victim()` start relays;
    `settle()` drains and judges. `relay_role`: the relay logs in as this role, with a password. `retention` makes the
    ring, `kept` shortens what is retained without it. `small_disk`: the server that lies on `volume`, a file system
    that can be filled. `environment` is that of PostgreSQL's process.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        *,
        postgres: dict[str, str] | None = None,
        kafka: dict[str, str] | None = None,
        shards: int = 1,
        doorbell: bool = True,
        brokers: int = 1,
        relay_role: str | None = None,
        retention: str = "1 day",
        kept: str | None = None,
        small_disk: Literal["postgres", "kafka"] | None = None,
        environment: Mapping[str, str] = {},
        **settings: object,
    ) -> None:
        self.directory = directory / name
        self.directory.mkdir(parents=True)
        self.directory.chmod(0o755)
        self.name = name
        self._stack = ExitStack()
        self.postgres = Postgres(
            self.directory / "postgres",
            options={"shared_buffers": "64MB", **(postgres or {})},
            environment=environment,
        )
        self._small_disk = small_disk
        self._brokers = brokers
        self._relay_role = relay_role
        self._retention = retention
        self._kept = kept
        self._kafka_properties = kafka or {}
        self.shards = shards
        self.doorbell = doorbell
        self.settings: dict[str, object] = {"backoff_max": "0.5", "batch_rows": "60", **settings}
        self._relays: list[Relay] = []
        self._logs = 0
        self.timeline = 1
        self.adopted = False
        self.republished = False
        self.gone: dict[str, Position] = {}

    def __enter__(self) -> Self:
        try:
            self._make()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for relay in self._relays:
            relay.kill()
        self._stack.close()

    def _make(self) -> None:
        if self._small_disk is not None:
            self.volume = self._stack.enter_context(Volume(self.directory / self._small_disk, megabytes=300))
        first = self.postgres
        first.launch()
        self._stack.callback(lambda: first.stop("immediate"))
        if self._brokers == 1:
            self._make_kafka()
        else:
            self.cluster = self._stack.enter_context(Cluster(self.directory))
            self.settings["replication_factor"] = "3"
        self.postgres.wait_ready()
        self.postgres_line = self._stack.enter_context(Proxy(self.postgres.port))
        with psycopg.connect(self.postgres.url()) as connection:
            schema.install(
                connection,
                schema.Settings(self.name, shards=self.shards, doorbell=self.doorbell, retention=self._retention),
            )
            if self._kept is not None:
                connection.execute("UPDATE outbox.settings SET retention = %s::interval", [self._kept])
            if self._relay_role is not None:
                connection.execute(f"CREATE ROLE {self._relay_role} LOGIN PASSWORD '{PASSWORD}'".encode())
                for statement in schema.grants("outbox", relay=self._relay_role):
                    connection.execute(statement.encode())
        if self._relay_role is not None:
            self._ask_for_the_password()
        make_domain(self.postgres.url())
        for type_name in TYPES:
            collapse = ["--no-collapse"] if type_name == "every" else []
            must(self.env(), "types", "add", type_name, "--topic", self.topics[type_name], *collapse)
        must(self.env(), "topics", "apply", "--yes")

    def _ask_for_the_password(self) -> None:
        rules = self.postgres.data / "pg_hba.conf"
        rules.write_text(f"host all {self._relay_role} 127.0.0.1/32 scram-sha-256\n{rules.read_text()}")
        self.sql("SELECT pg_reload_conf()")

    def _make_kafka(self) -> None:
        kafka = Kafka(self.directory / "kafka")
        proxy = self._stack.enter_context(Proxy(kafka.port, kafka=True))
        # Clients are told to come to the proxy; nobody else is there.
        kafka.properties["advertised.listeners"] = (
            f"PLAINTEXT://127.0.0.1:{proxy.port},CONTROLLER://127.0.0.1:{kafka.controller_port}"
        )
        kafka.properties.update(self._kafka_properties)
        self.kafka, self.kafka_line = kafka, proxy
        self._stack.callback(kafka.kill)
        kafka.start()

    # --- what it is ------------------------------------------------------------------------------

    @property
    def topics(self) -> dict[str, str]:
        """The topics, by entity type."""
        return {type_name: f"{self.name}.{type_name}" for type_name in TYPES}

    @property
    def bootstrap(self) -> str:
        """Kafka, through its proxy; a cluster directly."""
        if self._brokers > 1:
            return self.cluster.bootstrap
        return f"127.0.0.1:{self.kafka_line.port}"

    def env(self, **settings: object) -> dict[str, str]:
        """The environment of a relay or command: both servers through their proxies."""
        line = getattr(self, "postgres_line", None)
        url = self.postgres.url() if line is None else self.postgres.url().replace(
            f":{self.postgres.port}/", f":{line.port}/"
        )  # fmt: skip
        env = environment(url, self.bootstrap, **{**self.settings, **settings})
        path = os.pathsep.join([str(TESTS), str(TESTS.parent / "examples")])
        return {**env, "PYTHONPATH": path}

    def url(self) -> str:
        """PostgreSQL, directly: for the owning service and the checker."""
        return self.postgres.url()

    def load(self, **more: Any) -> Load:
        """The owning service's writers."""
        return Load(self.url, timeline=self.timeline, **more)

    # --- relays ----------------------------------------------------------------------------------

    def relay(self, *, shard: int = 0, **settings: object) -> Relay:
        """Start the relay of the command line."""
        env = self.env(shard=shard, **settings)
        if self._relay_role is not None:
            env["OUTBOX_DATABASE_URL"] = env["OUTBOX_DATABASE_URL"].replace(
                "postgres@", f"{self._relay_role}:{PASSWORD}@"
            )
        return self._start([str(OUTBOX), "relay"], env)

    def command(self, *arguments: str) -> Relay:
        """Start another command of the command line, to be watched and killed like a relay."""
        return self._start([str(OUTBOX), *arguments], self.env())

    def victim(
        self, place: str, number: int, what: str = "KILL", *, lack: Lack | None = None, **settings: object
    ) -> Relay:
        """Start a relay that kills or freezes itself at a place; see `faults.victim`."""
        command = [sys.executable, "-m", "faults.victim", place, str(number), what]
        return self._start([*command, lack] if lack else command, self.env(**settings))

    def _start(self, command: Sequence[str], env: dict[str, str]) -> Relay:
        self._logs += 1
        relay = Relay(command, env, self.directory / f"relay-{self._logs}.log")
        self._relays.append(relay)
        return relay

    def replace_postgres(self, other: Postgres, *, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Another server takes the database's place: for writers, for the checker, behind the relay's proxy.

        `meanwhile` is done before the relay sees it.
        """
        self.postgres = other
        self._stack.callback(lambda: other.stop("immediate"))
        meanwhile()
        self.postgres_line.target = other.port
        self.postgres_line.cut()

    # --- how far it is ---------------------------------------------------------------------------

    def put(self, key: str) -> None:
        """A change beside the load, of an entity of its own."""
        with psycopg.connect(self.url()) as connection:
            self.change(connection, key)

    def change(
        self,
        connection: psycopg.Connection,
        key: str,
        *,
        type_name: str = "wide",
        age: str = "0",
        padding: int = 0,
        slot: int | None = None,
    ) -> None:
        """The same in somebody's transaction; `age` (an interval) and `padding` (characters) are what Kafka refuses.

        `slot` of the ring: the clock's, unless the owner says which.
        """
        connection.execute(
            "INSERT INTO thing (type, key, version, alive, changed_on) VALUES (%s, %s, 1, true, %s)"
            " ON CONFLICT (type, key) DO UPDATE SET version = thing.version + 1",
            [type_name, key, self.timeline],
        )
        connection.execute(
            "WITH entry AS (INSERT INTO outbox.entries (type, key, state, created_at, slot)"
            " SELECT type, key, convert_to(jsonb_build_object("
            "'version', version, 'on', changed_on, 'padding', repeat('x', %s))::text, 'UTF8'),"
            " clock_timestamp() - %s::interval, coalesce(%s::smallint, outbox.slot_of(clock_timestamp()))"
            " FROM thing WHERE type = %s AND key = %s RETURNING id)"
            " INSERT INTO ledger (id, type, key, version)"
            " SELECT entry.id, thing.type, thing.key, version FROM entry, thing WHERE type = %s AND key = %s",
            [padding, age, slot, type_name, key, type_name, key],
        )

    def sql(self, statement: str) -> None:
        """A statement of the database's owner."""
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(statement.encode())

    def terminate(self) -> int:
        """Terminate the relay's backends, as an administrator might; how many there were."""
        with psycopg.connect(self.url(), autocommit=True) as connection:
            row = connection.execute(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity"
                " WHERE application_name LIKE 'outbox-relay%'"
            ).fetchone()
        return int(row[0]) if row else 0

    def positions(self) -> list[Position | None]:
        """The committed positions, by shard."""
        values = read_positions(Config(kafka_bootstrap_servers=self.bootstrap), self.name)
        return [Position.decode(value) if value is not None else None for value in values]

    # --- what Kafka has of transactions ------------------------------------------------------------

    @property
    def positions_topic(self) -> str:
        """The topic of positions."""
        return f"{self.name}.outbox.positions"

    def aborted_states(self) -> int:
        """How many records of states were aborted: who reads what is not committed sees them, too."""
        return sum(
            len(self.offsets(topic, committed=False) - self.offsets(topic, committed=True))
            for topic in self.topics.values()
        )

    def offsets(self, topic: str, *, committed: bool) -> set[tuple[int, int]]:
        """Partition and offset of each record of a topic; those of aborted transactions, too, unless `committed`."""
        return offsets(self._asker, self.bootstrap, topic, committed=committed)

    def open_transactions(self) -> bool:
        """Whether Kafka holds an open transaction in any of the topics."""
        topics = (*self.topics.values(), self.positions_topic)
        return any(has_open_transaction(self._asker, topic) for topic in topics)

    def has_ended(self, record: tuple[int, int]) -> bool:
        """Whether the transaction of a record of the positions topic, by partition and offset, has ended."""
        partition, offset = record
        return ends(self._asker, self.positions_topic, committed=True)[partition] > offset

    def transactional_ids(self) -> set[str]:
        """The transactional ids that the coordinator knows."""
        said = self.kafka.tool(
            "org.apache.kafka.tools.TransactionsCommand", "--bootstrap-server", self.bootstrap, "list"
        )
        return {line.split()[0] for line in said.splitlines()[1:] if line.strip()}

    @cached_property
    def _asker(self) -> AdminClient:
        # One that stays: it is asked again and again. A broker that is away is nothing to tell.
        return AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0})

    def admin(self) -> AdminClient:
        """Kafka, as its administrator."""
        return AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0})

    def delete_topic(self, topic: str) -> None:
        """Delete a topic, as somebody might, and wait until it is gone."""
        admin = self.admin()
        admin.delete_topics([topic])[topic].result()
        eventually(lambda: topic not in admin.list_topics(timeout=5).topics, what="the topic is gone")

    def lose_positions(self) -> None:
        """Delete the positions topic, as somebody might, and make it anew."""
        topic = f"{self.name}.outbox.positions"
        self.delete_topic(topic)
        must(self.env(), "topics", "apply", "--yes")
        self.republished = True

    @staticmethod
    def count_said(relay: Relay, name: str) -> int:
        """How often a relay has logged an event."""
        return sum(event.get("event") == name for event in relay.events())

    def wait_said_again(self, relay: Relay, name: str, before: int, *, seconds: float = 60) -> None:
        """Wait until a relay has logged an event more often than before."""
        eventually(lambda: self.count_said(relay, name) > before, seconds=seconds, what=f"{name}, once more")

    def wait_in_sync(self, *, seconds: float = 60) -> None:
        """Wait until every partition has all of its replicas in sync."""
        admin = self.admin()

        def in_sync() -> bool:
            topics = admin.list_topics(timeout=5).topics.values()
            return all(len(p.isrs) == len(p.replicas) for topic in topics for p in topic.partitions.values())

        eventually(in_sync, seconds=seconds, what="in sync")

    @staticmethod
    def peak(relay: Relay, code: int, *, seconds: float = 300) -> float:
        """Wait for a relay's end, which must be this; its peak memory in MB, as it was last seen.

        Not by `wait4`: a child is credited with its parent's peak, from between fork and exec.
        """
        status = Path(f"/proc/{relay.process.pid}/status")
        seen = 0.0
        deadline = time.monotonic() + seconds
        while relay.alive:
            assert time.monotonic() < deadline, f"it still runs after {seconds:g} s"
            with contextlib.suppress(OSError, IndexError):
                seen = float(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
            time.sleep(0.02)
        assert relay.wait() == code, relay.log.read_text()[-2000:]
        assert seen, "it ended before it was looked at"
        return seen

    def greatest(self) -> int:
        """The greatest committed entry id."""
        with psycopg.connect(self.url()) as connection:
            row = connection.execute("SELECT coalesce(max(id), 0) FROM outbox.entries").fetchone()
        return int(row[0]) if row else 0

    def next_xid(self) -> int:
        """The transaction id that the server gives next."""
        with psycopg.connect(self.url()) as connection:
            row = connection.execute("SELECT pg_snapshot_xmax(pg_current_snapshot())::text").fetchone()
        return int(row[0]) if row else 0

    def missing(self, ids: set[int]) -> set[int]:
        """Which of some entries the service's ledger does not have."""
        with psycopg.connect(self.url()) as connection:
            return ids - {number for (number,) in connection.execute("SELECT id FROM ledger")}

    def epoch(self) -> int:
        """How often the log was adopted, and one."""
        with psycopg.connect(self.url()) as connection:
            (epoch,) = connection.execute("SELECT epoch FROM outbox.settings").fetchone() or (0,)
        return int(epoch)

    def seconds_until_published(self, *, seconds: float = 90) -> float:
        """How long it takes until what is committed now is published."""
        began = time.monotonic()
        target = self.greatest()

        def there() -> bool:
            try:
                positions = self.positions()
            except BrokerUnavailableError:
                return False  # it is on its way back
            return all(
                one is not None and (one.point.floor >= target or (one.cut is not None and one.cut.last_id >= target))
                for one in positions
            )

        eventually(there, seconds=seconds, what=f"publishing up to entry {target}")
        return time.monotonic() - began

    # --- the end ---------------------------------------------------------------------------------

    def settle(self, *relays: Relay) -> Judgement:
        """End what runs, drain, and judge. The load must have ended."""
        for relay in relays:
            if relay.alive:
                relay.send(signal.SIGCONT)
                relay.send(signal.SIGTERM)
                assert relay.wait(seconds=15) == 0, relay.log.read_text()[-2000:]
        for shard in range(self.shards):
            must(self.env(shard=shard), "relay", "--until-caught-up", "--timeout", "120", seconds=150)
        found = judge(
            self.url(),
            self.bootstrap,
            self.topics,
            timeline=self.timeline,
            adopted=self.adopted,
            republished=self.republished,
            gone=self.gone,
        )
        found.torn = self.torn()
        found.excused = found.torn * int(str(self.settings["batch_rows"]))
        return found

    def reconciled(self) -> None:
        """What a person does after a loss: each topic is compared with its table and repaired, and equal then."""
        relays = [self.relay(shard=shard) for shard in range(self.shards)]
        for type_name in TYPES:
            source = (
                "SELECT key, jsonb_build_object('version', version, 'on', changed_on) AS state FROM thing"
                f" WHERE type = '{type_name}' AND alive AND version > 0"
            )
            must(self.env(), "types", "change", type_name, "--source", source)
            must(self.env(), "reconcile", type_name, "--repair", seconds=120)
        for relay in relays:
            relay.send(signal.SIGTERM)
            assert relay.wait(seconds=15) == 0, relay.log.read_text()[-2000:]

    def torn(self) -> int:
        """How often a broker has said that it left the end of a relay's transaction out of the topic of positions.

        A coordinator that is started while partitions have no leader takes them for deleted; a transaction that it was
        about to mark is then committed in some partitions, and open for ever in others. See docs/guarantees.md.
        """
        brokers = [self.kafka] if self._brokers == 1 else list(self.cluster.nodes.values())
        lines = (line for broker in brokers for line in broker.log.read_text(errors="replace").splitlines())
        return sum(TORN in line and f"{self.positions_topic}-" in line for line in lines)


Say = Callable[[str], None]
"""Takes what a case is doing, in words."""


@dataclass
class Outcome:
    """A row of the table: a fault, how often it was injected, the verdict, and how long until publishing went on.

    `unit`: what `times` counts when that is not faults. Rows with the same judgement are those of one scene.
    """

    fault: str
    times: int
    judgement: Judgement
    seconds: list[float] = field(default_factory=list)
    notes: str = ""
    unit: str = ""

    @property
    def remarks(self) -> str:
        """The notes, and what Kafka did that shows."""
        j = self.judgement
        if not (j.torn and (j.doubled or j.stale)):
            return self.notes
        times = f"{j.torn} time{'s' * (j.torn != 1)}"
        torn = f"{times} Kafka itself, by its own log, left a transaction without its end in some partitions"
        return f"{self.notes}; {torn}" if self.notes else torn

    @property
    def row(self) -> tuple[str, ...]:
        """For the table."""
        seconds = sorted(self.seconds)
        shown = "" if not seconds else f"{seconds[len(seconds) // 2]:.1f} / {seconds[-1]:.1f}"
        j = self.judgement
        wrong = (j.count(name) for name in ("lost", "doubled", "stale", "ghosts"))
        return (self.fault, f"{self.times} {self.unit}".strip(), str(j.entries), str(j.records), *wrong, shown)

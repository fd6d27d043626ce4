"""The demo from the servers' start to their end. Exit 0 equal, 1 not equal or failed, 130 after Ctrl-C."""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import psycopg
from confluent_kafka import KafkaException, Producer
from psycopg import sql
from sqlalchemy.exc import SQLAlchemyError

from devstack.kafka import Kafka
from devstack.postgres import Postgres
from devstack.processes import Child, ServerError
from outbox.errors import OutboxError
from pgbench_demo.compare import Comparison, compare
from pgbench_demo.publishing import NAME, Publishing
from pgbench_demo.service import CLIENT_ROWS, CLIENTS, DATABASE, TABLES, Pgbench
from pgbench_demo.view import Run, View
from pgbench_demo.watch import Watch

BACKLOG_SECONDS = 120.0
"""How long publishing the rows that are there may take before something must be wrong."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal asked the demo to stop. Not an `Exception`: nothing on the way may take it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main(arguments: list[str] | None = None) -> int:
    """Parse, run, say how it ended; the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m pgbench_demo",
        description="Run stock pgbench through the outbox into Kafka, then compare the topics with the tables.",
    )
    parser.add_argument("--seconds", type=_positive, default=30, help="how long pgbench runs (default 30)")
    parser.add_argument(
        "--scale", type=_positive, default=2, help="pgbench's scale: 100,000 accounts and a branch each (default 2)"
    )
    parser.add_argument("--clients", type=_positive, default=4, help="pgbench's concurrent clients (default 4)")
    parser.add_argument(
        "--tamper", action="store_true", help="write a wrong record before the comparison, to see that it is found"
    )
    chosen = parser.parse_args(arguments)
    view = View()
    for number in SIGNALS:
        signal.signal(number, _stop)
    try:
        equal = run(view, scale=chosen.scale, seconds=chosen.seconds, clients=chosen.clients, tamper=chosen.tamper)
    except Stopped as stopped:
        view.step("stopped; nothing is left behind")
        return 128 + stopped.number
    except (ServerError, OutboxError, KafkaException, psycopg.Error, SQLAlchemyError) as error:
        print(f"The demo failed: {error}", file=sys.stderr)
        return 1
    return 0 if equal else 1


def run(view: View, *, scale: int, seconds: int, clients: int, tamper: bool = False) -> bool:
    """The whole demo, from the servers' start to their end; whether topics and tables are equal."""
    with ExitStack() as cleanup:
        directory = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="outbox-demo-")))
        # PostgreSQL may run as another user (see devstack.postgres), who must be able to enter.
        directory.chmod(0o711)
        postgres = Postgres(
            directory / "postgres",
            # So that the latency is counted from the moment of the commit, not from that of the insert before it.
            options={"track_commit_timestamp": "on"},
        )
        kafka = Kafka(directory / "kafka")
        # The data goes away with them: no need to wait until they have put it in order. And while they end, a
        # second Ctrl-C must not leave the half of it behind.
        cleanup.callback(kafka.kill)
        cleanup.callback(postgres.stop, "immediate")
        cleanup.callback(_ignore_signals)

        view.step("starting PostgreSQL and Kafka")
        postgres.launch()
        kafka.launch()
        postgres.wait_ready()
        with psycopg.connect(postgres.url(), autocommit=True) as connection:
            connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(DATABASE)))
        url = postgres.url(DATABASE)
        service = Pgbench(url, directory)
        service.make_tables(scale)
        service.make_clients()
        view.step(f"the service: pgbench's own tables, {100_000 * scale:,} accounts")
        kafka.wait_ready()

        publishing = Publishing(url, kafka.bootstrap, directory)
        cleanup.callback(publishing.abandon)
        publishing.make(TABLES)
        view.step("the outbox: made, three tables captured with their rows, topics made")
        publishing.start_relay()
        topics = [table.topic for table in TABLES]
        with Watch(url, kafka.bootstrap, name=NAME, topics=topics) as watch, view.live():
            _publish_backlog(view, watch, publishing)
            watch.listen()
            child = service.start(clients=clients, seconds=seconds)
            cleanup.callback(child.stop, seconds=0)
            _publish_changes(view, watch, publishing, child, clients=clients, seconds=seconds)
            service.check("run", child)
            latency = watch.latency()
        _publish_what_was_there(view, publishing, kafka.bootstrap)
        publishing.stop_relay()
        publishing.drain()
        view.step("the relay was stopped in order, and what it had left is published")

        if tamper:
            _tamper(kafka.bootstrap)
            view.step("a wrong record was written into a topic")
        view.step("reading the topics from the start and comparing them with the tables")
        comparisons: list[Comparison] = [compare(url, kafka.bootstrap, table) for table in (*TABLES, CLIENTS)]
        view.result(Run(*service.transactions(), seconds, latency), comparisons)
        return all(one.equal for one in comparisons)


def _publish_backlog(view: View, watch: Watch, publishing: Publishing) -> None:
    """Wait until the rows that were there before are published."""
    deadline = time.monotonic() + BACKLOG_SECONDS
    while True:
        publishing.check_relay()
        look = watch.look()
        done = look.entries > 0 and look.unpublished == 0
        view.show("existing rows", look, last=done)
        if done:
            return
        if time.monotonic() > deadline:
            raise ServerError(f"The relay has not published the existing rows in {BACKLOG_SECONDS:g} s.")
        time.sleep(view.interval / 2)


def _publish_changes(
    view: View, watch: Watch, publishing: Publishing, child: Child, *, clients: int, seconds: int
) -> None:
    """Show what happens until pgbench ends."""
    began = time.monotonic()
    ended = False
    while not ended:
        ended = child.wait(view.interval)
        publishing.check_relay()
        passed = min(round(time.monotonic() - began), seconds)
        view.show(f"pgbench, {clients} clients, {passed} of {seconds} s", watch.look(), last=ended)
        if time.monotonic() - began > seconds + 60:
            raise ServerError(f"pgbench does not end: it was to run for {seconds} s.")


def _publish_what_was_there(view: View, publishing: Publishing, bootstrap: str) -> None:
    """A table that is older than the outbox is backfilled; its topic is damaged on purpose, and mended."""
    view.step(f"pgbench has ended; another table, {CLIENT_ROWS:,} clients, is captured only now")
    publishing.capture_later(CLIENTS)
    view.step(f"outbox backfill start client --watch: {publishing.backfill(CLIENTS)}")
    _damage(bootstrap)
    view.step("damaged by hand: one record deleted, one made stale, one of rubbish, one of nobody")
    equal, said = publishing.reconcile(CLIENTS)
    if equal:
        raise ServerError("outbox reconcile has not seen the damage.")
    view.step(f"outbox reconcile client: {_in_a_line(said)}")
    equal, said = publishing.reconcile(CLIENTS, repair=True)
    view.step(f"outbox reconcile client --repair: {_in_a_line(said)}")
    if not equal:
        raise ServerError("outbox reconcile --repair has not mended the damage.")


def _in_a_line(said: str) -> str:
    return "; ".join(said.splitlines())


def _damage(bootstrap: str) -> None:
    """Write by hand what no relay would."""
    producer = Producer({"bootstrap.servers": bootstrap, "partitioner": "murmur2_random"})
    for key, value in {"7": None, "8": b'{"cid": 8}', "9": b"\x00rubbish", "nobody": b"{}"}.items():
        producer.produce(CLIENTS.topic, value, key.encode(), headers=[("outbox-id", b"0")])
    if producer.flush(30):
        raise ServerError("Kafka did not take the wrong records.")


def _tamper(bootstrap: str) -> None:
    """Write what no relay would: a state that the table does not hold."""
    producer = Producer({"bootstrap.servers": bootstrap, "partitioner": "murmur2_random"})
    state = b'{"aid": 1, "bid": 1, "abalance": 1000000000, "filler": ""}'
    producer.produce(TABLES[0].topic, state, b"1", headers=[("outbox-id", b"%d" % (2**62))])
    if producer.flush(30):
        raise ServerError("Kafka did not take the wrong record.")


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError("it must be a whole number from 1")
    return int(text)


def _stop(number: int, _frame: object) -> NoReturn:
    raise Stopped(number)


def _ignore_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

"""Servers that go away and come back under a running relay, and servers that it must not publish from."""

from __future__ import annotations

from pathlib import Path

import psycopg
import pytest

from consume import live, records
from devstack.kafka import Kafka
from devstack.postgres import Postgres
from outbox import schema
from outbox.errors import BrokerUnavailableError
from relays import RelayProcess, environment, eventually, must, outbox

pytestmark = [pytest.mark.postgres, pytest.mark.kafka, pytest.mark.acceptance]


def put(url: str, key: str) -> None:
    """One change of the service."""
    with psycopg.connect(url) as connection:
        connection.execute("SELECT outbox.put('user', %s, '{}')", [key])


def _live(kafka: Kafka) -> int | None:
    """How many keys the topic has; None while the broker, just back, does not answer for its partitions."""
    try:
        return len(live(kafka, "outage.user").values)
    except BrokerUnavailableError:
        return None


def test_the_relay_goes_on_when_postgresql_and_kafka_come_back_and_refuses_a_standby(tmp_path: Path) -> None:
    """Said once per change of state; writers never fail while Kafka is down; nothing lost, nothing doubled."""
    with (
        Postgres(tmp_path / "postgres", options={"wal_level": "replica"}) as server,
        Kafka(tmp_path / "kafka") as kafka,
    ):
        url = server.url()
        with psycopg.connect(url) as connection:
            schema.install(connection, schema.Settings("outage"))
        env = environment(url, kafka.bootstrap, backoff_max="0.5", transaction_timeout="10")
        must(env, "types", "add", "user", "--topic", "outage.user")
        must(env, "topics", "apply", "--yes")
        with RelayProcess(env, tmp_path / "relay.log") as relay:
            relay.wait_event("relay.holds")
            put(url, "before")
            eventually(lambda: len(records(kafka, "outage.user")) == 1)

            server.stop("immediate")
            assert relay.wait_event("relay.waiting")["what"] == "database"
            server.start()
            relay.wait_event("relay.resumed")
            put(url, "after the crash")
            eventually(lambda: len(records(kafka, "outage.user")) == 2)

            kafka.stop()
            for number in range(50):
                put(url, f"while Kafka is away {number}")
            assert relay.wait_event("relay.waiting", count=2, seconds=90)["what"] == "kafka"
            kafka.start()
            eventually(lambda: _live(kafka) == 52, seconds=90)
            assert relay.stop() == 0
            assert len([event for event in relay.events if event.get("event") == "relay.waiting"]) == 2
        assert len(records(kafka, "outage.user")) == 52

        with server.standby(tmp_path / "standby") as standby:
            refused = outbox({**env, "OUTBOX_DATABASE_URL": standby.url()}, "relay", "--until-caught-up")
            assert refused.returncode == 78
            assert "standby" in refused.stderr

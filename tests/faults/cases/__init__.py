"""The cases: each injects a fault so many times under load, and judges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from faults.cases import copies, entries, kafka, mended, postgres, relay
from faults.scene import Outcome, Say

Run = Callable[[Path, int, Say], Iterator[Outcome]]
"""Runs a case so many times in a directory, saying what it does."""

CASES: Mapping[str, tuple[Run, int]] = {
    "killed": (relay.killed_at, 20),
    "second-relay": (relay.second_relay, 20),
    "zombie": (relay.zombie, 20),
    "stall": (relay.stall, 5),
    "crash": (postgres.crash, 21),
    "line": (postgres.line, 20),
    "answers": (kafka.lost_answers, 6),
    "kafka": (kafka.kafka_away, 6),
    "brokers": (kafka.brokers_killed, 4),
    "fail-over": (copies.fail_over, 2),
    "promoted": (copies.promoted, 2),
    "other-cluster": (copies.other_cluster, 1),
    "transactions": (entries.open_transactions, 1),
    "doorbell": (relay.doorbell, 300),
    "backlog": (relay.backlog, 1),
    "expired": (kafka.expired, 4),
    "denied-by-postgres": (mended.denied_by_postgres, 3),
    "denied-by-kafka": (mended.denied_by_kafka, 3),
    "topic-changed": (mended.topic_changed, 3),
    "topic-deleted": (mended.topic_deleted, 3),
    "own-topic-deleted": (mended.own_topic_deleted, 2),
    "read-only": (postgres.read_only, 3),
    "postgres-full": (postgres.disk_full, 3),
    "kafka-full": (kafka.disk_full, 2),
    "clock": (postgres.clock, 3),
    "refused": (entries.refused, 5),
    "pruned": (entries.pruned, 10),
    "pruned-fail-over": (entries.pruned_and_failed_over, 1),
    "two-shards": (copies.two_shards, 3),
}
"""The cases, and how often each injects its faults in a whole run."""

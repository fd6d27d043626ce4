"""Faults on real servers, a quick selection; `make faults` runs all of them, many times."""

from __future__ import annotations

import signal
from pathlib import Path

import psycopg
import pytest

from faults.cases import Run, copies, entries, kafka, mended, postgres, relay
from faults.scene import Scene
from faults.victim import BEFORE_THE_BELL
from faults.volume import LeftOutError
from relays import eventually, must

pytestmark = [pytest.mark.postgres, pytest.mark.kafka, pytest.mark.acceptance]


def quiet(_: str) -> None:
    """Progress is for people."""


@pytest.mark.parametrize(
    ("run", "times"),
    [
        (relay.killed_anywhere, 1),
        (relay.second_relay, 1),
        (relay.zombie, 2),
        (postgres.crash, 2),
        (postgres.line, 1),
        (kafka.lost_answers, 1),
        (kafka.expired, 1),
        (mended.denied_by_postgres, 1),
        (mended.denied_by_kafka, 1),
        (mended.topic_changed, 1),
        (mended.topic_deleted, 1),
        (postgres.read_only, 1),
        (postgres.clock, 1),
        (entries.refused, 1),
        (entries.open_transactions, 1),
        (entries.pruned, 1),
        (copies.two_shards, 1),
        (copies.promoted, 1),
        (copies.other_cluster, 1),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_nothing_is_lost_doubled_or_stale(run: Run, times: int, tmp_path: Path) -> None:
    """Under concurrent writers, several types, hot and cold keys, deletes."""
    tmp_path.chmod(0o755)
    try:
        outcomes = list(run(tmp_path, times, quiet))
    except LeftOutError as reason:
        pytest.skip(str(reason))
    assert outcomes
    for outcome in outcomes:
        assert outcome.judgement.right, (outcome.fault, outcome.judgement)
        assert outcome.judgement.entries > 20, outcome


def test_a_relay_that_publishes_what_is_not_on_the_disk_yet_is_judged_wrong(tmp_path: Path) -> None:
    """The rule is left out: what an immediate stop takes back is published, as entries that nobody committed."""
    tmp_path.chmod(0o755)
    (outcome,) = postgres.crash(tmp_path, 1, quiet, lack="hasty")
    assert outcome.judgement.ghosts, outcome.judgement


def test_pruning_that_takes_everything_for_published_is_judged_wrong(tmp_path: Path) -> None:
    """The question whether a slot is published is answered with yes: entries are removed that nobody published."""
    tmp_path.chmod(0o755)
    outcome = next(entries.pruned(tmp_path, 1, quiet, spoil=_believe_all_published))
    assert outcome.judgement.lost, outcome.judgement


def _believe_all_published(scene: Scene) -> None:
    with psycopg.connect(scene.url()) as connection:
        found = connection.execute(
            "SELECT oid::regprocedure::text, pg_get_function_arguments(oid) FROM pg_proc"
            " WHERE proname = 'unpublished' AND pronamespace = 'outbox'::regnamespace"
        ).fetchall()
        assert found, "pruning asks something else now; this test has to follow"
        for name, arguments in found:
            head = f"{name.partition('(')[0]}({arguments})"
            connection.execute(
                f"CREATE OR REPLACE FUNCTION {head} RETURNS boolean LANGUAGE sql AS 'SELECT false'".encode()
            )


def test_a_zombie_that_needs_a_fresh_producer_finds_its_successor_instead(tmp_path: Path) -> None:
    """A topic's limit changes while it is frozen: the fresh producer fences whoever took the shard meanwhile."""
    tmp_path.chmod(0o755)
    with Scene(tmp_path, "renews", topic_check_interval=0.1) as scene, scene.load() as load:
        # Not while it reads ahead: the transaction that is open then would be fenced anyhow.
        frozen = scene.victim("after read", 2, "STOP", batch_rows=20_000)
        load.wait_written(5)
        frozen.wait_frozen()
        must(scene.env(), "types", "change", "wide", "--topic-setting", "max.message.bytes=700000")
        must(scene.env(), "topics", "apply", "--yes")
        successor = scene.relay()
        successor.wait_said("relay.holds")
        scene.seconds_until_published()
        frozen.send(signal.SIGCONT)
        assert frozen.wait() == 75, frozen.log.read_text()[-2000:]
        load.wait_written(5)
        # It was fenced by that, and has taken its shard back.
        scene.seconds_until_published()
        assert successor.alive, successor.log.read_text()[-2000:]
        load.stop()
        judgement = scene.settle(successor)
    assert judgement.right, judgement


@pytest.mark.parametrize("deaf", [False, True], ids=["looks again", "does not"])
def test_a_writer_that_comes_just_before_the_bell_is_held_is_silent_and_seen_by_the_second_look(
    deaf: bool, tmp_path: Path
) -> None:
    """Forced there: the relay freezes between a read that found nothing and the bell. Without the look it is missed."""
    tmp_path.chmod(0o755)
    with Scene(tmp_path, "bell", poll_interval=86_400) as scene:
        relay = scene.victim(BEFORE_THE_BELL, 1, "STOP", lack="deaf" if deaf else None)
        relay.wait_frozen()
        scene.put("silent")
        relay.send(signal.SIGCONT)
        if deaf:
            with pytest.raises(AssertionError, match="did not happen"):
                scene.seconds_until_published(seconds=3)
            scene.put("this one rings")
        scene.seconds_until_published()


def test_a_doorbell_that_rings_in_a_prepared_transaction_is_refused_in_words(tmp_path: Path) -> None:
    """PostgreSQL names NOTIFY; the documentation says to make an outbox without a doorbell for two-phase commit."""
    tmp_path.chmod(0o755)
    with Scene(tmp_path, "prepared", poll_interval=86_400) as scene, psycopg.connect(scene.url()) as connection:
        relay = scene.relay()
        relay.wait_said("relay.holds")
        asleep = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND mode = 'ExclusiveLock' AND granted"
        eventually(lambda: connection.execute(asleep).fetchone() is not None, what="asleep")
        scene.change(connection, "x")
        with pytest.raises(psycopg.errors.FeatureNotSupported, match="NOTIFY"):
            connection.execute("PREPARE TRANSACTION 'p'")

"""What the entries themselves do: stay open, are pruned, are refused."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg

from faults.scene import Outcome, Say, Scene
from relays import eventually, must


def open_transactions(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """Transactions that stay open, and prepared ones that another session ends: only their own entries wait."""
    seconds = []
    with Scene(directory, "open", doorbell=False, poll_interval="0.2") as scene, scene.load() as load:
        relay = scene.relay()
        relay.wait_said("relay.holds")
        with psycopg.connect(scene.url()) as late:
            scene.change(late, "late")
            with psycopg.connect(scene.url()) as connection:
                for number in range(5):
                    scene.change(connection, f"prepared-{number}")
                    connection.execute(f"PREPARE TRANSACTION 'p{number}'")
                    connection.commit()
            for _ in range(5):
                load.wait_written(10)
                seconds.append(scene.seconds_until_published())
            with psycopg.connect(scene.url(), autocommit=True) as other:
                for number in range(5):
                    other.execute(f"{'ROLLBACK' if number % 2 else 'COMMIT'} PREPARED 'p{number}'")
            load.wait_written(10)
            say("prepared transactions ended")
            late.commit()
        load.stop()
        yield Outcome("a transaction open all the time, five prepared", 6, scene.settle(relay), seconds)


def pruned(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """Pruning under load with a slow relay, one slot locked while the next is not; then the positions are lost."""
    with Scene(directory, "pruned", retention="10 seconds") as scene, scene.load(writers=3, pause=0.1) as load:
        # Of the ring's twelve seconds four are kept: some slots are old at any time.
        scene.sql("UPDATE outbox.settings SET retention = '4 seconds'")
        relay = scene.relay(batch_rows=15)
        relay.wait_said("relay.holds")
        emptied = locked = 0
        deadline = time.monotonic() + 60 + 20 * times
        while emptied < times or not locked:
            assert time.monotonic() < deadline, f"{emptied} slots were emptied, {locked} locked"
            with psycopg.connect(scene.url()) as reader:
                # A reader of the oldest slot: the next ones are pruned before it, out of order.
                row = reader.execute(
                    "SELECT slot FROM outbox.entries GROUP BY slot ORDER BY max(created_at) LIMIT 1"
                ).fetchone()
                # It holds a lock on all of them now; only that of the oldest is to stay.
                reader.rollback()
                reader.execute(f"SELECT count(*) FROM outbox.entries_{row[0] if row else 0}".encode())
                for slot in json.loads(must(scene.env(lock_timeout="0.3"), "prune", "--json"))["slots"]:
                    emptied += bool(slot["pruned"])
                    locked += slot["reason"] == "locked by an open transaction"
            load.wait_written(5)
            say(f"pruned: {emptied} slots of {times}, {locked} times one was locked")
        seconds = [scene.seconds_until_published()]
        load.stop()
        assert load.slowest < 1.3, f"an entry took {load.slowest:.1f} s to be inserted; the lock was waited for 0.3 s"
        notes = f"the slowest insert took {load.slowest * 1000:.0f} ms"
        yield Outcome("a slot is pruned under load, another is locked", emptied, scene.settle(relay), seconds, notes)
        scene.lose_positions()
        yield Outcome("the positions topic is lost after pruning out of order", 1, scene.settle())


def refused(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """Records that the broker refuses, several among innocent ones and in two topics: exactly those are dead-lettered.

    Then what refused them is mended, a retry is asked for, and they are published, too.
    """
    seconds = []
    limit = "message.timestamp.before.max.ms"
    with Scene(directory, "refused", batch_rows="500") as scene:
        for type_name in ("wide", "every"):
            must(scene.env(), "types", "change", type_name, "--topic-setting", f"{limit}=3600000")
        must(scene.env(), "topics", "apply", "--yes")
        with scene.load() as load:
            relay = scene.relay()
            relay.wait_said("relay.holds")
            guilty: set[tuple[str, str]] = set()
            for number in range(times):
                load.wait_written(10)
                with psycopg.connect(scene.url()) as connection:
                    for place in range(30):
                        type_name = ("wide", "every")[place % 2]
                        bad = place % 7 == 0
                        key = f"{'guilty' if bad else 'innocent'}-{number}-{place}"
                        # Too old for the topic, or larger than it takes; the others lie in the same batches.
                        scene.change(
                            connection,
                            key,
                            type_name=type_name,
                            age="2 hours" if bad and place % 3 else "0",
                            padding=1_200_000 if bad and not place % 3 else 0,
                        )
                        if bad:
                            guilty.add((type_name, key))
                seconds.append(scene.seconds_until_published())
                say(f"refused: {len(guilty)} records in {number + 1} of {times} rounds")
            found = {(x["type"], x["key"]) for x in json.loads(must(scene.env(), "dead-letters", "list", "--json"))}
            assert found == guilty, found ^ guilty
            for type_name in ("wide", "every"):
                must(scene.env(), "types", "change", type_name, "--max-bytes", "3000000")
                must(scene.env(), "types", "change", type_name, "--topic-setting", f"{limit}={2**63 - 1}")
            must(scene.env(), "topics", "apply", "--yes")
            must(scene.env(), "dead-letters", "retry", "--all", "--yes")
            eventually(lambda: json.loads(must(scene.env(), "dead-letters", "list", "--json")) == [], seconds=60)
            load.stop()
        notes = "those alone were dead-lettered, and published after the limits were mended and a retry was asked for"
        yield Outcome("records are refused among others", len(guilty), scene.settle(relay), seconds, notes)

"""The database is another one: it failed over, was restored, or was copied into another cluster."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg

from devstack.postgres import Postgres
from faults.scene import Outcome, Say, Scene
from relays import must, outbox


def fail_over(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """A standby that misses the tail is promoted; or an older base backup is put in its place."""
    for number in range(times):
        for what in ("fail-over", "restore"):
            with Scene(directory, f"{what}-{number}") as scene, scene.load() as load:
                relay = scene.relay()
                relay.wait_said("relay.holds")
                load.wait_written(20)
                copy = scene.postgres.standby(scene.directory / "copy")
                # What is published from here on is not in the copy.
                load.wait_written(20)
                scene.seconds_until_published()
                scene.postgres.stop("immediate")
                began = time.monotonic()
                _put_in_place(scene, copy, promote=what == "fail-over")
                scene.timeline = load.timeline = 2
                load.wait_written(20)
                scene.adopted = True
                relay.wait_said("relay.adopted")
                seconds = scene.seconds_until_published()
                say(f"{what}: {number + 1} of {times}, {time.monotonic() - began:.0f} s")
                load.stop()
                judgement = scene.settle(relay)
                assert scene.epoch() == 2, "adopted more than once"
                yield Outcome(f"{what}: the tail is lost", 1, judgement, [seconds])


def _put_in_place(scene: Scene, copy: Postgres, *, promote: bool) -> None:
    if not promote:
        # Restored, not replicating: it comes up as a primary of the same timeline.
        (copy.data / "standby.signal").unlink()
    copy.start()
    if promote:
        copy.promote()
    scene.replace_postgres(copy)


def two_shards(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """Two shards lose their tail at once, with a transaction prepared; one relay is killed while they adopt."""
    for number in range(times):
        with Scene(directory, f"shards-{number}", shards=2, doorbell=False, poll_interval="0.2") as scene:
            with scene.load() as load:
                relays = [scene.relay(shard=0), scene.relay(shard=1)]
                for relay in relays:
                    relay.wait_said("relay.holds")
                load.wait_written(20)
                copy = scene.postgres.standby(scene.directory / "copy")
                load.wait_written(20)
                scene.seconds_until_published()
                scene.postgres.stop("immediate")
                _put_in_place(scene, copy, promote=True)
                with psycopg.connect(scene.url()) as connection:
                    # It holds the table against adoption, like any open writer, until it is ended by another session.
                    scene.change(connection, "prepared")
                    connection.execute("PREPARE TRANSACTION 'held'")
                    connection.commit()
                scene.timeline, scene.adopted = 2, True
                load.timeline = 2
                for relay in relays:
                    relay.wait_said("relay.lost_tail")
                relays[0].wait_said("adoption.locked_out")
                relays[0].kill()
                relays[0] = scene.relay(shard=0)
                scene.sql("COMMIT PREPARED 'held'")
                load.wait_written(20)
                seconds = scene.seconds_until_published()
            say(f"two shards: {number + 1} of {times}")
            judgement = scene.settle(*relays)
            assert scene.epoch() == 2, "adopted more than once"
            yield Outcome("two shards lose their tail, one relay is killed", 2, judgement, [seconds])


def other_cluster(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """A dump is loaded into another cluster: refused until `outbox adopt`, which is killed once, under writers.

    A prepared transaction holds the adoption up. Two shards.
    """
    for number in range(times):
        with Scene(directory, f"dump-{number}", shards=2, doorbell=False, poll_interval="0.2") as scene:
            with scene.load() as load:
                relays = [scene.relay(shard=0), scene.relay(shard=1)]
                for relay in relays:
                    relay.wait_said("relay.holds")
                load.wait_written(30)
                scene.seconds_until_published()
            for relay in relays:
                relay.send(signal.SIGTERM)
                assert relay.wait() == 0
            _dump_and_load(scene)
            scene.timeline, scene.adopted = 2, True
            with scene.load() as more:
                more.wait_written(10)
                for shard in (0, 1):
                    refused = outbox(scene.env(shard=shard), "relay", "--until-caught-up")
                    assert refused.returncode == 76, refused.stderr
                    assert "outbox adopt" in refused.stderr
                with psycopg.connect(scene.url()) as connection:
                    scene.change(connection, "prepared")
                    connection.execute("PREPARE TRANSACTION 'held'")
                    connection.commit()
                killed = scene.command("adopt", "--yes")
                killed.wait_said("adoption.locked_out")
                killed.kill()
                scene.sql("COMMIT PREPARED 'held'")
                must(scene.env(), "adopt", "--yes", seconds=120)
                relays = [scene.relay(shard=0), scene.relay(shard=1)]
                more.wait_written(20)
                seconds = scene.seconds_until_published()
            say(f"another cluster: {number + 1} of {times}")
            judgement = scene.settle(*relays)
            assert scene.epoch() == 2, "adopted more than once"
            yield Outcome("another cluster, adopted by a person; `outbox adopt` is killed", 2, judgement, [seconds])


def _dump_and_load(scene: Scene) -> None:
    other = Postgres(scene.directory / "other", options=scene.postgres.options)
    other.start()
    dump = scene.directory / "dump.sql"
    with dump.open("wb") as to:
        subprocess.run([Postgres.bin("pg_dump"), scene.url()], stdout=to, check=True, timeout=120)
    with dump.open("rb") as source:
        subprocess.run(
            [Postgres.bin("psql"), "-q", "-v", "ON_ERROR_STOP=1", other.url()],
            stdin=source, stdout=subprocess.DEVNULL, check=True, timeout=120,
        )  # fmt: skip
    scene.postgres.stop("immediate")
    scene.replace_postgres(other)

"""The database is another one: it failed over, was restored, or was copied into another cluster."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psycopg

from devstack.postgres import Postgres
from faults.load import Load
from faults.scene import Outcome, Relay, Say, Scene
from faults.victim import ADOPTED, NEW_EPOCH
from relays import eventually, must, outbox


def fail_over(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """A standby that misses the tail is promoted; or an older base backup is put in its place."""
    for number in range(times):
        for what in ("fail-over", "restore"):
            with Scene(directory, f"{what}-{number}") as scene, scene.load() as load:
                relay = scene.relay()
                relay.wait_said("relay.holds")
                seconds = lose_tail(scene, load, [relay], promote=what == "fail-over")
                say(f"{what}: {number + 1} of {times}")
                load.stop()
                judgement = scene.settle(relay)
                assert scene.epoch() == 2, "adopted more than once"
                assert scene.count_said(relay, "relay.adopted") == 1, relay.log.read_text()[-2000:]
                # What the database lost and never wrote again, the topics still have, until somebody repairs them.
                scene.reconciled()
                yield Outcome(f"{what}: the tail is lost", 1, judgement, [seconds])


def lose_tail(scene: Scene, load: Load, relays: Sequence[Relay], *, promote: bool) -> float:
    """The server's place is taken by a copy that misses what was published last; seconds until publishing went on."""
    _switch(scene, load, promote=promote)
    load.wait_written(20)
    for relay in relays:
        relay.wait_said("relay.starts_anew")
    return scene.seconds_until_published()


def _switch(scene: Scene, load: Load, *, promote: bool, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Put a copy in the server's place; `meanwhile`: before the relays see it."""
    load.wait_written(20)
    copy = scene.postgres.standby(scene.directory / "copy")
    # What is published from here on is not in the copy.
    load.wait_written(20)
    scene.seconds_until_published()
    scene.postgres.stop("immediate")
    if not promote:
        # Restored, not replicating: it comes up as a primary of the same timeline.
        (copy.data / "standby.signal").unlink()
    copy.start()
    if promote:
        copy.promote()
    scene.timeline = load.timeline = 2
    scene.adopted = True
    scene.replace_postgres(copy, meanwhile=meanwhile)


def promoted(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """A standby that has everything is promoted: the anchor is there, nothing is adopted, the new timeline is said."""
    for number in range(times):
        with Scene(directory, f"promoted-{number}") as scene, scene.load() as load:
            relay = scene.relay()
            relay.wait_said("relay.holds")
            load.wait_written(20)
            copy = scene.postgres.standby(scene.directory / "copy")
            copy.start()
            load.wait_written(20)
            load.hold()
            scene.seconds_until_published()
            _wait_replayed(scene, copy)
            scene.postgres.stop("immediate")
            copy.promote()
            scene.replace_postgres(copy)
            load.release()
            load.wait_written(20)
            said = relay.wait_said("relay.timeline")
            assert said["now"] > said["before"], said
            seconds = scene.seconds_until_published()
            load.stop()
            judgement = scene.settle(relay)
            assert scene.epoch() == 1, "adopted, with nothing lost"
            say(f"promoted: {number + 1} of {times}")
            yield Outcome("fail-over to a standby that has everything", 1, judgement, [seconds])


def _wait_replayed(scene: Scene, copy: Postgres) -> None:
    with psycopg.connect(scene.url()) as connection:
        (written,) = connection.execute("SELECT pg_current_wal_lsn()::text").fetchone() or ("",)

    def there() -> bool:
        with psycopg.connect(copy.url()) as standby:
            return standby.execute("SELECT pg_last_wal_replay_lsn() >= %s::pg_lsn", [written]).fetchone() == (True,)

    eventually(there, what="the standby has everything")


WAITING = "while it waits for the lock"
ADOPTING = (WAITING, ADOPTED, NEW_EPOCH)
"""Where the relay is killed that adopts."""


def two_shards(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """Two shards lose their tail at once, with a transaction prepared; the relay that adopts is killed."""
    for number in range(times):
        place, promote = ADOPTING[number % len(ADOPTING)], number % 2 == 0
        with Scene(directory, f"shards-{number}", shards=2, doorbell=False, poll_interval="0.2") as scene:
            with scene.load() as load:
                victim = scene.relay(shard=0) if place == WAITING else scene.victim(place, 1, shard=0)
                other = scene.relay(shard=1)
                for relay in (victim, other):
                    relay.wait_said("relay.holds")
                # It holds the table against adoption, like any open writer, until it is ended by another session.
                _switch(scene, load, promote=promote, meanwhile=lambda scene=scene: _prepare(scene))  # type: ignore[misc]  # bound now
                for relay in (victim, other):
                    relay.wait_said("relay.lost_tail")
                victim.wait_said("adoption.locked_out")
                if place == WAITING:
                    victim.kill()
                scene.sql("COMMIT PREPARED 'held'")
                if place != WAITING:
                    assert victim.wait(seconds=60) == -signal.SIGKILL, victim.log.read_text()[-2000:]
                successor = scene.relay(shard=0)
                load.wait_written(20)
                for relay in (successor, other):
                    relay.wait_said("relay.starts_anew")
                seconds = scene.seconds_until_published()
            say(f"two shards, the relay killed {place}: {number + 1} of {times}")
            judgement = scene.settle(successor, other)
            assert scene.epoch() == 2, "adopted more than once"
            told = sum(scene.count_said(relay, "relay.adopted") for relay in (victim, successor, other))
            # The one that adopted may have been killed before it could say so.
            assert told == 1 or (told == 0 and place == ADOPTED), f"{told} adoptions were told"
            yield Outcome(f"two shards lose their tail, a relay is killed {place}", 1, judgement, [seconds])


def _prepare(scene: Scene) -> None:
    with psycopg.connect(scene.url()) as connection:
        scene.change(connection, "prepared")
        connection.execute("PREPARE TRANSACTION 'held'")
        connection.commit()


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
                _prepare(scene)
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
            scene.reconciled()
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

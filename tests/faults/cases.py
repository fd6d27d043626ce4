"""The cases: each injects a fault so many times under load, and judges."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psycopg

from devstack.postgres import Postgres
from faults.judge import Judgement
from faults.scene import Outcome, Relay, Scene
from faults.victim import PLACES
from outbox.kafka.reader import read_topic
from relays import eventually, must, outbox

Say = Callable[[str], None]


def killed_anywhere(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """The relay is killed at each place, `times` round, in one scene."""
    with Scene(directory, "killed") as scene, scene.load() as load:
        for number in range(times * len(PLACES)):
            victim = scene.victim(PLACES[number % len(PLACES)], 1)
            load.wait_written(3)
            assert victim.wait(seconds=60) == -signal.SIGKILL, victim.log.read_text()[-2000:]
            say(f"killed {PLACES[number % len(PLACES)]}")
        relay = scene.relay()
        seconds = scene.seconds_until_published()
        load.stop()
        yield Outcome("relay killed at each place", times * len(PLACES), scene.settle(relay), [seconds])


def killed_at(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """The relay is killed between two calls of its step, `times` at each place."""
    chance = random.Random(1)
    for place in PLACES:
        with Scene(directory, f"killed-{PLACES.index(place)}") as scene, scene.load() as load:
            for number in range(times):
                victim = scene.victim(place, chance.randint(1, 3))
                load.wait_written(3)
                code = victim.wait(seconds=60)
                assert code == -signal.SIGKILL, victim.log.read_text()[-2000:]
                say(f"killed {place}: {number + 1} of {times}")
            began = time.monotonic()
            relay = scene.relay()
            relay.wait_said("relay.holds")
            scene.seconds_until_published()
            seconds = time.monotonic() - began
            load.stop()
            yield Outcome(f"relay killed {place}", times, scene.settle(relay), [seconds])


def second_relay(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """A second relay of the same shard takes over: the first is fenced, says so, and exits with 75."""
    seconds = []
    with Scene(directory, "second") as scene, scene.load() as load:
        first = scene.relay()
        first.wait_said("relay.holds")
        for number in range(times):
            load.wait_written(5)
            second = scene.relay()
            second.wait_said("relay.holds")
            seconds.append(scene.seconds_until_published())
            assert first.wait() == 75, first.log.read_text()[-2000:]
            assert "took over" in first.log.read_text()
            first = second
            say(f"second relay: {number + 1} of {times}")
        load.stop()
        yield Outcome("a second relay takes the shard", times, scene.settle(first), seconds)


def zombie(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """A relay freezes within a transaction, and wakes after its successor has published."""
    seconds = []
    places = ("in the middle of sending", "after the position record", "before commit", "after read")
    with Scene(directory, "zombie") as scene, scene.load() as load:
        successor: Relay | None = None
        for number in range(times):
            frozen = scene.victim(places[number % len(places)], 2, "STOP")
            load.wait_written(5)
            frozen.wait_frozen()
            if successor is not None:
                assert successor.wait() == 75
            successor = scene.relay()
            successor.wait_said("relay.holds")
            seconds.append(scene.seconds_until_published())
            frozen.send(signal.SIGCONT)
            assert frozen.wait() == 75 or "took over" in frozen.log.read_text(), frozen.log.read_text()[-2000:]
            say(f"zombie: {number + 1} of {times}")
        load.stop()
        assert successor is not None
        yield Outcome("a zombie wakes after its successor published", times, scene.settle(successor), seconds)


def stall(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """A relay stands still for longer than a transaction may take, and nobody else came: it goes on."""
    seconds = []
    properties = {"transaction.abort.timed.out.transaction.cleanup.interval.ms": "500"}
    with Scene(directory, "stall", kafka=properties, transaction_timeout=2) as scene, scene.load() as load:
        for number in range(times):
            relay = scene.victim("before commit", 2, "STOP", transaction_timeout=2)
            load.wait_written(5)
            relay.wait_frozen()
            time.sleep(3.5)  # the fault itself: longer than the time limit
            relay.send(signal.SIGCONT)
            seconds.append(scene.seconds_until_published())
            assert relay.alive
            relay.send(signal.SIGTERM)
            assert relay.wait() == 0
            say(f"stall: {number + 1} of {times}")
        load.stop()
        yield Outcome("a stall beyond the transaction's time limit", times, scene.settle(), seconds)


def postgres_crash(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """PostgreSQL stops at once under load: aborted transactions just before, asynchronous commits among the others."""
    seconds = []
    with Scene(directory, "crash") as scene, scene.load(asynchronous=0.3, aborts=0.4) as load:
        relay = scene.relay()
        relay.wait_said("relay.holds")
        for number in range(times):
            load.wait_written(10)
            scene.postgres.stop("immediate")
            scene.postgres.start()
            load.wait_written(2)
            seconds.append(scene.seconds_until_published())
            assert relay.alive, relay.log.read_text()[-2000:]
            say(f"PostgreSQL crashed: {number + 1} of {times}")
        load.stop()
        yield Outcome("PostgreSQL stops at once, with asynchronous commits", times, scene.settle(relay), seconds)


def postgres_line(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """The relay's line to PostgreSQL: cut in the middle, its backend terminated, a server that answers no more."""
    with Scene(directory, "line", statement_timeout=1) as scene, scene.load() as load:
        relay = scene.relay()
        relay.wait_said("relay.holds")
        cut: list[float] = []
        for number in range(times):
            load.wait_written(3)
            eventually(lambda: scene.postgres_line.cut() > 0, what="a line to cut")
            cut.append(scene.seconds_until_published())
            say(f"line cut: {number + 1} of {times}")
        terminated: list[float] = []
        for number in range(times):
            load.wait_written(3)
            eventually(lambda: _terminate(scene.url()), what="a backend to terminate")
            terminated.append(scene.seconds_until_published())
            say(f"backend terminated: {number + 1} of {times}")
        silent: list[float] = []
        for number in range(max(1, times // 5)):
            load.wait_written(3)
            before = len([e for e in relay.events() if e.get("event") == "relay.waiting"])
            scene.postgres_line.silent = True
            eventually(
                lambda before=before: len([e for e in relay.events() if e.get("event") == "relay.waiting"]) > before,  # type: ignore[misc]  # bound now
                seconds=60,
                what="the relay gives the silent server up",
            )
            scene.postgres_line.silent = False
            silent.append(scene.seconds_until_published())
            say(f"silent server: {number + 1} of {max(1, times // 5)}")
        load.stop()
        assert relay.alive
        judgement = scene.settle(relay)
        yield Outcome("the line to PostgreSQL is cut", times, judgement, cut)
        yield Outcome("the relay's backend is terminated", times, judgement, terminated)
        yield Outcome("PostgreSQL accepts and never answers", len(silent), judgement, silent)


def _terminate(url: str) -> bool:
    with psycopg.connect(url, autocommit=True) as connection:
        row = connection.execute(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name LIKE 'outbox-relay%'"
        ).fetchone()
    return bool(row and row[0])


def lost_answers(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """A commit whose answer is lost: it really was committed, or it never got there."""
    with Scene(directory, "answers", transaction_timeout=5) as scene, scene.load() as load:
        relay = scene.relay()
        relay.wait_said("relay.holds")
        outcomes: dict[str, list[float]] = {"lose_answers": [], "lose_requests": []}
        for number in range(times):
            for what, seconds in outcomes.items():
                load.wait_written(3)
                before = scene.kafka_line.lost
                setattr(scene.kafka_line, what, 1)
                eventually(lambda before=before: scene.kafka_line.lost > before, what="a commit to lose")  # type: ignore[misc]  # bound now
                seconds.append(scene.seconds_until_published())
                assert relay.alive, relay.log.read_text()[-2000:]
            say(f"answers lost: {number + 1} of {times}")
        load.stop()
        judgement = scene.settle(relay)
        yield Outcome("a commit is done, its answer lost", times, judgement, outcomes["lose_answers"])
        yield Outcome("a commit does not arrive", times, judgement, outcomes["lose_requests"])


def kafka_away(directory: Path, times: int, say: Say, *, seconds_away: float = 60) -> Iterator[Outcome]:
    """Kafka is stopped under load, once for a minute: writers never fail; the relay goes on by itself."""
    seconds = []
    with Scene(directory, "kafka", transaction_timeout=5) as scene, scene.load() as load:
        relay = scene.relay()
        relay.wait_said("relay.holds")
        for number in range(times):
            load.wait_written(10)
            scene.kafka.kill() if number % 2 else scene.kafka.stop()
            if number == 0:
                time.sleep(seconds_away)  # the fault itself
            load.wait_written(10)
            scene.kafka.start()
            seconds.append(scene.seconds_until_published())
            assert relay.alive, relay.log.read_text()[-2000:]
            say(f"Kafka restarted: {number + 1} of {times}")
        load.stop()
        assert load.failed == 0, load.errors
        yield Outcome("Kafka is stopped or killed, and comes back", times, scene.settle(relay), seconds)


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
                with psycopg.connect(scene.url()) as connection:
                    row = connection.execute("SELECT epoch FROM outbox.settings").fetchone()
                assert row == (2,), f"adopted more than once: {row}"
                yield Outcome(f"{what}: the tail is lost", 1, judgement, [seconds])


def _put_in_place(scene: Scene, copy: Postgres, *, promote: bool) -> None:
    if not promote:
        # Restored, not replicating: it comes up as a primary of the same timeline.
        (copy.data / "standby.signal").unlink()
    copy.start()
    if promote:
        copy.promote()
    scene.replace_postgres(copy)


def other_cluster(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """A dump is loaded into another cluster: refused until `outbox adopt`."""
    for number in range(times):
        with Scene(directory, f"dump-{number}") as scene, scene.load() as load:
            relay = scene.relay()
            relay.wait_said("relay.holds")
            load.wait_written(30)
            scene.seconds_until_published()
            load.stop()
            relay.send(signal.SIGTERM)
            assert relay.wait() == 0
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
            scene.timeline, scene.adopted = 2, True
            refused = outbox(scene.env(), "relay", "--until-caught-up")
            assert refused.returncode == 76, refused.stderr
            assert "outbox adopt" in refused.stderr
            adopted = outbox(scene.env(), "adopt", "--yes")
            assert adopted.returncode == 0, adopted.stderr
            with scene.load() as more:
                second = scene.relay()
                more.wait_written(20)
                seconds = scene.seconds_until_published()
            say(f"another cluster: {number + 1} of {times}")
            yield Outcome("another cluster, adopted by a person", 1, scene.settle(second), [seconds])


def expired(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """The transactional id expires while nothing happens (a week by default): the relay goes on."""
    seconds = []
    properties = {
        "transactional.id.expiration.ms": "1500",
        "transaction.remove.expired.transaction.cleanup.interval.ms": "300",
        "producer.id.expiration.ms": "1500",
        "producer.id.expiration.check.interval.ms": "300",
    }
    with Scene(directory, "expired", kafka=properties) as scene:
        relay = scene.relay()
        relay.wait_said("relay.holds")
        judgement = Judgement()
        for number in range(times):
            with scene.load() as load:
                load.wait_written(10)
            scene.seconds_until_published()
            time.sleep(4)  # the fault itself: idle for longer than the ids live
            scene.put("after idling")
            seconds.append(scene.seconds_until_published())
            assert relay.alive, relay.log.read_text()[-2000:]
            say(f"expired: {number + 1} of {times}")
        judgement = scene.settle(relay)
        yield Outcome("idle until the transactional id expires", times, judgement, seconds)


def three_brokers(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """Of three brokers with `min.insync.replicas=2` the one that coordinates the relay's transactions is killed."""
    seconds = []
    with Scene(directory, "brokers", brokers=3, transaction_timeout=10) as scene, scene.load() as load:
        relay = scene.relay()
        relay.wait_said("relay.holds")
        for number in range(times):
            load.wait_written(10)
            node = scene.cluster.nodes[scene.cluster.coordinator(f"{scene.name}-0")]
            node.kill()
            load.wait_written(5)
            seconds.append(scene.seconds_until_published())
            assert relay.alive, relay.log.read_text()[-2000:]
            node.start()
            scene.wait_in_sync()
            say(f"coordinator killed: {number + 1} of {times}")
        load.stop()
        assert load.failed == 0, load.errors
        yield Outcome("the coordinator's broker of three is killed", times, scene.settle(relay), seconds)


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


def doorbell(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """The doorbell without a polling floor: bursts of writers, and each must wake the relay."""
    with Scene(directory, "doorbell", poll_interval=86_400, backoff_max="0.5") as scene:
        relay = scene.relay(poll_interval=86_400)
        relay.wait_said("relay.holds")
        lost, written = bursts(scene, times, say)
        assert not lost, f"{lost} wake-ups were lost"
        yield Outcome("bursts of writers, no polling floor", times, scene.settle(relay), notes=f"{written} entries")


def bursts(scene: Scene, times: int, say: Say, *, patience: float = 5.0) -> tuple[int, int]:
    """Let writers write in bursts, and wait after each until all is published; wake-ups lost, entries written."""
    chance = random.Random(3)
    lost = 0
    before = scene.greatest()
    with ThreadPoolExecutor(4) as pool:
        for number in range(times):
            pauses = [chance.random() * 0.02 for _ in range(4)]
            list(pool.map(partial(_burst, scene), range(4), pauses))
            try:
                scene.seconds_until_published(seconds=patience)
            except AssertionError:
                lost += 1
                scene.put("a ring for what slept")
                scene.seconds_until_published()
            if number % 50 == 49:
                say(f"bursts: {number + 1} of {times}, {lost} wake-ups lost")
    return lost, scene.greatest() - before


def _burst(scene: Scene, writer: int, pause: float) -> None:
    with psycopg.connect(scene.url()) as connection:
        for _ in range(4):
            scene.change(connection, f"burst-{writer}")
            connection.execute("SELECT pg_sleep(%s)", [pause])
            connection.commit()


def backlog(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """A backlog of a million entries: the relay's memory is that of one tenth of it; killed in the middle of it."""
    peaks: dict[int, float] = {}
    judgement = Judgement()
    for size in (100_000, 1_000_000):
        with Scene(directory, f"backlog-{size}", batch_rows=20_000) as scene:
            with psycopg.connect(scene.url()) as connection:
                connection.execute(
                    "INSERT INTO outbox.entries (type, key, state) SELECT 'wide', n::text,"
                    " convert_to('{\"n\": \"' || repeat('x', 180) || n || '\"}', 'UTF8') FROM generate_series(1, %s) n",
                    [size],
                )
            if size > 100_000:
                for number in range(3):
                    victim = scene.victim("before commit", 10 + 3 * number, batch_rows=20_000)
                    assert victim.wait(seconds=120) == -signal.SIGKILL
                    say(f"killed in the backlog: {number + 1} of 3")
            peaks[size] = scene.drain_peak()
            seen: Counter[bytes] = Counter()
            for record in read_topic(scene.bootstrap, {}, scene.topics["wide"]):
                seen[record.key or b""] += 1
            judgement.entries, judgement.records = size, seen.total()
            judgement.lost += size - len(seen)
            judgement.doubled += seen.total() - len(seen)
            say(f"backlog of {size}: {peaks[size]:.0f} MB at the most")
    small, large = peaks.values()
    assert large < small * 1.2 + 10, f"{large:.0f} MB for ten times as much, {small:.0f} MB for the smaller"
    notes = f"peak memory {small:.0f} MB for 100,000, {large:.0f} MB for 1,000,000"
    yield Outcome("killed in a backlog of 1,000,000", 3, judgement, notes=notes)


def mended(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """What a person must mend: said with the cure, and gone on from when it is mended."""
    seconds: list[float] = []
    done = 0
    with Scene(directory, "mended", relay_role="relay_role") as scene, scene.load() as load:
        relay = scene.relay()
        relay.wait_said("relay.holds")
        break_and_mend: tuple[tuple[str, str], ...] = (
            (
                "REVOKE SELECT ON outbox.entries FROM relay_role",
                "GRANT SELECT ON outbox.entries TO relay_role",
            ),
            ("ALTER ROLE relay_role NOLOGIN", "ALTER ROLE relay_role LOGIN"),
        )
        for _ in range(times):
            for broken, mend in break_and_mend:
                load.wait_written(5)
                count = scene.count_said(relay, "relay.stuck")
                scene.sql(broken)
                _terminate(scene.url())
                eventually(
                    lambda count=count: scene.count_said(relay, "relay.stuck") > count,  # type: ignore[misc]  # bound now
                    seconds=30,
                    what="stuck",
                )
                said = relay.said("relay.stuck")
                assert said is not None
                assert said["cure"]
                scene.sql(mend)
                seconds.append(scene.seconds_until_published())
                done += 1
                say(f"mended: {mend}")
        load.stop()
        assert relay.alive
        assert load.failed == 0, load.errors
        yield Outcome("a privilege or a login is taken away, and given back", done, scene.settle(relay), seconds)


def pruned(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """Pruning under load with a slow relay, one slot locked while the next is not; then the positions are lost."""
    with Scene(directory, "pruned", retention="10 seconds") as scene, scene.load(writers=3) as load:
        # Of the ring's twelve seconds four are kept: some slots are old at any time.
        scene.sql("UPDATE outbox.settings SET retention = '4 seconds'")
        relay = scene.relay(batch_rows=5)
        relay.wait_said("relay.holds")
        emptied = locked = 0
        deadline = time.monotonic() + 60 + 20 * times
        while emptied < times or not locked:
            assert time.monotonic() < deadline, f"{emptied} slots were emptied, {locked} locked"
            with psycopg.connect(scene.url()) as reader:
                # A reader of the oldest slot: the next ones are pruned before it, out of order.
                row = reader.execute("SELECT (outbox.slot_of(clock_timestamp()) + 2) % 12").fetchone()
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
            with psycopg.connect(scene.url()) as connection:
                row = connection.execute("SELECT epoch FROM outbox.settings").fetchone()
            assert row == (2,), f"adopted more than once: {row}"
            yield Outcome("two shards lose their tail, one relay is killed", 2, judgement, [seconds])

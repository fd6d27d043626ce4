"""PostgreSQL crashes, is cut off, is read-only, has no room; its clock jumps."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import psycopg

from faults.load import Load
from faults.scene import Outcome, Relay, Say, Scene
from faults.victim import BEFORE_THE_BELL, Lack
from faults.volume import LeftOutError
from relays import eventually, must, outbox


def crash(directory: Path, times: int, say: Say, *, lack: Lack | None = None) -> Iterator[Outcome]:
    """PostgreSQL stops at once after a burst of asynchronous commits and aborts, in turn:

    when all of the burst is published; while the relay stands still, so that nothing asks for the disk; in the middle.
    Of those that nobody asked for, commits are really lost, and transaction ids really come again.
    `lack`: a rule that the relay leaves out, for a test.
    """
    seconds = []
    lost = again = 0
    # By itself the server writes to its disk so rarely that a burst is not there yet.
    with (
        Scene(directory, "crash", postgres={"wal_writer_delay": "10s"}) as scene,
        scene.load(aborts=0.4) as load,
    ):
        relay = scene.relay() if lack is None else scene.victim(BEFORE_THE_BELL, 0, lack=lack)
        relay.wait_said("relay.holds")
        for number in range(times):
            load.asynchronous = 0.3
            load.wait_written(10)
            load.hold()
            standing = number % 3 == 1
            if standing:
                relay.send(signal.SIGSTOP)
            load.asynchronous = 1.0
            load.release()
            load.wait_written(20)
            if number % 3 < 2:
                load.hold()
            if number % 3 == 0:
                scene.seconds_until_published()
            before = scene.next_xid()
            scene.postgres.stop("immediate")
            load.hold()
            scene.postgres.start()
            again += scene.next_xid() < before
            missing = scene.missing(load.believed)
            lost += len(missing)
            load.believed -= missing
            load.release()
            if standing:
                relay.send(signal.SIGCONT)
            load.wait_written(2)
            seconds.append(scene.seconds_until_published())
            assert relay.alive, relay.log.read_text()[-2000:]
            say(f"PostgreSQL crashed: {number + 1} of {times}; {lost} entries were lost, {again} times ids came again")
        load.stop()
        if lack is None and times > 1:
            assert lost, "no asynchronous commit was lost"
            assert again, "no transaction id came again"
        notes = f"{lost} entries that were acknowledged were lost, transaction ids came again after {again} of {times}"
        judgement = scene.settle(relay)
        yield Outcome("PostgreSQL stops at once, with asynchronous commits", times, judgement, seconds, notes)


def line(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """The relay's line to PostgreSQL: cut in the middle, its backend terminated, a server that answers no more."""
    with Scene(directory, "line", statement_timeout=1) as scene, scene.load() as load:
        relay = scene.relay()
        relay.wait_said("relay.holds")
        cut: list[float] = []
        for number in range(times):
            waited = scene.count_said(relay, "relay.waiting")
            # Several entries at once, so that it is a batch that comes in two halves and not whole.
            _stand_still(scene, relay, load)
            scene.postgres_line.cuts_within = 1_500
            relay.send(signal.SIGCONT)
            eventually(lambda number=number: scene.postgres_line.cuts > number, what="a batch is cut within")  # type: ignore[misc]  # bound now
            cut.append(scene.seconds_until_published())
            assert scene.count_said(relay, "relay.waiting") > waited, relay.log.read_text()[-2000:]
            say(f"line cut: {number + 1} of {times}")
        terminated: list[float] = []
        for number in range(times):
            waited = scene.count_said(relay, "relay.waiting")
            _stand_still(scene, relay, load)
            eventually(scene.terminate, what="a backend to terminate")
            relay.send(signal.SIGCONT)
            terminated.append(scene.seconds_until_published())
            assert scene.count_said(relay, "relay.waiting") > waited, relay.log.read_text()[-2000:]
            say(f"backend terminated: {number + 1} of {times}")
        silent: list[float] = []
        for number in range(max(1, times // 5)):
            load.wait_written(3)
            waited = scene.count_said(relay, "relay.waiting")
            scene.postgres_line.silent = True
            scene.wait_said_again(relay, "relay.waiting", waited)
            scene.postgres_line.silent = False
            silent.append(scene.seconds_until_published())
            say(f"silent server: {number + 1} of {max(1, times // 5)}")
        # Slow, both of them, and each in turn slower than the other.
        slow: list[float] = []
        for number in range(2):
            scene.postgres_line.delay, scene.kafka_line.delay = (0.05, 0.001) if number else (0.005, 0.01)
            load.wait_written(10)
            scene.postgres_line.delay = scene.kafka_line.delay = 0.0
            slow.append(scene.seconds_until_published())
        load.stop()
        assert relay.alive
        judgement = scene.settle(relay)
        yield Outcome("the line to PostgreSQL is cut within a batch", times, judgement, cut)
        yield Outcome("the relay's backend is terminated", times, judgement, terminated)
        yield Outcome("PostgreSQL accepts and never answers", len(silent), judgement, silent)
        yield Outcome("every answer of both servers is late", len(slow), judgement, slow)


def _stand_still(scene: Scene, relay: Relay, load: Load) -> None:
    """Stop the relay, and let a backlog come into being."""
    relay.send(signal.SIGSTOP)
    load.wait_written(20)


def disk_full(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """PostgreSQL has no room left: writers fail, it may go down; the relay goes on when there is room."""
    seconds = []
    # Little WAL is kept, so that it must be extended soon.
    options = {"min_wal_size": "32MB", "max_wal_size": "48MB", "wal_recycle": "off"}
    with Scene(directory, "pg-full", postgres=options, small_disk="postgres") as scene, scene.load() as load:
        relay = scene.relay()
        relay.wait_said("relay.holds")
        went_down = 0
        for number in range(times):
            load.wait_written(10)
            waited = scene.count_said(relay, "relay.waiting")
            scene.volume.fill()
            failed = load.failed
            with contextlib.suppress(psycopg.Error):
                # Somebody's large query takes what little the server had in reserve; or its log does, and it goes down.
                scene.sql(
                    "SELECT pg_logical_emit_message(false, 'junk', repeat('x', 1000000)) FROM generate_series(1, 200)"
                    if number % 2
                    else "CREATE TABLE junk AS SELECT repeat(md5(n::text), 30) FROM generate_series(1, 300000) n"
                )
            eventually(lambda failed=failed: load.failed > failed, seconds=120, what="a writer fails")  # type: ignore[misc]  # bound now
            scene.volume.free()
            if scene.postgres.wait_gone(2):
                went_down += 1
                scene.wait_said_again(relay, "relay.waiting", waited)
                said = relay.said("relay.waiting")
                assert said is not None
                assert said["what"] == "database", said
                assert "OUTBOX_DATABASE_URL" in said["cure"], said
                scene.postgres.start()
            load.wait_written(10)
            scene.sql("DROP TABLE IF EXISTS junk")
            seconds.append(scene.seconds_until_published())
            assert relay.alive, relay.log.read_text()[-2000:]
            say(f"PostgreSQL's disk was full: {number + 1} of {times}")
        load.stop()
        notes = f"PostgreSQL went down {went_down} times"
        yield Outcome("PostgreSQL's disk is full", times, scene.settle(relay), seconds, notes)


def read_only(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """The database becomes read-only: writers fail, what is there is published, pruning says why it cannot."""
    seconds = []
    with Scene(directory, "read-only") as scene:
        # Something to prune, in a slot that the clock does not come to.
        with psycopg.connect(scene.url()) as connection:
            scene.change(connection, "old", age="2 days")
            connection.execute("UPDATE outbox.entries SET slot = (slot + 5) % 12 WHERE key = 'old'")
        with scene.load() as load:
            relay = scene.relay()
            relay.wait_said("relay.holds")
            for number in range(times):
                load.wait_written(10)
                failed = load.errors.get("ReadOnlySqlTransaction", 0)
                scene.sql("ALTER SYSTEM SET default_transaction_read_only = on")
                scene.sql("SELECT pg_reload_conf()")
                eventually(
                    lambda failed=failed: load.errors.get("ReadOnlySqlTransaction", 0) > failed,  # type: ignore[misc]  # bound now
                    what="a writer is refused",
                )
                seconds.append(scene.seconds_until_published())
                if number == 0:
                    refused = outbox(scene.env(), "prune")
                    assert refused.returncode == 78, refused.stdout
                    assert "read-only" in refused.stderr, refused.stderr
                scene.sql("ALTER SYSTEM RESET default_transaction_read_only")
                scene.sql("SELECT pg_reload_conf()")
                load.wait_written(5)
                scene.seconds_until_published()
                pruned = [slot["pruned"] for slot in json.loads(must(scene.env(), "prune", "--json"))["slots"]]
                assert any(pruned) == (number == 0)
                assert relay.alive, relay.log.read_text()[-2000:]
                say(f"read-only: {number + 1} of {times}")
            load.stop()
            yield Outcome("the database is read-only", times, scene.settle(relay), seconds)


def clock(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """The database server's clock jumps by more than the retention, forth and back: nothing is lost, dead or pruned."""
    library = find_spec("libfaketime")
    if library is None or not library.submodule_search_locations:
        raise LeftOutError("the clock of a process cannot be set here: libfaketime is for Linux")
    shift = directory / "shift"
    preload = Path(library.submodule_search_locations[0]) / "vendor/libfaketime/src/libfaketime.so.1"
    environment = {
        "LD_PRELOAD": str(preload),
        "FAKETIME_TIMESTAMP_FILE": str(shift),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    shift.write_text("+0")
    shift.chmod(0o644)
    seconds = []
    with (
        Scene(directory, "clock", environment=environment, prune="on", prune_interval=1) as scene,
        scene.load() as load,
    ):
        relay = scene.relay()
        relay.wait_said("relay.holds")
        load.wait_written(10)
        jumps = 0
        for _ in range(times):
            for to in ("+25h", "+0", "-25h", "+0"):
                shift.write_text(to)
                jumps += 1
                with psycopg.connect(scene.url()) as connection:
                    (away,) = connection.execute(
                        "SELECT extract(epoch FROM clock_timestamp())::float8 - %s", [time.time()]
                    ).fetchone() or (0.0,)
                assert abs(away - 3600 * float(to.rstrip("h"))) < 60, f"the clock did not jump: {away}"
                load.wait_written(10)
                seconds.append(scene.seconds_until_published())
                kept = [slot["reason"] for slot in json.loads(must(scene.env(), "prune", "--json"))["slots"]]
                assert None not in kept, f"pruned early, at {to}: {kept}"
            say(f"the clock jumped {jumps} times")
        load.stop()
        assert relay.said("relay.pruned") is None
        judgement = scene.settle(relay)
        letters = json.loads(must(scene.env(), "dead-letters", "list", "--json"))
        assert letters == [], letters
        yield Outcome("the database's clock jumps by 25 hours", jumps, judgement, seconds)

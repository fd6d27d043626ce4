"""The relay is killed, frozen, doubled; its memory; its sleep."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import psycopg

from faults.scene import Outcome, Relay, Say, Scene
from faults.victim import BEFORE_THE_BELL, PLACES, SENT
from relays import eventually


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
        judgement = scene.settle(relay)
        aborted = scene.aborted_states()
        assert aborted >= times * len(SENT), f"only {aborted} records were aborted"
        yield Outcome("relay killed at each place", times * len(PLACES), judgement, [seconds])


def killed_at(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """The relay is killed between two calls of its step, `times` at each place.

    In the middle of a transaction Kafka holds its records by then: the successor makes aborted ones of them.
    """
    chance = random.Random(1)
    for place in PLACES:
        with Scene(directory, f"killed-{PLACES.index(place)}") as scene, scene.load() as load:
            for number in range(times):
                victim = scene.victim(place, chance.randint(1, 3))
                load.wait_written(3)
                code = victim.wait(seconds=60)
                assert code == -signal.SIGKILL, victim.log.read_text()[-2000:]
                say(f"killed {place}: {number + 1} of {times}")
            relay = scene.relay()
            relay.wait_said("relay.holds")
            seconds = scene.seconds_until_published()
            load.stop()
            judgement = scene.settle(relay)
            aborted = scene.aborted_states()
            assert aborted >= times or place not in SENT, f"only {aborted} records were aborted by {times} kills"
            notes = f"{aborted} records of states were aborted"
            yield Outcome(f"relay killed {place}", times, judgement, [seconds], notes)


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
    """A relay freezes within a transaction, and wakes after its successor has published: it is fenced, and says so."""
    seconds = []
    places = (*SENT, "after read")
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
            assert frozen.wait() == 75, frozen.log.read_text()[-2000:]
            assert "took over" in frozen.log.read_text(), frozen.log.read_text()[-2000:]
            say(f"zombie: {number + 1} of {times}")
        load.stop()
        assert successor is not None
        judgement = scene.settle(successor)
        aborted, within = scene.aborted_states(), sum(places[n % len(places)] in SENT for n in range(times))
        assert aborted >= within, f"only {aborted} records were aborted, {within} froze in a transaction"
        notes = f"each was fenced; {aborted} records of states were aborted"
        yield Outcome("a zombie wakes after its successor published", times, judgement, seconds, notes)


def stall(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """A relay stands still for longer than a transaction may take, and nobody else came: fenced, it goes on."""
    seconds = []
    properties = {"transaction.abort.timed.out.transaction.cleanup.interval.ms": "500"}
    with Scene(directory, "stall", kafka=properties, transaction_timeout=2) as scene, scene.load() as load:
        for number in range(times):
            relay = scene.victim("before commit", 2, "STOP")
            load.wait_written(5)
            relay.wait_frozen()
            assert scene.open_transactions(), "Kafka holds no open transaction"
            # The broker's patience ends: that is what the stall is.
            eventually(lambda: not scene.open_transactions(), what="Kafka ends the transaction")
            relay.send(signal.SIGCONT)
            seconds.append(scene.seconds_until_published())
            doubt = relay.wait_said("relay.hold_in_doubt")
            assert "_FENCED" in doubt["reason"], doubt
            assert relay.alive
            relay.send(signal.SIGTERM)
            assert relay.wait() == 0
            say(f"stall: {number + 1} of {times}")
        load.stop()
        judgement = scene.settle()
        aborted = scene.aborted_states()
        assert aborted >= times, f"only {aborted} records were aborted"
        yield Outcome(
            "a stall beyond the transaction's time limit", times, judgement, seconds, "each was fenced by Kafka"
        )


def doorbell(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """The doorbell without a polling floor: bursts of writers, and each must wake the relay.

    Then the same for a relay that does not look once more before it sleeps: it misses some.
    """
    with Scene(directory, "doorbell", poll_interval=86_400) as scene:
        relay = scene.relay()
        relay.wait_said("relay.holds")
        lost, _ = bursts(scene, times, say, until_lost=False)
        assert not lost, f"{lost} wake-ups were lost"
        outcome = Outcome("bursts of writers, no polling floor", times, scene.settle(relay), unit="bursts")
    with Scene(directory, "deaf", poll_interval=86_400) as scene:
        relay = scene.victim(BEFORE_THE_BELL, 0, lack="deaf")
        relay.wait_said("relay.holds")
        lost, tried = bursts(scene, 20 * times, say, until_lost=True)
        assert lost, f"a relay without its second look lost no wake-up in {tried} bursts"
        assert scene.settle(relay).right
    outcome.notes = f"without its second look the relay missed the end of a burst after {tried}"
    yield outcome


def bursts(scene: Scene, times: int, say: Say, *, until_lost: bool) -> tuple[int, int]:
    """Let writers write in bursts, and wait after each until all is published; wake-ups lost, bursts tried."""
    chance = random.Random(3)
    lost = 0
    # While it is awake a burst is published in milliseconds; a wake-up that is lost is lost for good.
    patience = 2.0 if until_lost else 10.0
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
                if until_lost:
                    return lost, number + 1
            if number % 50 == 49:
                say(f"bursts: {number + 1} of {times}, {lost} wake-ups lost")
    return lost, times


def _burst(scene: Scene, writer: int, pause: float) -> None:
    with psycopg.connect(scene.url()) as connection:
        for _ in range(17):
            scene.change(connection, f"burst-{writer}")
            connection.execute("SELECT pg_sleep(%s)", [pause / 4])
            connection.commit()


def backlog(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """A backlog of a million entries: the relay's memory is that of one tenth of it; killed in the middle of it.

    The peak is the greatest of all relays that drained a part. Writers go on beside them.
    """
    peaks: dict[int, float] = {}
    for size in (100_000, 1_000_000):
        with Scene(directory, f"backlog-{size}", batch_rows=20_000) as scene:
            _fill(scene, size)
            with scene.load() as load:
                parts: list[float] = []
                for number in range(3 if size > 100_000 else 0):
                    victim = scene.victim("before commit", 10 + 3 * number)
                    parts.append(scene.peak(victim, -signal.SIGKILL))
                    say(f"killed in the backlog: {number + 1} of 3")
                parts.append(scene.peak(scene.command("relay", "--until-caught-up"), 0))
                load.wait_written(10)
            peaks[size] = max(parts)
            judgement = scene.settle()
            assert judgement.right, judgement
            say(f"backlog of {size}: {peaks[size]:.0f} MB at the most")
    small, large = peaks.values()
    # What is held for each entry would show: 900,000 more, and 64 bytes each would be too much.
    assert large < small + 58, f"{large:.0f} MB for ten times as much, {small:.0f} MB for the smaller"
    notes = f"peak memory {small:.0f} MB for 100,000, {large:.0f} MB for 1,000,000"
    yield Outcome("killed in a backlog of 1,000,000", 3, judgement, notes=notes)


def _fill(scene: Scene, count: int) -> None:
    """So many entities, each with its entry, its row and its line in the ledger."""
    with psycopg.connect(scene.url()) as connection:
        connection.execute(
            "WITH entry AS (INSERT INTO outbox.entries (type, key, state) SELECT 'wide', 'b' || n, convert_to("
            "jsonb_build_object('version', 1, 'on', 1, 'padding', repeat('x', 180))::text, 'UTF8')"
            " FROM generate_series(1, %s) n RETURNING id, key),"
            " row AS (INSERT INTO thing (type, key, version, alive, changed_on)"
            " SELECT 'wide', key, 1, true, 1 FROM entry)"
            " INSERT INTO ledger (id, type, key, version) SELECT id, 'wide', key, 1 FROM entry",
            [count],
        )

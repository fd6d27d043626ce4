"""Kafka stops, loses answers, loses brokers, forgets transactional ids."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from faults.judge import Judgement
from faults.scene import Outcome, Say, Scene
from relays import eventually


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


def brokers_killed(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
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


def disk_full(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """Kafka has no room left and goes down; when it has room and is started, the relay goes on by itself."""
    seconds = []
    with Scene(directory, "kafka-full", small_disk="kafka", transaction_timeout=10) as scene, scene.load() as load:
        relay = scene.relay()
        relay.wait_said("relay.holds")
        for number in range(times):
            load.wait_written(10)
            scene.volume.fill()
            assert scene.kafka.wait_gone(120), "Kafka goes on without room"
            load.wait_written(10)
            scene.volume.free()
            scene.kafka.start()
            seconds.append(scene.seconds_until_published())
            assert relay.alive, relay.log.read_text()[-2000:]
            say(f"Kafka's disk was full: {number + 1} of {times}")
        load.stop()
        assert load.failed == 0, load.errors
        yield Outcome("Kafka's disk is full, and it goes down", times, scene.settle(relay), seconds)

"""Kafka stops, loses answers, loses brokers, forgets transactional ids."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from faults.proxy import Loses
from faults.scene import Outcome, Say, Scene
from relays import eventually


def lost_answers(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """Every commit's answer is lost until the relay gives up: it really was committed. Or none of them gets there."""
    # Kafka itself must not end what the relay is to find open.
    properties = {"transaction.abort.timed.out.transaction.cleanup.interval.ms": "600000"}
    with Scene(directory, "answers", kafka=properties, transaction_timeout=4) as scene, scene.load() as load:
        relay = scene.relay()
        relay.wait_said("relay.holds")
        seconds: dict[Loses, list[float]] = {"answers": [], "requests": []}
        for number in range(times):
            for loses, needed in seconds.items():
                load.wait_written(3)
                doubts, holds = (scene.count_said(relay, f"relay.{name}") for name in ("hold_in_doubt", "holds"))
                lost = scene.kafka_line.lost
                scene.kafka_line.loses = loses
                eventually(lambda lost=lost: scene.kafka_line.lost > lost, what="a commit to lose")  # type: ignore[misc]  # bound now
                # The last record of the positions is that of the transaction that was to be ended.
                record = max(scene.offsets(scene.positions_topic, committed=False))
                ended = partial(scene.has_ended, record)
                if loses == "answers":
                    eventually(ended, what="Kafka commits it")
                else:
                    assert not ended(), "the request did arrive"
                scene.wait_said_again(relay, "relay.hold_in_doubt", doubts)
                # Before, its client may still try: no commit is to get through. It ends what it left open.
                eventually(ended, what="the relay takes the shard again")
                scene.kafka_line.loses = None
                scene.wait_said_again(relay, "relay.holds", holds)
                committed = scene.offsets(scene.positions_topic, committed=True)
                assert (record in committed) == (loses == "answers"), f"{loses}: committed is {record in committed}"
                needed.append(scene.seconds_until_published())
                assert relay.alive, relay.log.read_text()[-2000:]
            say(f"answers lost: {number + 1} of {times}")
        load.stop()
        judgement = scene.settle(relay)
        yield Outcome("a commit is done, its answers are lost", times, judgement, seconds["answers"])
        yield Outcome("a commit does not arrive", times, judgement, seconds["requests"])


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
        mine = f"{scene.name}-0"
        for number in range(times):
            with scene.load() as load:
                load.wait_written(10)
                if number == 0:
                    assert mine in scene.transactional_ids(), "Kafka calls it differently"
            scene.seconds_until_published()
            # The fault itself: idle for longer than the ids live.
            eventually(lambda: mine not in scene.transactional_ids(), what="the transactional id expires")
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
            waited = scene.count_said(relay, "relay.waiting")
            scene.volume.fill()
            assert scene.kafka.wait_gone(120), "Kafka goes on without room"
            load.wait_written(10)
            scene.wait_said_again(relay, "relay.waiting", waited)
            said = relay.wait_said("relay.waiting")
            assert said["what"] == "kafka", said
            assert "Check that it runs" in said["cure"], said
            scene.volume.free()
            scene.kafka.start()
            seconds.append(scene.seconds_until_published())
            assert relay.alive, relay.log.read_text()[-2000:]
            say(f"Kafka's disk was full: {number + 1} of {times}")
        load.stop()
        assert load.failed == 0, load.errors
        judgement = scene.settle(relay)
        if judgement.doubled:
            # What comes twice because a broker broke a transaction is told to whoever runs the relay.
            assert relay.said("relay.torn"), (judgement.examples, relay.log.read_text()[-2000:])
        yield Outcome("Kafka's disk is full, and it goes down", times, judgement, seconds)

"""What a person must mend: said with the cure, and gone on from when it is mended."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from confluent_kafka.admin import (  # type: ignore[attr-defined]  # the package re-exports them without saying so
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    ResourcePatternType,
    ResourceType,
)

from faults.load import Load
from faults.scene import PASSWORD, Outcome, Relay, Say, Scene
from relays import must

Break = Callable[[], object]

AUTHORIZER = {
    "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "allow.everyone.if.no.acl.found": "true",
}
"""Nobody logs in: the broker's own requests and the relay's are the same user's. What no rule names is allowed."""


def _mend(scene: Scene, relay: Relay, load: Load, break_it: Break, mend: Break, cure: str) -> float:
    """Break something and wait until the relay says the cure; mend it; seconds until publishing went on."""
    load.wait_written(5)
    count = scene.count_said(relay, "relay.stuck")
    break_it()
    scene.wait_said_again(relay, "relay.stuck", count)
    said = relay.said("relay.stuck")
    assert said is not None
    assert cure in said["cure"], said
    load.wait_written(5)
    mend()
    seconds = scene.seconds_until_published()
    assert relay.alive, relay.log.read_text()[-2000:]
    return seconds


def denied_by_postgres(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """PostgreSQL denies the relay a table, the login, its password."""
    broken: dict[str, tuple[tuple[str, str, str], ...]] = {
        "a privilege is revoked": (
            (
                "REVOKE SELECT ON outbox.entries FROM relay_role",
                "GRANT SELECT ON outbox.entries TO relay_role",
                "outbox_grant",
            ),
        ),
        "the login is taken away": (
            ("ALTER ROLE relay_role NOLOGIN", "ALTER ROLE relay_role LOGIN", "the user and the password"),
        ),
        "the password expires, or is changed": (
            (
                "ALTER ROLE relay_role VALID UNTIL '2001-01-01'",
                "ALTER ROLE relay_role VALID UNTIL 'infinity'",
                "the user and the password",
            ),
            (
                "ALTER ROLE relay_role PASSWORD 'another'",
                f"ALTER ROLE relay_role PASSWORD '{PASSWORD}'",
                "the user and the password",
            ),
        ),
    }
    with Scene(directory, "denied", relay_role="relay_role") as scene, scene.load() as load:
        relay = scene.relay()
        relay.wait_said("relay.holds")
        seconds: dict[str, list[float]] = {fault: [] for fault in broken}

        def deny(statement: str) -> None:
            scene.sql(statement)
            scene.terminate()

        for _ in range(times):
            for fault, ways in broken.items():
                for broken_by, mended_by, cure in ways:
                    seconds[fault].append(
                        _mend(scene, relay, load, partial(deny, broken_by), partial(scene.sql, mended_by), cure)
                    )
                    say(f"mended: {mended_by}")
        load.stop()
        assert load.failed == 0, load.errors
        judgement = scene.settle(relay)
        for fault, needed in seconds.items():
            yield Outcome(fault, len(needed), judgement, needed)


def denied_by_kafka(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """Kafka denies the relay to write to one of its topics, or its transactional id, which fences it as well."""
    seconds: dict[ResourceType, list[float]] = {ResourceType.TOPIC: [], ResourceType.TRANSACTIONAL_ID: []}
    with Scene(directory, "acl", kafka=AUTHORIZER) as scene, scene.load() as load:
        relay = scene.relay()
        relay.wait_said("relay.holds")
        admin = scene.admin()
        names = {ResourceType.TOPIC: scene.topics["wide"], ResourceType.TRANSACTIONAL_ID: f"{scene.name}-0"}

        def deny(kind: ResourceType) -> None:
            rules = [
                AclBinding(kind, names[kind], ResourcePatternType.LITERAL, "User:ANONYMOUS", "*", operation, permission)
                for operation, permission in (
                    (AclOperation.ALL, AclPermissionType.ALLOW),
                    (AclOperation.WRITE, AclPermissionType.DENY),
                )
            ]
            for made in admin.create_acls(rules).values():
                made.result()

        def allow(kind: ResourceType) -> None:
            every = AclBindingFilter(
                kind, names[kind], ResourcePatternType.LITERAL,
                None, None, AclOperation.ANY, AclPermissionType.ANY,  # type: ignore[arg-type]  # None: any
            )  # fmt: skip
            for gone in admin.delete_acls([every]).values():
                gone.result()

        for number in range(times):
            for kind, needed in seconds.items():
                needed.append(_mend(scene, relay, load, partial(deny, kind), partial(allow, kind), "ACLs"))
            say(f"denied by Kafka: {number + 1} of {times}")
        load.stop()
        assert load.failed == 0, load.errors
        judgement = scene.settle(relay)
        topic, identity = seconds.values()
        yield Outcome("Kafka denies the relay a topic", times, judgement, topic)
        yield Outcome("Kafka denies the relay its transactional id", times, judgement, identity)


def topic_changed(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """A topic's policy is changed to delete, under the relay."""
    seconds = []
    with Scene(directory, "policy", topic_check_interval=0.3) as scene, scene.load() as load:
        relay = scene.relay()
        relay.wait_said("relay.holds")
        resource = ConfigResource(
            ConfigResource.Type.TOPIC,
            scene.topics["hot"],
            incremental_configs=[ConfigEntry("cleanup.policy", "delete", incremental_operation=AlterConfigOpType.SET)],
        )

        admin = scene.admin()

        def change() -> None:
            admin.incremental_alter_configs([resource])[resource].result()

        for number in range(times):
            mend = partial(must, scene.env(), "topics", "apply", "--yes")
            seconds.append(_mend(scene, relay, load, change, mend, "outbox topics apply"))
            say(f"policy changed: {number + 1} of {times}")
        load.stop()
        yield Outcome("a topic's policy becomes delete", times, scene.settle(relay), seconds)


def topic_deleted(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """A topic is deleted in the middle of a transaction: what was not published goes on when it is made anew.

    What it held is gone with it. The position that was committed at that moment tells which entries those are.
    """
    seconds = []
    places = ("in the middle of sending", "after read", "after begin")
    with Scene(directory, "deleted", transaction_timeout=5) as scene, scene.load() as load:
        for number in range(times):
            relay = scene.victim(places[number % len(places)], 2, "STOP", transaction_timeout=5)
            load.wait_written(5)
            relay.wait_frozen()
            (position,) = scene.positions()
            assert position is not None
            scene.gone["wide"] = position

            def delete(relay: Relay = relay) -> None:
                scene.delete_topic(scene.topics["wide"])
                relay.send(signal.SIGCONT)

            mend = partial(must, scene.env(), "topics", "apply", "--yes")
            seconds.append(_mend(scene, relay, load, delete, mend, "outbox topics apply"))
            relay.send(signal.SIGTERM)
            assert relay.wait() == 0
            say(f"topic deleted: {number + 1} of {times}")
        load.stop()
        yield Outcome("a topic is deleted under the relay", times, scene.settle(), seconds)


def own_topic_deleted(directory: Path, times: int, say: Say) -> Iterator[Outcome]:
    """A topic of the outbox's own is deleted under a running relay: it says so, and goes on when it is made anew.

    Without the dead letters nothing else is amiss. Without the positions the retained log is published again, and said
    to be - unless the relay itself still knows its position.
    """
    for which in ("dead-letters", "positions"):
        seconds = []
        with (
            Scene(directory, f"deleted-{which}", transaction_timeout=5, topic_check_interval=0.3) as scene,
            scene.load() as load,
        ):
            relay = scene.relay()
            relay.wait_said("relay.holds")
            delete = partial(scene.delete_topic, f"{scene.name}.outbox.{which}")
            mend = partial(must, scene.env(), "topics", "apply", "--yes")
            for number in range(times):
                seconds.append(_mend(scene, relay, load, delete, mend, "outbox topics apply"))
                say(f"topic of {which} deleted: {number + 1} of {times}")
            load.stop()
            anew = scene.count_said(relay, "relay.new_log") - 1
            notes = f"the retained log was published again {anew} times"
            assert which == "positions" or not anew, notes
            # Where it still knew the position it goes on from there, and everything is judged.
            scene.republished = anew > 0
            yield Outcome(
                f"the topic of {which} is deleted under the relay", times, scene.settle(relay), seconds, notes
            )

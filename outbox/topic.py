"""Topics as they should be: declared once, compared with what Kafka has. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from outbox.entity_type import EntityType
from outbox.errors import ConfigError, TopicError

DEFAULT_PARTITIONS = 8
# What a record needs beside key and state: see outbox.message. Keys have at most 1,024 bytes.
_RESERVE = 4096
_USUAL_LIMIT = "1048588"  # Kafka's default
# Smaller, and a position may not fit, nor a batch of any size.
_LEAST_LIMIT = 65_536
_WEEK_MS = 7 * 24 * 3600 * 1000
_FOR_EVER = 2**63 - 1
_APPLY = "outbox topics apply"

# The names that Kafka knows for a topic; another one in `topic_settings` is a mistake.
KNOWN = frozenset(
    [
        "cleanup.policy",
        "compression.gzip.level",
        "compression.lz4.level",
        "compression.type",
        "compression.zstd.level",
        "delete.retention.ms",
        "file.delete.delay.ms",
        "flush.messages",
        "flush.ms",
        "follower.replication.throttled.replicas",
        "index.interval.bytes",
        "leader.replication.throttled.replicas",
        "local.retention.bytes",
        "local.retention.ms",
        "max.compaction.lag.ms",
        "max.message.bytes",
        "message.timestamp.after.max.ms",
        "message.timestamp.before.max.ms",
        "message.timestamp.type",
        "min.cleanable.dirty.ratio",
        "min.compaction.lag.ms",
        "min.insync.replicas",
        "preallocate",
        "remote.storage.enable",
        "retention.bytes",
        "retention.ms",
        "segment.bytes",
        "segment.index.bytes",
        "segment.jitter.ms",
        "segment.ms",
        "unclean.leader.election.enable",
    ]
)
# Settings that would lose states or break what consumers rely on.
_FIXED: Mapping[str, str] = {
    "cleanup.policy": "compact",
    "message.timestamp.type": "CreateTime",
    "unclean.leader.election.enable": "false",
}


def positions_topic(name: str) -> str:
    """The topic of an outbox's positions: one partition a shard."""
    return f"{name}.outbox.positions"


def dead_letters_topic(name: str) -> str:
    """The topic of an outbox's dead letters: one partition a shard."""
    return f"{name}.outbox.dead-letters"


@dataclass(frozen=True, slots=True)
class TopicSpec:
    """A topic as it should be. `settings` are those that are declared; the others are the broker's affair."""

    name: str
    partitions: int
    replication_factor: int
    settings: Mapping[str, str]
    purpose: str


@dataclass(frozen=True, slots=True)
class TopicState:
    """A topic as Kafka has it; `settings` holds all of them, by Kafka's names."""

    name: str
    partitions: int
    replication_factor: int
    settings: Mapping[str, str]

    @property
    def max_message_bytes(self) -> int:
        """The greatest batch that the topic takes, bytes."""
        return int(self.settings["max.message.bytes"])


@dataclass(frozen=True, slots=True)
class Action:
    """One difference between a topic as it should be and as it is.

    `create` and `change` are what `apply` does; `grow` (more partitions) only when asked, since it moves keys to other
    partitions; `cannot` is what Kafka does not change. `settings` maps a setting to (is, should be).
    """

    kind: Literal["create", "change", "grow", "cannot"]
    topic: str
    explanation: str
    spec: TopicSpec
    settings: Mapping[str, tuple[str | None, str]] = field(default_factory=dict)


def check_settings(settings: Mapping[str, object], *, where: str) -> None:
    """Refuse settings of an entity type's topic that Kafka does not know, or that would lose states."""
    for name, value in settings.items():
        if name == "partitions":
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 100_000:
                raise ConfigError(f"{where}: {value!r} is no number of partitions.", cure="Use 1 to 100000.")
            continue
        if name not in KNOWN:
            raise ConfigError(f'{where}: Kafka knows no topic setting "{name}".', cure="See Kafka's topic configs.")
        fixed = _FIXED.get(name)
        if fixed is not None and str(value) != fixed:
            raise ConfigError(
                f"{where}: {name}={value} would lose states or their order.", cure=f"Leave it out; it is {fixed}."
            )


def declared(
    name_positions: str,
    name_dead_letters: str,
    types: Iterable[EntityType],
    *,
    shards: int,
    replication_factor: int,
) -> list[TopicSpec]:
    """All topics of an outbox: state, positions, dead letters. `ConfigError` when two types share one."""
    honest = {
        **_FIXED,
        "min.insync.replicas": str(max(1, replication_factor - 1)),
        "delete.retention.ms": str(_WEEK_MS),
        "message.timestamp.after.max.ms": str(_FOR_EVER),
    }
    own = {**honest, "segment.bytes": str(4 * 1024 * 1024), "min.compaction.lag.ms": "0"}
    own["max.message.bytes"] = _USUAL_LIMIT
    specs = [
        TopicSpec(name_positions, shards, replication_factor, own, "positions"),
        TopicSpec(name_dead_letters, shards, replication_factor, own, "dead letters"),
    ]
    owners: dict[str, str] = {name_positions: "positions", name_dead_letters: "dead letters"}
    for t in sorted(types, key=lambda t: t.name):
        if t.topic in owners:
            raise ConfigError(
                f'The entity types "{owners[t.topic]}" and "{t.name}" share the topic {t.topic}, which says the type.',
                cure=f"Give one of them another: outbox types change {t.name} --topic TOPIC.",
            )
        owners[t.topic] = t.name
        check_settings(t.topic_settings, where=f'The entity type "{t.name}"')
        more = {key: str(value) for key, value in t.topic_settings.items() if key != "partitions"}
        partitions = t.topic_settings.get("partitions", DEFAULT_PARTITIONS)
        settings = {
            **honest,
            # A reader that is this far behind still sees each change; beyond it may see the last only.
            "min.compaction.lag.ms": "0",
            "max.message.bytes": str(max(1_048_588, t.max_bytes + _RESERVE)),
            **more,
        }
        specs.append(TopicSpec(t.topic, int(str(partitions)), replication_factor, settings, f"states of {t.name}"))
    return specs


def plan(specs: Iterable[TopicSpec], actual: Mapping[str, TopicState]) -> list[Action]:
    """What differs, in the order of the specs; empty when nothing does."""
    actions: list[Action] = []
    for spec in specs:
        state = actual.get(spec.name)
        if state is None:
            explanation = f"{spec.partitions} partition(s), {spec.replication_factor} replica(s), for {spec.purpose}"
            actions.append(Action("create", spec.name, explanation, spec))
            continue
        drift = {
            name: (state.settings.get(name), value)
            for name, value in spec.settings.items()
            if state.settings.get(name) != value
        }
        if drift:
            text = ", ".join(f"{name} is {is_}, should be {should}" for name, (is_, should) in drift.items())
            actions.append(Action("change", spec.name, text, spec, drift))
        if state.partitions < spec.partitions:
            text = (
                f"{state.partitions} partition(s), should be {spec.partitions}: keys would move to other partitions; "
                "--grow does it"
            )
            actions.append(Action("grow", spec.name, text, spec))
        if state.partitions > spec.partitions:
            text = (
                f"{state.partitions} partitions, should be {spec.partitions}: Kafka never takes partitions away; "
                f"declare what there is: outbox types change TYPE --partitions {state.partitions}"
            )
            actions.append(Action("cannot", spec.name, text, spec))
        if state.replication_factor != spec.replication_factor:
            text = (
                f"{state.replication_factor} replica(s), should be {spec.replication_factor}: reassign its partitions "
                "with Kafka's own tool"
            )
            actions.append(Action("cannot", spec.name, text, spec))
    return actions


def troubles(
    actual: Mapping[str, TopicState],
    types: Mapping[str, EntityType],
    *,
    positions: str,
    dead_letters: str,
    shards: int,
) -> dict[str, TopicError]:
    """By topic, what a relay must not publish to, and the command that mends it; the outbox's own topics come first."""
    found: dict[str, TopicError] = {}
    wanted = {positions: "positions", dead_letters: "dead letters"}
    for t in types.values():
        if t.topic in wanted:
            found[t.topic] = TopicError(
                f'The entity type "{t.name}" has the topic {t.topic}, which is that of the {wanted[t.topic]}.',
                cure=f"Give it one of its own: outbox types change {t.name} --topic TOPIC.",
            )
        else:
            wanted[t.topic] = f"entity type {t.name}"
    for name, purpose in wanted.items():
        error = _trouble(actual.get(name), f"{name} ({purpose})", shards if name in {positions, dead_letters} else None)
        if error is not None:
            found.setdefault(name, error)
    return found


def _trouble(state: TopicState | None, called: str, partitions: int | None) -> TopicError | None:
    if state is None:
        return TopicError(f"The topic {called} is missing.", cure=f"Make it: {_APPLY}.")
    policy = state.settings.get("cleanup.policy", "")
    if policy != "compact":
        return TopicError(
            f"The topic {called} has cleanup.policy={policy}: what does not change would be deleted.",
            cure=f"Make it compacted: {_APPLY}.",
        )
    if state.max_message_bytes < _LEAST_LIMIT:
        return TopicError(
            f"The topic {called} takes at most {state.max_message_bytes} bytes.",
            cure=f"Raise its max.message.bytes: {_APPLY}.",
        )
    if state.settings.get("message.timestamp.type") == "LogAppendTime":
        return TopicError(
            f"The topic {called} has message.timestamp.type=LogAppendTime: it hides a state's time.",
            cure=f"Mend it: {_APPLY}.",
        )
    if partitions is not None and state.partitions != partitions:
        return TopicError(
            f"The topic {called} has {state.partitions} partition(s), the outbox has {partitions} shard(s): a position "
            "would be lost or shared.",
            cure=f"Restore the topic as it was, or, to publish the retained log again, delete it and run {_APPLY}.",
        )
    return None

"""Which librdkafka properties a user may pass through, and which carry the guarantee."""

from __future__ import annotations

from collections.abc import Mapping

from outbox.errors import ConfigError

_EXACTLY_ONCE = "exactly-once publishing depends on it"
_ORDER = "the order of a key's states depends on it"
_READ = "reading the position back depends on it"

GUARDED: Mapping[str, str] = {
    "acks": _EXACTLY_ONCE,
    "request.required.acks": _EXACTLY_ONCE,
    "enable.idempotence": _EXACTLY_ONCE,
    "enable.gapless.guarantee": _ORDER,
    "transactional.id": "it is the outbox's name and the shard; fencing depends on it",
    "transaction.timeout.ms": "set transaction_timeout instead",
    "max.in.flight": _ORDER,
    "max.in.flight.requests.per.connection": _ORDER,
    "retries": _EXACTLY_ONCE,
    "message.send.max.retries": _EXACTLY_ONCE,
    "message.timeout.ms": _EXACTLY_ONCE,
    "delivery.timeout.ms": _EXACTLY_ONCE,
    "partitioner": "consumers that join topics depend on the Java clients' partitioner",
    "isolation.level": _READ,
    "auto.offset.reset": _READ,
    "enable.auto.commit": _READ,
    "enable.partition.eof": _READ,
    "group.id": _READ,
    "bootstrap.servers": "set kafka_bootstrap_servers instead",
    "metadata.broker.list": "set kafka_bootstrap_servers instead",
    "message.max.bytes": "the topics' limits decide; it is set above them",
    "batch.num.messages": "finding a refused record depends on it",
    "batch.size": "it follows from the topics' limits",
}

# A mistyped name must not show what it was to hide either.
_SECRET_WORDS = ("pas", "secret", "key.pem", "jaas", "token", "credential", "oauthbearer.config")


def check_passthrough(properties: Mapping[str, str]) -> None:
    """Refuse a property that would weaken the guarantee; `ConfigError` with the reason."""
    for name in properties:
        reason = GUARDED.get(name)
        if reason is None and name == "default.topic.config":
            reason = "it hides other properties"
        if reason is None and name.startswith("test."):
            reason = "it is for librdkafka's own tests"
        if reason is None and (name.endswith("_cb") or name.startswith("plugin.")):
            reason = "it names code"
        if reason is not None:
            raise ConfigError(
                f"The property {name} in the table [kafka] cannot be set: {reason}.",
                cure="Remove it from outbox.toml.",
            )


def is_secret(name: str) -> bool:
    """Whether a property's value must not be shown."""
    return any(word in name for word in _SECRET_WORDS)

"""What all clients of Kafka share: properties, logs, and the wait for an answer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from confluent_kafka import KafkaError

log = logging.getLogger("outbox.kafka")

# How long one question may take before it counts as no answer, seconds.
ANSWER_SECONDS = 10.0


def properties(bootstrap: str, passthrough: Mapping[str, str]) -> dict[str, Any]:
    """The properties of any client: what the user passes through, and where the brokers are."""
    return {
        # A broker that was away is tried again soon; the default backs off to ten seconds.
        "reconnect.backoff.ms": 50,
        "reconnect.backoff.max.ms": 1000,
        "socket.connection.setup.timeout.ms": 5000,
        **passthrough,
        "bootstrap.servers": bootstrap,
        "error_cb": _on_error,
        "logger": log,
        "log.connection.close": False,
    }


def _on_error(error: KafkaError) -> None:
    # What matters comes out of a call too; here it is for whoever looks closer.
    log.debug("%s: %s", error.name(), error.str())

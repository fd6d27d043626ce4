"""What each part says of itself, asked again and again: by a thread each, so that one that hangs holds up no other."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from marketplace.http import get
from marketplace.market import OWNERS, PARTS, Market
from outbox.config import resolve
from outbox.database import connect_as
from outbox.errors import OutboxError
from outbox.status import look

State = Literal["stopped", "silent", "serving"]
"""`silent`: the process is there, and does not answer."""
_PAUSE = 0.5
_PATIENCE = 2.0


@dataclass(frozen=True, slots=True)
class Said:
    """The state of a part, and what it says in words; `facts`: what a service's `/health` has."""

    state: State
    words: str = ""
    facts: Mapping[str, Any] | None = None


class Watch:
    """Asks all parts of a market, from `start` to `stop`."""

    def __init__(self, market: Market) -> None:
        self._market = market
        self._over = threading.Event()
        self._kafka = AdminClient({"bootstrap.servers": market.kafka.bootstrap, "log_level": 0})
        ask: dict[str, Callable[[], Said]] = {"kafka": self._broker}
        for name in OWNERS:
            ask[name] = partial(self._service, name, f"{{{name}}} {name}")
            ask[f"relay-{name}"] = partial(self._relay, name)
        ask["search"] = partial(self._service, "search", "{offers} offers")
        self._said = {name: Said("stopped") for name in PARTS}
        self._threads = [threading.Thread(target=self._watch, args=(name, ask[name]), daemon=True) for name in PARTS]

    def start(self) -> None:
        """Begin to ask."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End."""
        self._over.set()
        for thread in self._threads:
            thread.join()

    def said(self) -> Mapping[str, Said]:
        """What each part said last; whether it runs at all, as of now."""
        running = self._market.running()
        return {name: said if running[name] else Said("stopped") for name, said in self._said.items()}

    def _watch(self, name: str, ask: Callable[[], Said]) -> None:
        while not self._over.is_set():
            self._said[name] = ask()
            self._over.wait(_PAUSE)

    def _service(self, name: str, words: str) -> Said:
        facts = get(f"{self._market.url(name)}/health", seconds=_PATIENCE)
        return Said("silent") if facts is None else Said("serving", words.format(**facts), facts)

    def _broker(self) -> Said:
        try:
            topics = self._kafka.list_topics(timeout=_PATIENCE).topics
        except KafkaException:
            return Said("silent")
        return Said("serving", f"{sum(name.startswith('market.') for name in topics)} topics")

    def _relay(self, owner: str) -> Said:
        """Its backlog is the owner's, and known while the relay is down."""
        try:
            config = resolve({}, self._market.environment(owner), None).config
            with connect_as(config, "marketplace") as connection:
                status = look(config, connection)
        except OutboxError:
            return Said("silent", "its database does not answer")
        if status.kafka is not None:
            return Said("silent", "Kafka does not answer")
        left = sum(one.unpublished or 0 for one in status.types)
        oldest = max((one.oldest_seconds or 0 for one in status.types), default=0)
        words = f"{left} to publish, the oldest {oldest:.0f} s old" if left else "all is published"
        held = all(one.state != "not running" for one in status.shards)
        return Said("serving" if held else "silent", words)

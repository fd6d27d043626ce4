"""What is compared: each contender publishes rows of a table of its own into a topic of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Protocol

import psycopg

from bench.measure import wait_for
from bench.topics import Topics
from bench.workload import Load
from devstack.postgres import Postgres


class Contender(Protocol):
    """One way from a table to a topic. `prepare` once, then `fill`, `begin`, `end` for each round.

    `exactly_once` and `collapses` say what it may be held to. Failures raise `ServerError`.
    """

    name: str
    topic: str
    postgres: Postgres
    exactly_once: bool
    collapses: bool

    def prepare(self) -> None:
        """Make what it needs, and start what stays warm; it publishes nothing yet."""

    def fill(self, load: Load) -> None:
        """Write the rows while nobody publishes them."""

    def begin(self) -> None:
        """Start, or resume, publishing."""

    def end(self) -> None:
        """Stop publishing, in order."""

    def close(self) -> None:
        """End everything of it at once."""

    @property
    def pids(self) -> Mapping[str, int]:
        """Its own processes, as they run now."""

    @property
    def trees(self) -> Mapping[str, int]:
        """The servers that work for it, each with its children."""

    @property
    def url(self) -> str:
        """The database that its rows are in."""

    @property
    def insert(self) -> str:
        """The statement by which a service writes one row, with `%s` for the key and for the state (a text)."""

    @property
    def versions(self) -> Mapping[str, str]:
        """What it is made of, beside the servers."""

    def check_alive(self) -> None:
        """Raise `ServerError`, with the end of its log, when it was begun and has ended by itself."""

    def done(self, load: Load, added: int) -> bool:
        """Whether all of a load may have been published, as `added` offsets of the topic say, or as it says itself."""

    def details(self) -> Mapping[str, float]:
        """Of the last round, what it tells of itself."""


def prepared(makers: Mapping[str, Callable[[], Contender]], chosen: Sequence[str], stack: ExitStack) -> list[Contender]:
    """Those of the makers' contenders that were chosen, in that order, prepared; `stack` closes them."""
    found: list[Contender] = []
    for name in chosen:
        if name in makers:
            one = makers[name]()
            stack.callback(one.close)
            one.prepare()
            found.append(one)
    return found


def wait_alive(topics: Topics, contender: Contender, seconds: float, *, topic: str | None = None) -> None:
    """Wait until a change goes through: then it is started, and its servers know of it.

    `topic`: where its changes go, if that is not what it is measured by.
    """
    topic = topic or contender.topic
    before = sum(topics.ends(topic).values())
    with psycopg.connect(contender.url) as connection:
        connection.execute(contender.insert.encode(), ("k0", '{"version":0,"note":""}'))

    def went_through() -> bool:
        contender.check_alive()
        return sum(topics.ends(topic).values()) > before

    wait_for(went_through, seconds=seconds, what=f"the first record of {contender.name}")

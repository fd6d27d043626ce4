"""The store: where a read model lies. What a store of one's own has to do; `conformance` is its test suite.

Everything that belongs together is one transaction: rows, entry ids, parked messages, and the offsets. The offsets here
are the truth; Kafka's group only says who reads. So that a member that was frozen and wakes up writes nothing, each
partition has an epoch: `claim` raises it, and `advance` goes on only with the one that was claimed.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Collection, Generator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, Protocol

from outbox.errors import StoreError as StoreError  # noqa: PLC0414  a store of one's own raises them
from outbox.errors import StoreUnavailableError as StoreUnavailableError  # noqa: PLC0414  as above
from outbox.kafka.subscription import Place
from outbox.read_model.change import Bad, Change, Raw
from outbox.read_model.declared import Declared, Follow

Build = Literal["live", "new"]
"""What a transaction writes: the tables that are served, or those of a rebuild."""


class BadBuildError(StoreError):
    """A new build would be worse than what is served: it is not put into its place."""


class RefusedError(Exception):
    """The store refuses rows that it was given: a value, a constraint. What was written since the savepoint is gone."""


class LostBuildError(Exception):
    """Another process has begun a build since: this one's is gone, and nothing was written."""


class Claim(NamedTuple):
    """A partition that may be written: from which offset on, and the epoch that allows it."""

    offset: int
    epoch: int


class Parked(NamedTuple):
    """A message that could not be applied, why, and since when."""

    topic: str
    key: str
    entry_id: int
    reason: str
    raw: Raw
    parked_at: dt.datetime


class Facts(NamedTuple):
    """What is known of a model.

    `loaded_at`: when all topics were first read to their ends (None: not yet); `rebuild`: why a rebuild is asked for
    (None: it is not), and `rebuild_for`: the fingerprint of the mapping that is wanted; by topic Kafka's id, when it
    was first claimed, and when it was last read to its end; how many messages are parked.
    """

    fingerprint: str | None
    loaded_at: dt.datetime | None
    rebuild: str | None
    rebuild_for: str | None
    topic_ids: Mapping[str, str]
    began_at: Mapping[str, dt.datetime]
    current_at: Mapping[str, dt.datetime]
    parked: int


class Transaction(Protocol):
    """One transaction of one build. Raises `StoreError` and `StoreUnavailableError`.

    Of what is written for a topic one transaction goes on at a time, from `held` to its end: partitions may have been
    added to the topic, and then states of one key lie in two of them, which two processes read.
    """

    def fingerprint(self) -> str | None:
        """Which mapping made the build that is served; it stays until the transaction ends."""

    def claim(self, place: Place) -> Claim:
        """Become the one that may write a partition; a new one begins at offset 0."""

    def advance(self, place: Place, claim: Claim, offset: int) -> bool:
        """Say that a partition is applied up to an offset; False when somebody else has claimed it since.

        It keeps others from claiming or advancing the partition until the transaction ends.
        """

    def lock(self, place: Place) -> None:
        """Keep others from writing what belongs to a partition until the transaction ends."""

    def held(self, follow: Follow, keys: Sequence[str]) -> Mapping[str, int]:
        """The entry ids of those of the keys of which something is held: a row, or that it was deleted.

        In a transaction that writes they stay what they are until it ends.
        """

    def put(self, follow: Follow, changes: Sequence[Change], held: Mapping[str, int], known: Mapping[str, int]) -> None:
        """Write rows, or let the function write. `held`: the id that each key gets; `known`: what `held()` said.

        Raises `RefusedError`, having written nothing, when one of them is refused; and, of each single change that
        cannot become a row, the error that says so.
        """

    def delete(self, follow: Follow, changes: Sequence[Change], held: Mapping[str, int]) -> None:
        """Take rows away, and remember the ids, so that an older state does not come back.

        Raises `RefusedError`, having written nothing, when one of them is refused.
        """

    def park(self, follow: Follow, bad: Sequence[Bad]) -> None:
        """Keep messages that could not be applied; of each key one, parked since its first."""

    def unpark(self, follow: Follow, applied: Mapping[str, int]) -> None:
        """Forget those of keys of which an entry was applied that is as new, or one of no entry (0)."""

    def parked(
        self,
        topic: str | None = None,
        keys: Sequence[str] | None = None,
        *,
        after: tuple[str, str] | None = None,
        limit: int | None = None,
    ) -> Sequence[Parked]:
        """Those of a topic, or of all; of some keys, or of all; by topic and key.

        A page of them: at most so many, after the topic and the key of the last one that was seen.
        """

    def parked_count(self, topic: str | None = None) -> int:
        """How many, of a topic, or of all."""

    def offsets(self) -> Mapping[Place, int]:
        """Up to which offset each partition is applied."""

    def forget(self, before: dt.datetime) -> int:
        """Forget ids of entities that were deleted before this time; how many."""


class Store(Protocol):
    """Where a read model lies. May be used by several threads, each with transactions of its own."""

    def open(self, declared: Declared) -> None:
        """Connect, and look whether all tables are there; `SchemaError` says what is missing."""

    def close(self) -> None:
        """Give connections back; it can be opened again."""

    def transaction(self, build: Build = "live", *, reads: bool = False) -> AbstractContextManager[Transaction]:
        """A transaction: committed at the end of the block, rolled back when that raises. `reads`: it only reads."""

    def facts(self) -> Facts:
        """What is known of the model; of one that is new, nothing."""

    def know(
        self,
        *,
        fingerprint: str | None = None,
        loaded_at: dt.datetime | None = None,
        topic_ids: Mapping[str, str] = {},
        began_at: Mapping[str, dt.datetime] = {},
        current_at: Mapping[str, dt.datetime] = {},
    ) -> None:
        """Remember what is given; the rest stays, the first `began_at`, and a later `current_at` as well."""

    def ask_rebuild(self, why: str | None) -> None:
        """Ask for a rebuild by the mapping that it is open for, or (None) for none."""

    def builder(self) -> AbstractContextManager[bool]:
        """The right to rebuild, until the block ends; False when another process has it."""

    def begin_build(self) -> str:
        """Make empty copies of the tables, and no books of an earlier one: what `transaction("new")` writes.

        Gives the build's token. Whoever began one before has lost it: what he does with it raises `LostBuildError`.
        """

    def swap(
        self,
        fingerprint: str,
        *,
        anew: Collection[str] = (),
        topic_ids: Mapping[str, str] = {},
        current_at: Mapping[str, dt.datetime] = {},
        may_empty: bool = False,
    ) -> Sequence[Place]:
        """Put the new build into the place of the live one, in one transaction: rows, ids, parked messages, offsets.

        Only if the new build is as far as the live one in all that is followed, but for topics that were made `anew`;
        otherwise nothing is done, and the places where it is behind are returned. What is known of the model becomes
        what is given; topics that are not followed are forgotten. Who had claimed partitions of the live one must claim
        them anew. Raises `BadBuildError` when a table would become empty - of which messages are parked, or, unless it
        `may_empty`, in any case - and `LostBuildError`.
        """

    def end_build(self) -> None:
        """Remove the copies, and the books of the new build, if it is this store's own."""

    def rows(self, follow: Follow) -> Generator[tuple[str, Mapping[str, object]]]:
        """The rows of a copy or of columns, each with its entity's key: for `reconcile`."""

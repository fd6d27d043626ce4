"""The hold of a shard, against every other relay: taken over, looked after, given up.

Kafka fences all producers of a shard's transactional id but the newest; the token in the committed position tells whose
it is. What is held in memory - the position, the dead letters - is good only as long as nobody else has committed.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from outbox import position as positions
from outbox.entity_type import EntityType
from outbox.errors import DatabaseUnavailableError, FencedError, WrongClusterError, WrongOutboxError
from outbox.kafka.faults import Aborted, Fault, Fenced
from outbox.lineage import Head, Verdict, judge
from outbox.ports import Database, Identity, Log, OpenLog
from outbox.position import Position
from outbox.request import Entity
from outbox.telemetry import emit

log = logging.getLogger("outbox.relay")

_GRACE_LOOK_SECONDS = 0.1


class Hold:
    """The hold of one shard.

    While it is held, `kafka` is its log, `position` the committed position, `dead` its dead letters: by entity, the
    entry's id. `token` names this holder, anew for each start. `inherited`: whether the cut that is being read was
    begun by a former holder. `has_held`: whether this process has held it, now or before. `grace` is how long, in
    seconds, a successor is given to write its token; `stop` is asked within long waits whether to give up.
    """

    def __init__(
        self,
        number: int,
        database: Database,
        open_log: OpenLog,
        *,
        token: str,
        grace: float,
        stop: Callable[[], bool],
    ) -> None:
        self._number = number
        self._database = database
        self._open_log = open_log
        self._grace = grace
        self._stop = stop
        self._heeded: str | None = None
        self.token = token
        self.kafka: Log | None = None
        self.position: Position | None = None
        self.dead: Mapping[Entity, int] = {}
        self.inherited = False
        self.has_held = False

    # -- taken -------------------------------------------------------------------------------------------------

    def take(self, identity: Identity | None, *, check: Callable[[Log, Mapping[str, EntityType]], None]) -> int | None:
        """Take the shard over: fence any other holder, read its position, write it with the own token.

        `check` refuses topics that must not be published to, before anybody is fenced. Returns the version of the
        entity types that it was given, or None when Kafka did not let the taking through.
        """
        if identity is None:
            raise DatabaseUnavailableError("There is no connection to the database.")
        self.give_up()
        number = self._number
        kafka = self._open_log(identity.name, number, stop=self._stop)
        former: str | None = None
        try:
            # The types may change from here on: what is known of their topics is of this version.
            looked_at, types = self._database.look(self._start(identity))
            check(kafka, types)
            # Before anybody is fenced: a relay of the wrong database must not disturb the right one, and one that comes
            # back from an outage must not take the shard from its successor.
            before, _ = self._look_from(kafka, identity)
            if before is not None and self.has_held and before.token != self.token:
                raise self._superseded()
            former = before.token if before is not None else None
            kafka.take()
            # Kafka has ended by now what a former holder left open, and nobody else writes there.
            unmarked = kafka.unmarked()
            found, head = self._look_from(kafka, identity)
            if found is None:
                position = self._start(identity, head)
                emit(log, "relay.new_log", shard=number, removed_id=head.removed_id)
            else:
                former = found.token
                position = replace(found, token=self.token)
            dead = {(letter.type, letter.key): letter.id for letter in kafka.read_dead_letters()}
            kafka.begin()
            kafka.send_position(position.encode())
            kafka.commit()
        except Fault as fault:
            self.lost(kafka, fault, former=former)
            return None
        except BaseException:
            kafka.discard()
            raise
        self.kafka, self.position, self.dead = kafka, position, dead
        self.inherited = position.cut is not None
        self.has_held = True
        if unmarked:
            emit(log, "relay.torn", shard=number, unmarked=unmarked)
        emit(log, "relay.holds", shard=number, outbox=identity.name, token=self.token, epoch=position.epoch)
        self._database.announce(self.token)
        return looked_at.types_version

    def _start(self, identity: Identity, head: Head | None = None) -> Position:
        """The position of a log that was never published; without a head only good for looking."""
        if head is None:
            return positions.start(identity.name, self._number, self.token, 0, None, 0, 0)
        return positions.start(
            identity.name, self._number, self.token, head.epoch, identity.system, head.timeline, head.removed_id
        )

    def _look_from(self, kafka: Log, identity: Identity) -> tuple[Position | None, Head]:
        """The committed position, if there is one, and the database as it is after that was read.

        In this order: what pruning has removed before the position was lost must be known to whoever starts without.
        """
        value = kafka.read_position()
        found = Position.decode(value) if value is not None else None
        if found is not None and (found.outbox != identity.name or found.shard != self._number):
            raise WrongOutboxError(
                f'The positions topic of "{identity.name}" holds a record of "{found.outbox}", shard {found.shard}, '
                f"where shard {self._number} was expected.",
                cure="Somebody else wrote to this topic; see docs/guarantees.md.",
            )
        head = self._database.look(found or self._start(identity))[0]
        if found is not None and judge(found, head) is Verdict.OTHER_CLUSTER:
            raise WrongClusterError(
                f"The database is another cluster (system identifier {identity.system}) than the one that "
                f'"{identity.name}" was published from ({found.system}): a copy, or a wrong database URL.',
                cure="Correct OUTBOX_DATABASE_URL; or, if this copy is to take over for good: outbox adopt.",
            )
        return found, head

    # -- looked after ------------------------------------------------------------------------------------------

    def heed(self) -> None:
        """Stop for a relay that said it took the shard, if it did; Kafka tells an idle holder only later."""
        said = self._database.announced
        if self.kafka is None or said in {None, self.token, self._heeded}:
            return
        self._heeded = said
        self._must_be_mine(self.kafka)

    def renew(self) -> None:
        """Take a fresh producer in the middle of a step.

        It fences whoever has taken the shard since: then the position bears another token, and to go on from what is
        in memory would publish again what the successor has published.
        """
        if self.kafka is not None:
            self.kafka.renew()
            self._must_be_mine(self.kafka)

    def _must_be_mine(self, kafka: Log) -> None:
        if _holder(kafka) not in {None, self.token}:
            raise self._superseded()

    def settle(self) -> None:
        """Wait until consumers see what was committed.

        Kafka acknowledges a commit before it has marked it in the partitions; a fresh producer of the same id is
        given only afterwards. Whoever drains and then reads finds everything.
        """
        if self.kafka is not None:
            # Somebody else who takes it at the same moment waits for the same.
            with contextlib.suppress(Fault):
                self.kafka.renew()

    def committed_positions(self) -> list[Position]:
        """The committed positions of all shards that have one; none while this one is not held."""
        if self.kafka is None:
            return []
        return [Position.decode(value) for value in self.kafka.read_all_positions() if value is not None]

    # -- given up ----------------------------------------------------------------------------------------------

    def give_up(self, *, unless_idle: bool = False) -> bool:
        """Throw the producer and the position away; whoever takes the shard next reads it again.

        `unless_idle`: not while no transaction is open. Whether it was given up.
        """
        if unless_idle and (self.kafka is None or not self.kafka.in_transaction):
            return False
        kafka, self.kafka, self.position = self.kafka, None, None
        if kafka is not None:
            kafka.discard()
        return True

    def lost(self, kafka: Log, fault: Fault, *, former: str | None = None) -> None:
        """A transaction that failed, or may have: the hold is given up; another holder's token says that it is lost.

        `former`: whose token was there before the own was written, while it may not have been.
        """
        aborted = isinstance(fault, Aborted)
        if aborted:
            emit(log, "relay.aborted", shard=self._number, reason=str(fault))
        else:
            emit(log, "relay.hold_in_doubt", shard=self._number, reason=str(fault))
        self.give_up()
        kafka.discard()
        if self._stop():
            return
        # Fenced, and the own token still there: a stall, or a successor that has not written its own yet. Taking the
        # shard back at once would fence it in its turn. A broker may also call it an error of its own, when a successor
        # comes in the middle of a commit.
        graced = isinstance(fault, Fenced | Aborted) and former is None
        deadline = time.monotonic() + (self._grace if graced else 0.0)
        while True:
            if _holder(kafka) not in {None, self.token, former}:
                raise self._superseded()
            if time.monotonic() >= deadline or self._stop():
                return
            time.sleep(_GRACE_LOOK_SECONDS)

    def _superseded(self) -> FencedError:
        return FencedError(
            f"Another relay took over shard {self._number} of this outbox; this one stops, having lost nothing.",
            cure="Run one relay a shard. If this one is to publish, stop the other and start it again.",
        )

    def close(self) -> None:
        """Abort what is open and close."""
        kafka, self.kafka, self.position = self.kafka, None, None
        if kafka is not None:
            kafka.close()


def _holder(kafka: Log) -> str | None:
    """Whose token the committed position bears; None when there is none."""
    value = kafka.read_position()
    return Position.decode(value).token if value is not None else None

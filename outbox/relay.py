"""The relay: a loop around `Shard.step()` that waits, sleeps, and says what it waits for."""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Literal

from outbox.adoption import adopt_log
from outbox.config import Config
from outbox.errors import (
    BrokerError,
    BrokerUnavailableError,
    DatabaseError,
    DatabaseUnavailableError,
    NotCaughtUpError,
    OutboxError,
    TopicError,
    UnsuitableServerError,
)
from outbox.kafka.shard_log import ShardLog
from outbox.pruning import prune_ring
from outbox.reader import Reader
from outbox.shard import Did, Shard, Step
from outbox.telemetry import emit
from outbox.wake import Wake

log = logging.getLogger("outbox.relay")

_FIRST_PAUSE = 0.05
# How much more seldom looks in vain come, at the most, while a writer holds the doorbell.
_MOST_TIMES = 10


class Relay:
    """Publishes one shard of one outbox until `wake` is set.

    `done` sums up what this process has published. `reader` and `shard_log` make its two edges.
    """

    def __init__(
        self,
        config: Config,
        *,
        wake: Wake | None = None,
        reader: type[Reader] = Reader,
        shard_log: type[ShardLog] = ShardLog,
    ) -> None:
        self._config = config
        self._wake = wake or Wake()
        self._reader = reader(config, shard=config.shard, stop=self._stopping)
        self._shard = Shard(
            config,
            self._reader,
            partial(shard_log, config),
            partial(adopt_log, config, stop=self._stopping),
            stop=self._stopping,
        )
        self._waiting_for: tuple[str, str] | None = None
        self._tries = 0
        # How many busy_poll_intervals the next look in vain waits for.
        self._times = 1
        self._next_prune = 0.0
        self._deadline: float | None = None
        self.done = Step(Did.NOTHING)

    def run(self, *, until_caught_up: bool = False, timeout: float | None = None) -> Step:
        """Step until stopped, or until all that was committed at the start is published; the last step.

        Returns having left nothing half-done. Servers that are away are waited for. Raises the errors of
        `outbox.errors` that a person must act upon, and `NotCaughtUpError` when it takes longer than `timeout` seconds.
        """
        last = Step(Did.NOTHING)
        self._deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while not self._wake.is_set:
                try:
                    last = self._shard.step()
                    self._count(last)
                    if last.did is not Did.TOOK_OVER:
                        # Taking over proves little: what it waits for may be met only by the next batch.
                        self._went_on()
                    if self._config.prune and not last.more:
                        self._prune_sometimes()
                    if until_caught_up:
                        if last.caught_up:
                            if self.done.entries or self.done.records:
                                self._shard.settle()
                            break
                    elif not last.more:
                        self._sleep(published=last.did is Did.PUBLISHED, at_most=last.again)
                    self._check_time(f"{self.done.entries} entries were published")
                except (DatabaseUnavailableError, BrokerUnavailableError) as error:
                    self._wait_for(error, "waiting")
                except (TopicError, BrokerError, DatabaseError, UnsuitableServerError) as error:
                    # At the start a person is there to read it. Later the relay goes on by itself once it is mended.
                    if until_caught_up or not self._shard.has_held:
                        raise
                    self._wait_for(error, "stuck")
            if until_caught_up and not last.caught_up:
                raise NotCaughtUpError(
                    f"The relay was stopped before it had caught up; {self.done.entries} entries were published.",
                    cure="Nothing is lost: the next run goes on from there. See outbox status.",
                )
        finally:
            self._shard.close()
            self._reader.close()
        return last

    def _stopping(self) -> bool:
        return self._wake.is_set

    def _count(self, step: Step) -> None:
        self.done = replace(
            step,
            entries=self.done.entries + step.entries,
            records=self.done.records + step.records,
            dead=self.done.dead + step.dead,
        )

    def _check_time(self, what: str) -> None:
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise NotCaughtUpError(
                f"The time is over and the relay has not caught up: {what}.",
                cure="Nothing is lost: the next run goes on from there. See outbox status.",
            )

    # -- servers that are away ---------------------------------------------------------------------------------

    def _wait_for(self, error: OutboxError, how: Literal["waiting", "stuck"]) -> None:
        """Give up what hangs on what is away; say so once; pause, longer each time."""
        database = isinstance(error, DatabaseUnavailableError | DatabaseError | UnsuitableServerError)
        self._shard.forget(database=database, keep=isinstance(error, TopicError))
        if self._wake.is_set:
            return
        self._check_time(error.message.rstrip("."))
        what = "database" if database else "topic" if isinstance(error, TopicError) else "kafka"
        # A server that is back, and now denies what it allowed, is news.
        if self._waiting_for != (how, what):
            shard = self._config.shard
            if how == "waiting":
                emit(log, "relay.waiting", shard=shard, what=what, error=error.message, cure=error.cure)
            else:
                emit(log, "relay.stuck", shard=shard, what=what, error=error.message, cure=error.cure)
            self._waiting_for = (how, what)
        if how == "stuck" and database:
            # The server answers, as a rule: a session of the relay's is how outbox status knows that it runs.
            with suppress(OutboxError):
                self._shard.connect()
        self._show(f"{how}:{what}")
        self._wake.wait(min(self._config.backoff_max, _FIRST_PAUSE * 2 ** min(self._tries, 20)))
        self._tries += 1

    def _went_on(self) -> None:
        if self._waiting_for is not None:
            emit(log, "relay.resumed", shard=self._config.shard, what=self._waiting_for[1])
            self._waiting_for = None
        self._tries = 0

    def _show(self, state: str) -> None:
        try:
            self._reader.show(state)
        except OutboxError:
            self._reader.close()

    # -- when there is nothing to do ---------------------------------------------------------------------------

    def _sleep(self, *, published: bool, at_most: float | None) -> None:
        """Wait until there may be something to read, `at_most` so many seconds; `published`: the step has committed.

        Falling asleep: LISTEN (since the connection was made), *try* the doorbell, look once more in a new statement,
        sleep. A writer that began before the bell was held is seen by that look or rings afterwards.
        """
        reader, identity = self._reader, self._reader.identity
        poll_interval = self._config.poll_interval if at_most is None else min(at_most, self._config.poll_interval)
        if published:
            # Kafka answers a commit before it has marked it in the partitions. A transaction that begins before that is
            # told to come again, which takes the client four times as long; and what comes meanwhile goes with it.
            self._times = 1
            self._wake.wait(self._config.busy_poll_interval)
        if not reader.try_bell():
            # A writer holds it for as long as its transaction is open: waiting for it would delay the others.
            reader.show("idle")
            polls_often = identity is not None and identity.doorbell
            if not polls_often:
                self._wake.wait(poll_interval)
            elif not published:
                self._wake.wait(self._config.busy_poll_interval * self._times)
                self._times = min(2 * self._times, _MOST_TIMES)
            reader.hear()
            return
        found = False
        try:
            found = self._shard.look_again()
            if not found:
                reader.show("idle")
                reader.wait_rung(poll_interval, self._wake)
        finally:
            # What was found now is published without another read.
            reader.release_bell(now=found)

    def _prune_sometimes(self) -> None:
        """Prune, if it is time; by the committed positions of all shards, like the command."""
        if time.monotonic() < self._next_prune or not self._shard.holds:
            return
        self._next_prune = time.monotonic() + self._config.prune_interval
        for pruned in prune_ring(self._config, self._shard.committed_positions(), stop=self._stopping):
            if pruned.pruned:
                emit(log, "relay.pruned", shard=self._config.shard, slot=pruned.slot, entries=pruned.entries)

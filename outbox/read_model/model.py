"""A read model, as a service declares and runs it: as its own process, as a thread, or from asyncio."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from outbox.errors import (
    ConfigError,
    NeedsRebuildError,
    NotCaughtUpError,
    OutboxError,
    ParkedError,
    StoreUnavailableError,
)
from outbox.read_model.applier import Applied, Applier
from outbox.read_model.applier import parked as all_parked
from outbox.read_model.consumer import Consumer, OnChange, Settings, is_passing
from outbox.read_model.declared import Declared, Follow
from outbox.read_model.rebuild import Progress, Rebuild
from outbox.read_model.store import Parked, Store, Transaction
from outbox.telemetry import emit
from outbox.wake import Wake

log = logging.getLogger("outbox.read_model")
T = TypeVar("T")

_FETCH_SECONDS = 0.5
_BACKOFF_LEAST, _BACKOFF_MOST = 0.1, 10.0
_REBUILD_AGAIN = 60.0
_LOOK_SECONDS = 0.02
# So long `running()` waits at the most for a store that does not say whether it is there.
_OPEN_SECONDS = 5.0


@dataclass(frozen=True)
class Status:
    """How a read model is.

    `staleness`: how many seconds ago all its topics were known to be read to their ends (None: never). `same_mapping`:
    its rows were made by this mapping; `own_rebuild`: a rebuild that is asked for is by this mapping.
    """

    model: str
    loaded_at: dt.datetime | None
    staleness: float | None
    rebuild: str | None
    parked: int
    offsets: Mapping[str, int]
    same_mapping: bool
    own_rebuild: bool


class ReadModel:
    """A local, read-only copy of other services' entities, made of their topics alone.

    `name`: the model's, and the consumer group's. `store`: where it lies (`PostgresStore`, `SqliteStore`). `follows`:
    the topics, and what becomes of their messages. `bootstrap`: Kafka's first brokers; `kafka`: properties passed
    through to librdkafka. The others are those of `outbox.read_model.Settings`.
    """

    def __init__(
        self,
        name: str,
        store: Store,
        follows: Sequence[Follow],
        *,
        bootstrap: str,
        kafka: Mapping[str, str] | None = None,
        instance: str | None = None,
        batch: int = 10_000,
        on_mapping_change: OnChange = "rebuild",
        on_outrun: OnChange = "rebuild",
        check_seconds: float = 1.0,
        forget_deleted: float = 14 * 86_400,
    ) -> None:
        self.declared = Declared(name, follows)
        self.store = store
        self.settings = Settings(
            bootstrap,
            dict(kafka or {}),
            instance,
            batch,
            on_mapping_change,
            on_outrun,
            check_seconds,
            forget_deleted,
        )

    # -- running -----------------------------------------------------------------------------------------------

    def run(self, wake: Wake, *, running: Running | None = None, until_ready: bool = False) -> bool:
        """Keep it up to date until `wake` is set; or `until_ready`, until it is, and no rebuild is asked for any more.

        Whether it got there: False when `wake` ended it.
        Raises errors that trying again does not mend.
        """
        consumer = Consumer(
            self.declared, self.store, self.settings, applied=running.applied if running else lambda _: None
        )
        patience = _Patience(self.declared.name, wake)
        rebuilder: _Rebuilder | None = None
        there = False
        try:
            if self._open(consumer, wake, patience, running):
                emit(log, "read_model.started", model=self.declared.name, topics=", ".join(self.declared.by_topic))
            looks = consumer.looks
            while not wake.is_set:
                went = patience.does(lambda: consumer.step(_FETCH_SECONDS))
                if running is not None:
                    running.notify()
                if not went:
                    continue
                if consumer.looks != looks:
                    looks = consumer.looks
                    patience.rests()
                if rebuilder is not None:
                    if rebuilder.over():
                        # What was asked for may be done.
                        rebuilder = None
                        consumer.look_soon()
                elif consumer.rebuild is not None:
                    rebuilder = _Rebuilder(self, wake, consumer.rebuild, again=not until_ready)
                elif until_ready and consumer.currency.ready:
                    consumer.check_useful()
                    there = True
                    break
        finally:
            if rebuilder is not None:
                wake.set()
                rebuilder.join()
            consumer.close()
            emit(log, "read_model.stopped", model=self.declared.name)
        return there

    @staticmethod
    def _open(consumer: Consumer, wake: Wake, patience: _Patience, running: Running | None) -> bool:
        """Open the store, however long it is away; False when `wake` is set before."""
        while not wake.is_set:
            opened = patience.does(consumer.open)
            if running is not None:
                running.watches(consumer if opened else None)
            if opened:
                return True
        return False

    @contextmanager
    def running(self) -> Iterator[Running]:
        """Run it in a thread while the block goes on."""
        running = Running(self)
        running.start()
        try:
            yield running
        finally:
            running.stop()

    @asynccontextmanager
    async def running_async(self) -> AsyncIterator[AsyncRunning]:
        """The same for asyncio: it runs in a thread, and what waits does not hold the loop up."""
        running = Running(self)
        await asyncio.to_thread(running.start)
        try:
            yield AsyncRunning(running)
        finally:
            await asyncio.to_thread(running.stop)

    # -- by hand -----------------------------------------------------------------------------------------------

    def status(self) -> Status:
        """How it is, by its store alone."""
        self.store.open(self.declared)
        facts = self.store.facts()
        with self.store.transaction(reads=True) as transaction:
            offsets = transaction.offsets()
        now = dt.datetime.now(dt.UTC)
        ages = [(now - facts.current_at[t]).total_seconds() for t in self.declared.by_topic if t in facts.current_at]
        whole = len(ages) == len(self.declared.by_topic)
        return Status(
            self.declared.name,
            facts.loaded_at,
            max(0.0, *ages) if whole else None,
            facts.rebuild,
            facts.parked,
            {f"{place.topic} {place.partition}": offset for place, offset in sorted(offsets.items())},
            facts.fingerprint in {None, self.declared.fingerprint},
            facts.rebuild_for in {None, self.declared.fingerprint},
        )

    def rebuild(self, *, told: Progress = lambda _done, _of: None, wake: Wake | None = None) -> bool:
        """Rebuild it here and now; False when another process does so already."""
        self.store.open(self.declared)
        own = wake or Wake()
        try:
            rebuild = Rebuild(self.declared, self.store, self.settings, may_empty=True, told=told)
            return rebuild.run(own, why="asked for by a person")
        finally:
            if wake is None:
                own.close()

    def parked(self, topic: str | None = None, keys: Sequence[str] | None = None) -> Iterator[Parked]:
        """The messages that could not be applied (of a topic, of some keys), by topic and key.

        `ConfigError` for a topic that is not followed.
        """
        self._opened(topic)
        return all_parked(self.store, topic=topic, keys=keys)

    def retry(self, topic: str | None = None, keys: Sequence[str] | None = None) -> Applied:
        """Apply what is parked once more.

        `NeedsRebuildError` when the rows that there are were made by another mapping: a rebuild tries all of it again.
        """
        self._opened(topic)
        if self.store.facts().fingerprint not in {None, self.declared.fingerprint}:
            raise NeedsRebuildError(
                f"The rows of the read model {self.declared.name} were made by another mapping than this one.",
                cure="Make them anew, which tries what is parked again: "
                "outbox read-model rebuild --app MODULE:ATTRIBUTE.",
            )
        return Applier(self.declared, self.store).retry(topic, keys)

    def _opened(self, topic: str | None) -> None:
        if topic is not None and topic not in self.declared.by_topic:
            raise ConfigError(
                f"The read model {self.declared.name} does not follow the topic {topic}.",
                cure=f"It follows {', '.join(self.declared.by_topic)}.",
            )
        self.store.open(self.declared)


class _Patience:
    """Waits, longer each time, while a server is away; says so once, until both have answered again."""

    def __init__(self, model: str, wake: Wake) -> None:
        self._model = model
        self._wake = wake
        self._said: set[str] = set()
        self._pause = _BACKOFF_LEAST

    def does(self, what: Callable[[], object]) -> bool:
        """Do it; whether a server was not away. Raises errors that stay."""
        try:
            what()
        except OutboxError as error:
            if not is_passing(error):
                raise
            if error.message not in self._said:
                self._said.add(error.message)
                emit(log, "read_model.waiting", model=self._model, error=error.message, cure=error.cure)
            self._wake.wait(self._pause)
            self._pause = min(_BACKOFF_MOST, self._pause * 2)
            return False
        return True

    def rests(self) -> None:
        """Both servers answer."""
        if self._said:
            emit(log, "read_model.resumed", model=self._model)
            self._said.clear()
            self._pause = _BACKOFF_LEAST


class _Rebuilder(threading.Thread):
    """A rebuild beside the consumer."""

    def __init__(self, model: ReadModel, wake: Wake, why: str, *, again: bool) -> None:
        """`again`: one that fails is tried again; otherwise it ends the consumer, too."""
        super().__init__(name=f"outbox-rebuild-{model.declared.name}", daemon=True)
        self._model = model
        self._wake = wake
        self._why = why
        self._again = again
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        model, began = self._model, time.monotonic()
        try:
            facts = model.store.facts()
            if facts.rebuild is None or facts.rebuild_for not in {None, model.declared.fingerprint}:
                return  # another process has done it, or another version asks for its own
            if not Rebuild(model.declared, model.store, model.settings).run(self._wake, why=self._why):
                # Another process does it: looked at again when that is over.
                self._wake.wait(_BACKOFF_MOST / 2)
        except OutboxError as error:
            if not self._again:
                self._error = error
                return
            # The copy that there is goes on being kept. What reads all there is is not done all the time.
            emit(log, "read_model.rebuild_failed", model=model.declared.name, error=error.message, cure=error.cure)
            self._wake.wait(max(_REBUILD_AGAIN, 10 * (time.monotonic() - began)))
        except BaseException as error:  # noqa: BLE001  raised where the consumer runs
            self._error = error

    def over(self) -> bool:
        """Whether it has ended; raises what ended it."""
        if self.is_alive():
            return False
        if self._error is not None:
            raise self._error
        return True


class Running:
    """A read model that runs in a thread of this process. Its methods may be called from any thread."""

    def __init__(self, model: ReadModel) -> None:
        self._model = model
        self._wake = Wake()
        self._changed = threading.Condition()
        self._begun = threading.Event()
        self._consumer: Consumer | None = None
        self._error: BaseException | None = None
        self._counts = Applied()
        self._thread = threading.Thread(target=self._run, name=f"outbox-{model.declared.name}", daemon=True)

    def start(self) -> None:
        """Begin, and wait until the store is open, or was found to be away: what it holds is known then."""
        self._thread.start()
        self._begun.wait(_OPEN_SECONDS)

    def stop(self) -> None:
        """End after the batch at hand. Raises what ended it before."""
        self._wake.set()
        self._thread.join()
        self._wake.close()
        self._model.store.close()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._model.run(self._wake, running=self)
        except BaseException as error:
            self._error = error
            log.exception("the read model %s ended", self._model.declared.name)
        finally:
            self._begun.set()
            self.notify()

    # -- told by the consumer ----------------------------------------------------------------------------------

    def watches(self, consumer: Consumer | None) -> None:
        """Whose state it shows; None: of one whose store cannot be opened now."""
        self._consumer = consumer
        self._begun.set()

    def applied(self, applied: Applied) -> None:
        """Count a transaction."""
        self._counts.records += applied.records
        self._counts.changes += applied.changes
        self._counts.deleted += applied.deleted
        self._counts.parked += applied.parked

    def notify(self) -> None:
        """Something may have changed."""
        with self._changed:
            self._changed.notify_all()

    # -- for the service ---------------------------------------------------------------------------------------

    @property
    def counts(self) -> Applied:
        """What this process has applied."""
        return self._counts

    @property
    def ready(self) -> bool:
        """Whether it has caught up with the ends that the topics had when it started, and goes on."""
        return self._consumer is not None and self._consumer.currency.ready and not self._ended

    @property
    def loaded(self) -> bool:
        """Whether the copy has ever been whole: it may be served, however old it is. Known without Kafka."""
        return self._consumer is not None and self._consumer.currency.loaded_at is not None

    def staleness(self) -> float | None:
        """How many seconds ago all topics were known to be read to their ends; None: never yet.

        It grows while Kafka does not answer, and while there is more to read than is applied; a silent topic makes no
        copy old. Whether the owner's relay publishes is its owner's to watch: outbox status.
        """
        return self._consumer.currency.staleness(dt.datetime.now(dt.UTC)) if self._consumer is not None else None

    def wait_ready(self, timeout: float | None = None, *, told: Callable[[int], None] = lambda _left: None) -> None:
        """Wait until it is ready; `told` how many offsets are left. `NotCaughtUpError` when the time is over."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self.ready:
            self._wait(deadline, "is not ready")
            if self._consumer is not None and self._consumer.currency.goal:
                offsets = self._ask(lambda transaction: transaction.offsets())
                if offsets is not None:
                    told(self._consumer.currency.left(offsets))

    def wait_for(self, type: str, key: str, entry_id: int, timeout: float | None = None) -> None:
        """Wait until the copy is as new as an entry: read your own writes. `NotCaughtUpError` when the time is over.

        `entry_id` is what `outbox.put` returned; a later state of the key will do. `ParkedError` when that entry, or a
        later one, could not be applied.
        """
        if not isinstance(entry_id, int):
            raise ConfigError(f"{entry_id!r} is no entry's id.", cure="Give the number that outbox.put returned.")
        follow = self._model.declared.follow(type)
        deadline = None if timeout is None else time.monotonic() + timeout

        def is_there(transaction: Transaction) -> bool:
            if transaction.held(follow, [key]).get(key, 0) >= entry_id:
                return True
            for one in transaction.parked(follow.topic, [key]):
                if one.entry_id >= entry_id:
                    raise ParkedError(
                        f'Entry {one.entry_id} of {type} "{key}" was parked by the read model '
                        f"{self._model.declared.name}: {one.reason}.",
                        cure="Mend the mapping, then: outbox read-model parked --retry --app MODULE:ATTRIBUTE.",
                    )
            return False

        while not self._ask(is_there):
            self._wait(deadline, f'has not applied entry {entry_id} of {type} "{key}"')

    def _ask(self, what: Callable[[Transaction], T]) -> T | None:
        """Ask the store; None while it is not open yet, not any more, or away."""
        if self._consumer is None:
            return None
        try:
            with self._model.store.transaction(reads=True) as transaction:
                return what(transaction)
        except (StoreUnavailableError, ConfigError):
            return None

    @property
    def _ended(self) -> bool:
        return self._wake.is_set or not self._thread.is_alive()

    def _wait(self, deadline: float | None, what: str) -> None:
        if self._error is not None:
            raise self._error
        late = deadline is not None and time.monotonic() >= deadline
        if late or self._ended:
            raise NotCaughtUpError(
                f"The read model {self._model.declared.name} {what}{'' if late else ', and was stopped'}.",
                cure="See: outbox read-model status --app MODULE:ATTRIBUTE; and the owner's outbox status.",
            )
        with self._changed:
            # Another process may apply the partition: that is looked for.
            self._changed.wait(_LOOK_SECONDS if deadline is None else min(_LOOK_SECONDS, deadline - time.monotonic()))


class AsyncRunning:
    """`Running`, for asyncio."""

    def __init__(self, running: Running) -> None:
        self._running = running

    @property
    def ready(self) -> bool:
        """See `Running.ready`."""
        return self._running.ready

    @property
    def loaded(self) -> bool:
        """See `Running.loaded`."""
        return self._running.loaded

    def staleness(self) -> float | None:
        """See `Running.staleness`."""
        return self._running.staleness()

    async def wait_ready(
        self,
        timeout: float | None = None,  # noqa: ASYNC109  as the other has it
        *,
        told: Callable[[int], None] = lambda _left: None,
    ) -> None:
        """See `Running.wait_ready`; `told` is called in another thread."""
        await asyncio.to_thread(self._running.wait_ready, timeout, told=told)

    async def wait_for(
        self,
        type: str,
        key: str,
        entry_id: int,
        timeout: float | None = None,  # noqa: ASYNC109  as the other has it
    ) -> None:
        """See `Running.wait_for`."""
        await asyncio.to_thread(self._running.wait_for, type, key, entry_id, timeout)

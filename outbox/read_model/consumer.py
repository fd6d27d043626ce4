"""The consumer: one `step()` fetches and applies; the loop around it only waits, and says what it waits for."""

from __future__ import annotations

import datetime as dt
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Literal, get_args

from outbox.errors import BrokerError, BrokerUnavailableError, ConfigError, NeedsRebuildError, OutboxError, TopicError
from outbox.kafka.admin import Admin
from outbox.kafka.subscription import Bounds, Place, Subscription, check_passthrough
from outbox.read_model.applier import Applied, Applier, GapError, LostPlacesError
from outbox.read_model.currency import Currency
from outbox.read_model.declared import Declared, Follow, Function
from outbox.read_model.store import BadBuildError, Claim, Facts, Store
from outbox.telemetry import emit

log = logging.getLogger("outbox.read_model")

OnChange = Literal["rebuild", "refuse"]
"""What becomes of a copy that is not what it should be: it is made anew beside itself, or a person has to say so."""

_CHECK_SECONDS = 1.0
_PLACES_SECONDS = 10.0
_KNOW_SECONDS = 5.0
# A topic that was not read to its end for so long is late.
_LATE_SECONDS = 30.0
_REPORT_SECONDS = 5.0
_FORGET_SECONDS = 3600.0
_FORGET_MOST = 100 * 365 * 86_400.0
_DAY_MS = 86_400_000
# Of a batch so many parked messages are said one by one.
_SAID = 5


@dataclass(frozen=True)
class Settings:
    """How a read model is kept.

    `kafka`: properties passed through to librdkafka; `instance`: this member's name, the same at each start. `batch`:
    most messages in one transaction. `on_mapping_change`, `on_outrun`: what to do when the mapping is another one, and
    when a topic was made anew or has forgotten what was not read yet. `check_seconds`: how often Kafka and the store
    are asked how far all is; `forget_deleted`: how many seconds the id of a deleted entity is remembered.
    """

    bootstrap: str
    kafka: Mapping[str, str] = field(default_factory=dict)
    instance: str | None = None
    batch: int = 10_000
    on_mapping_change: OnChange = "rebuild"
    on_outrun: OnChange = "rebuild"
    check_seconds: float = _CHECK_SECONDS
    forget_deleted: float = 14 * 86_400

    def __post_init__(self) -> None:
        check_passthrough(self.kafka)
        allowed = get_args(OnChange)
        for name, good, cure in (
            ("bootstrap", bool(self.bootstrap), 'Name a broker: "localhost:9092".'),
            ("instance", self.instance != "", "Name this process, differently from the others, or leave it out."),
            ("batch", self.batch >= 1, "Let it be 1 or more."),
            ("on_mapping_change", self.on_mapping_change in allowed, f"It is one of {', '.join(allowed)}."),
            ("on_outrun", self.on_outrun in allowed, f"It is one of {', '.join(allowed)}."),
            ("check_seconds", self.check_seconds > 0, "Let it be more than 0."),
            ("forget_deleted", 0 < self.forget_deleted <= _FORGET_MOST, "Let it be more than 0; days are usual."),
        ):
            if not good:
                raise ConfigError(f"{name} of a read model cannot be {getattr(self, name)!r}.", cure=cure)


class Consumer:
    """Keeps one build up to date; `applied` is called after each transaction."""

    def __init__(
        self,
        declared: Declared,
        store: Store,
        settings: Settings,
        *,
        applied: Callable[[Applied], None] = lambda _: None,
        clock: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
    ) -> None:
        self._declared = declared
        self._store = store
        self._settings = settings
        self._told = applied
        self._clock = clock
        self._applier = Applier(declared, store)
        self._subscription: Subscription | None = None
        self._claims: dict[Place, Claim] = {}
        self._places: Sequence[Place] = ()
        self._wanted: Sequence[Place] | None = None
        # What the group has given, and of that what Kafka does not know yet: partitions that were just added.
        self._given: Sequence[Place] = ()
        self._unknown: Sequence[Place] = ()
        self._rewind = False
        # Topics that cannot be gone on with, and those that there are not.
        self._left_out: set[str] = set()
        self._missing: list[str] = []
        self._made_by = declared.fingerprint
        self._ends: dict[Place, int] = {}
        self._next_ends = 0.0
        self._next_check = self._next_places = self._next_know = self._next_report = self._next_forget = 0.0
        self.currency = Currency(tuple(declared.by_topic))
        self._said_unknown = False
        # Why a rebuild by this mapping is asked for; and how often both servers were asked how far all is.
        self.rebuild: str | None = None
        self.looks = 0

    # -- the mapping -------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Open the store, and see whether what it holds was made as it would be now. Kafka is not asked."""
        self._store.open(self._declared)
        facts = self._store.facts()
        self.currency.loaded_at = facts.loaded_at
        self.currency.current_at.update(facts.current_at)
        self._asked(facts)
        self._made_by = facts.fingerprint or self._declared.fingerprint
        if facts.fingerprint is None:
            self._store.know(fingerprint=self._declared.fingerprint)
            if held := self._held():
                # By another name, or before its books were lost: what was deleted meanwhile would stay.
                self._needs_rebuild(
                    f"the table {held} has rows that it has not written", self._settings.on_mapping_change
                )
        elif facts.fingerprint != self._declared.fingerprint:
            self._needs_rebuild("the mapping was changed", self._settings.on_mapping_change)

    def _held(self) -> str | None:
        """A table that has rows; not of functions, which may share theirs with the rest of the service."""
        for follow in self._declared.follows:
            if not isinstance(follow.into, Function) and self._has_rows(follow):
                return follow.into.table.fullname
        return None

    def _has_rows(self, follow: Follow) -> bool:
        with closing(self._store.rows(follow)) as rows:
            return next(rows, None) is not None

    def _asked(self, facts: Facts) -> None:
        """Take note of a rebuild that is asked for, if it is by this mapping: another one is another process's."""
        own = facts.rebuild_for in {None, self._declared.fingerprint}
        self.rebuild = facts.rebuild if own else None

    def _needs_rebuild(self, why: str, what_then: OnChange) -> None:
        if what_then == "refuse":
            raise NeedsRebuildError(
                f"The read model {self._declared.name} is not what it should be: {why}.",
                cure="It is made anew beside itself by: outbox read-model rebuild --app MODULE:ATTRIBUTE.",
            )
        if self.rebuild is None:
            self._store.ask_rebuild(why)
            self.rebuild = why
            emit(log, "read_model.rebuild_asked", model=self._declared.name, why=why)

    def _is_ours(self, fingerprint: str | None) -> None:
        """Whether the rows are still those of the mapping that was there at the start, or of this one."""
        if fingerprint == self._declared.fingerprint:
            self._made_by = fingerprint
        elif fingerprint not in {None, self._made_by}:
            raise NeedsRebuildError(
                f"The read model {self._declared.name} has another mapping now: another version of this service has "
                "rebuilt it.",
                cure="End this version; or start it again, and it rebuilds the model by its own mapping.",
            )

    def close(self) -> None:
        """Leave the group."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            subscription.close()

    # -- one step ----------------------------------------------------------------------------------------------

    def step(self, seconds: float) -> Applied:
        """Fetch and apply at most one batch, waiting at most so long for it. Raises the errors of both servers."""
        if self._subscription is None:
            self._subscription = Subscription(
                self._settings.bootstrap,
                self._settings.kafka,
                list(self._declared.by_topic),
                group=self._declared.name,
                instance=self._settings.instance,
            )
        applied = self._advance(self._subscription, seconds)
        self._check(self._subscription)
        return applied

    def _advance(self, subscription: Subscription, seconds: float) -> Applied:
        if self._rewind:
            subscription.begin({place: claim.offset for place, claim in self._claims.items()})
            self._ends = {}
            self._rewind = False
        try:
            if self._wanted is None:
                fetched = subscription.fetch(self._settings.batch, seconds)
                self._wanted = fetched.assigned
            if self._wanted is not None:
                # Kept until it is done: a server may be away.
                self._assign(subscription, self._wanted)
                self._wanted = None
                return Applied()
            self._ends |= fetched.reached
            now = time.monotonic()
            if not fetched.records and now < self._next_ends:
                return Applied()
            # What lies behind the last records alone (the marks of transactions) is said now and then.
            self._next_ends = now + self._settings.check_seconds
            fetched.reached, self._ends = self._ends, {}
            applied = self._applier.apply(fetched, self._claims)
        except GapError as gap:
            log.warning("the read model %s fetches again from where it is: %s", self._declared.name, gap)
            self._rewind = True
            return Applied()
        except LostPlacesError as lost:
            # A member that was away for long, or a rebuild that took its place: who reads what, the group says.
            emit(log, "read_model.fenced", model=self._declared.name, places=str(lost))
            self._rejoin(subscription)
            return Applied()
        except BaseException:
            # What was fetched is not applied, or it is not known: it is fetched again.
            self._rewind = True
            raise
        self._claims.update(applied.claims)
        self._say_parked(applied)
        if applied.claims:
            self._told(applied)
            self._report(subscription)
        return applied

    def _rejoin(self, subscription: Subscription) -> None:
        self._claims, self._ends, self._wanted, self._rewind = {}, {}, None, False
        self._given = self._unknown = ()
        subscription.rejoin()

    def _say_parked(self, applied: Applied) -> None:
        name, refused = self._declared.name, applied.refused
        for one in refused[:_SAID]:
            emit(log, "read_model.parked", model=name, key=one.key, reason=one.reason)
        if len(refused) > _SAID:
            emit(log, "read_model.parked_many", model=name, parked=len(refused), of=applied.records)

    def _assign(self, subscription: Subscription, places: Sequence[Place]) -> None:
        """Claim what the group has given, and read on from where the store is."""
        self._claims = {}
        self._ends = {}
        self._given, self._unknown = places, ()
        if not places:
            return
        with self._store.transaction() as transaction:
            self._is_ours(transaction.fingerprint())
            claims = {place: transaction.claim(place) for place in sorted(places)}
        # After the claim: until then others may go on, beyond an end that was asked before.
        bounds = subscription.bounds(places)
        self._unknown = [place for place in claims if place not in bounds]
        claims = {place: claim for place, claim in claims.items() if place in bounds}
        self._left_out = self._outrun(subscription, bounds, claims)
        # What cannot be gone on with waits for the rebuild; the rest goes on.
        self._claims = {place: claim for place, claim in claims.items() if place.topic not in self._left_out}
        subscription.begin({place: claim.offset for place, claim in self._claims.items()})
        emit(
            log,
            "read_model.assigned",
            model=self._declared.name,
            places=", ".join(f"{place.topic} {place.partition}" for place in sorted(self._claims)) or "none",
        )

    def _outrun(
        self, subscription: Subscription, bounds: Mapping[Place, Bounds], claims: Mapping[Place, Claim]
    ) -> set[str]:
        """The topics that cannot be gone on with from where the store is, having asked for a rebuild."""
        identities = subscription.identities()
        facts = self._store.facts()
        found = {topic: f"the topic {topic} was made anew" for topic in _made_anew(identities, facts)}
        for place, claim in claims.items():
            if claim.offset > bounds[place].end:
                found.setdefault(place.topic, f"the topic {place.topic} ends before what was read of it")
            elif 0 < claim.offset < bounds[place].first:
                found.setdefault(place.topic, f"the topic {place.topic} has forgotten what was not read yet")
        for topic in {place.topic for place, claim in claims.items() if claim.offset} - found.keys():
            since = facts.current_at.get(topic, facts.began_at.get(topic))
            read = "was last read to its end" if topic in facts.current_at else "began to be read"
            self._look_at_tombstones(topic, since, read)
        for why in found.values():
            self._needs_rebuild(why, self._settings.on_outrun)
        at = self._clock()
        self._store.know(
            topic_ids={topic: identity for topic, identity in identities.items() if topic not in facts.topic_ids},
            began_at={place.topic: at for place in claims if place.topic not in facts.began_at},
        )
        return set(found)

    def _look_at_tombstones(self, topic: str, since: dt.datetime | None, read: str) -> None:
        """Ask for a rebuild where deletions may be gone that were not read; what there is can be gone on with."""
        if since is None:
            return
        kept, age_ms = self._tombstones_kept(topic), (self._clock() - since).total_seconds() * 1000
        if kept is not None and age_ms > kept:
            self._needs_rebuild(
                f"the topic {topic} {read} at {since:%Y-%m-%d %H:%M} UTC, and its tombstones are kept for "
                f"{kept / _DAY_MS:g} days",
                self._settings.on_outrun,
            )

    def _tombstones_kept(self, topic: str) -> float | None:
        """How long, in milliseconds; Kafka's default where it may not be asked."""
        try:
            with Admin(self._settings.bootstrap, self._settings.kafka) as admin:
                state = admin.describe([topic]).get(topic)
        except BrokerError as error:
            if not self._said_unknown:
                self._said_unknown = True
                emit(log, "read_model.kept_unknown", model=self._declared.name, topic=topic, error=error.message)
            return _DAY_MS
        return float(state.settings["delete.retention.ms"]) if state is not None else None

    # -- beside the steps --------------------------------------------------------------------------------------

    def check_useful(self) -> None:
        """Refuse a copy of which a mapping has parked everything: `BadBuildError`."""
        for follow in self._declared.follows:
            if isinstance(follow.into, Function) or self._has_rows(follow):
                continue
            with self._store.transaction(reads=True) as transaction:
                parked, count = transaction.parked(follow.topic, limit=1), transaction.parked_count(follow.topic)
            for one in parked:
                raise BadBuildError(
                    f"The table {follow.into.table.fullname} of the read model {self._declared.name} is empty: of "
                    f"{follow.topic} {count} messages are parked, the first because {one.reason}.",
                    cure="Mend the mapping of the topic.",
                )

    def look_soon(self) -> None:
        """Look at the next step how far all is, and what is asked for."""
        self._next_check = 0.0

    def _check(self, subscription: Subscription) -> None:
        """Now and then: how far all partitions are, whoever applies them, and whether a rebuild is asked for."""
        now = time.monotonic()
        if now < self._next_check:
            return
        facts = self._store.facts()
        self._is_ours(facts.fingerprint)
        self._asked(facts)
        if facts.rebuild is None and facts.fingerprint not in {None, self._declared.fingerprint}:
            # Another version's request took the place of the one that this one made.
            self._needs_rebuild("the mapping was changed", self._settings.on_mapping_change)
        if self._left_out and facts.rebuild is None:
            # It was rebuilt: what could not be gone on with can be.
            self._left_out = set()
            self._rejoin(subscription)
        if now >= self._next_places:
            self._look_at_topics(subscription, facts)
            self._next_places = now + _PLACES_SECONDS
        at = self._clock()
        # Before the ends are asked: what is applied lies before them, unless it is another topic's.
        with self._store.transaction(reads=True) as transaction:
            offsets = transaction.offsets()
        bounds = subscription.bounds({*self._places, *self._unknown})
        if any(place in bounds for place in self._unknown):
            self._wanted = self._given
        if now >= self._next_forget:
            with self._store.transaction() as transaction:
                transaction.forget(at - dt.timedelta(seconds=self._settings.forget_deleted))
            self._next_forget = now + _FORGET_SECONDS
        became_ready = self.currency.saw(bounds, offsets, at, left_out=self._left_out)
        if became_ready:
            emit(log, "read_model.ready", model=self._declared.name)
        if became_ready or now >= self._next_know:
            self._store.know(loaded_at=self.currency.loaded_at, current_at=self.currency.current_at)
            self._next_know = now + _KNOW_SECONDS
        self._next_check = now + self._settings.check_seconds
        self.looks += 1

    def _look_at_topics(self, subscription: Subscription, facts: Facts) -> None:
        """Which partitions there are, of topics that are the same as before."""
        self._places = subscription.places()
        there = {place.topic for place in self._places}
        missing = [topic for topic in self._declared.by_topic if topic not in there]
        if missing and missing != self._missing:
            error, cure = f"there is no topic {', '.join(missing)}.", "Its owner makes it: outbox topics apply."
            emit(log, "read_model.waiting", model=self._declared.name, error=error, cure=cure)
        elif self._missing and not missing:
            emit(log, "read_model.resumed", model=self._declared.name)
        self._missing = missing
        for topic, since in self.currency.current_at.items():
            # It lags, or Kafka was away for long.
            if topic in there - self._left_out and (self._clock() - since).total_seconds() > _LATE_SECONDS:
                self._look_at_tombstones(topic, since, "was last read to its end")
        if new := _made_anew(subscription.identities(), facts) - self._left_out:
            # Whoever joins looks at what it is given, and asks for what is to be done.
            self._left_out |= new
            self._rejoin(subscription)

    def _report(self, subscription: Subscription) -> None:
        now = time.monotonic()
        if now >= self._next_report:
            subscription.report({place: claim.offset for place, claim in self._claims.items()})
            self._next_report = now + _REPORT_SECONDS


def _made_anew(identities: Mapping[str, str], facts: Facts) -> set[str]:
    """The topics that are others, by the same names, than those that were read."""
    return {topic for topic, identity in identities.items() if facts.topic_ids.get(topic, identity) != identity}


def is_passing(error: OutboxError) -> bool:
    """Whether trying again may help."""
    # A topic that is missing: its owner may make it.
    return isinstance(error, BrokerUnavailableError | TopicError) or error.exit_code == 69

"""A rebuild: the topics from their starts into tables beside the live ones, which go on being kept and served.

When it is as far as they are it takes their place, in one transaction.
"""

from __future__ import annotations

import datetime as dt
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

from outbox.errors import BrokerError, OutboxError, StoreUnavailableError, TopicError
from outbox.kafka.admin import Admin
from outbox.kafka.subscription import Bounds, Place, Subscription
from outbox.read_model.applier import Applier, LostPlacesError
from outbox.read_model.consumer import Settings, is_passing
from outbox.read_model.currency import Currency
from outbox.read_model.declared import Declared
from outbox.read_model.store import BadBuildError, Claim, LostBuildError, Store
from outbox.telemetry import emit
from outbox.wake import Wake

log = logging.getLogger("outbox.read_model")

Progress = Callable[[int, int], None]
"""Told how many offsets are read, and how many there are."""
_FETCH_SECONDS = 0.2
_LOOK_SECONDS = 0.2
# Offsets that may be left when it is tried to swap.
_NEAR = 1_000
# So many messages more than live may be parked whatever was read; of more a tenth.
_PARKED_MORE = 10
# Without an answer for so long, it is asked how long tombstones are kept.
_INTERRUPTED_SECONDS = 10
_DAY_MS = 86_400_000


class _VoidError(Exception):
    """What was read is not the beginning of what there is now: it is begun again, by another client."""


class Rebuild:
    """One rebuild of a read model."""

    def __init__(
        self,
        declared: Declared,
        store: Store,
        settings: Settings,
        *,
        may_empty: bool = False,
        told: Progress = lambda _done, _of: None,
    ) -> None:
        """`may_empty`: a person has asked for it, who may want a table to be empty."""
        self._declared = declared
        self._store = store
        self._settings = settings
        self._told = told
        self._may_empty = may_empty
        self._said = ""
        self._pause = 0.1
        self._anew()

    def _anew(self) -> None:
        """Of a build that is to be begun."""
        self._begun = False
        self._places: Sequence[Place] = ()
        self._claims: dict[Place, Claim] = {}
        self._records = 0
        # Kafka's ids of the topics that it reads, and when Kafka answered last.
        self._identities: Mapping[str, str] = {}
        self._answered_at: dt.datetime | None = None
        # Ends that are to be reached, and when they were asked; since when the ones before are.
        self._goal: tuple[dt.datetime, Mapping[Place, int]] | None = None
        self._current_at: dt.datetime | None = None

    def run(self, wake: Wake, *, why: str) -> bool:
        """Build and swap; False when another process does or has done it, or `wake` ended it. Raises errors that stay.

        When it raises `BadBuildError`, what is served stays as it is.
        """
        asked = self._store.facts().rebuild is not None
        with self._store.builder() as mine:
            if not mine or (asked and self._store.facts().rebuild is None):
                return False
            emit(log, "read_model.rebuilding", model=self._declared.name, why=why)
            try:
                return self._insist(wake)
            except LostBuildError:
                return False
            finally:
                # The next one removes it.
                with suppress(StoreUnavailableError):
                    self._store.end_build()

    def _insist(self, wake: Wake) -> bool:
        """Go on, again and again while a server is away; said once."""
        while not wake.is_set:
            try:
                if not self._begun:
                    self._store.begin_build()
                    self._begun = True
                with Subscription(
                    self._settings.bootstrap, self._settings.kafka, list(self._declared.by_topic), group=None
                ) as subscription:
                    if self._build(subscription, wake):
                        return True
            except _VoidError:
                self._anew()
            except OutboxError as error:
                if not is_passing(error):
                    raise
                if error.message != self._said:
                    self._said = error.message
                    emit(log, "read_model.waiting", model=self._declared.name, error=error.message, cure=error.cure)
                wake.wait(self._pause)
                self._pause = min(10.0, self._pause * 2)
        return False

    def _build(self, subscription: Subscription, wake: Wake) -> bool:
        applier = Applier(self._declared, self._store, "new")
        self._begin(subscription)
        next_look = 0.0
        while not wake.is_set:
            fetched = subscription.fetch(self._settings.batch, _FETCH_SECONDS)
            if fetched.assigned is not None:
                self._begin(subscription)
                continue
            try:
                applied = applier.apply(fetched, self._claims)
            except LostPlacesError:
                self._begin(subscription)
                continue
            self._claims.update(applied.claims)
            self._records += applied.records
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + _LOOK_SECONDS
                if self._is_near(subscription) and self._swap(subscription):
                    return True
        return False

    # -- where it begins ---------------------------------------------------------------------------------------

    def _begin(self, subscription: Subscription) -> None:
        """Claim all partitions, those that were added since as well, and read on."""
        at = dt.datetime.now(dt.UTC)
        places = subscription.places()
        bounds, identities = subscription.bounds(places), subscription.identities()
        claims = self._claim(places)
        if self._is_void(claims, bounds, identities, at):
            raise _VoidError
        self._places, self._claims = places, claims
        self._identities = {**self._identities, **identities}
        self._answered_at = at
        self._goal = self._current_at = None
        subscription.begin({place: claim.offset for place, claim in claims.items()})

    def _claim(self, places: Sequence[Place]) -> dict[Place, Claim]:
        with self._store.transaction("new") as transaction:
            return {place: transaction.claim(place) for place in sorted(places)}

    def _is_void(
        self,
        claims: Mapping[Place, Claim],
        bounds: Mapping[Place, Bounds],
        identities: Mapping[str, str],
        at: dt.datetime,
    ) -> bool:
        """Whether what was read before is not the beginning of what there is now."""
        return (
            any(self._identities.get(topic, identity) != identity for topic, identity in identities.items())
            or any(claim.offset and not _is_within(claim.offset, bounds[place]) for place, claim in claims.items())
            or self._missed_tombstones(at)
        )

    def _missed_tombstones(self, at: dt.datetime) -> bool:
        """Whether deletions may be gone that it has not read: it was interrupted for longer than they are kept."""
        if not self._was_interrupted(at):
            return False
        try:
            with Admin(self._settings.bootstrap, self._settings.kafka) as admin:
                states = admin.describe(list(self._declared.by_topic))
        except BrokerError:  # it may not be asked
            states = {}
        kept = min((float(one.settings["delete.retention.ms"]) for one in states.values()), default=_DAY_MS)
        return self._seconds_since_answer(at) * 1000 > kept

    def _was_interrupted(self, at: dt.datetime) -> bool:
        return self._seconds_since_answer(at) > _INTERRUPTED_SECONDS

    def _seconds_since_answer(self, at: dt.datetime) -> float:
        return 0.0 if self._answered_at is None else (at - self._answered_at).total_seconds()

    # -- where it ends -----------------------------------------------------------------------------------------

    def _is_near(self, subscription: Subscription) -> bool:
        """Look how far it is: whether it has reached ends that there were, and is nearly at those that there are.

        Under load they never stand still.
        """
        at = dt.datetime.now(dt.UTC)
        bounds = subscription.bounds(self._places)
        offsets = {place: claim.offset for place, claim in self._claims.items()}
        goal = self._goal[1] if self._goal is not None else {}
        if (
            self._was_interrupted(at)
            or any(offset and not _is_within(offset, bounds[place]) for place, offset in offsets.items())
            # The topic is another one, of which nothing was read yet.
            or any(end > bounds[place].end for place, end in goal.items())
        ):
            self._begin(subscription)
            return False
        self._answered(at)
        total = sum(bound.end - bound.first for bound in bounds.values())
        left = sum(max(0, bound.end - max(offsets[place], bound.first)) for place, bound in bounds.items())
        self._told(total - left, total)
        if self._goal is None:
            self._goal = at, {place: bound.end for place, bound in bounds.items()}
        if Currency.reached(self._goal[1], offsets, bounds):
            self._current_at, self._goal = self._goal[0], None
        return self._current_at is not None and left <= _NEAR

    def _answered(self, at: dt.datetime) -> None:
        """Both servers have answered."""
        self._answered_at = at
        self._pause = 0.1
        if self._said:
            self._said = ""
            emit(log, "read_model.resumed", model=self._declared.name)

    def _swap(self, subscription: Subscription) -> bool:
        """Put it into the place of the live one, unless it is behind that."""
        identities = subscription.identities()
        if self._is_void({}, {}, identities, dt.datetime.now(dt.UTC)):
            self._begin(subscription)
            return False
        facts = self._store.facts()
        with self._store.transaction("new", reads=True) as transaction:
            parked = transaction.parked_count()
            for one in transaction.parked(limit=1):
                self._check_parked(parked, facts.parked, one.reason)
        with self._store.transaction(reads=True) as transaction:
            live = transaction.offsets()
        bounds = subscription.bounds(self._places)
        anew = {topic for topic, identity in identities.items() if facts.topic_ids.get(topic, identity) != identity}
        anew |= {place.topic for place, bound in bounds.items() if live.get(place, 0) > bound.end}
        current_at = dict.fromkeys(identities, self._current_at) if self._current_at else {}
        behind = self._store.swap(
            self._declared.fingerprint,
            anew=anew,
            topic_ids=identities,
            current_at=current_at,
            may_empty=self._may_empty,
        )
        if not behind:
            emit(log, "read_model.swapped", model=self._declared.name, parked=parked)
            return True
        if missing := {place.topic for place in behind} - {place.topic for place in self._places}:
            raise TopicError(
                f"There is no topic {', '.join(sorted(missing))}.", cure="Its owner makes it: outbox topics apply."
            )
        if any(place not in self._claims for place in behind):
            self._begin(subscription)
        return False

    def _check_parked(self, parked: int, live: int, reason: str) -> None:
        """A mapping that does not fit the messages would take away what is served."""
        if parked - live > max(_PARKED_MORE, self._records // 10):
            raise BadBuildError(
                f"The new build of the read model {self._declared.name} parks {parked} of {self._records} messages, "
                f"where {live} are parked of what is served; the first because {reason}.",
                cure="Mend the mapping, or what the topics have.",
            )


def _is_within(offset: int, bound: Bounds) -> bool:
    return bound.first <= offset <= bound.end

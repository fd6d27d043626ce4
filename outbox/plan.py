"""The plan of a batch: which Kafka transactions publish it, and the position that each of them carries. Pure.

Normally one transaction takes the whole batch, and what open requests want with it. After a refusal the batch is halved
until the record that is refused stands alone; each part is committed with a position of its own: cut by id, or, behind
the batch's own entries, with how far the requests are.
"""

from __future__ import annotations

import sys
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, NamedTuple

from outbox.batch import Batch
from outbox.collapse import collapse
from outbox.dead_letter import DeadLetter
from outbox.entity_type import EntityType
from outbox.entry import Entry
from outbox.message import Made, Message, Unpublishable, messages
from outbox.position import Position, Totals
from outbox.request import DEAD_LETTERS, Entity, Row
from outbox.share import Share, shares

_ID = itemgetter(0)
_TYPE = itemgetter(1)
_TOPIC = itemgetter(0)
_PLACE = itemgetter(0)


def make(batch: Batch, limits: Mapping[str, int], *, now_ms: int) -> Made:
    """What the entries of a batch become, after collapse. A batch that is read ahead has it made there, too."""
    began = time.monotonic()
    entries = collapse(batch.entries, batch.types)
    failed: list[Unpublishable] = []
    if any(of.follows or of.reads_source for of in batch.types.values()):
        entries, failed = _published(entries, batch.live, batch.types)
    made, unpublishable = messages(entries, batch.types, limits, now_ms=now_ms)
    return Made(made, sorted([*unpublishable, *failed], key=lambda one: one.entry[0]), limits, time.monotonic() - began)


def _published(
    entries: Sequence[Entry], live: Sequence[Row], types: Mapping[str, EntityType]
) -> tuple[list[Entry], list[Unpublishable]]:
    """What the types publish of entries, in id order: as written, under another name, or as their sources say."""
    reading = {of.name for of in types.values() if of.reads_source}
    copies: dict[str, list[str]] = defaultdict(list)
    for of in types.values():
        if of.follows and not of.reads_source:
            copies[of.follows].append(of.name)
    found: list[Entry] = []
    for entry in entries:
        if entry[1] not in reading:
            found.append(entry)
        found += [Entry(entry[0], name, *entry[2:]) for name in copies.get(entry[1], ())]
    found += [row.entry for row in live if row.failure is None]
    failed = [
        Unpublishable(row.entry, types[row.entry.type].topic, "source", row.failure)
        for row in live
        if row.failure is not None
    ]
    return sorted(found, key=_ID), failed


class _Place(NamedTuple):
    """A row of a request's share: places compare as they are sent."""

    share: int
    row: int


@dataclass(frozen=True, slots=True)
class Part:
    """What one Kafka transaction holds, in the order in which it is sent.

    `cleared` are entities whose dead letter a later state supersedes, or a request dropped. `end` is how many of the
    plan's messages are done with it.
    """

    messages: Sequence[Message]
    letters: Sequence[DeadLetter]
    cleared: Sequence[Entity]
    position: Position
    end: int

    @classmethod
    def alone(cls, position: Position) -> Part:
        """A position, without any record."""
        return cls((), (), (), position, 0)


class Plan:
    """One batch made ready, and how much of it is done.

    Take `part(size)`, commit it, tell `done(part)`; or `refuse` messages of it and take it again. `dead` maps each
    entity that has a dead letter to the id of its entry; `limits` each topic to its `max.message.bytes`. With more than
    `most_dead` dead letters a request ends instead.
    """

    def __init__(
        self,
        batch: Batch,
        limits: Mapping[str, int],
        dead: Mapping[Entity, int],
        *,
        now_ms: int,
        most_dead: int = sys.maxsize,
    ) -> None:
        self._most_dead = most_dead
        self._batch = batch
        self._now_ms = now_ms
        self._dead = dict(dead)
        self.position = batch.position
        self._done = 0  # messages
        self._done_id = batch.position.cut.last_id if batch.position.cut else 0
        made = batch.made
        if made is None or made.limits != limits:
            made = make(batch, limits, now_ms=now_ms)
        self._messages, self._unpublishable = list(made.messages), list(made.unpublishable)
        self._own = len(self._messages)  # those of the batch; what requests publish comes after them
        self._shares = shares(batch, dead) if batch.requests else []
        # Of each message behind the batch's own its place, and the reasons of those that have none.
        self._places: list[_Place] = []
        self._left_out: list[tuple[_Place, Unpublishable]] = []
        self._dropped: set[Entity] = set()
        for number, share in enumerate(self._shares):
            self._add(number, limits)
            if share.request.kind == "drop":
                self._dropped.update(share.named)
        self._reached = _Place(-1, 0)
        self._finished = False

    def _add(self, number: int, limits: Mapping[str, int]) -> None:
        """Make the messages of a request's share."""
        share, types = self._shares[number], self._batch.types
        rows = [(place, row) for place, row in enumerate(share.rows) if place not in share.left_out]
        made, refused = messages((r.entry for _, r in rows if r.failure is None), types, limits, now_ms=self._now_ms)
        places = {id(row.entry): _Place(number, place) for place, row in rows}
        error = self._hopeless(refused, sum(row.failure is not None for _, row in rows))
        if error is not None and share.request.kind not in DEAD_LETTERS:
            # The request ends; what the log has is published all the same.
            self._shares[number] = Share(share.request, (), share.before, last=True, error=error)
            return
        self._messages += made
        self._places += [places[id(message.entry)] for message in made]
        self._left_out += [(places[id(unpublishable.entry)], unpublishable) for unpublishable in refused]
        for place, row in rows:
            if row.failure is not None:
                entity_type = types.get(row.entry.type)
                topic = entity_type.topic if entity_type else None
                self._left_out.append((_Place(number, place), Unpublishable(row.entry, topic, "source", row.failure)))

    def _hopeless(self, refused: Sequence[Unpublishable], failures: int) -> str | None:
        """Why a request is not gone on with: its topic, or more dead letters than there may be."""
        for unpublishable in refused:
            if unpublishable.reason == "unknown-type":
                return f'the entity type "{unpublishable.entry[1]}" is there no more'
            if unpublishable.reason == "no-topic":
                topic = unpublishable.topic
                return f"the topic {topic} is missing, or must not be published to: see outbox topics plan"
        if len(self._dead) + len(self._left_out) + len(refused) + failures > self._most_dead:
            return (
                f"more rows than may be dead-lettered (max_dead_letters, {self._most_dead}) cannot be published: see "
                "outbox dead-letters list"
            )
        return None

    @property
    def _failed(self) -> set[Entity]:
        unpublishable = (*self._unpublishable, *(u for _, u in self._left_out))
        return {(u.entry[1], u.entry[2]) for u in unpublishable}

    # -- parts -------------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """How many messages are left."""
        return len(self._messages) - self._done

    @property
    def finished(self) -> bool:
        """Whether every part is committed."""
        return self._finished

    @property
    def too_large(self) -> bool:
        """Whether something is larger than its topic takes, as far as the limits say."""
        unpublishable = (*self._unpublishable, *(u for _, u in self._left_out))
        return any(u.reason == "too-large" for u in unpublishable)

    @property
    def records(self) -> int:
        """How many messages there are in all."""
        return len(self._messages)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to publish and nothing to say."""
        return not (self._batch.entries or self._shares)

    def ends_with(self, part: Part) -> bool:
        """Whether a part is the last."""
        return part.end == len(self._messages)

    def part(self, size: int | None = None) -> Part:
        """What the next transaction holds: at most `size` of the messages that are left (None: all)."""
        batch = self._batch
        end = len(self._messages) if size is None else min(self._done + size, len(self._messages))
        # What several types publish of one entry stands or falls together: the position knows entries.
        while 0 < end < self._own and self._messages[end].entry[0] == self._messages[end - 1].entry[0]:
            end += 1
        final = end == len(self._messages)
        sent = self._messages[self._done : end]
        # A part within the batch ends at an id; what cannot be published goes with the part that its id lies in.
        whole = final or end >= self._own
        upto = None if whole else self._messages[end - 1].entry[0]
        refused = [
            u for u in self._unpublishable if u.entry[0] > self._done_id and (whole or u.entry[0] <= (upto or 0))
        ]
        reached = self._place_of(end)
        left_out = [(place, u) for place, u in self._left_out if self._reached < place <= reached]
        refused += [u for _, u in sorted(left_out, key=_PLACE)]
        letters = [self._letter(u) for u in refused]
        after = batch.next() if whole else self.position.advanced(batch.to, upto)
        after = replace(
            after,
            timeline=batch.head.timeline,
            totals=self._totals(sent, letters, upto),
            requests=self._progress(reached),
        )
        return Part(sent, letters, self._cleared(sent, letters, final=final), after, end)

    def _place_of(self, end: int) -> _Place:
        """Up to where the requests are done with so many messages."""
        if end == len(self._messages):
            return _Place(len(self._shares), 0)
        return self._places[end - 1 - self._own] if end > self._own else _Place(-1, 0)

    def smallest(self, part: Part) -> bool:
        """Whether a part cannot be halved: it is one message, or what was made of one entry."""
        ids = {message.entry[0] for message in part.messages}
        return len(part.messages) == 1 or (part.end <= self._own and len(ids) == 1)

    def done(self, part: Part) -> dict[Entity, int]:
        """A part is committed; the dead letters that there are now."""
        self.position = part.position
        self._done = part.end
        self._reached = self._place_of(part.end)
        self._finished = self.ends_with(part)
        if part.position.cut is not None:
            self._done_id = part.position.cut.last_id
        else:
            self._done_id = self._batch.entries[-1][0] if self._batch.entries else self._done_id
        self._dead.update({(letter.type, letter.key): letter.id for letter in part.letters})
        for entity in part.cleared:
            self._dead.pop(entity, None)
        return dict(self._dead)

    def refuse(self, reasons: Mapping[int, str]) -> None:
        """Leave messages out that the broker refuses: by their places in the next part, with the reasons."""
        for place in sorted(reasons, reverse=True):
            at = self._done + place
            message = self._messages.pop(at)
            explanation = f"the broker refused the record: {reasons[place]}"
            unpublishable = Unpublishable(message.entry, message.topic, "refused", explanation)
            if at < self._own:
                self._own -= 1
                self._unpublishable.append(unpublishable)
            else:
                self._left_out.append((self._places.pop(at - self._own), unpublishable))

    # -- what belongs to a part --------------------------------------------------------------------------------

    def _letter(self, refused: Unpublishable) -> DeadLetter:
        entry = refused.entry
        return DeadLetter(
            id=entry[0],
            type=entry[1],
            key=entry[2],
            topic=refused.topic,
            reason=refused.reason,
            message=refused.explanation,
            created_ms=entry[4],
            epoch=self._batch.head.epoch,
            at_ms=self._now_ms,
        )

    def _cleared(self, sent: Sequence[Message], letters: Sequence[DeadLetter], *, final: bool) -> list[Entity]:
        """The entities that have a dead letter, of this part or before, and no reason for it any more."""
        ids = self._dead | {(letter.type, letter.key): letter.id for letter in letters}
        cleared: set[Entity] = set()
        if ids:
            for message in sent:
                entity = (message.entry[1], message.entry[2])
                # What comes from no entry is what the key is as of the batch: no dead letter is newer.
                if entity in ids and (not message.entry[0] or message.entry[0] >= ids[entity]):
                    cleared.add(entity)
        if final:
            cleared |= self._dropped - {(letter.type, letter.key) for letter in letters}
        return sorted(cleared)

    def _totals(self, sent: Sequence[Message], letters: Sequence[DeadLetter], upto: int | None) -> dict[str, Totals]:
        entries = self._batch.entries
        begin = bisect_right(entries, self._done_id, key=_ID)
        end = len(entries) if upto is None else bisect_right(entries, upto, key=_ID)
        taken = Counter(map(_TYPE, entries[begin:end]))
        # By topic, which says the type: counted without a step of Python for each.
        by_topic = {t.topic: name for name, t in self._batch.types.items()}
        written = Counter({by_topic[topic]: count for topic, count in Counter(map(_TOPIC, sent)).items()})
        dead = Counter(letter.type for letter in letters)
        # Nobody writes entries of a follower: what it took is what became of them.
        taken.update({of.name: written[of.name] + dead[of.name] for of in self._batch.types.values() if of.follows})
        totals = dict(self.position.totals)
        for name in taken.keys() | written.keys() | dead.keys():
            if name not in self._batch.types:
                continue  # what a hand-written INSERT may hold: a position must not grow with it
            totals[name] = totals.get(name, Totals()).plus(entries=taken[name], records=written[name], dead=dead[name])
        return totals

    def _progress(self, reached: _Place) -> dict[str, Mapping[str, Any]]:
        """What the position says of requests: how far they are, or that they are done, until the table was told."""
        progress = self._batch.progress
        failed = self._failed
        for number, share in enumerate(self._shares[: reached.share + 1]):
            done = reached.row + 1 if number == reached.share else len(share.rows)
            said = share.progress(done, failed)
            if said is not None:
                progress[str(share.request.id)] = said
        return progress

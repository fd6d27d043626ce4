"""The plan of a batch: which Kafka transactions publish it, and the position that each of them carries. Pure.

Normally one transaction takes the whole batch. After a refusal the batch is halved until the record that is refused
stands alone; each part is committed with a position of its own, cut by id.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

from outbox.batch import Batch, Entity, Request
from outbox.collapse import collapse
from outbox.dead_letter import DeadLetter
from outbox.message import Message, Unpublishable, messages
from outbox.position import Position, Totals

_EXAMPLES = 20
_ID = itemgetter(0)
_TYPE = itemgetter(1)
_TOPIC = itemgetter(0)


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
    entity that has a dead letter to the id of its entry; `limits` each topic to its `max.message.bytes`.
    """

    def __init__(self, batch: Batch, limits: Mapping[str, int], dead: Mapping[Entity, int], *, now_ms: int) -> None:
        self._batch = batch
        self._now_ms = now_ms
        self._dead = dict(dead)
        self.position = batch.position
        self._done = 0  # messages
        self._done_id = batch.position.cut.last_id if batch.position.cut else 0
        made, self._unpublishable = messages(collapse(batch.entries, batch.types), batch.types, limits, now_ms=now_ms)
        self._own = len(made)  # those of the batch; what requests have published again comes after them
        self._messages = made
        self._again_refused: list[Unpublishable] = []
        self._dropped: set[Entity] = set()
        self._asked = list(self._take(limits))
        self._finished = False

    # -- requests ----------------------------------------------------------------------------------------------

    def _take(self, limits: Mapping[str, int]) -> Iterator[tuple[Request, list[Entity]]]:
        """The dead letters that each request names; those to be retried join the messages."""
        batch = self._batch
        if not batch.requests:
            return
        in_batch = {(entry[1], entry[2]) for entry in batch.entries}
        retained = {(entry[1], entry[2]): entry for entry in batch.retained}
        left = dict(self._dead)
        for request in batch.requests:
            if str(request.id) in batch.position.requests:
                continue  # done; the control table has not been told yet
            named = request.names(left)
            for entity in named:
                del left[entity]
            if request.kind == "drop":
                self._dropped.update(named)
            else:
                again = [retained[entity] for entity in named if entity in retained and entity not in in_batch]
                made, refused = messages(again, batch.types, limits, now_ms=self._now_ms)
                self._messages += made
                self._again_refused += refused
            yield request, named

    def _outcome(self, request: Request, named: Sequence[Entity]) -> dict[str, Any]:
        if request.kind == "drop":
            return {"dropped": len(named)}
        batch = self._batch
        there = {(entry[1], entry[2]) for entry in (*batch.entries, *batch.retained)}
        failed = self._failed
        gone = [entity for entity in named if entity not in there]
        return {
            "retried": sum(entity in there and entity not in failed for entity in named),
            "refused": sum(entity in failed for entity in named),
            # The position holds this: a count, and the first of them.
            "not_retained": len(gone),
            "examples": [list(entity) for entity in gone[:_EXAMPLES]],
        }

    @property
    def _failed(self) -> set[Entity]:
        return {(u.entry[1], u.entry[2]) for u in (*self._unpublishable, *self._again_refused)}

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
        return any(u.reason == "too-large" for u in (*self._unpublishable, *self._again_refused))

    @property
    def records(self) -> int:
        """How many messages there are in all."""
        return len(self._messages)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to publish and nothing to say."""
        return not (self._batch.entries or self._asked)

    def part(self, size: int | None = None) -> Part:
        """What the next transaction holds: at most `size` of the messages that are left (None: all)."""
        batch = self._batch
        end = len(self._messages) if size is None else min(self._done + size, len(self._messages))
        final = end == len(self._messages)
        sent = self._messages[self._done : end]
        # A part within the batch ends at an id; what cannot be published goes with the part that its id lies in.
        whole = final or end >= self._own
        upto = None if whole else self._messages[end - 1].entry[0]
        refused = [
            u for u in self._unpublishable if u.entry[0] > self._done_id and (whole or u.entry[0] <= (upto or 0))
        ]
        if final:
            refused += self._again_refused
        letters = [self._letter(u) for u in refused]
        after = batch.next() if whole else self.position.advanced(batch.to, upto)
        after = replace(
            after,
            timeline=batch.head.timeline,
            totals=self._totals(sent, letters, upto),
            requests=self._progress(final=final),
        )
        return Part(sent, letters, self._cleared(sent, letters, final=final), after, end)

    def done(self, part: Part) -> dict[Entity, int]:
        """A part is committed; the dead letters that there are now."""
        self.position = part.position
        self._done = part.end
        self._finished = part.end == len(self._messages)
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
                self._again_refused.append(unpublishable)

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
                if message.entry[0] >= ids.get(entity, message.entry[0] + 1):
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
        totals = dict(self.position.totals)
        for name in taken.keys() | written.keys() | dead.keys():
            if name not in self._batch.types:
                continue  # what a hand-written INSERT may hold: a position must not grow with it
            totals[name] = totals.get(name, Totals()).plus(entries=taken[name], records=written[name], dead=dead[name])
        return totals

    def _progress(self, *, final: bool) -> dict[str, Mapping[str, Any]]:
        """What the position says of requests: those that are done, until the control table has been told."""
        progress = self._batch.progress
        if final:
            for request, named in self._asked:
                progress[str(request.id)] = {"done": self._outcome(request, named)}
        return progress

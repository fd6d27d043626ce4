"""Shares: what each open request publishes with a batch, and how far it is after each row of it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

from outbox.batch import Batch
from outbox.entry import Entry
from outbox.request import DEAD_LETTERS, NAMELESS, Entity, Found, Request, Row

_EXAMPLES = 20
PAGED = frozenset({"backfill", "history"})
KEYS = 1_000
"""How many of the keys that a request names are looked up for one batch."""

Progress = Mapping[str, Any]
"""What the position says of a request; `{"done": outcome}` when it is over."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one request publishes with a batch: rows, in the order in which they are sent.

    `before` is how far the request was; `last`: whether it is over when all rows are. `left_out` are places of rows
    that are not sent: the batch has an entry of the key, which says what it is as of the same snapshot, or there is
    nothing to send; of those `elsewhere` are another shard's, and do not count. `named` are the dead letters that the
    request means, `gone` the entities of which there is nothing to publish. `error`: why
    nothing can be read for it; the request is over. `source` identifies what a page was read from, `end` is where the
    next begins, if not after the last row.
    """

    request: Request
    rows: Sequence[Row]
    before: Progress
    last: bool
    left_out: AbstractSet[int] = frozenset()
    elsewhere: AbstractSet[int] = frozenset()
    named: Sequence[Entity] = ()
    gone: Sequence[Entity] = ()
    error: str | None = None
    source: str | None = None
    end: Sequence[str] | None = None

    def progress(self, done: int, failed: AbstractSet[Entity]) -> Progress | None:
        """How far it is once the first `done` rows are, given the entities that could not be published.

        None: as far as before. A dead letter that was published is none any more, and nothing else has to tell.
        """
        if self.last and done == len(self.rows):
            return {"done": self._outcome(failed)}
        if self.request.kind in DEAD_LETTERS or not (done or self.end):
            return None
        return self._partly(done, failed)

    def _partly(self, done: int, failed: AbstractSet[Entity]) -> dict[str, Any]:
        rows = self.rows[:done]
        elsewhere = sum(place < done for place in self.elsewhere)
        so_far = {
            "rows": self.before.get("rows", 0) + done - elsewhere,
            "refused": self.before.get("refused", 0) + sum(_entity(row.entry) in failed for row in rows),
        }
        if self.request.kind in PAGED:
            after = self.end if self.end is not None and done == len(self.rows) else rows[-1].at
            return {**so_far, "after": list(after), "source": self.source}
        tombstones = sum(
            row.entry.state is None and row.failure is None and place not in self.left_out
            for place, row in enumerate(rows)
        )
        gone = [*self.before.get("gone", ()), *map(list, self.gone)] if done == len(self.rows) else []
        more = {"tombstones": self.before.get("tombstones", 0) + tombstones, "gone": gone[:_EXAMPLES]}
        return {**so_far, **more, "named": self.before.get("named", 0) + done}

    def _outcome(self, failed: AbstractSet[Entity]) -> dict[str, Any]:
        # The position holds it: counts, and the first of those of which there was nothing.
        match self.request.kind:
            case "drop":
                return {"dropped": len(self.named)}
            case "retry":
                refused = sum(entity in failed for entity in self.named)
                return {
                    "retried": len(self.named) - len(self.gone) - refused,
                    "refused": refused,
                    "not_retained": len(self.gone),
                    "examples": list(map(list, self.gone[:_EXAMPLES])),
                }
            case _:
                so_far = self._partly(len(self.rows), failed) if self.rows else dict(self.before)
                for where in ("after", "source", "named"):
                    so_far.pop(where, None)
                error = {"error": self.error} if self.error is not None else {}
                return {"rows": 0, "refused": 0, **so_far, **error}


def shares(batch: Batch, dead: Mapping[Entity, int]) -> list[Share]:
    """What the open requests publish with a batch that takes them; `dead`: of each dead letter the entry's id."""
    found = batch.found
    in_batch = {_entity(entry) for entry in batch.entries}
    for of in batch.types.values():
        if of.follows:
            in_batch |= {(of.name, entry[2]) for entry in batch.entries if entry[1] == of.follows}
    # The reader gives rows as they come, without names.
    there = {_entity(entry): Row(Entry(*entry)) for entry in found.retained}
    there.update((_entity(row.entry), row) for row in found.current)
    left = dict(dead)
    taken: list[Share] = []
    for request in batch.requests:
        before = batch.position.requests.get(str(request.id), {})
        if "done" in before or request.paused:
            continue  # done, and the control table has not been told yet; or somebody wants it to wait
        if request.arguments.get("type") in found.later:
            continue
        error = found.errors.get(request.arguments.get("type", ""))
        if error is not None and request.kind not in DEAD_LETTERS:
            taken.append(Share(request, (), before, last=True, error=error))
        elif request.kind in DEAD_LETTERS:
            named = request.names(left)
            if request.kind == "retry" and any(_not_yet(entity, found) for entity in named):
                continue
            for entity in named:
                del left[entity]
            wanted = named if request.kind == "retry" else []
            taken.append(_named(request, before, wanted, there, in_batch, found.elsewhere, last=True, named=named))
        elif request.kind == "publish":
            keys, begin = request.arguments["keys"], before.get("named", 0)
            wanted = [(request.arguments["type"], key) for key in keys[begin : begin + KEYS]]
            last = begin + KEYS >= len(keys)
            taken.append(_named(request, before, wanted, there, in_batch, found.elsewhere, last=last))
        elif found.paged is not None and found.paged.request == request.id:
            # Of a history every entry is meant, and what the batch has of the key is a later one.
            of_history = request.kind == "history"
            left_out = (
                frozenset()
                if of_history or not in_batch
                else frozenset(n for n, row in enumerate(found.page) if _entity(row.entry) in in_batch)
            )
            share = Share(request, found.page, before, not found.more, left_out, source=found.source, end=found.end)
            taken.append(share)
    return taken


def _not_yet(entity: Entity, found: Found) -> bool:
    """Whether a dead letter came after the look-up (a batch is read ahead), or its source cannot be read now."""
    return entity[0] in found.later or (entity not in found.looked_for and not entity[1].startswith(NAMELESS))


def _named(
    request: Request,
    before: Progress,
    wanted: Iterable[Entity],
    there: Mapping[Entity, Row],
    in_batch: AbstractSet[Entity],
    of_others: AbstractSet[Entity],
    *,
    last: bool,
    named: Sequence[Entity] = (),
) -> Share:
    rows: list[Row] = []
    left_out: set[int] = set()
    elsewhere: set[int] = set()
    gone: list[Entity] = []
    for entity in wanted:
        if entity in of_others or entity in in_batch or entity not in there:
            if entity in of_others:
                elsewhere.add(len(rows))
            elif entity not in in_batch:
                gone.append(entity)
            left_out.add(len(rows))
            rows.append(Row(Entry(0, *entity, None, 0)))
        else:
            rows.append(there[entity])
    return Share(request, rows, before, last, left_out, elsewhere, named, gone)


def _entity(entry: Entry) -> Entity:
    return entry[1], entry[2]

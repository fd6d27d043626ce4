"""What a consumer is promised, judged by the records that it gets."""

from __future__ import annotations

from collections.abc import Sequence

from model.world import Record


class Wrong(AssertionError):
    """A promise is broken: what happened last, and what is wrong."""


def check_records(topic: Sequence[Record], known: int, what: str) -> None:
    """No duplicate, no older state after a newer: ids grow for each key. The first `known` records were checked.

    A record with id 0 comes from a backfill: once for each key, and what follows it is newer than it.
    """
    newest: dict[str, Record] = {}
    latest: dict[str, Record] = {}
    backfilled: set[str] = set()
    for number, record in enumerate(topic):
        before = latest.get(record.key)
        latest[record.key] = record
        if number >= known and before is not None and 0 in {record.id, before.id}:
            _check_backfilled(record, before, what, again=record.key in backfilled)
        if not record.id:
            backfilled.add(record.key)
            continue
        last = newest.get(record.key)
        newest[record.key] = record
        if last is None or number < known:
            continue
        if record.id == last.id:
            raise Wrong(what, f"entry {record.id} of {record.key} is published twice")
        if record.id < last.id:
            raise Wrong(what, f"entry {record.id} of {record.key} is published after entry {last.id}")
        if record.epoch == last.epoch and record.value[1] == last.value[1] and record.value[0] < last.value[0]:
            raise Wrong(what, f"version {record.value[0]} of {record.key} is published after {last.value[0]}")


def _check_backfilled(record: Record, before: Record, what: str, *, again: bool) -> None:
    if not record.id and again:
        raise Wrong(what, f"{record.key} is backfilled twice")
    if record.epoch != before.epoch or record.value[1] != before.value[1]:
        return
    if record.value[0] < before.value[0]:
        raise Wrong(what, f"version {record.value[0]} of {record.key} is published after {before.value[0]}")
    if record.id and record.value[0] == before.value[0]:
        raise Wrong(what, f"version {record.value[0]} of {record.key} is published again after its backfill")

"""What a consumer is promised, judged by the records that it gets."""

from __future__ import annotations

from collections.abc import Sequence

from model.world import Record


class Wrong(AssertionError):
    """A promise is broken: what happened last, and what is wrong."""


def check_records(topic: Sequence[Record], known: int, what: str) -> None:
    """No duplicate, no older state after a newer: ids grow for each key. The first `known` records were checked."""
    newest: dict[str, Record] = {}
    for number, record in enumerate(topic):
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

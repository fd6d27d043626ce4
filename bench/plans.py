"""Query plans of what the relay, the status and pruning ask: each by its index, and none costs what is retained.

The statements that they really send are recorded, and then explained and run in the same session, with the same
settings. tests/test_plans.py judges small and middle logs, the part `growth` one of ten million entries.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import psycopg

from devstack.processes import ServerError
from outbox.config import Config
from outbox.position import Position, start
from outbox.reader import Reader

SLACK = 40
"""Rows that a statement may touch beside those that it returns: a probe of an index for each slot and shard."""
BATCH = 1_000
"""Rows of a batch of those who are judged."""


class Sent(NamedTuple):
    """A statement as it was sent."""

    text: str
    arguments: Mapping[str, Any]
    connection: psycopg.Connection[Any]


@contextmanager
def recorded() -> Iterator[list[Sent]]:
    """Every statement that is sent within the block, by whatever connection of this process."""
    sent: list[Sent] = []

    def spied(send: Callable[..., Any]) -> Callable[..., Any]:
        def spy(cursor: Any, query: Any, params: Any = None, **options: Any) -> Any:
            text = query.decode() if isinstance(query, bytes) else query
            if isinstance(text, str):
                sent.append(Sent(text, dict(params) if isinstance(params, Mapping) else {}, cursor.connection))
            return send(cursor, query, params, **options)

        return spy

    before = {name: getattr(psycopg.Cursor, name) for name in ("execute", "stream")}
    for name, send in before.items():
        setattr(psycopg.Cursor, name, spied(send))
    try:
        yield sent
    finally:
        for name, send in before.items():
            setattr(psycopg.Cursor, name, send)


def explain(sent: Sent) -> dict[str, Any]:
    """The plan by which the session that sent it runs it, with what it touched."""
    names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", sent.text)))
    text = re.sub(r"%\((\w+)\)s", lambda found: f"${names.index(found[1]) + 1}", sent.text)
    values = [None if sent.arguments[name] is None else str(sent.arguments[name]) for name in names]
    connection = sent.connection
    connection.execute(f"PREPARE explained AS {text}".encode())
    try:
        given = ", ".join("NULL" if value is None else "'" + value.replace("'", "''") + "'" for value in values)
        call = f"EXECUTE explained ({given})" if names else "EXECUTE explained"
        row = connection.execute(f"EXPLAIN (ANALYZE, TIMING off, SUMMARY off, FORMAT JSON) {call}".encode()).fetchone()
    finally:
        connection.execute("DEALLOCATE explained")
    if row is None:
        raise ServerError(f"PostgreSQL explains nothing: {sent.text}")
    plan: dict[str, Any] = row[0][0]["Plan"]
    return plan


def nodes(plan: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The plan and all that is below it, as far as it was run."""
    yield plan
    for child in plan.get("Plans", ()):
        yield from nodes(child)


def touched(plan: Mapping[str, Any]) -> float:
    """How many rows of the log were looked at, in all."""
    return sum(
        float(node["Actual Loops"] * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)))
        for node in nodes(plan)
        if str(node.get("Relation Name", "")).startswith("entries")
    )


def walks(plan: Mapping[str, Any], *, one: bool = False) -> Iterator[Mapping[str, Any]]:
    """Scans of the log that nothing but the shard bounds: they would walk a slot, once it is filled.

    Those of which one row is wanted, in the order of the index, are none: the greatest id.
    """
    one = one or (plan["Node Type"] == "Limit" and plan["Plan Rows"] == 1)
    if str(plan.get("Relation Name", "")).startswith("entries"):
        bound = r"\bxid\b" if plan.get("Index Name", "").endswith("_xid_id_idx") else r"\bid\b"
        if not (one and plan.get("Scan Direction") == "Backward") and not re.search(bound, plan.get("Index Cond", "")):
            yield plan
    for child in plan.get("Plans", ()):
        yield from walks(child, one=one)


def judge(sent: Sequence[Sent], *, news: int = 0, slack: int = SLACK) -> int:
    """How many statements of these read the log; `ServerError` when one of them does it wrongly.

    None may walk a slot, sort a backlog, read without an index, or look at more than what is new.
    """
    kept = set(Reader(Config(database_url="postgresql://", batch_rows=BATCH), shard=0)._sql.values())  # noqa: SLF001  its statements as it sends them
    judged = 0
    for one in sent:
        if (
            "entries" not in one.text
            or not one.text.lstrip().startswith(("SELECT", "WITH"))
            or "prune_slot" in one.text
        ):
            continue
        judged += 1
        plan = explain(one)
        said = f"{one.text}\n{one.arguments}\n{plan}"
        # Its plan is kept while the connection lives: what is empty now may be full then.
        if one.text in kept and (found := list(walks(plan))):
            raise ServerError(f"A slot would be walked: {found}\n{said}")
        for node in nodes(plan):
            relation = str(node.get("Relation Name", ""))
            if not node["Actual Loops"] or not node["Actual Rows"]:
                continue
            index = node.get("Index Name", "")
            if relation.startswith("entries") and not re.fullmatch(r"entries_\d+_shard_(id|xid_id)_idx", index):
                raise ServerError(f"{relation} is read by {node}\n{said}")
            if node["Node Type"] == "Sort" and node["Plans"][0]["Actual Rows"] > max(SLACK, news):
                raise ServerError(f"{node['Plans'][0]['Actual Rows']} rows are sorted\n{said}")
        if touched(plan) > news + slack:
            raise ServerError(f"{touched(plan)} rows were looked at, for {news} new ones\n{said}")
    return judged


def everything(reader: Reader, outbox: str) -> Position:
    """The position at which everything that is visible now is published."""
    begun = start(outbox, 0, "t", 1, None, 1, 0)
    return begun.advanced(reader.look(begun)[0].point, None)


def judge_relay(url: str, outbox: str, put: Callable[[], object]) -> int:
    """Judge what a relay of shard 0 asks: in vain, of what `put` writes, of a backlog's start and its middle.

    How many statements were judged; `ServerError` when one does it wrongly.
    """
    judged = 0
    reader = Reader(Config(database_url=url, batch_rows=BATCH), shard=0)
    reader.open()
    with closing(reader):
        now = everything(reader, outbox)
        begun = start(outbox, 0, "t", 1, None, 1, 0)

        def read(position: Position) -> None:
            nonlocal judged
            with recorded() as sent:
                found = len(reader.read(position).entries)
                reader.look(position)
            judged += judge(sent, news=found)

        read(now)
        put()
        read(now)
        read(begun)
        read(begun.advanced(everything(reader, outbox).point, now.point.floor // 2))
    return judged

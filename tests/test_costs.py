"""What an entry costs, in counts that no clock and no other program of the machine disturbs.

The baseline is costs.json: for each count its values, each with the reason why it became that; the last one is in
force. A count that leaves it fails, upwards and downwards: what became cheaper is written down as well, so that it
stays so.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import opentelemetry.trace  # noqa: F401  with it the writer asks for a trace: the dearer case, in any order of tests
import psycopg
import pytest

import outbox
from devstack.kafka import Kafka
from outbox.config import Config
from outbox.kafka.producer import TransactionalProducer
from outbox.read_ahead import ReadAhead
from outbox.relay import Relay
from outbox.wake import Wake
from relays import environment, must

pytestmark = [pytest.mark.postgres, pytest.mark.kafka]

BASELINE = Path(__file__).with_name("costs.json")
OURS = str(Path(outbox.__file__).parent) + os.sep
ENTRIES = 20_000
"""A fifth of 100,000: the counts are per entry, or per ten batches, and do not depend on how many there are."""
BATCH = 2_000
EXACT = 0.0


class Costs:
    """Counts by name. Statements of the flush are left out: they depend on what others write to the server."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __sub__(self, other: Costs) -> Costs:
        difference = Costs()
        difference.counts = Counter(self.counts)
        difference.counts.subtract(other.counts)
        return difference

    def profile(self, frame: FrameType, event: str, _: object) -> None:
        """Called by the interpreter for each call: counts those that the package's code makes."""
        if event == "c_call":
            caller: FrameType | None = frame
        elif event == "call":
            # What is generated (a NamedTuple's constructor) has no file: its caller tells.
            caller = frame if frame.f_code.co_filename.startswith(OURS) else frame.f_back
        else:
            return
        if caller is not None and caller.f_code.co_filename.startswith(OURS):
            self.counts["calls"] += 1


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, *, calls: bool = True) -> Iterator[Costs]:
    """Count what is done within the block: SQL statements, Kafka transactions and messages, Python calls."""
    costs = Costs()
    execute, stream, commit = psycopg.Cursor.execute, psycopg.Cursor.stream, TransactionalProducer.commit
    send_all = TransactionalProducer.send_all

    def spy_execute(cursor: Any, query: Any, *arguments: Any, **options: Any) -> Any:
        if "wal_flush_lsn" not in str(query) and "emit_message" not in str(query):
            costs.counts["statements"] += 1
        return execute(cursor, query, *arguments, **options)

    def spy_stream(cursor: Any, *arguments: Any, **options: Any) -> Any:
        costs.counts["statements"] += 1
        return stream(cursor, *arguments, **options)

    def spy_commit(producer: Any) -> None:
        costs.counts["transactions"] += 1
        commit(producer)

    def spy_send_all(producer: Any, messages: Any) -> None:
        costs.counts["messages"] += len(messages)
        send_all(producer, messages)

    with monkeypatch.context() as patch:
        patch.setattr(psycopg.Cursor, "execute", spy_execute)
        patch.setattr(psycopg.Cursor, "stream", spy_stream)
        patch.setattr(TransactionalProducer, "commit", spy_commit)
        if not calls:
            # Its wrapper would be one call more for each entry.
            patch.setattr(TransactionalProducer, "send_all", spy_send_all)
            yield costs
            return
        before = sys.getprofile()
        threading.setprofile(costs.profile)
        sys.setprofile(costs.profile)
        try:
            yield costs
        finally:
            sys.setprofile(before)
            threading.setprofile(None)


def hold(name: str, measured: float, *, unit: str, tolerance: float = 0.03) -> None:
    """Compare with the baseline; fail with what to do."""
    history = json.loads(BASELINE.read_text())[name]["values"]
    expected = float(history[-1]["value"])
    if abs(measured - expected) <= tolerance * expected + 1e-9:
        return
    share = f" ({measured / expected - 1:+.1%})" if expected else ""
    more = measured > expected
    pytest.fail(
        f"{name}: {measured:.6g} {unit}, the baseline says {expected:g}{share}.\n"
        + (
            "Something that runs for every entry or batch was added. Find it (git stash, and this test again; "
            "cProfile on `outbox relay --until-caught-up`) and take it out; or, if it is worth it,"
            if more
            else "It became cheaper: so that it stays so,"
        )
        + f' append {{"value": {measured:.6g}, "why": "..."}} to "{name}" in tests/costs.json, with '
        "the reason in a sentence.",
        pytrace=False,
    )


@pytest.fixture
def config(make_outbox: Callable[..., str], outbox_name: str, kafka: Kafka) -> Config:
    """An outbox with the type `thing` and its topic, and how a relay reaches it."""
    url = make_outbox()
    env = environment(url, kafka.bootstrap)
    must(env, "types", "add", "thing", "--topic", f"{outbox_name}.thing", "--partitions", "8")
    must(env, "topics", "apply", "--yes")
    return Config(database_url=url, kafka_bootstrap_servers=kafka.bootstrap, batch_rows=BATCH)


def fill(config: Config, count: int) -> None:
    """Entries of about 280 bytes, each of another key."""
    with psycopg.connect(config.database_url) as connection:
        connection.execute(
            "INSERT INTO outbox.entries (type, key, state)"
            " SELECT 'thing', 'key-' || n, convert_to(repeat('x', 220), 'UTF8') FROM generate_series(1, %s) n",
            [count],
        )


def drain(config: Config) -> int:
    """A relay in this process, until all is published; how many entries that were."""
    with closing(Wake()) as wake:
        relay = Relay(config, wake=wake)
        relay.run(until_caught_up=True)
        return relay.done.entries


def test_what_a_drain_asks_of_the_servers(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten batches: what they cost more than a start that finds nothing."""
    drain(config)
    with counted(monkeypatch, calls=False) as nothing:
        drain(config)
    fill(config, ENTRIES)
    with counted(monkeypatch, calls=False) as all_of_it:
        assert drain(config) == ENTRIES
    costs = (all_of_it - nothing).counts
    hold("sql statements of ten batches", costs["statements"], unit="statements", tolerance=EXACT)
    hold("kafka transactions of ten batches", costs["transactions"], unit="transactions", tolerance=EXACT)
    hold("messages of an entry", costs["messages"] / ENTRIES, unit="messages", tolerance=EXACT)


def test_what_an_entry_costs_in_the_relays_loop(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that the package's code makes: from the row that was read to the message that is handed over."""
    drain(config)
    with counted(monkeypatch) as nothing:
        drain(config)
    fill(config, ENTRIES)
    with counted(monkeypatch) as all_of_it:
        assert drain(config) == ENTRIES
    calls = (all_of_it - nothing).counts["calls"]
    hold("python calls of an entry in the relay", calls / ENTRIES, unit="calls")


@pytest.mark.parametrize(
    ("batches", "name"),
    [(1, "python bytes of an entry in the relay"), (4, "python bytes of an entry in a backlog")],
    ids=["a batch", "a backlog"],
)
def test_what_a_batch_takes_of_memory(config: Config, monkeypatch: pytest.MonkeyPatch, batches: int, name: str) -> None:
    """Python's part at its peak, for each entry of a batch; in a backlog there is the next one, read and made ready."""
    begin = ReadAhead.begin

    def begin_and_end(ahead: ReadAhead, *arguments: Any) -> None:
        begin(ahead, *arguments)
        assert ahead.batch is not None
        assert ahead.batch.exception() is None

    # Whole before the one at hand is sent: otherwise they would meet by chance.
    monkeypatch.setattr(ReadAhead, "begin", begin_and_end)
    # What a first batch leaves behind is not counted; what others left in the interpreter's free lists is, whichever
    # test came before.
    fill(config, BATCH)
    assert drain(config) == BATCH
    fill(config, batches * BATCH)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        assert drain(config) == batches * BATCH
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # Without what a start takes in any case.
    hold(name, (peak - before) / BATCH, unit="bytes", tolerance=0.1)


def test_what_an_entry_costs_the_writer(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """One statement, and few calls around it; many entries take one statement."""
    count = 1_000
    with psycopg.connect(config.database_url) as connection:
        outbox.put(connection, "thing", "first", {"name": "Ada"})
        with counted(monkeypatch) as costs:
            for number in range(count):
                outbox.put(connection, "thing", number, {"name": "Ada"})
        hold("sql statements of an entry in the writer", costs.counts["statements"] / count, unit="statements")
        hold("python calls of an entry in the writer", costs.counts["calls"] / count, unit="calls")
        with counted(monkeypatch) as costs:
            outbox.put_many(connection, "thing", ((number, {"name": "Ada"}) for number in range(count)))
        hold("sql statements of put_many", costs.counts["statements"], unit="statements", tolerance=EXACT)
        hold("python calls of an entry in put_many", costs.counts["calls"] / count, unit="calls")


def test_what_an_insert_costs_the_server(outbox_database: str) -> None:
    """Records in the write-ahead log; and what every insert would have to plan anew."""
    with closing(psycopg.connect(outbox_database)) as connection:
        connection.execute("INSERT INTO outbox.entity_types (name, topic) VALUES ('thing', 'thing')")
        (plan,) = connection.execute(
            "EXPLAIN (ANALYZE, WAL, TIMING off, SUMMARY off, FORMAT JSON)"
            " INSERT INTO outbox.entries (type, key, state)"
            " SELECT 'thing', 'k' || n, '{}' FROM generate_series(1, 10000) n"
        ).fetchone() or ([],)
        hold("wal records of an entry", plan[0]["Plan"]["WAL Records"] / 10_000, unit="records")
        (planned,) = connection.execute(
            "SELECT (SELECT count(*) FROM pg_constraint WHERE conrelid = 'outbox.entries'::regclass AND contype = 'c')"
            " + (SELECT count(*) FROM pg_attribute WHERE attrelid = 'outbox.entries'::regclass AND attgenerated <> '')"
            " + (SELECT count(*) FROM pg_trigger WHERE tgrelid = 'outbox.entries'::regclass)"
        ).fetchone() or (0,)
        hold("expressions that an insert plans anew", planned, unit="of them", tolerance=EXACT)


def test_the_baseline_names_a_reason_for_each_value() -> None:
    """And nothing that is not measured."""
    source = Path(__file__).read_text()
    for name, said in json.loads(BASELINE.read_text()).items():
        assert f'"{name}"' in source, f"nothing measures {name!r}"
        assert said["values"], name
        assert all(len(value["why"]) > 20 for value in said["values"]), name


def test_a_count_that_leaves_its_baseline_says_what_to_do() -> None:
    """Find what was added, or write down why it is worth it; what became cheaper is written down, too."""
    for measured, said in ((20.0, "was added"), (5.0, "cheaper")):
        with pytest.raises(pytest.fail.Exception, match=rf'(?s){said}.*"value": {measured:g}, "why"'):
            hold("kafka transactions of ten batches", measured, unit="transactions")

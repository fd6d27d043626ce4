"""Reconcile: every kind of difference is found and mended, and what is on its way is none."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import psycopg
import pytest
from confluent_kafka import Producer

from consume import live, records
from devstack.kafka import Kafka
from outbox.canonical import json_digest
from owners import Owner, writing
from relays import OUTBOX, RelayProcess, environment, eventually, must, outbox

pytestmark = [pytest.mark.postgres, pytest.mark.kafka]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b'{"a": 1, "b": [true, null]}', b'{"b":[true,null],"a":1}'),
        (b'{"a": 1.0, "b": 1e2}', b'{"a": 1, "b": 100}'),
        (b'{"a": 0.10, "b": -0}', b'{"a": 0.1, "b": 0}'),
        (b"[12345678901234567890123]", b"[12345678901234567890123.0]"),
        (b"[-0, -0.0, -0e5]", b"[0, 0, 0]"),
        (
            b'{"a": "1.5", "b": [{"c": "12345678901234567890123"}]}',
            b'{"b":[{"c":"12345678901234567890123"}],"a":"1.5"}',
        ),
        ('"Zoë"'.encode(), b'"Zo\\u00eb"'),
    ],
)
def test_texts_of_one_value_have_one_digest(one: bytes, other: bytes) -> None:
    """Key order, spaces, escapes and number form say nothing."""
    assert json_digest(one) == json_digest(other) is not None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b"1", b"2"),
        (b"1", b'"1"'),
        (b"0.1", b"0.10000000000000001"),
        (b"12345678901234567890123", b"12345678901234567890124"),
        (b'["1.5", 1.5]', b'["1.5", 1.6]'),
        (b'"1.5"', b'"1.50"'),
        (b"[1,2]", b"[2,1]"),
        (b"1.5", b'{"\\\\u0000number": "1.5"}'),
        (b"null", b"false"),
    ],
)
def test_different_values_have_different_digests(one: bytes, other: bytes) -> None:
    """Exactly, however long the numbers."""
    assert json_digest(one) != json_digest(other)


@pytest.mark.parametrize("text", [b"", b"{", b"NaN", b"\xff", b"\x00rubbish", b"[" * 100_000])
def test_what_is_no_json_has_none(text: bytes) -> None:
    """It is told from a value that differs."""
    assert json_digest(text) is None


@pytest.fixture
def owner(make_outbox: Callable[..., str], outbox_name: str, kafka: Kafka, tmp_path: Path) -> Iterator[Owner]:
    """A service whose table was backfilled, and a relay that runs."""
    url = make_outbox()
    made = Owner(url, outbox_name, environment(url, kafka.bootstrap), kafka, tmp_path)
    made.sql(
        "CREATE TABLE customer (id bigint PRIMARY KEY, name text, version numeric NOT NULL DEFAULT 1.0)",
        "INSERT INTO customer SELECT n, 'customer ' || n FROM generate_series(1, 3000) n",
        """CREATE FUNCTION change(one bigint) RETURNS void LANGUAGE sql AS $$
               UPDATE customer SET version = version + 1 WHERE id = one;
               SELECT outbox.put('customer', one::text, to_jsonb(c)) FROM customer c WHERE id = one $$""",
    )
    made.add_type()
    with RelayProcess(made.env, tmp_path / "relay.log") as relay:
        relay.wait_event("relay.holds")
        must(made.env, "backfill", "start", "customer", "--watch")
        made.running = relay
        yield made


def reconcile(owner: Owner, *options: str) -> tuple[int, dict[str, Any]]:
    done = outbox(owner.env, "reconcile", "customer", *options, "--json", seconds=120)
    assert done.stdout, done.stderr
    return done.returncode, orjson.loads(done.stdout)


def test_what_is_equal_is_told_with_its_count(owner: Owner) -> None:
    """The topic has what the backfill published."""
    code, found = reconcile(owner)
    assert (code, found["equal"], found["moving"]) == (0, 3000, 0)
    assert not any(found[kind] for kind in ("missing", "stale", "orphaned", "undecodable"))


def test_each_kind_of_difference_is_found_and_repaired_and_nothing_else(owner: Owner) -> None:
    """Planted by somebody who writes to the topic by hand."""
    by_hand = Producer({"bootstrap.servers": owner.kafka.bootstrap, "partitioner": "murmur2_random"})
    for key, value in {"7": None, "8": None, "9": b'{"id": 9}', "10": b"\x00rubbish", "extra": b"{}"}.items():
        by_hand.produce(owner.topic, value, key.encode(), headers=[("outbox-id", b"0")])
    assert by_hand.flush(30) == 0
    code, found = reconcile(owner)
    assert code == 1
    assert found["examples"] == {
        "missing": ["7", "8"], "stale": ["9"], "undecodable": ["10"], "orphaned": ["extra"],
    }  # fmt: skip
    assert found["equal"] == 2996
    before = len(records(owner.kafka, owner.topic))
    code, found = reconcile(owner, "--repair")
    assert (code, found["equal"], found["examples"]) == (0, 3000, {})
    assert len(records(owner.kafka, owner.topic)) == before + 5
    assert live(owner.kafka, owner.topic).json == owner.table()


def test_among_100_000_keys_a_few_are_found_and_repaired(owner: Owner) -> None:
    """And a sample says what it knows: of some thousand keys, what all may have at the most."""
    owner.sql("INSERT INTO customer SELECT n, 'customer ' || n FROM generate_series(3001, 100000) n")
    must(owner.env, "backfill", "start", "customer", "--where", "id > 3000", "--watch", seconds=120)
    code, found = reconcile(owner, "--sample", "2000")
    assert (code, found["equal"]) == (0, found["sample"]["keys"])
    assert found["equal"] == pytest.approx(2000, rel=0.15)
    assert found["sample"]["different_at_most"] == pytest.approx(3 / found["equal"], rel=0.01)
    by_hand = Producer({"bootstrap.servers": owner.kafka.bootstrap, "partitioner": "murmur2_random"})
    for key, value in {"70000": None, "80000": b'{"id": 9}', "90000": b"rubbish", "extra": b"{}"}.items():
        by_hand.produce(owner.topic, value, key.encode(), headers=[("outbox-id", b"0")])
    assert by_hand.flush(30) == 0
    before = len(records(owner.kafka, owner.topic))
    code, found = reconcile(owner)
    assert (code, found["equal"]) == (1, 99_997)
    assert found["examples"] == {
        "missing": ["70000"], "stale": ["80000"], "undecodable": ["90000"], "orphaned": ["extra"],
    }  # fmt: skip
    code, found = reconcile(owner, "--repair")
    assert (code, found["equal"]) == (0, 100_000)
    assert len(records(owner.kafka, owner.topic)) == before + 4


def test_a_sample_of_a_topic_that_is_wrong_says_so(owner: Owner) -> None:
    """The share that differs in it bounds that of all."""
    owner.running.stop()
    owner.sql("UPDATE customer SET name = 'another' WHERE id % 10 = 0")
    with RelayProcess(owner.env, owner.directory / "again.log"):
        code, found = reconcile(owner, "--sample", "1000")
    assert code == 1
    assert found["stale"] == pytest.approx(100, rel=0.4)
    assert 0.1 < found["sample"]["different_at_most"] < 0.2


COMPARISONS = """
def normal(state: bytes) -> bytes:
    return " ".join(sorted(state.decode("ascii").split())).encode()

def broken(state: bytes) -> bytes:
    raise KeyError("nothing")

def texts(state: bytes) -> str:
    return state.decode()

number = 5
seen, again = set(), []

def tired(state: bytes) -> bytes:
    if state in seen:
        again.append(state)  # in the source as well
    seen.add(state)
    if len(again) > 500:
        raise RuntimeError("enough")
    return state
"""


def test_what_is_no_json_is_compared_as_its_type_says(owner: Owner, tmp_path: Path) -> None:
    """By its bytes, or by a function of the service's: words whose order says nothing."""
    (tmp_path / "words.py").write_text(COMPARISONS)
    owner.env["PYTHONPATH"] = str(tmp_path)
    source = (
        "SELECT id::text AS key, convert_to(name, 'UTF8') AS state, 'text/x-words' AS content_type, id FROM customer c"
    )
    must(owner.env, "types", "change", "customer", "--source", source)
    must(owner.env, "backfill", "start", "customer", "--watch")
    last = {record.key: record for record in records(owner.kafka, owner.topic)}
    assert {dict(record.headers).get("content-type") for record in last.values()} == {b"text/x-words"}
    by_hand = Producer({"bootstrap.servers": owner.kafka.bootstrap, "partitioner": "murmur2_random"})
    for key, value in {"7": b"7 customer", "8": b"\xff", "9": b"customer"}.items():
        by_hand.produce(owner.topic, value, key.encode(), headers={"outbox-id": b"0", "content-type": b"text/x-words"})
    assert by_hand.flush(30) == 0
    assert reconcile(owner)[1]["examples"] == {"stale": ["7", "8", "9"]}
    must(owner.env, "types", "change", "customer", "--comparison", "words:normal")
    code, found = reconcile(owner)
    assert (code, found["examples"]) == (1, {"stale": ["9"], "undecodable": ["8"]})
    must(owner.env, "types", "change", "customer", "--comparison", "json")
    assert reconcile(owner)[1]["undecodable"] == 3000
    must(owner.env, "types", "change", "customer", "--comparison", "bytes")
    assert reconcile(owner)[1]["examples"] == {"stale": ["7", "8", "9"]}
    for wrong, said in {
        "words:broken": "failed: KeyError",
        "words:texts": "returned a str",
        "words:number": "no function",
        "words:missing": "has no missing",
        # Of the topic all, and some of the source: the query is not read to its end.
        "words:tired": "failed: RuntimeError: enough",
        "nowhere:normal": "cannot be imported",
    }.items():
        must(owner.env, "types", "change", "customer", "--comparison", wrong)
        told = outbox(owner.env, "reconcile", "customer")
        assert (told.returncode, said in told.stderr) == (2, True), told.stderr
    refused = outbox(owner.env, "types", "change", "customer", "--comparison", "words")
    assert (refused.returncode, "is no comparison" in refused.stderr) == (78, True)
    must(owner.env, "types", "change", "customer", "--comparison", "content-type")
    code, found = reconcile(owner, "--repair")
    assert (code, found["equal"]) == (0, 3000)


def test_under_writers_no_false_difference_is_reported(owner: Owner) -> None:
    """Hot keys among them: what never holds still is told as that, and what is on its way is looked at again."""

    def change(connection: psycopg.Connection, draw: random.Random) -> None:
        connection.execute("SELECT change(%s)", [draw.choice((draw.randint(1, 20), draw.randint(1, 3000)))])

    # Each reconcile reads the whole topic: it must not grow without end.
    with writing(owner.url, 4, change, pause=0.02):
        for _ in range(20):
            code, found = reconcile(owner)
            assert not any(found[kind] for kind in ("missing", "stale", "orphaned", "undecodable")), found
            assert (code == 0) == (not found["moving"])
            assert found["moving"] <= 100
    eventually(lambda: reconcile(owner)[0] == 0)


def test_what_cannot_be_told_is_exit_code_2(owner: Owner, tmp_path: Path) -> None:
    """No relay publishes what is committed; no source."""
    owner.running.kill()
    with psycopg.connect(owner.url) as connection:
        connection.execute("SELECT change(1)")
        told = outbox(owner.env, "reconcile", "customer")
        assert told.returncode == 0, told.stderr  # not committed: nothing to wait for
    told = outbox(owner.env, "reconcile", "customer", "--timeout", "1")
    assert (told.returncode, "has not published" in told.stderr) == (2, True)
    told = outbox(owner.env, "reconcile", "customer", "--timeout", "1", "--json")
    said = orjson.loads(told.stderr)
    assert (told.returncode, said["exit_code"], "outbox status" in said["cure"]) == (2, 2, True)
    must(owner.env, "types", "add", "other", "--topic", f"{owner.name}.other")
    told = outbox(owner.env, "reconcile", "other")
    assert (told.returncode, "has no source" in told.stderr) == (2, True)


def test_rows_of_one_key_are_no_source_to_compare_with(owner: Owner) -> None:
    """Which of them is meant nobody knows: neither is equal, and neither is repaired."""
    source = "SELECT (id % 2000)::text AS key, to_jsonb(c) AS state, id FROM customer c"
    must(owner.env, "types", "change", "customer", "--source", source)
    told = outbox(owner.env, "reconcile", "customer", "--repair", "--json")
    said = orjson.loads(told.stderr)
    assert (told.returncode, "rows of one key: '1', '10', '100'" in said["error"]) == (2, True), said


def test_a_key_that_is_no_text_is_told_and_not_repaired(owner: Owner) -> None:
    """A tombstone under the text that it looks like would be another key's."""
    by_hand = Producer({"bootstrap.servers": owner.kafka.bootstrap})
    by_hand.produce(owner.topic, b"{}", b"\xff\xfe")
    assert by_hand.flush(30) == 0
    before = len(records(owner.kafka, owner.topic))
    for options in ([], ["--repair"]):
        code, found = reconcile(owner, *options)
        assert (code, found["examples"], found["equal"]) == (1, {"undecodable": ["bytes fffe"]}, 3000)
    assert len(records(owner.kafka, owner.topic)) == before


def test_what_differs_is_said_with_what_mends_it(owner: Owner) -> None:
    """And how many there are beyond those that are named."""
    owner.sql("DELETE FROM customer WHERE id <= 30")
    told = outbox(owner.env, "reconcile", "customer")
    assert (told.returncode, "orphaned: and 10 more\n" in told.stdout) == (1, True)
    assert "outbox reconcile customer --repair" in told.stderr


def test_what_is_ended_by_a_signal_leaves_no_files(owner: Owner, tmp_path: Path) -> None:
    """As when a job has run out of its time."""
    owner.running.kill()
    owner.sql("SELECT change(1)")  # nobody publishes it: it waits
    files = tmp_path / "files"
    files.mkdir()
    command = [str(OUTBOX), "reconcile", "customer", "--timeout", "600"]
    with subprocess.Popen(command, env={**owner.env, "TMPDIR": str(files)}) as running:
        eventually(lambda: list(files.iterdir()))
        running.terminate()
    assert (running.returncode, list(files.iterdir())) == (143, [])

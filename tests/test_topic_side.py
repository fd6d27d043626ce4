"""The topic's side of a comparison, filled by a process of its own: the same as here, and its failures are said."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from confluent_kafka import Producer

from devstack.kafka import Kafka
from outbox import topic_side
from outbox.equality import Equality
from outbox.errors import ConfigError, OutboxError
from outbox.kafka import reader
from outbox.kafka.admin import Admin
from outbox.topic_side import Reading, beside
from relays import eventually

pytestmark = pytest.mark.kafka


@pytest.fixture
def reading(kafka: Kafka, outbox_name: str) -> Reading:
    """A topic with 5,000 records of 1,000 keys, a tombstone the last one of every tenth."""
    with Admin(kafka.bootstrap, {}) as admin:
        admin.create(outbox_name, partitions=3, replication_factor=1, settings={"cleanup.policy": "compact"})
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "queue.buffering.max.messages": 100_000})
    for number in range(5_000):
        key = number % 1_000
        gone = number >= 4_000 and key % 10 == 0
        producer.produce(outbox_name, None if gone else b'{"n":%d}' % number, f"k{key}")
    assert producer.flush(30) == 0
    starts, ends = reader.bounds(kafka.bootstrap, {}, outbox_name)
    return Reading(kafka.bootstrap, {}, outbox_name, starts, ends)


def filled(path: Path) -> list[tuple[object, ...]]:
    """What a side holds."""
    with closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT key, value, bytes, valued, look FROM topic ORDER BY key").fetchall()


def slow(state: bytes) -> bytes:
    """A comparison that never ends: whoever waits for it is told that its process was killed."""
    signal.pause()
    return state


def wrong(state: bytes) -> bytes:
    """A comparison that fails."""
    raise RuntimeError(f"not {state[:5]!r}")


def test_another_process_fills_the_side_as_this_one_does(
    reading: Reading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with beside(tmp_path / "here", Equality(), reading, lambda _: None) as topic:
        assert not multiprocessing.active_children()
        topic.wait()
    monkeypatch.setattr(topic_side, "_WORTH", 0)
    with beside(tmp_path / "there", Equality(), reading, lambda _: None) as topic:
        assert len(multiprocessing.active_children()) == 1
        topic.wait()
    here = filled(tmp_path / "here")
    assert here == filled(tmp_path / "there")
    assert (len(here), sum(row[2] is None for row in here)) == (1_000, 100)


def test_a_function_that_has_no_name_elsewhere_is_asked_here(
    reading: Reading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topic_side, "_WORTH", 0)
    equality = Equality("a:b", lambda state: state[:1])
    with beside(tmp_path / "side", equality, reading, lambda _: None) as topic:
        assert not multiprocessing.active_children()
        topic.wait()
    assert len({row[1] for row in filled(tmp_path / "side")}) == 2  # what is there, and tombstones


def test_what_goes_wrong_in_the_other_process_is_raised_here(
    reading: Reading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With its cure."""
    monkeypatch.setattr(topic_side, "_WORTH", 0)
    with (
        pytest.raises(ConfigError, match="a:b failed: RuntimeError: not b") as failed,
        beside(tmp_path / "side", Equality("a:b", wrong), reading, lambda _: None) as topic,
    ):
        topic.wait()
    assert "ValueError" in failed.value.cure
    assert "in wrong" in str(failed.value.__cause__)  # where in the other process


class Unknown:
    """Something that another process cannot make again."""

    def __call__(self, state: bytes) -> bytes:
        return state

    def __reduce__(self) -> tuple[object, ...]:
        return _missing, ()


def _missing() -> Unknown:
    if multiprocessing.parent_process() is not None:
        raise ImportError("no such module here")
    return Unknown()


def test_what_the_other_process_cannot_be_given_is_said(
    reading: Reading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And nothing is written beside what is said."""
    monkeypatch.setattr(topic_side, "_WORTH", 0)
    with (
        pytest.raises(ImportError, match="no such module here"),
        beside(tmp_path / "side", Equality("a:b", Unknown()), reading, lambda _: None) as topic,
    ):
        topic.wait()
    assert capfd.readouterr() == ("", "")


def test_what_goes_wrong_there_is_heard_by_who_looks(
    reading: Reading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the other side is read to its end."""
    monkeypatch.setattr(topic_side, "_WORTH", 0)
    with beside(tmp_path / "side", Equality("a:b", wrong), reading, lambda _: None) as topic:

        def fails() -> bool:
            try:
                topic.look()
            except ConfigError:
                return True
            return False

        eventually(fails)


def test_a_topic_whose_keys_are_written_often_grows_with_its_keys(
    reading: Reading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What came is brought together with what is there whenever it is as much."""
    most = 0

    def told(_read: int) -> None:
        nonlocal most
        with closing(sqlite3.connect(tmp_path / "side")) as database:
            most = max(most, *database.execute("SELECT count(*) FROM records").fetchone())

    monkeypatch.setattr(topic_side, "_FOLDED", 500)
    monkeypatch.setattr(topic_side, "ROWS_AT_ONCE", 100)
    with beside(tmp_path / "side", Equality(), reading, told):
        pass
    with beside(tmp_path / "whole", Equality(), reading, lambda _: None):
        pass
    assert filled(tmp_path / "side") == filled(tmp_path / "whole")
    assert most <= 1_000  # of 5,000 records; there are 1,000 keys


def test_the_other_process_ends_with_the_one_that_asked(reading: Reading, tmp_path: Path) -> None:
    """Which is killed, and can end nobody."""
    script = (
        "import multiprocessing, sys\n"
        "from outbox import topic_side\n"
        "from test_topic_side import slow, Equality, Reading, Path\n"
        "if __name__ == '__main__':\n"
        "    topic_side._WORTH = 0\n"
        f"    reading = Reading({reading.bootstrap!r}, {{}}, {reading.topic!r}, {dict(reading.starts)!r},"
        f" {dict(reading.ends)!r})\n"
        f"    with topic_side.beside(Path({str(tmp_path / 'side')!r}), Equality('a:b', slow), reading,"
        " lambda _: None) as topic:\n"
        "        print(multiprocessing.active_children()[0].pid, flush=True)\n"
        "        topic.wait()\n"
    )
    path = tmp_path / "asks.py"
    path.write_text(script)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, str(path)], stdout=subprocess.PIPE, text=True, env=environment) as asks:
        assert asks.stdout is not None
        pid = int(asks.stdout.readline())
        asks.kill()
    eventually(lambda: not Path(f"/proc/{pid}").exists() or "State:\tZ" in Path(f"/proc/{pid}/status").read_text())


@pytest.mark.parametrize("ended", ["killed", "left"])
def test_another_process_that_does_not_end_is_ended(
    reading: Reading, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ended: str
) -> None:
    """By somebody else: that is said; or because nobody waits for it any more."""
    monkeypatch.setattr(topic_side, "_WORTH", 0)

    def fill(end: Callable[[int], object]) -> None:
        with beside(tmp_path / "side", Equality("a:b", slow), reading, lambda _: None) as topic:
            (process,) = multiprocessing.active_children()
            assert process.pid is not None
            end(process.pid)
            topic.wait()

    if ended == "killed":
        with pytest.raises(OutboxError, match="ended by signal 9"):
            fill(lambda pid: os.kill(pid, signal.SIGKILL))
    else:
        with pytest.raises(ZeroDivisionError):
            fill(lambda pid: divmod(pid, 0))
    eventually(lambda: not multiprocessing.active_children())

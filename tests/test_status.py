"""`outbox status` on real servers: what waits, what was published, and what the relay is doing."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from devstack.kafka import Kafka
from relays import OUTBOX, RelayProcess, environment, eventually, must

pytestmark = [pytest.mark.postgres, pytest.mark.kafka]


@pytest.fixture
def env(make_outbox: Callable[..., str], outbox_name: str, kafka: Kafka) -> dict[str, str]:
    """An outbox with the type `thing` and its topics; no relay runs."""
    made = environment(make_outbox(), kafka.bootstrap)
    must(made, "types", "add", "thing", "--topic", f"{outbox_name}.thing")
    must(made, "topics", "apply", "--yes")
    return made


def put(env: dict[str, str], *keys: str) -> None:
    with psycopg.connect(env["OUTBOX_DATABASE_URL"]) as connection:
        for key in keys:
            connection.execute("SELECT outbox.put('thing', %s, '{}')", [key])


def status(env: dict[str, str], *more: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(must(env, "status", "--json", *more))
    return found


def test_before_the_first_relay_everything_is_unpublished(env: dict[str, str]) -> None:
    """With the age of the oldest, and why nothing goes on."""
    put(env, "a", "a", "b")
    seen = status(env)
    (thing,), (shard,) = seen["types"], seen["shards"]
    assert (thing["type"], thing["unpublished"], thing["published"]) == ("thing", 3, 0)
    assert thing["oldest_seconds"] >= 0
    assert (shard["state"], shard["on"]) == ("not running", "no relay is connected; unpublished entries wait")
    assert sum(slot["entries"] for slot in seen["ring"]) == 3


def test_after_a_drain_the_totals_tell_entries_records_and_collapse(env: dict[str, str]) -> None:
    """Three entries of two keys in one batch are two records."""
    put(env, "a", "a", "b")
    must(env, "relay", "--until-caught-up")
    (thing,) = status(env)["types"]
    assert (thing["unpublished"], thing["published"], thing["records"]) == (0, 3, 2)
    assert (thing["collapse_ratio"], thing["oldest_seconds"]) == (1.5, None)
    put(env, "c")
    (thing,) = status(env)["types"]
    assert (thing["unpublished"], thing["published"]) == (1, 3)


def test_an_entry_of_a_transaction_that_was_open_counts_when_it_commits(env: dict[str, str]) -> None:
    """Counted by the position's rule: its id is below the anchor, and it is not published."""
    with psycopg.connect(env["OUTBOX_DATABASE_URL"]) as late:
        late.execute("SELECT outbox.put('thing', 'late', '{}')")
        put(env, "early")
        must(env, "relay", "--until-caught-up")
        (thing,) = status(env)["types"]
        assert (thing["unpublished"], thing["published"]) == (0, 1)
        late.commit()
        (thing,) = status(env)["types"]
        assert (thing["unpublished"], thing["published"]) == (1, 1)


def test_dead_letters_are_counted(env: dict[str, str]) -> None:
    """An entry that cannot be published is no longer unpublished."""
    with psycopg.connect(env["OUTBOX_DATABASE_URL"]) as connection:
        # Past the check of the writer's functions, and beyond what the topic takes.
        connection.execute(
            "INSERT INTO outbox.entries (type, key, state) VALUES ('thing', 'a', repeat('x', 1100000)::bytea)"
        )
    must(env, "relay", "--until-caught-up")
    (thing,) = status(env)["types"]
    assert (thing["unpublished"], thing["dead_letters"]) == (0, 1)


def test_an_idle_relay_and_one_that_waits_for_kafka_are_told_apart(env: dict[str, str], tmp_path: Path) -> None:
    """The relay shows its state in pg_stat_activity."""

    def state(env: dict[str, str]) -> tuple[str, str | None]:
        (shard,) = status(env)["shards"]
        return shard["state"], shard["on"]

    with RelayProcess(env, tmp_path / "idle.log") as relay:
        relay.wait_event("relay.holds")
        eventually(lambda: state(env) == ("idle", None), what="idle")
    unnamed = {**env, "OUTBOX_KAFKA_BOOTSTRAP_SERVERS": ""}
    with RelayProcess({**env, "OUTBOX_KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1"}, tmp_path / "waiting.log") as relay:
        relay.wait_event("relay.waiting", seconds=60)
        eventually(lambda: state(unnamed) == ("waiting", "kafka"), what="waiting for kafka")
    eventually(lambda: state(unnamed)[0] == "not running", what="not running")


def test_watch_prints_a_line_a_sample_and_ctrl_c_ends_it_with_0(env: dict[str, str]) -> None:
    """For a script that follows it."""
    command = [str(OUTBOX), "status", "--watch", "--json", "--interval", "0.1"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        for _ in range(2):
            assert json.loads(watching.stdout.readline())["types"][0]["type"] == "thing"
        watching.send_signal(signal.SIGINT)
        _, said = watching.communicate(timeout=20)
    assert watching.returncode == 0, said
    assert "Traceback" not in said


def test_for_people_it_is_a_table(env: dict[str, str]) -> None:
    """Every number of the JSON form that matters has a heading."""
    put(env, "a")
    text = must(env, "status")
    for word in ("UNPUBLISHED", "OLDEST", "RATIO", "DEAD", "thing", "not running", "ring: 1 of 12 slots"):
        assert word in text

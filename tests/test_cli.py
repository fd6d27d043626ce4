"""The command line with everything that can be wrong: one clear sentence, the cure, a documented exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest

from devstack.kafka import Kafka
from devstack.postgres import Postgres
from devstack.processes import free_port
from relays import environment, must, outbox

pytestmark = [pytest.mark.postgres, pytest.mark.kafka]

# Every command that talks to the database, and which of them talk to Kafka too.
WITH_KAFKA = (
    ("topics", "plan"),
    ("topics", "apply", "--yes"),
    ("topics", "check"),
    ("relay", "--until-caught-up"),
    ("prune",),
    ("dead-letters", "list"),
    ("adopt", "--yes"),
)
COMMANDS = (
    ("types", "list"),
    ("types", "add", "x", "--topic", "x"),
    ("types", "change", "x", "--max-bytes", "5"),
    ("types", "remove", "x", "--yes"),
    ("status",),
    *WITH_KAFKA,
)


def refused(env: dict[str, str], arguments: tuple[str, ...], code: int, *words: str) -> None:
    """Assert that a command is refused in words, and in JSON for scripts."""
    done = outbox(env, *arguments, seconds=90)
    assert done.returncode == code, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr + done.stdout
    for word in words:
        assert word in done.stderr, f"{arguments}: {done.stderr}"


@pytest.fixture
def nowhere(tmp_path: Path) -> dict[str, str]:
    """An environment in which nothing answers."""
    return environment(f"postgresql://nobody@127.0.0.1:{free_port()}/x", f"127.0.0.1:{free_port()}")


@pytest.mark.parametrize("arguments", [c for c in COMMANDS if c[0] != "relay"], ids=" ".join)
def test_an_unreachable_database(nowhere: dict[str, str], arguments: tuple[str, ...]) -> None:
    """Exit 69; it may come back."""
    refused(nowhere, arguments, 69, "cannot be reached", "OUTBOX_DATABASE_URL")


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_database_without_an_outbox(database_url: str, kafka: Kafka, arguments: tuple[str, ...]) -> None:
    """Exit 78, and the migration to write."""
    refused(environment(database_url, kafka.bootstrap), arguments, 78, "outbox migrate --name NAME")


@pytest.mark.parametrize("arguments", [("types", "list"), ("relay", "--until-caught-up"), ("status",)], ids=" ".join)
def test_a_wrong_name_is_refused(outbox_database: str, kafka: Kafka, arguments: tuple[str, ...]) -> None:
    """The name is checked, never set."""
    refused(environment(outbox_database, kafka.bootstrap, name="tset"), arguments, 78, '"test"', '"tset"')


def test_a_wrong_password(postgres: Postgres, tmp_path: Path) -> None:
    """Exit 77: trying again does not help. The password is not in the message."""
    with Postgres(tmp_path / "guarded", options={"fsync": "off"}) as server:
        with psycopg.connect(server.url(), autocommit=True) as admin:
            admin.execute("CREATE ROLE guarded LOGIN PASSWORD 'right'")
        hba = server.data / "pg_hba.conf"
        hba.write_text("host all guarded 127.0.0.1/32 scram-sha-256\n" + hba.read_text())
        server.restart()
        env = environment(server.url(user="guarded", password="wr0ng-s3cret"), "127.0.0.1:1")
        done = outbox(env, "types", "list")
        assert done.returncode == 77
        assert "password" in done.stderr
        assert "wr0ng-s3cret" not in done.stderr


@pytest.mark.parametrize("arguments", [c for c in WITH_KAFKA if c[0] not in {"relay", "adopt"}], ids=" ".join)
def test_kafka_is_not_there(outbox_database: str, arguments: tuple[str, ...]) -> None:
    """Exit 69."""
    refused(environment(outbox_database, f"127.0.0.1:{free_port()}"), arguments, 69, "Kafka does not answer")


def test_status_shows_the_databases_half_without_kafka(outbox_database: str) -> None:
    """And says so: exit 69 where Kafka is named and does not answer; what only it knows is not known."""
    with psycopg.connect(outbox_database) as connection:
        connection.execute("INSERT INTO outbox.entity_types (name, topic) VALUES ('thing', 'thing')")
        connection.execute("INSERT INTO outbox.entries (type, key, state) VALUES ('thing', 'k', '{}')")
    for bootstrap, code in ((f"127.0.0.1:{free_port()}", 69), ("", 0)):
        done = outbox(environment(outbox_database, bootstrap), "status", "--json")
        assert done.returncode == code, done.stderr
        status = json.loads(done.stdout)
        assert "Kafka" in status["kafka"]
        assert status["name"] == "test"
        assert (status["types"][0]["unpublished"], status["types"][0]["published"]) == (None, None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"batch_rows": "many"}, ("batch_rows", "a whole number")),
        ({"on_lost_tail": "cry"}, ("on_lost_tail", "adopt, stop")),
        ({"poll_interval": "-1"}, ("poll_interval", "seconds")),
        ({"config": "/nowhere/outbox.toml"}, ("/nowhere/outbox.toml",)),
    ],
)
def test_a_bad_setting_is_refused_with_its_source(settings: dict[str, str], words: tuple[str, ...]) -> None:
    """Exit 78, before anything is done."""
    refused(environment("postgresql://x@127.0.0.1/x", "x:1", **settings), ("config",), 78, *words)


def test_a_file_with_an_unknown_or_weakening_setting_is_refused(tmp_path: Path) -> None:
    """With the name that was likely meant; with the reason."""
    env = environment("postgresql://x@127.0.0.1/x", "x:1", config=str(tmp_path / "outbox.toml"))
    (tmp_path / "outbox.toml").write_text("batch_row = 5\n")
    refused(env, ("config",), 78, "batch_row", "batch_rows")
    (tmp_path / "outbox.toml").write_text('[kafka]\nacks = "1"\n')
    refused(env, ("config",), 78, "acks", "exactly-once")


def test_flag_over_environment_over_file_over_default(tmp_path: Path) -> None:
    """And `outbox config` says where each comes from; the password is masked."""
    file = tmp_path / "outbox.toml"
    file.write_text('schema = "file"\nbatch_rows = 7\npoll_interval = 3\n[kafka]\n"sasl.password" = "hush"\n')
    env = environment("postgresql://ann:hush@db/x", "k:1", config=str(file), schema="env", batch_rows="8")
    text = must(env, "config", "--json", "--schema", "flag")
    assert "hush" not in text
    shown = json.loads(text)
    assert [
        (shown[n]["value"], shown[n]["source"].split(",")[0]) for n in ("schema", "batch_rows", "poll_interval")
    ] == [
        ("flag", "flag --schema"),
        (8, "environment"),
        (3.0, str(file)),
    ]
    assert shown["lock_tries"]["source"] == "default"


def test_an_unknown_type(outbox_database: str, kafka: Kafka) -> None:
    """Names the command that lists them."""
    env = environment(outbox_database, kafka.bootstrap)
    refused(env, ("types", "change", "nope", "--max-bytes", "5"), 65, '"nope"', "outbox types list")


def test_without_a_terminal_nothing_is_asked(outbox_database: str, kafka: Kafka) -> None:
    """Exit 2 and how to say that it is meant."""
    env = environment(outbox_database, kafka.bootstrap)
    must(env, "types", "add", "user", "--topic", "t.user")
    refused(env, ("topics", "apply"), 2, "--yes")
    refused(env, ("types", "remove", "user"), 2, "--yes")


def test_two_types_cannot_share_a_topic_and_odd_settings_are_refused(outbox_database: str, kafka: Kafka) -> None:
    """Refused early; nothing is lost."""
    env = environment(outbox_database, kafka.bootstrap)
    must(env, "types", "add", "a", "--topic", "same")
    refused(env, ("types", "add", "b", "--topic", "same"), 78, "already belongs")
    refused(env, ("types", "add", "a", "--topic", "other"), 78, "there already")
    refused(env, ("types", "add", "c", "--topic", "c", "--topic-setting", "cleanup.policy=delete"), 78, "lose")
    refused(env, ("types", "add", "c", "--topic", "c", "--topic-setting", "retention.weeks=1"), 78, "retention.weeks")
    refused(env, ("types", "add", "c", "--topic", "a b"), 78, "letters")


def test_topics_are_planned_made_checked_and_mended(outbox_database: str, kafka: Kafka, outbox_name: str) -> None:
    """Drift is shown and mended; a second apply does nothing."""
    env = environment(outbox_database, kafka.bootstrap)
    topic = f"{outbox_name}.user"
    must(env, "types", "add", "user", "--topic", topic, "--partitions", "3")
    assert any(a["topic"] == topic and a["kind"] == "create" for a in json.loads(must(env, "topics", "plan", "--json")))
    must(env, "topics", "apply", "--yes")
    assert json.loads(must(env, "topics", "check", "--json"))["equal"]
    must(env, "types", "change", "user", "--topic-setting", "segment.ms=5000")
    assert outbox(env, "topics", "check").returncode == 1
    done = json.loads(must(env, "topics", "apply", "--yes", "--json"))
    assert [(a["kind"], a["topic"]) for a in done["done"]] == [("change", topic)]
    must(env, "topics", "check")
    must(env, "types", "change", "user", "--partitions", "5")
    assert outbox(env, "topics", "apply", "--yes").returncode == 1
    must(env, "topics", "apply", "--yes", "--grow")
    must(env, "topics", "check")


def test_prune_empties_what_is_old_and_published_and_nothing_else(
    make_outbox: Callable[..., str], kafka: Kafka, outbox_name: str
) -> None:
    """Never a slot that a shard still needs; the greatest id removed is recorded."""
    url = make_outbox(retention="1 day")
    env = environment(url, kafka.bootstrap)
    must(env, "types", "add", "user", "--topic", f"{outbox_name}.user")
    must(env, "topics", "apply", "--yes")
    with psycopg.connect(url, autocommit=True) as connection:
        # Slots that the clock does not point at, nor soon will.
        (now,) = connection.execute("SELECT outbox.slot_of(clock_timestamp())").fetchone() or (0,)
        first, second, third = ((now + ahead) % 12 for ahead in (4, 5, 6))
        old = """INSERT INTO outbox.entries (type, key, state, slot, created_at)
                 SELECT 'user', n::text, '{}', %s, now() - interval '3 days' FROM generate_series(1, 10) n"""
        connection.execute(old, [first])
        connection.execute(old, [second])

        def prune(*flags: str) -> dict[int, dict[str, Any]]:
            return {slot["slot"]: slot for slot in json.loads(must(env, "prune", "--json", *flags))["slots"]}

        assert not any(slot["pruned"] for slot in prune().values())
        must(env, "relay", "--until-caught-up")
        # The last entry is the anchor: its slot stays until newer ones have been published.
        would = prune("--dry-run")
        assert [number for number, slot in would.items() if slot["pruned"]] == [first]
        assert "anchor" in would[second]["reason"]
        # As old as the others: younger entries with smaller ids would keep what comes after them.
        connection.execute(
            """INSERT INTO outbox.entries (type, key, state, slot, created_at)
               VALUES ('user', 'new', '{}', %s, now() - interval '3 days')""",
            [(now + 8) % 12],
        )
        must(env, "relay", "--until-caught-up")
        connection.execute(
            """INSERT INTO outbox.entries (type, key, state, slot, created_at)
               VALUES ('user', 'unpublished', '{}', %s, now() - interval '3 days')""",
            [third],
        )
        pruned = prune()
        gone = {number: slot["entries"] for number, slot in pruned.items() if slot["pruned"]}
        assert gone == {first: 10, second: 10}
        assert "anchor" in pruned[third]["reason"]
        assert connection.execute("SELECT removed_id FROM outbox.settings").fetchone() == (20,)
        assert connection.execute("SELECT count(*) FROM outbox.entries").fetchone() == (2,)


def test_completion_is_printed_for_each_shell() -> None:
    """Bash, zsh and fish."""
    for shell in ("bash", "zsh", "fish"):
        assert "_OUTBOX_COMPLETE" in must({"PATH": "/usr/bin:/bin"}, "completion", shell)


def test_an_unknown_command_names_the_one_that_was_meant() -> None:
    """Exit 2."""
    refused(environment("postgresql://x@y/z", "x:1"), ("statsu",), 2, "status")


def test_a_time_limit_that_is_not_a_number_is_refused(nowhere: dict[str, str]) -> None:
    """Python reads `nan` as a number, and it passes every comparison with a bound."""
    refused(nowhere, ("relay", "--until-caught-up", "--timeout", "nan"), 2, "no number of seconds")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("backfill", "start", "x", "--rate", "nan"), "no number of rows"),
        (("backfill", "start", "x", "--rate", "inf"), "not in the range"),
        (("backfill", "watch", "99999999999999999999"), "not in the range"),
        (("replay", "--type", "x", "--id", "210:208"), "ends before it begins"),
        (("replay", "--type", "x", "--since", "2026-01-02T00:00", "--until", "2026-01-01T00:00"), "later than --until"),
    ],
)
def test_a_number_or_a_range_that_cannot_be_is_refused(
    nowhere: dict[str, str], arguments: tuple[str, ...], words: str
) -> None:
    """Before any server is asked."""
    refused(nowhere, arguments, 2, words)


def test_with_json_an_error_is_json(nowhere: dict[str, str]) -> None:
    """On standard error, with the exit code."""
    done = outbox(nowhere, "types", "list", "--json")
    said = json.loads(done.stderr)
    assert said["exit_code"] == done.returncode == 69
    assert said["cure"]


def test_a_source_whose_order_no_index_gives_is_taken_with_a_warning(outbox_database: str) -> None:
    """The columns that the key is made of mend it; what is no source is refused."""
    env = environment(outbox_database, "x:1")
    with psycopg.connect(outbox_database) as connection:
        connection.execute("CREATE TABLE customer (id int PRIMARY KEY, name text)")
    slow = "SELECT id::text AS key, to_jsonb(t) AS state FROM customer t"
    added = outbox(env, "types", "add", "customer", "--topic", "customer", "--source", slow)
    assert added.returncode == 0, added.stderr
    assert "no index gives the order of key" in added.stderr
    changed = outbox(env, "types", "change", "customer", "--source", slow.replace("state FROM", "state, id FROM"))
    assert changed.returncode == 0, changed.stderr
    assert "warning" not in changed.stderr
    refused(env, ("types", "change", "customer", "--source", "SELECT 1 AS key"), 78, "has the columns key", "state")
    text = "SELECT id::text AS key, name AS state, id FROM customer"
    refused(env, ("types", "change", "customer", "--source", text), 78, "is text, which is no JSON", "content_type")
    said = text.replace("state, id", "state, 'text/plain' AS content_type, id")
    changed = outbox(env, "types", "change", "customer", "--source", said)
    assert (changed.returncode, "outbox topics apply" in changed.stdout) == (0, False)

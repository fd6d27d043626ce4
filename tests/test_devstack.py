"""The development stack: servers that come up, come back with what they held, and leave nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from confluent_kafka import Consumer, Producer

# confluent_kafka's types leave out the names that this module takes from its neighbours.
from confluent_kafka.admin import (  # type: ignore[attr-defined]
    AdminClient,
    ConfigResource,
    NewTopic,
    ResourceType,
)

from devstack.kafka import Kafka
from devstack.postgres import Postgres
from devstack.processes import (
    Child,
    Identity,
    ServerError,
    boot_id,
    children,
    free_port,
    port_is_free,
    wait_until,
)

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def scalar(server: Postgres, query: str, dbname: str = "postgres") -> object:
    """The one value that a query gives."""
    with psycopg.connect(server.url(dbname)) as connection:
        row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return row[0]


def execute(server: Postgres, statement: str) -> None:
    """Run one statement and commit."""
    with psycopg.connect(server.url()) as connection:
        connection.execute(statement.encode())


def topics(broker: Kafka) -> set[str]:
    """The topics that the broker names."""
    return set(AdminClient({"bootstrap.servers": broker.bootstrap}).list_topics(timeout=20).topics)


def make_topic(broker: Kafka, name: str) -> None:
    """Create a topic of one partition, and wait for it."""
    admin = AdminClient({"bootstrap.servers": broker.bootstrap})
    admin.create_topics([NewTopic(name, num_partitions=1, replication_factor=1)])[name].result(20)


def family(pid: int) -> list[Identity]:
    """A process and its direct children."""
    own = Identity.of(pid)
    assert own is not None
    return [own, *children(pid)]


def gone(processes: list[Identity], *, seconds: float = 30) -> bool:
    """Whether all of them end within `seconds`."""
    return wait_until(lambda: not any(one.alive() for one in processes), seconds=seconds)


# --- PostgreSQL ---------------------------------------------------------------------------------


@pytest.mark.postgres
def test_postgres_starts_with_its_options_and_answers_a_query(tmp_path: Path) -> None:
    """The version is 18, options override the defaults, clients' programs are at hand, no process stays."""
    with Postgres(tmp_path / "pg", options={"wal_level": "logical", "application_name": "it's"}) as server:
        assert str(scalar(server, "SHOW server_version")).startswith("18.")
        assert scalar(server, "SHOW wal_level") == "logical"
        assert scalar(server, "SHOW fsync") == "on"
        assert scalar(server, "SHOW max_prepared_transactions") == "20"
        shown = subprocess.run(
            [server.bin("psql"), "-XAtc", "SELECT 1 + 1", server.url()],
            capture_output=True,
            text=True,
            check=True,
        )
        assert shown.stdout == "2\n"
        processes = family(server.pid)
    assert gone(processes)
    assert not server.running
    with pytest.raises(ServerError, match="does not run"):
        _ = server.pid


@pytest.mark.postgres
def test_postgres_restart_keeps_data_and_port(tmp_path: Path) -> None:
    """A restart is another process on the same data and port, with the options as they are then."""
    with Postgres(tmp_path / "pg") as server:
        execute(server, "CREATE TABLE kept AS SELECT 7 AS n")
        url, pid = server.url(), server.pid
        server.options["max_connections"] = "50"
        server.restart()
        assert server.url() == url
        assert server.pid != pid
        assert scalar(server, "SELECT n FROM kept") == 7
        assert scalar(server, "SHOW max_connections") == "50"


@pytest.mark.postgres
@pytest.mark.parametrize("how", ["immediate", "kill"])
def test_postgres_recovers_what_was_committed_before_a_crash(tmp_path: Path, how: str) -> None:
    """Immediate stop and kill both leave the server to its recovery, which loses nothing durable."""
    with Postgres(tmp_path / "pg") as server:
        execute(server, "CREATE TABLE kept AS SELECT 7 AS n")
        processes = family(server.pid)
        if how == "kill":
            server.kill()
        else:
            server.stop("immediate")
        assert gone(processes, seconds=0)
        server.start()
        assert scalar(server, "SELECT n FROM kept") == 7
        assert "was not properly shut down; automatic recovery" in server.log.read_text()


@pytest.mark.postgres
def test_a_second_object_on_the_same_directory_serves_the_same_data_on_the_same_port(tmp_path: Path) -> None:
    """What a directory holds does not depend on the object that made it."""
    with Postgres(tmp_path / "pg") as first:
        execute(first, "CREATE TABLE kept AS SELECT 7 AS n")
    with Postgres(tmp_path / "pg") as second:
        assert second.port == first.port
        assert scalar(second, "SELECT n FROM kept") == 7


@pytest.mark.postgres
def test_postgres_that_cannot_start_says_why_and_where_its_log_is(tmp_path: Path) -> None:
    """The error carries the server's own words; what was half started is gone."""
    server = Postgres(tmp_path / "pg", options={"wal_level": "nonsense"})
    with pytest.raises(ServerError, match=r"(?s)postgres\.log.*invalid value for parameter \"wal_level\""):
        server.start()
    assert not server.running

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = Postgres(tmp_path / "taken", port=listener.getsockname()[1])
        with pytest.raises(ServerError, match="Address already in use"):
            taken.start()


@pytest.mark.postgres
def test_a_standby_follows_and_can_be_promoted(tmp_path: Path) -> None:
    """A standby has the primary's data, says that it is one, and is none after `promote`."""
    with Postgres(tmp_path / "pg") as primary:
        execute(primary, "CREATE TABLE kept AS SELECT 7 AS n")
        with primary.standby(tmp_path / "standby") as standby:
            assert scalar(standby, "SELECT pg_is_in_recovery()") is True
            execute(primary, "UPDATE kept SET n = 8")
            assert wait_until(lambda: scalar(standby, "SELECT n FROM kept") == 8, seconds=20)
            primary.kill()
            standby.promote()
            assert scalar(standby, "SELECT pg_is_in_recovery()") is False
            execute(standby, "UPDATE kept SET n = 9")
            assert scalar(standby, "SELECT n FROM kept") == 9


# --- Kafka --------------------------------------------------------------------------------------


@pytest.mark.kafka
def test_kafka_keeps_topics_records_and_port_over_a_restart_and_a_kill(tmp_path: Path) -> None:
    """Settings are in force, transactions work, and a topic with its record survives stop and kill."""
    with Kafka(tmp_path / "kafka", properties={"log.cleaner.backoff.ms": "250"}) as broker:
        admin = AdminClient({"bootstrap.servers": broker.bootstrap})
        resource = ConfigResource(ResourceType.BROKER, "1")
        settings = admin.describe_configs([resource])[resource].result(20)
        assert settings["log.cleaner.backoff.ms"].value == "250"
        assert settings["auto.create.topics.enable"].value == "false"

        make_topic(broker, "kept")
        producer = Producer({"bootstrap.servers": broker.bootstrap, "transactional.id": "t"})
        producer.init_transactions(30)
        producer.begin_transaction()
        producer.produce("kept", key=b"k", value=b"v")
        producer.commit_transaction(30)
        # Dropped before the broker goes: it would log its lost connection.
        del producer, admin

        bootstrap, pid = broker.bootstrap, broker.pid
        broker.restart()
        assert broker.bootstrap == bootstrap
        assert broker.pid != pid
        assert "kept" in topics(broker)

        broker.kill()
        broker.start()
        assert "kept" in topics(broker)
        consumer = Consumer(
            {
                "bootstrap.servers": broker.bootstrap,
                "group.id": "g",
                "auto.offset.reset": "earliest",
                "isolation.level": "read_committed",
            }
        )
        with contextlib.closing(consumer):
            consumer.subscribe(["kept"])
            message = consumer.poll(30)
            assert message is not None
            assert (message.error(), message.key(), message.value()) == (None, b"k", b"v")

        listed = broker.tool("org.apache.kafka.tools.TopicCommand", "--bootstrap-server", broker.bootstrap, "--list")
        assert "kept" in listed.split()
        with pytest.raises(ServerError, match="TopicCommand failed"):
            broker.tool("org.apache.kafka.tools.TopicCommand", "--nonsense")
        process = broker.child.identity
    assert not process.alive()


@pytest.mark.kafka
def test_kafka_that_cannot_start_says_why_and_where_its_log_is(tmp_path: Path) -> None:
    """A bad setting is refused with Kafka's own words, and nothing is left running."""
    with Kafka(tmp_path / "kafka"):
        pass
    broker = Kafka(tmp_path / "kafka", properties={"log.cleaner.threads": "-1"})
    with pytest.raises(ServerError, match=r"(?s)ended at its start.*kafka\.log.*log\.cleaner\.threads"):
        broker.start()
    assert not broker.running


# --- processes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "server",
    [
        pytest.param("devstack.postgres.Postgres", marks=pytest.mark.postgres),
        pytest.param("devstack.kafka.Kafka", marks=pytest.mark.kafka),
    ],
)
def test_nothing_is_left_when_the_parent_is_killed(tmp_path: Path, server: str) -> None:
    """The parent gets SIGKILL and can do nothing; the kernel ends its servers."""
    module, _, name = server.rpartition(".")
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys, threading
            from pathlib import Path
            from {module} import {name}

            server = {name}(Path(sys.argv[1]))
            # From a thread that ends: the server's life must hang on the process, not on it.
            starter = threading.Thread(target=server.start)
            starter.start()
            starter.join()
            print(server.pid, flush=True)
            sys.stdin.read()
            """
        )
    )
    with subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "server")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES)},
    ) as parent:
        try:
            assert parent.stdout is not None
            processes = family(int(parent.stdout.readline()))
            assert all(one.alive() for one in processes)
        finally:
            parent.kill()
    assert gone(processes)


def test_a_child_outlives_the_thread_that_started_it_and_is_killed_when_it_does_not_stop(
    tmp_path: Path,
) -> None:
    """The kernel's tie is to a thread: it must be one that stays. A deaf child is killed after the deadline."""
    started: list[Child] = []
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    )

    def start() -> None:
        started.append(Child([sys.executable, "-c", deaf], log=tmp_path / "log"))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    child = started[0]
    assert wait_until(lambda: "up" in (tmp_path / "log").read_text(), seconds=20)
    assert child.exit_code() is None
    assert os.getsid(child.pid) == child.pid
    assert not child.stop(seconds=0.2)
    assert child.exit_code() == -signal.SIGKILL
    assert not child.identity.alive()


def test_a_program_that_cannot_be_run_is_named_in_the_log(tmp_path: Path) -> None:
    """The launcher's failure is one sentence, not a traceback."""
    child = Child([str(tmp_path / "absent")], log=tmp_path / "log")
    assert child.wait(20)
    assert child.exit_code() == 126
    assert (tmp_path / "log").read_text() == f"{tmp_path / 'absent'} cannot be run: No such file or directory\n"


def test_free_ports_differ_and_are_not_those_of_outgoing_connections() -> None:
    """A client's reconnect must not be able to take a stopped server's port."""
    ports = [free_port() for _ in range(50)]
    assert len(set(ports)) == 50
    limits = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if limits.exists() and int(limits.read_text().split()[0]) >= 12000:
        assert max(ports) < int(limits.read_text().split()[0])
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert not port_is_free(listener.getsockname()[1])


# --- up and down --------------------------------------------------------------------------------


def devstack(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m devstack` on a directory."""
    return subprocess.run(
        [sys.executable, "-m", "devstack", "--directory", str(directory), *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES)},
        timeout=120,
        check=False,
    )


@pytest.fixture
def run_directory(tmp_path: Path) -> Iterator[Path]:
    """A directory for `up`, down again after the test."""
    directory = tmp_path / "run"
    yield directory
    devstack(directory, "down")


@pytest.mark.postgres
@pytest.mark.kafka
def test_up_survives_the_command_and_down_stops_exactly_that(run_directory: Path) -> None:
    """Twice up is once up; a dead server alone is started again; kept data is there at the next up."""
    first = devstack(run_directory, "up")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("Started: postgres, kafka.")
    exports = dict(re.findall(r"^export (\w+)=(\S+)$", first.stdout, re.MULTILINE))
    assert set(exports) == {"OUTBOX_DATABASE_URL", "OUTBOX_KAFKA_BOOTSTRAP_SERVERS"}
    with psycopg.connect(exports["OUTBOX_DATABASE_URL"]) as connection:
        connection.execute("CREATE TABLE kept ()")
    assert AdminClient({"bootstrap.servers": exports["OUTBOX_KAFKA_BOOTSTRAP_SERVERS"]}).list_topics(timeout=20)

    again = devstack(run_directory, "up")
    assert again.stdout.startswith("Already up.")
    assert again.stdout.partition("\n")[2] == first.stdout.partition("\n")[2]

    status = json.loads(devstack(run_directory, "status", "--json").stdout)
    before = {name: Identity(one["pid"], one["started"]) for name, one in status.items()}
    assert status["postgres"]["url"] == exports["OUTBOX_DATABASE_URL"]
    before["kafka"].stop(signal.SIGKILL)
    assert devstack(run_directory, "status").returncode == 3
    assert devstack(run_directory, "up").stdout.startswith("Started: kafka.")
    status = json.loads(devstack(run_directory, "status", "--json").stdout)
    after = {name: Identity(one["pid"], one["started"]) for name, one in status.items()}
    assert after["postgres"] == before["postgres"]
    assert status["kafka"]["url"] == exports["OUTBOX_KAFKA_BOOTSTRAP_SERVERS"]

    assert devstack(run_directory, "down", "--keep").stdout == "Stopped: kafka, postgres.\n"
    assert not any(one.alive() for one in after.values())
    assert devstack(run_directory, "up").returncode == 0
    with psycopg.connect(exports["OUTBOX_DATABASE_URL"]) as connection:
        assert connection.execute("SELECT count(*) FROM kept").fetchone() == (0,)
    devstack(run_directory, "down")
    assert [entry.name for entry in run_directory.iterdir()] == ["lock"]
    assert devstack(run_directory, "down").stdout == "Nothing was running.\n"


@pytest.mark.parametrize("stale", ["another process of that id", "an earlier boot"])
def test_down_leaves_a_process_alone_that_it_did_not_start(tmp_path: Path, run_directory: Path, stale: str) -> None:
    """Process ids are used again: a recorded one counts only with its start time, and within one boot."""
    bystander = Child([sys.executable, "-c", "import time; time.sleep(600)"], log=tmp_path / "log")
    try:
        service = {
            "pid": bystander.pid,
            "started": "1" if stale.startswith("another") else bystander.identity.started,
            "port": 1,
            "url": "",
            "log": "",
            "directory": "",
        }
        boot = boot_id() if stale.startswith("another") else "earlier"
        run_directory.mkdir()
        (run_directory / "state.json").write_text(json.dumps({"boot": boot, "services": {"postgres": service}}))
        assert devstack(run_directory, "down").stdout == "Nothing was running.\n"
        assert bystander.identity.alive()
    finally:
        bystander.stop()


def test_a_damaged_state_file_is_an_error_and_not_a_guess(tmp_path: Path) -> None:
    """Without knowing the processes, `down` must not remove data under them."""
    (tmp_path / "postgres").mkdir()
    (tmp_path / "state.json").write_text("{")
    result = devstack(tmp_path, "down")
    assert result.returncode == 1
    assert "state.json cannot be read" in result.stderr
    assert (tmp_path / "postgres").is_dir()


# --- make ---------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what `make setup` needs, with nothing installed."""
    copy = tmp_path / "checkout"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(EXAMPLES / "devstack", copy / "examples" / "devstack", ignore=ignored)
    for name in ("Makefile", "pyproject.toml", "requirements-dev.lock"):
        shutil.copy(ROOT / name, copy / name)
    return copy


def make_setup(
    checkout: Path, path: Path, programs: dict[str, str], python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    """Run `make setup` with nothing on the PATH but these programs: name to shell script."""
    path.mkdir()
    for name, script in programs.items():
        (path / name).write_text(f"#!/bin/sh\n{script}\n")
        (path / name).chmod(0o755)
    make = shutil.which("make")
    assert make is not None
    return subprocess.run(
        [make, "setup", f"PYTHON={python}"],
        cwd=checkout,
        env={"PATH": str(path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def run_make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make in this checkout, without the flags of a `make test` around it."""
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


JAVA_17 = """echo 'openjdk version "17.0.15" 2025-04-15' >&2"""
JAVA_8 = """echo 'java version "1.8.0_402"' >&2"""


@pytest.mark.parametrize(
    ("programs", "said"),
    [
        (
            {},
            "Java 17 or newer is needed and no `java` is on the PATH: install it (Debian, Ubuntu: apt install",
        ),
        (
            {"java": JAVA_8},
            "Java 17 or newer is needed and {path}/java is Java 8: install a newer one (Debian",
        ),
        (
            {"java": "exit 1"},
            "`{path}/java -version` does not work: install Java 17 or newer, or set JAVA_HOME",
        ),
        (
            {"java": JAVA_17},
            "Maven is needed to get Kafka and there is no `mvn` on the PATH: install it (Debian",
        ),
    ],
    ids=["no java", "old java", "broken java", "no maven"],
)
def test_setup_says_in_one_sentence_what_is_missing(
    tmp_path: Path, checkout: Path, programs: dict[str, str], said: str
) -> None:
    """Before anything is installed, with how to get it, and make fails."""
    result = make_setup(checkout, tmp_path / "bin", programs)
    assert result.returncode != 0
    sentence, *rest = result.stderr.splitlines()
    assert sentence.startswith(said.format(path=tmp_path / "bin"))
    assert sentence.endswith(".")
    assert all(line.startswith("make: ***") for line in rest)
    assert not (checkout / ".venv").exists()


def test_setup_refuses_an_old_python_in_one_sentence(tmp_path: Path, checkout: Path) -> None:
    """The Makefile asks the interpreter itself, so that even one too old to read our code gets the sentence."""
    old = tmp_path / "python2"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = make_setup(checkout, tmp_path / "bin", {}, python=str(old))
    assert result.returncode != 0
    assert result.stderr.startswith(f"Python 3.11 or newer is needed and `{old}` is none: install it, or run make")


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="asks the checkout's own .venv, which is not in use")
def test_a_second_setup_does_nothing() -> None:
    """Each step has a stamp: with all of them in place, nothing is run and nothing said."""
    run_make("setup", f"PYTHON={sys.executable}")
    second = run_make("setup", f"PYTHON={sys.executable}")
    assert (second.returncode, second.stdout, second.stderr) == (0, "", "")


def test_help_lists_every_target() -> None:
    """`make` alone tells what there is."""
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    shown = run_make().stdout
    assert sorted(line.split()[1] for line in shown.splitlines()) == sorted(phony[1].split())


def test_the_lock_pins_every_requirement_with_hashes_and_names_no_registry() -> None:
    """What pyproject.toml asks for is in the lock; a requirement without a hash would be refused by pip."""
    lock = (ROOT / "requirements-dev.lock").read_text()
    assert "://" not in lock
    assert "--find-links" not in lock
    requirements = re.findall(r"^([a-z0-9-]+)==.*?(?=^\S|\Z)", lock, re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"^[a-z0-9-]+==.*?(?=^\S|\Z)", lock, re.MULTILINE | re.DOTALL)
    assert all("--hash=sha256:" in block for block in blocks)

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *project["project"]["optional-dependencies"]["relay"],
        *project["dependency-groups"]["dev"],
    ]
    names = {re.split(r"[^A-Za-z0-9._-]", one)[0].lower().replace("_", "-") for one in wanted}
    assert names <= set(requirements)

"""What is installed, and that the container files say what is there. No engine runs here: images are not built."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path

import click
import psycopg
import pytest

from consume import live
from devstack.kafka import Kafka
from outbox_cli.main import cli
from relays import OUTBOX, RelayProcess, environment, eventually

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text("utf-8")
COMPOSE = (ROOT / "docker-compose.yml").read_text("utf-8")
IGNORED = (ROOT / ".dockerignore").read_text("utf-8").split()


def run(*command: object, cwd: Path, **env: str) -> str:
    """Run a program without this project's checkout on its path; its output."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("OUTBOX_", "PYTHONPATH"))}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=kept | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copied() -> list[str]:
    """What the Dockerfile's first stage copies out of the checkout."""
    return [
        word for line in re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()
    ]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from nothing but what the Dockerfile copies."""
    source = tmp_path_factory.mktemp("source")
    leave = shutil.ignore_patterns("__pycache__")
    for name in copied():
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=leave)
        else:
            shutil.copy(ROOT / name, source / name)
    run(Path(sys.executable).with_name("hatchling"), "build", "-t", "wheel", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel installed into it, without its dependencies."""
    target = tmp_path_factory.mktemp("installed")
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--target",
        target,
        wheel,
        cwd=target,
    )
    return target


def metadata(wheel: Path) -> Message:
    """The wheel's own words about itself."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode())


def test_nothing_but_our_two_packages_comes_into_site_packages(wheel: Path) -> None:
    """A top-level `cli` or `migrations` would collide with other projects' modules."""
    with zipfile.ZipFile(wheel) as archive:
        tops = {name.split("/")[0] for name in archive.namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"outbox", "outbox_cli"}


def test_what_is_no_module_is_in_the_wheel_too(wheel: Path) -> None:
    """The marker of types, the queries, the schema, the migrations, the licence."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    sql = {path.relative_to(ROOT).as_posix() for path in (ROOT / "outbox").rglob("*.sql")}
    migrations = {
        f"outbox/_migrations/{path.relative_to(ROOT / 'migrations').as_posix()}"
        for path in (ROOT / "migrations").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sql
    assert migrations
    assert {"outbox/py.typed"} | sql | migrations <= names
    assert any(name.endswith("/licenses/LICENSE") for name in names)


def test_the_source_distribution_holds_what_the_wheel_is_built_from(tmp_path: Path) -> None:
    """And the docs and the tests."""
    run(Path(sys.executable).with_name("hatchling"), "build", "-t", "sdist", "-d", tmp_path, cwd=ROOT)
    (built,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(built) as archive:
        names = {name.partition("/")[2].split("/")[0] for name in archive.getnames()}
    assert {*copied(), "tests", "docs", "examples", "CHANGELOG.md"} <= names


def test_kafka_is_needed_by_the_relay_only(wheel: Path) -> None:
    """The owning service's side stays small."""
    needed = metadata(wheel).get_all("Requires-Dist") or []
    base = [requirement for requirement in needed if "extra ==" not in requirement]
    assert not [requirement for requirement in base if "kafka" in requirement]
    assert [requirement for requirement in needed if "kafka" in requirement and "extra == 'relay'" in requirement]
    assert [requirement for requirement in needed if "kafka" in requirement and "extra == 'read-model'" in requirement]
    assert set(metadata(wheel).get_all("Provides-Extra") or []) >= {"relay", "read-model", "all"}


def test_the_distribution_has_a_name_of_its_own_and_the_version_of_the_code(wheel: Path) -> None:
    """`outbox` is the import name; another project has it as its distribution's."""
    from outbox import __version__

    assert metadata(wheel)["Name"] == "outbox-publisher"
    assert metadata(wheel)["Version"] == __version__


def test_the_installed_package_works_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    """The command line answers, and finds its migrations and its SQL inside the package."""
    code = (
        "import outbox, outbox_cli; from outbox.revision import migrations_directory;"
        "from outbox.schema import Settings, statements_up; assert statements_up(1, Settings(name='n'));"
        "print(outbox.__file__, outbox_cli.__file__, migrations_directory(), sep='\\n')"
    )
    places = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert places == [
        str(installed / "outbox" / "__init__.py"),
        str(installed / "outbox_cli" / "__init__.py"),
        str(installed / "outbox" / "_migrations"),
    ]
    help_text = run(sys.executable, installed / "bin" / "outbox", "--help", cwd=tmp_path, PYTHONPATH=str(installed))
    assert "relay" in help_text


def test_a_base_install_answers_every_help_without_kafka(installed: Path, tmp_path: Path) -> None:
    """Kafka's client is kept from being imported, as if it were not installed."""
    code = (
        "import sys; sys.modules['confluent_kafka'] = None\n"
        "from outbox_cli.main import cli\n"
        "cli(sys.argv[1:], prog_name='outbox')"
    )
    for name in cli.list_commands(click.Context(cli)):
        run(sys.executable, "-c", code, name, "--help", cwd=tmp_path, PYTHONPATH=str(installed))


# -- container files ---------------------------------------------------------------------------------------------------


def services() -> Iterator[tuple[str, str]]:
    """The services of the compose file: name and text."""
    body = COMPOSE.partition("\nservices:\n")[2]
    yield from re.findall(r"^  (\w+):\n((?:(?:    .*)?\n)*)", body + "\n", re.MULTILINE)


def listed(text: str, key: str) -> list[str]:
    """A list in flow style, which is JSON as well; empty when the key is not there."""
    found = re.search(rf"^ *{key}: (\[.*\])$", text, re.MULTILINE)
    words: list[str] = json.loads(found[1]) if found else []
    return words


def check_command(words: list[str]) -> None:
    """Parse a command line of ours down to its options without running it; click raises what is wrong with it."""
    command: click.Command = cli
    context: click.Context | None = None
    while isinstance(command, click.Group):
        with command.make_context("outbox", words, parent=context) as context:
            words = [*context._protected_args, *context.args]
            _, found, words = command.resolve_command(context, words)
            assert found is not None
            command = found
    command.make_context("outbox", words, parent=context)


def test_what_the_dockerfile_copies_exists_and_is_not_ignored() -> None:
    """A build would end at the first missing one."""
    assert copied()
    for name in copied():
        assert (ROOT / name).exists(), name
        assert name not in IGNORED


def test_the_image_runs_as_a_user_without_rights_and_stops_the_relay_in_order() -> None:
    """The last USER is not root; SIGTERM goes to the relay itself, not to a shell."""
    final = DOCKERFILE.rpartition("\nFROM ")[2]
    users = re.findall(r"^USER (\S+)$", final, re.MULTILINE)
    assert users
    assert users[-1] not in {"root", "0"}
    assert listed(final.replace("ENTRYPOINT ", "ENTRYPOINT: "), "ENTRYPOINT") == ["outbox"]
    assert "STOPSIGNAL SIGTERM" in final
    check_command(listed(final.replace("CMD ", "CMD: "), "CMD"))


def test_the_services_of_the_compose_file_are_commands_of_ours() -> None:
    """A mistyped flag would show only when the stack starts."""
    ours = [(name, text) for name, text in services() if "<<: *outbox" in text]
    assert {"migrate", "topics", "relay"} <= {name for name, _ in ours}
    for _, text in ours:
        if listed(text, "entrypoint"):
            (script,) = listed(text, "command")
            found = re.findall(r"outbox ([^|]+)", script)
            assert found
            for words in found:
                check_command(words.split())
        else:
            check_command(listed(text, "command"))


def test_a_service_waits_for_what_it_needs() -> None:
    """Only for services that exist, and for health only where it is checked."""
    known = dict(services())
    assert known.keys() >= {"postgres", "kafka", "migrate", "topics", "relay"}
    for name, text in known.items():
        for needed, condition in re.findall(r"^      (\w+): \{ condition: (\w+) \}$", text, re.MULTILINE):
            assert needed in known, f"{name} needs {needed}"
            assert ("healthcheck:" in known[needed]) == (condition == "service_healthy"), f"{name} needs {needed}"
        if "<<: *outbox" in text:
            assert "depends_on:" in text, name


def test_the_environment_of_the_compose_file_is_settings_of_ours() -> None:
    """A mistyped variable is ignored by the relay, since other programs may use the prefix."""
    from outbox.config import SETTINGS

    used = set(re.findall(r"\b(OUTBOX_[A-Z_]+)\b", COMPOSE + DOCKERFILE))
    assert used
    assert used <= {setting.variable for setting in SETTINGS}


def test_the_stack_of_the_compose_file_is_the_one_that_the_tests_run() -> None:
    """The same Kafka as in the development stack, and the same major version of PostgreSQL."""
    kafka = re.search(r"<kafka\.version>([\d.]+)<", (ROOT / "examples/devstack/pom.xml").read_text("utf-8"))
    assert kafka
    assert f"image: apache/kafka:{kafka[1]}\n" in COMPOSE
    assert "image: postgres:18\n" in COMPOSE


@pytest.mark.postgres
@pytest.mark.kafka
@pytest.mark.acceptance
def test_the_jobs_of_the_compose_file_make_an_outbox_that_publishes(
    database_url: str, kafka: Kafka, outbox_name: str, tmp_path: Path
) -> None:
    """Its commands, run here in its order on the real servers, twice, as `docker compose up` does; then its health."""
    env = environment(database_url, kafka.bootstrap)
    env["PATH"] = f"{OUTBOX.parent}:{env['PATH']}"
    # The broker is shared by the tests: another name than the README's.
    jobs = {name: text.replace("shop", outbox_name) for name, text in services()}

    def job(name: str, key: str = "command") -> subprocess.CompletedProcess[str]:
        words = listed(jobs[name], "test")[1:] if key == "test" else listed(jobs[name], "command")
        start = ["sh", "-c"] if key == "test" else listed(jobs[name], "entrypoint") or ["outbox"]
        return subprocess.run([*start, *words], env=env, cwd=tmp_path, capture_output=True, text=True, check=False)

    for _ in range(2):
        for name in ("migrate", "types", "topics"):
            done = job(name)
            assert done.returncode == 0, f"{name}: {done.stdout}{done.stderr}"
    assert job("relay", "test").returncode != 0
    assert listed(jobs["relay"], "command") == ["relay"]
    with RelayProcess(env, tmp_path / "relay.log") as relay:
        relay.wait_event("relay.holds")
        (put,) = re.findall(r"^#   (SELECT outbox.put.*;)$", COMPOSE, re.MULTILINE)
        with psycopg.connect(database_url) as connection:
            connection.execute(put.encode())
        eventually(lambda: live(kafka, f"{outbox_name}.customer").json == {"7": {"name": "Ada"}}, what="the record")
        eventually(lambda: job("relay", "test").returncode == 0, what="health")
        assert relay.stop() == 0
    assert job("relay", "test").returncode != 0

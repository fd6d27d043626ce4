"""The real servers, started once a run, and a fresh database or topic name for each test."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import psycopg
import pytest
from psycopg import sql

from devstack.kafka import Kafka
from devstack.postgres import Postgres
from outbox import schema as outbox_schema

_numbers = itertools.count(1)

_LONGEST = "test_faults.py"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In several processes a file is one's: that which takes as long as half of all must not be begun last."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.path.name != _LONGEST)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    """A running PostgreSQL server, shared by the whole run."""
    # What the tests claim about durability is shown by tests with a server of their own; here fsync only costs time.
    with Postgres(tmp_path_factory.mktemp("postgres"), options={"fsync": "off"}) as server:
        yield server


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kafka]:
    """A running Kafka broker, shared by the whole run."""
    with Kafka(tmp_path_factory.mktemp("kafka")) as broker:
        yield broker


@pytest.fixture
def make_database(postgres: Postgres) -> Iterator[Callable[..., str]]:
    """Make a database, empty or from a template; it is dropped after the test."""
    made: list[str] = []

    def make(template: str = "template1") -> str:
        name = f"t{next(_numbers)}"
        with psycopg.connect(postgres.url(), autocommit=True) as admin:
            admin.execute(
                sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template))
            )
        made.append(name)
        return postgres.url(name)

    yield make
    if not postgres.running:
        return
    with psycopg.connect(postgres.url(), autocommit=True) as admin:
        for name in made:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


@pytest.fixture
def database_url(make_database: Callable[..., str]) -> str:
    """The URL of an empty database."""
    return make_database()


@pytest.fixture(scope="session")
def outbox_template(postgres: Postgres) -> str:
    """The name of a database that holds a fresh outbox of the name `test`."""
    with psycopg.connect(postgres.url(), autocommit=True) as admin:
        admin.execute("CREATE DATABASE outbox_template")
    with psycopg.connect(postgres.url("outbox_template")) as connection:
        outbox_schema.install(connection, outbox_schema.Settings(name="test"))
    return "outbox_template"


@pytest.fixture
def outbox_database(make_database: Callable[..., str], outbox_template: str) -> str:
    """The URL of a database with an outbox of one shard, named `test`, without entity types."""
    return make_database(outbox_template)


@pytest.fixture
def outbox_name() -> str:
    """A name that no other test of this run uses, for everything in Kafka."""
    return f"n{next(_numbers)}"


@pytest.fixture
def make_outbox(make_database: Callable[..., str], outbox_name: str) -> Callable[..., str]:
    """Make a database with an outbox of the test's own name; settings as in `schema.Settings`."""

    def make(**settings: object) -> str:
        url = make_database()
        with psycopg.connect(url) as connection:
            outbox_schema.install(connection, outbox_schema.Settings(**{"name": outbox_name, **settings}))  # type: ignore[arg-type]  # a test names what it sets
        return url

    return make

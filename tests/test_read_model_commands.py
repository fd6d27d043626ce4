"""The commands of the consuming service, as a user runs them; and its revision."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import create_engine, inspect

import outbox.read_model.operations  # noqa: F401  registers the operations
from devstack.kafka import Kafka
from devstack.processes import Child
from outbox.read_model import Copy, Follow, PostgresStore, ReadModel, SqliteStore
from relays import OUTBOX, environment, eventually, must
from relays import outbox as run
from test_read_model import COPY, Topic, a_model, copied

pytestmark = [pytest.mark.kafka]

APP = """
from sqlalchemy import MetaData
from outbox.read_model import Copy, Follow, ReadModel, SqliteStore, copy_table

copies = copy_table(MetaData(), "customer_copy")
follow = Follow({topic!r}, Copy(copies), type="customer")
model = ReadModel({name!r}, SqliteStore({path!r}), [follow], bootstrap={kafka!r}, check_seconds=0.1)
model.store.create(model.declared)
nothing = 5
"""


@pytest.fixture
def topic(kafka: Kafka, outbox_name: str) -> Topic:
    return Topic(kafka, f"{outbox_name}.customer")


@pytest.fixture
def env(topic: Topic, tmp_path: Path) -> dict[str, str]:
    """The environment of the consuming service, whose module is `copies`."""
    path = str(tmp_path / "model.db")
    text = APP.format(name=topic.name, path=path, topic=topic.name, kafka=topic.kafka.bootstrap)
    (tmp_path / "copies.py").write_text(text)
    return environment("postgresql://nowhere", topic.kafka.bootstrap) | {"PYTHONPATH": str(tmp_path)}


def said(env: dict[str, str], *arguments: str) -> Any:
    return orjson.loads(must(env, "read-model", *arguments, "--app", "copies:model", "--json"))


def test_it_is_run_looked_at_rebuilt_and_compared(env: dict[str, str], topic: Topic, tmp_path: Path) -> None:
    """From a topic to a copy, and back to equal."""
    topic.write({f"k{n}": {"n": n} for n in range(100)} | {"bad": b"rubbish"})
    must(env, "read-model", "run", "--app", "copies:model", "--until-ready")
    status = said(env, "status")
    assert status["loaded_at"] is not None
    assert 0 <= status["staleness_seconds"] < 60
    assert (status["parked"], sum(status["offsets"].values()) >= 101) == (1, True)
    assert "whole" in must(env, "read-model", "status", "--app", "copies:model")
    (parked,) = said(env, "parked")
    assert (parked["key"], "cannot be decoded" in parked["reason"]) == ("bad", True)
    retried = run(env, "read-model", "parked", "--retry", "--app", "copies:model")
    assert (retried.returncode, retried.stdout) == (
        1,
        "applied: 0, still parked: 1\nSee which and why: outbox read-model parked --app copies:model\n",
    )
    topic.write({"bad": {"n": "good"}})
    running = Child([str(OUTBOX), "read-model", "run", "--app", "copies:model"], log=tmp_path / "log", env=env)
    try:
        eventually(lambda: said(env, "status")["parked"] == 0)
        compared = orjson.loads(must(env, "reconcile", "customer", "--read-model", "copies:model", "--json"))
        assert (compared["equal"], compared["examples"]) == (101, {})
    finally:
        running.stop()
    assert running.exit_code() == 0, (tmp_path / "log").read_text()
    assert said(env, "rebuild") == {"model": topic.name, "swapped": True}
    assert run(env, "read-model", "parked", "--app", "copies:model").stdout == "Nothing is parked.\n"


def test_what_is_no_read_model_is_refused(env: dict[str, str]) -> None:
    """By name, with an example."""
    for app, why in {
        "copies:nothing": "is a int, no outbox.read_model.ReadModel",
        "copies": "is no MODULE:ATTRIBUTE",
    }.items():
        refused = run(env, "read-model", "status", "--app", app)
        assert (refused.returncode, why in refused.stderr) == (78, True), refused.stderr


@pytest.mark.postgres
@pytest.mark.parametrize("where", ["sqlite", "postgres"])
def test_the_revision_makes_what_the_store_needs_and_takes_it_away(
    make_database: Callable[..., str], tmp_path: Path, where: str
) -> None:
    """By the operations alone, in either database."""
    file = tmp_path / "model.db"
    url = make_database() if where == "postgres" else ""
    engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://", 1) or f"sqlite:///{file}")
    store = PostgresStore(url) if where == "postgres" else SqliteStore(file)
    model = ReadModel("m", store, [Follow("t", Copy(COPY))], bootstrap="nowhere:1")
    with engine.begin() as connection:
        operations: Any = Operations(MigrationContext.configure(connection))
        operations.outbox_read_model_create()
        operations.outbox_read_model_copy("customer_copy")
    assert model.status().loaded_at is None
    store.close()
    with engine.begin() as connection:
        operations = Operations(MigrationContext.configure(connection))
        operations.outbox_read_model_drop_copy("customer_copy")
        operations.outbox_read_model_drop()
    assert inspect(engine).get_table_names() == []
    engine.dispose()


def test_asyncio_waits_without_holding_the_loop_up(topic: Topic, tmp_path: Path) -> None:
    """Ready, and one's own write, while something else goes on."""
    store = SqliteStore(tmp_path / "model.db")
    model = a_model(store, topic)
    topic.write({"a": {"n": 1}})
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.001)
            ticks += 1

    async def main() -> None:
        ticking = asyncio.create_task(tick())
        async with model.running_async() as copies:
            await copies.wait_ready(60)
            before = ticks
            writing = asyncio.to_thread(topic.write, {"a": {"n": 2}})
            await writing
            await copies.wait_for("customer", "a", topic.id, 30)
            assert ticks > before
            assert copied(store) == {"a": {"n": 2}}
            assert copies.loaded
        ticking.cancel()

    asyncio.run(main())
